"""What a request wants to do, as authorization sees it."""

from __future__ import annotations

from aiohttp import web

from proxy.access.authorization import AccessRequest
from proxy.access.visibility import Probe
from proxy.config.access import Action
from proxy.web.routes import Endpoint, Route
from storage.oci import Digest


def access_request(request: web.BaseRequest, route: Route, name: str) -> AccessRequest:
    named = bool(route.prefix) or "ns" in request.query
    content, probe = probe_of(route, name.partition("/")[2])
    return AccessRequest(action_of(route, request.method), name, route.name, named, content, probe)


def action_of(route: Route, method: str) -> Action:
    if route.kind in (Endpoint.UPLOADS, Endpoint.UPLOAD):
        return "push"
    return "pull" if method in ("GET", "HEAD") else "delete" if method == "DELETE" else "push"


def probe_of(route: Route, repository: str) -> tuple[str, Probe]:
    """The name of the requested content, and how to ask an upstream whether the caller may have it."""
    reference = route.reference
    if reference is None:
        return "tags", lambda registry: registry.tags(repository)
    if route.kind is Endpoint.BLOB and isinstance(reference, Digest):
        return f"blob {reference}", lambda registry: registry.resolve_blob(repository, reference)
    return f"manifest {reference}", lambda registry: registry.resolve_manifest(repository, reference)

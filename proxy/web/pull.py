"""Answers to GET and HEAD: blobs, manifests, and what is listed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from aiohttp import web

from proxy.access.authorization import Authorizer
from proxy.telemetry.exchange import Exchange
from proxy.web.ranges import parse_ranges, satisfy
from proxy.web.responses import ALL, JSON, RequestRefused, cache_headers, content, empty, freshness, immutable
from proxy.web.routes import Route, build_next, parse_limit
from proxy.web.send import send_blob
from storage.errors import RangeInvalid
from storage.oci import OCI_INDEX, OCTETS, Descriptor, Digest
from storage.registry import Registry

MOST_LISTED = 1 << 31  # entries in a page
LARGEST_LISTING = 4_000_000  # bytes of referrers in a page: clients take no larger index


class Pull:
    """Handlers of the endpoints that read; each may raise RegistryError and Refused.

    A client that takes nothing of a blob for `client_timeout` seconds is cut off.  Without an `authorizer`,
    every repository is listed.
    """

    def __init__(self, registry: Registry, authorizer: Authorizer | None, client_timeout: float) -> None:
        self._registry = registry
        self._authorizer = authorizer
        self._client_timeout = client_timeout

    async def blob(
        self, request: web.BaseRequest, route: Route, name: str, now: Exchange
    ) -> web.StreamResponse:
        digest = route.reference
        assert isinstance(digest, Digest)
        now.digest = digest
        headers = {
            **ALL,
            "X-Request-Id": now.id,
            "Content-Type": OCTETS,
            "Docker-Content-Digest": digest,
            "ETag": f'"{digest}"',
            "Accept-Ranges": "bytes",
            "Cache-Control": immutable(now),
        }
        if request.method == "HEAD" or _matches(request, digest):
            now.content = await self._registry.resolve_blob(name, digest)
            size = now.content.size
            headers.update(cache_headers(now))
            if _matches(request, digest):
                return empty(304, headers)
            if size >= 0:
                headers["Content-Length"] = str(size)
            return empty(200, headers)
        if_range = request.headers.get("If-Range", f'"{digest}"')
        ranges = parse_ranges(request.headers.get("Range") if if_range == f'"{digest}"' else None)
        span = ranges[0].span if len(ranges) == 1 else None
        blob = await self._registry.get_blob(name, digest, span)
        try:
            now.content = blob.descriptor
            size = blob.descriptor.size
            # Without a size no range can be told; RFC 9110 §14.2 lets a server send all.
            try:
                spans = satisfy(ranges, size) if size >= 0 else []
            except RangeInvalid as error:
                raise RequestRefused(error, {"Content-Range": f"bytes */{size}"}) from None
            headers.update(cache_headers(now))
            return await send_blob(request, blob, spans, headers, now, self._client_timeout)
        finally:
            await blob.close()

    async def manifest(
        self, request: web.BaseRequest, route: Route, name: str, now: Exchange
    ) -> web.StreamResponse:
        reference = route.reference
        assert reference is not None
        content = b""
        if request.method == "HEAD":
            descriptor = await self._registry.resolve_manifest(name, reference)
        else:
            manifest = await self._registry.get_manifest(name, reference)
            descriptor, content = manifest.descriptor, manifest.content
        now.digest, now.content = descriptor.digest, descriptor
        headers = {
            **ALL,
            "Content-Type": descriptor.media_type,
            "Docker-Content-Digest": descriptor.digest,
            "ETag": f'"{descriptor.digest}"',
            "Cache-Control": immutable(now) if isinstance(reference, Digest) else freshness(now),
            **cache_headers(now),
        }
        if _matches(request, descriptor.digest):
            return empty(304, headers)
        if request.method == "HEAD":
            headers["Content-Length"] = str(descriptor.size)
            return empty(200, headers)
        now.bytes = len(content)
        return web.Response(body=content, headers=headers)

    async def tags(
        self, request: web.BaseRequest, route: Route, name: str, now: Exchange
    ) -> web.StreamResponse:
        last, limit = _page(request)
        tags = await self._registry.tags(name, last, None if limit is None else limit + 1)
        return self._listed(request, route, "tags", tags, limit, now)

    async def catalog(
        self, request: web.BaseRequest, route: Route, name: str, now: Exchange
    ) -> web.StreamResponse:
        last, limit = _page(request)
        wanted = None if limit is None else limit + 1
        if self._authorizer is None:
            names = await self._registry.repositories(last, wanted)
        else:
            names = await self._authorizer.repositories(request, self._registry, last, wanted, now)
        return self._listed(request, route, "repositories", names, limit, now)

    def _listed(
        self,
        request: web.BaseRequest,
        route: Route,
        key: str,
        values: Sequence[str],
        limit: int | None,
        now: Exchange,
    ) -> web.Response:
        headers = {"Content-Type": JSON, "Cache-Control": freshness(now, 0), **cache_headers(now)}
        if limit is not None and len(values) > limit:
            values = values[:limit]
            if values:
                query: dict[str, str | int] = {**request.query, "n": limit, "last": values[-1]}
                headers["Link"] = build_next(route, query)
        # The name as the client wrote it: it knows of no namespaces.
        members: dict[str, object] = {"name": route.name} if route.name else {}
        now.bytes = len(body := msgspec.json.encode({**members, key: values}))
        return content(body, headers)

    async def referrers(
        self, request: web.BaseRequest, route: Route, name: str, now: Exchange
    ) -> web.StreamResponse:
        assert isinstance(route.reference, Digest)
        artifact_type = request.query.get("artifactType") or None
        last, limit = _page(request)
        found = await self._registry.referrers(name, route.reference, artifact_type)
        shown, more = _referrers_page(found, last, limit)
        # oras and go-containerregistry want exactly this type; else they take the answer for none.
        headers = {"Content-Type": OCI_INDEX, "Cache-Control": freshness(now, 0), **cache_headers(now)}
        if artifact_type:
            headers["OCI-Filters-Applied"] = "artifactType"
        if more:
            query: dict[str, str | int] = {**request.query, "last": shown[-1]["digest"]}
            headers["Link"] = build_next(route, query)
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": shown}
        now.bytes = len(body := msgspec.json.encode(index))
        return content(body, headers)


def _matches(request: web.BaseRequest, digest: Digest) -> bool:
    """RFC 9110 §13.1.2: If-None-Match, by weak comparison; a digest that lacks its quotes will do."""
    ours = ("*", f'"{digest}"', digest)
    return any(
        each.strip().removeprefix("W/") in ours
        for line in request.headers.getall("If-None-Match", ())
        for each in line.split(",")
    )


def _referrers_page(
    found: Sequence[Descriptor], last: str, limit: int | None
) -> tuple[list[dict[str, Any]], bool]:
    """Those after the digest `last`, and whether there are more; no more than a client takes at once.

    Of `limit` 0 it is one all the same: a page must lead to the next.
    """
    shown: list[dict[str, Any]] = []
    size = 0
    for each in sorted(found, key=lambda each: each.digest):
        if each.digest <= last:
            continue
        row = each.to_json()
        size += len(msgspec.json.encode(row)) + 1
        if shown and (size > LARGEST_LISTING or (limit is not None and len(shown) >= limit)):
            return shown, True
        shown.append(row)
    return shown, False


def _page(request: web.BaseRequest) -> tuple[str, int | None]:
    """`last` and `n` of the query.  Raises PaginationNumberInvalid."""
    limit = parse_limit(request.query.get("n"))
    return request.query.get("last", ""), None if limit is None else min(limit, MOST_LISTED)

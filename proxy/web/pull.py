"""The endpoints for GET and HEAD: blobs, manifests and listings."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias

import msgspec
from aiohttp import web

from proxy.access.authorization import Authorizer
from proxy.telemetry.exchange import Exchange
from proxy.web.conditions import parse_conditions
from proxy.web.peers import check_confirmed
from proxy.web.ranges import Range, parse_ranges, satisfy
from proxy.web.redirects import Redirects, carries_login
from proxy.web.responses import (
    COMMON,
    JSON,
    RequestRefused,
    cache_headers,
    content,
    empty,
    freshness,
    immutable,
)
from proxy.web.routes import Route, build_location, build_next, parse_limit
from proxy.web.send import Turns, send_blob
from storage.conditions import Conditions
from storage.errors import RangeInvalid, Unsupported
from storage.oci import OCI_INDEX, OCTETS, Digest, Reference, Span, Tag
from storage.registry import Registry

MOST_LISTED = 1 << 31  # entries in a page
AT_ONCE = 1000  # referrers that are read at a time for a page
LARGEST_LISTING = 4_000_000  # bytes of referrers in a page: clients accept no larger index

# Gives the digest that a tag of a repository, given by its full name, stood for.  Raises ManifestUnknown.
Past: TypeAlias = Callable[[str, Tag, float], Awaitable[Digest]]


class Pull:
    """Handlers of the endpoints that read.  Each may raise RegistryError and RequestRefused.

    `past` gives what a tag stood for at a time, in seconds since the epoch.
    A client that takes nothing of a blob for `client_timeout` seconds is cut off.  Without an `authorizer`,
    the catalog lists every repository.  Without `redirects`, every blob is sent from here.
    """

    def __init__(
        self,
        registry: Registry,
        authorizer: Authorizer | None,
        client_timeout: float,
        redirects: Redirects | None = None,
        past: Past | None = None,
    ) -> None:
        self._registry = registry
        self._authorizer = authorizer
        self._past = past
        self._client_timeout = client_timeout
        self._redirects = redirects
        self._turns = Turns()

    async def blob(
        self, request: web.BaseRequest, route: Route, name: str, exchange: Exchange
    ) -> web.StreamResponse:
        digest = route.reference
        assert isinstance(digest, Digest)
        exchange.digest = digest
        headers = _blob_headers(digest, exchange)
        conditions = parse_conditions(request)
        if request.method == "HEAD" or conditions.failed(digest):
            exchange.content = await self._registry.resolve_blob(name, digest)
            size = exchange.content.size
            headers.update(cache_headers(exchange))
            if _not_modified(conditions, digest):
                return empty(304, headers)
            if size >= 0:
                headers["Content-Length"] = str(size)
            headers.update(_own_location(route, exchange))
            return empty(200, headers)
        ranges = _ranges(request, digest)
        if (url := await self._elsewhere(request, name, digest, ranges, exchange)) is not None:
            return _redirect(headers, url, exchange)
        blob = await self._registry.get_blob(name, digest, ranges[0].span if ranges else None)
        try:
            exchange.content, size = blob.descriptor, blob.descriptor.size
            if size < 0 and ranges:  # clients that take the beginning of a 200 for their range look at it
                headers["Accept-Ranges"] = "none"
            spans = _spans(ranges, size)
            await blob.prepare(spans)
            headers.update(cache_headers(exchange))
            if not spans:
                headers.update(_own_location(route, exchange))
            return await send_blob(request, blob, spans, headers, exchange, self._turns, self._client_timeout)
        finally:
            await blob.close()

    async def _elsewhere(
        self, request: web.BaseRequest, name: str, digest: Digest, ranges: Sequence[Range], exchange: Exchange
    ) -> str | None:
        """Where the client may fetch the blob itself; None if it is sent from here."""
        if self._redirects is None or not self._redirects.allows(request, ranges, exchange):
            return None
        found = await self._registry.locate_blob(name, digest)
        if found is None or carries_login(request, found.url):
            return None
        exchange.content = found.descriptor
        _spans(ranges, found.descriptor.size)  # refuses what the blob has not
        return found.url

    async def manifest(
        self, request: web.BaseRequest, route: Route, name: str, exchange: Exchange
    ) -> web.StreamResponse:
        reference = await self._reference(route, name, exchange)
        content = b""
        if request.method == "HEAD":
            descriptor = await self._registry.resolve_manifest(name, reference)
        else:
            manifest = await self._registry.get_manifest(name, reference)
            descriptor, content = manifest.descriptor, manifest.content
        check_confirmed(request.method, exchange)
        exchange.digest, exchange.content = descriptor.digest, descriptor
        headers = {
            **COMMON,
            "Content-Type": descriptor.media_type,
            "Docker-Content-Digest": descriptor.digest,
            "ETag": f'"{descriptor.digest}"',
            "Cache-Control": immutable(exchange)
            if isinstance(route.reference, Digest)
            else freshness(exchange),
            **cache_headers(exchange),
        }
        if reference != route.reference:  # as long as the day is not over
            headers["Cache-Control"] = "no-cache"
        if _not_modified(parse_conditions(request), descriptor.digest):
            return empty(304, headers)
        if request.method == "HEAD":
            headers["Content-Length"] = str(descriptor.size)
            return empty(200, headers)
        exchange.bytes = len(content)
        return web.Response(body=content, headers=headers)

    async def _reference(self, route: Route, name: str, exchange: Exchange) -> Reference:
        """What is asked for: the digest that a tag stood for, if that is wanted as it was."""
        assert route.reference is not None
        if exchange.as_of is None or not isinstance(route.reference, Tag):
            return route.reference
        if self._past is None:
            raise Unsupported("this server keeps no journal of what tags stood for")
        return await self._past(name, route.reference, exchange.as_of)

    async def tags(
        self, request: web.BaseRequest, route: Route, name: str, exchange: Exchange
    ) -> web.StreamResponse:
        last, limit = _page(request)
        tags = await self._registry.tags(name, last, None if limit is None else limit + 1)
        check_confirmed(request.method, exchange)
        return self._listing(request, route, "tags", tags, limit, exchange)

    async def catalog(
        self, request: web.BaseRequest, route: Route, name: str, exchange: Exchange
    ) -> web.StreamResponse:
        last, limit = _page(request)
        wanted = None if limit is None else limit + 1
        if self._authorizer is None:
            names = await self._registry.repositories(last, wanted)
        else:
            names = await self._authorizer.repositories(request, self._registry, last, wanted, exchange)
        return self._listing(request, route, "repositories", names, limit, exchange)

    def _listing(
        self,
        request: web.BaseRequest,
        route: Route,
        key: str,
        values: Sequence[str],
        limit: int | None,
        exchange: Exchange,
    ) -> web.Response:
        headers = {"Content-Type": JSON, "Cache-Control": freshness(exchange, 0), **cache_headers(exchange)}
        if limit is not None and len(values) > limit:
            values = values[:limit]
            if values:
                query: dict[str, str | int] = {**request.query, "n": limit, "last": values[-1]}
                headers["Link"] = build_next(route, query)
        # The name as the client wrote it, which may omit the namespace.
        members: dict[str, object] = {"name": route.name} if route.name else {}
        exchange.bytes = len(body := msgspec.json.encode({**members, key: values}))
        return content(body, headers)

    async def referrers(
        self, request: web.BaseRequest, route: Route, name: str, exchange: Exchange
    ) -> web.StreamResponse:
        assert isinstance(route.reference, Digest)
        artifact_type = request.query.get("artifactType") or None
        last, limit = _page(request)
        shown, more = await self._referrers(name, route.reference, artifact_type, last, limit)
        check_confirmed(request.method, exchange)
        # oras and go-containerregistry require exactly this type; otherwise they ignore the response.
        headers = {
            "Content-Type": OCI_INDEX,
            "Cache-Control": freshness(exchange, 0),
            **cache_headers(exchange),
        }
        if artifact_type:
            headers["OCI-Filters-Applied"] = "artifactType"
        if more:
            query: dict[str, str | int] = {**request.query, "last": shown[-1]["digest"]}
            headers["Link"] = build_next(route, query)
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": shown}
        exchange.bytes = len(body := msgspec.json.encode(index))
        return content(body, headers)

    async def _referrers(
        self, name: str, digest: Digest, artifact_type: str | None, last: str, limit: int | None
    ) -> tuple[list[dict[str, Any]], bool]:
        """A page of the referrers after the digest `last`, and whether there are more.

        A page is no larger than clients accept.  With a `limit` of 0 it has one entry, as a page must lead to
        the next.
        """
        shown: list[dict[str, Any]] = []
        size = 0
        wanted = AT_ONCE if limit is None else min(max(limit, 1) + 1, AT_ONCE)
        while found := await self._registry.referrers(name, digest, artifact_type, last, wanted):
            for each in found:
                row = each.to_json()
                size += len(msgspec.json.encode(row)) + 1
                if shown and (size > LARGEST_LISTING or (limit is not None and len(shown) >= limit)):
                    return shown, True
                shown.append(row)
            if len(found) < wanted:
                break
            last = found[-1].digest
        return shown, False


def _spans(ranges: Sequence[Range], size: int) -> list[Span]:
    """What to send; [] is everything.  Raises RequestRefused if the blob has none of the ranges."""
    try:
        # Without a size no Content-Range can be given; RFC 9110 §14.2 lets a server send everything.
        return satisfy(ranges, size) if size >= 0 else []
    except RangeInvalid as error:
        raise RequestRefused(error, {"Content-Range": f"bytes */{size}"}) from None


def _not_modified(conditions: Conditions, digest: Digest) -> bool:
    """Whether If-None-Match is false: 304.  Raises PreconditionFailed if If-Match is."""
    if conditions.failed(digest) == "If-None-Match":
        return True
    conditions.check(digest)
    return False


def _ranges(request: web.BaseRequest, digest: Digest) -> list[Range]:
    """The ranges that a client asks for; none if it has another version: RFC 9110 §13.1.5."""
    if_range = request.headers.get("If-Range", f'"{digest}"')
    return parse_ranges(request.headers.get("Range") if if_range == f'"{digest}"' else None)


def _blob_headers(digest: Digest, exchange: Exchange) -> dict[str, str]:
    return {
        **COMMON,
        "X-Request-Id": exchange.id,
        "Content-Type": OCTETS,
        "Docker-Content-Digest": digest,
        "ETag": f'"{digest}"',
        "Accept-Ranges": "bytes",
        "Cache-Control": immutable(exchange),
    }


def _own_location(route: Route, exchange: Exchange) -> dict[str, str]:
    """A Location with which Ollama asks for ranges: it expects a redirect, and fails at a 200 without one.

    Other clients get none: some follow it, whatever the status, and end in a loop.
    """
    ollama = (exchange.agent or "").startswith("ollama")
    return {"Location": build_location(route, exchange.ns)} if ollama else {}


def _redirect(headers: dict[str, str], url: str, exchange: Exchange) -> web.Response:
    """A response that leads to the bucket; the URL is a secret that expires, and belongs into no cache."""
    headers = {**headers, **cache_headers(exchange), "Location": url, "Cache-Control": "no-store"}
    del headers["Content-Type"]
    return empty(307, headers)


def _page(request: web.BaseRequest) -> tuple[str, int | None]:
    """Parse `last` and `n` of the query.  Raises PaginationNumberInvalid."""
    limit = parse_limit(request.query.get("n"))
    return request.query.get("last", ""), None if limit is None else min(limit, MOST_LISTED)

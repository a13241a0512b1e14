"""The push half of the distribution API over any Registry: uploads, manifests, deletion.

An upload's session is its file in the store: any worker goes on with it, and what was taken of a request that
is cut stays, to be resumed.  What is done in the end is done whole, and told of, should the client leave too.
Locations are relative, so that they are right behind any proxy.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import NoReturn

from aiohttp import web

from proxy.telemetry.exchange import Exchange
from proxy.telemetry.metrics import Metrics
from proxy.web.events import RequestEvents
from proxy.web.responses import ALL, RequestRefused, cache_headers, empty
from proxy.web.routes import Endpoint, Route, build_location
from proxy.web.send import LEFT
from storage.concurrency import uninterrupted
from storage.errors import (
    BlobUnknown,
    BlobUploadInvalid,
    DigestInvalid,
    ManifestInvalid,
    ManifestTooLarge,
    NameInvalid,
    NameUnknown,
    RangeInvalid,
    SizeInvalid,
    UploadStalled,
)
from storage.oci import MANIFEST_LIMIT, OCTETS, Descriptor, Digest, Manifest, Tag, parse_manifest
from storage.registry import Registry, Upload

ALGORITHMS = ("sha256", "sha512")
_CONTENT_RANGE = re.compile(r"(?:bytes )?([0-9]{1,18})-([0-9]{1,18})(?:/(?:[0-9]+|\*))?")

Write = Callable[[bytes], Awaitable[None]]
# The full name of what the client of a request calls so.
FullName = Callable[[web.BaseRequest, Route, str], str]


class Push:
    """A client that sends nothing of a body for `client_timeout` seconds is answered 408.

    Every method takes the request, its route, the repository's full name, and the exchange.
    """

    def __init__(
        self,
        registry: Registry,
        full_name: FullName,
        metrics: Metrics,
        client_timeout: float,
        events: RequestEvents,
    ) -> None:
        self._registry = registry
        self._events = events
        self._full_name = full_name
        self._metrics = metrics
        self._client_timeout = None if math.isinf(client_timeout) else client_timeout

    # Uploads

    async def start(self, request: web.BaseRequest, route: Route, name: str, now: Exchange) -> web.Response:
        """POST: a mount, a blob in one request, or the beginning of a session."""
        if "mount" in request.query:
            # What cannot be mounted is uploaded: clients expect no error.
            with suppress(BlobUnknown, NameUnknown, NameInvalid, DigestInvalid):
                return await uninterrupted(self._mount(request, route, name, now))
        if "digest" in request.query:
            return await self._whole(request, route, name, now)
        algorithm = request.query.get("digest-algorithm", "sha256")
        if algorithm not in ALGORITHMS:
            raise DigestInvalid(f"digest-algorithm is {algorithm[:50]!r}: expected sha256 or sha512")
        upload = await self._registry.start_upload(name, None, algorithm)
        await upload.suspend()
        return empty(202, self._session(request, route, upload, now))

    async def _mount(self, request: web.BaseRequest, route: Route, name: str, now: Exchange) -> web.Response:
        digest = Digest.parse(request.query["mount"])
        source = request.query.get("from")
        full = self._full_name(request, route, source) if source else None
        if full is not None and not now.visible(full):
            raise BlobUnknown(f"{full} is not for everybody to be mounted from")
        descriptor = await self._registry.mount_blob(name, digest, full, now.visible)
        now.detail = "mounted"
        await self._events.report("mount", "blob", request, route, now, descriptor, source=full)
        return self._created(request, route, Endpoint.BLOB, descriptor.digest, now)

    async def _whole(self, request: web.BaseRequest, route: Route, name: str, now: Exchange) -> web.Response:
        digest = Digest.parse(request.query["digest"])
        upload = await self._registry.start_upload(name, request.content_length, digest.algorithm)
        try:
            await self._take(request, now, upload.write)
        except BaseException as error:
            await upload.cancel(error)  # its id was told to nobody
            raise
        return await uninterrupted(self._commit(request, route, now, upload, digest))

    async def status(self, request: web.BaseRequest, route: Route, name: str, now: Exchange) -> web.Response:
        """GET: how far it has come."""
        upload = await self._registry.resume_upload(name, route.upload)
        await upload.suspend()
        return empty(204, self._session(request, route, upload, now))

    async def append(self, request: web.BaseRequest, route: Route, name: str, now: Exchange) -> web.Response:
        """PATCH: a chunk, or all that comes."""
        upload = await self._registry.resume_upload(name, route.upload)
        try:
            self._check_range(request, route, upload, now)
            await self._take(request, now, upload.write)
        finally:
            await upload.suspend()
        headers = self._session(request, route, upload, now)
        return empty(202, {**headers, "Content-Length": "0"})

    async def finish(self, request: web.BaseRequest, route: Route, name: str, now: Exchange) -> web.Response:
        """PUT: the last chunk, if it was not sent yet, and the digest of the whole."""
        upload = await self._registry.resume_upload(name, route.upload)
        try:
            digest = Digest.parse(request.query.get("digest", ""))
            self._check_range(request, route, upload, now)
            await self._take(request, now, upload.write)
        except BaseException:
            await upload.suspend()
            raise
        return await uninterrupted(self._commit(request, route, now, upload, digest))

    async def _commit(
        self, request: web.BaseRequest, route: Route, now: Exchange, upload: Upload, digest: Digest
    ) -> web.Response:
        descriptor = await upload.commit(digest)
        await self._events.report("push", "blob", request, route, now, descriptor)
        return self._created(request, route, Endpoint.BLOB, digest, now)

    async def cancel(self, request: web.BaseRequest, route: Route, name: str, now: Exchange) -> web.Response:
        upload = await self._registry.resume_upload(name, route.upload)
        await upload.cancel()
        return empty(204, {**ALL, **cache_headers(now)})

    def _check_range(self, request: web.BaseRequest, route: Route, upload: Upload, now: Exchange) -> None:
        """Raises what speaks against a chunk; distribution-spec, "Pushing a blob in chunks"."""
        header = request.headers.get("Content-Range")
        if header is None:
            return
        found = _CONTENT_RANGE.fullmatch(header.strip())
        if not found or int(found[2]) < int(found[1]):
            raise BlobUploadInvalid(f"Content-Range is {header[:60]!r}: expected <first>-<last>")
        first, last = int(found[1]), int(found[2])
        if first != upload.offset:
            error = RangeInvalid(f"the chunk begins at byte {first}, but {upload.offset} bytes are here")
            raise RequestRefused(error, self._session(request, route, upload, now))
        if request.content_length not in (None, last - first + 1):
            raise SizeInvalid(
                f"Content-Range tells of {last - first + 1} bytes, Content-Length of {request.content_length}"
            )

    async def _take(self, request: web.BaseRequest, now: Exchange, write: Write) -> None:
        """All of the body."""
        await _continue(request)
        stream = request.content
        try:
            while True:
                async with asyncio.timeout(self._client_timeout):
                    chunk = await stream.readany()
                if not chunk:
                    break
                now.received += len(chunk)
                await write(chunk)
        except TimeoutError:
            raise UploadStalled(f"nothing came for {self._client_timeout:g} s") from None
        except (ConnectionError, web.RequestPayloadError) as error:
            self._cut(request, now, error)
        finally:
            self._metrics.pushed.labels(now.namespace).inc(now.received)

    def _cut(self, request: web.BaseRequest, now: Exchange, error: Exception) -> NoReturn:
        if request.transport is None or request.transport.is_closing():
            now.detail = LEFT
        raise SizeInvalid(f"the body was cut after {now.received} bytes") from error

    # Manifests, and deletion

    async def push_manifest(
        self, request: web.BaseRequest, route: Route, name: str, now: Exchange
    ) -> web.Response:
        assert route.reference is not None
        tags = [Tag.parse(each) for each in dict.fromkeys(request.query.getall("tag", ()))]
        body = await self._manifest_body(request, now)
        media_type = request.headers.get("Content-Type", "").partition(";")[0].strip()
        manifest = Manifest.of(media_type or _told(body), body)
        now.digest = await uninterrupted(self._push(request, route, name, now, manifest, tags))
        answer = self._created(request, route, Endpoint.MANIFEST, Digest(now.digest), now)
        with suppress(ManifestInvalid):
            if (subject := parse_manifest(body).subject) is not None:
                answer.headers["OCI-Subject"] = subject.digest
        if tags:
            answer.headers["OCI-Tag"] = ", ".join(tags)
        return answer

    async def _push(
        self,
        request: web.BaseRequest,
        route: Route,
        name: str,
        now: Exchange,
        manifest: Manifest,
        tags: Sequence[Tag],
    ) -> Digest:
        assert route.reference is not None
        descriptor = await self._registry.push_manifest(name, route.reference, manifest, tags)
        pushed = [route.reference, *tags] if isinstance(route.reference, Tag) else tags
        for tag in pushed or (None,):
            await self._events.report("push", "manifest", request, route, now, descriptor, tag=tag)
        return descriptor.digest

    async def _manifest_body(self, request: web.BaseRequest, now: Exchange) -> bytes:
        body = bytearray()

        async def write(chunk: bytes) -> None:
            if len(body) + len(chunk) > MANIFEST_LIMIT:
                raise too_large
            body.extend(chunk)

        too_large = ManifestTooLarge(f"a manifest may have {MANIFEST_LIMIT} bytes")
        if (request.content_length or 0) > MANIFEST_LIMIT:
            raise too_large
        await self._take(request, now, write)
        return bytes(body)

    async def delete_manifest(
        self, request: web.BaseRequest, route: Route, name: str, now: Exchange
    ) -> web.Response:
        reference = route.reference
        assert reference is not None

        async def delete() -> None:
            await self._registry.delete_manifest(name, reference)
            if isinstance(reference, Tag):
                await self._events.report("delete", "tag", request, route, now, tag=reference)
            else:
                gone = Descriptor("", reference, -1)
                await self._events.report("delete", "manifest", request, route, now, gone)

        await uninterrupted(delete())
        return self._deleted(now)

    async def delete_blob(
        self, request: web.BaseRequest, route: Route, name: str, now: Exchange
    ) -> web.Response:
        digest = route.reference
        assert isinstance(digest, Digest)

        async def delete() -> None:
            await self._registry.delete_blob(name, digest)
            gone = Descriptor(OCTETS, digest, -1)
            await self._events.report("delete", "blob", request, route, now, gone)

        await uninterrupted(delete())
        return self._deleted(now)

    # Answers

    def _session(
        self, request: web.BaseRequest, route: Route, upload: Upload, now: Exchange
    ) -> dict[str, str]:
        session = Route(Endpoint.UPLOAD, route.name, None, route.prefix, upload.id)
        return {
            **ALL,
            **cache_headers(now),
            "Location": build_location(session, now.ns),
            # Of an empty upload too: there is no way to write none, and clients know this one.
            "Range": f"0-{max(0, upload.offset - 1)}",
            "Docker-Upload-UUID": upload.id,
        }

    def _created(
        self, request: web.BaseRequest, route: Route, kind: Endpoint, digest: Digest, now: Exchange
    ) -> web.Response:
        location = build_location(Route(kind, route.name, digest, route.prefix), now.ns)
        headers = {"Location": location, "Docker-Content-Digest": str(digest), "Content-Length": "0"}
        return empty(201, {**ALL, **cache_headers(now), **headers})

    def _deleted(self, now: Exchange) -> web.Response:
        return empty(202, {**ALL, **cache_headers(now), "Content-Length": "0"})


async def _continue(request: web.BaseRequest) -> None:
    """Only now that it is wanted: whoever is refused need not have sent it.  RFC 9110 §10.1.1."""
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # of the answer itself


def _told(body: bytes) -> str:
    """The media type that a manifest says it has, or none."""
    try:
        return parse_manifest(body).declared or ""
    except ManifestInvalid:
        return ""

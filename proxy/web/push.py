"""The endpoints that write: uploads, manifests, deletion.

An upload's session is its file in the store: any worker can continue it, and the bytes of an interrupted
request are kept, to be resumed.  Once a commit, a push or a deletion has begun, it is completed and its event
is published even if the client leaves.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import NoReturn

from aiohttp import web

from proxy.telemetry.exchange import Exchange
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.tracing import step
from proxy.web.conditions import parse_conditions
from proxy.web.events import RequestEvents
from proxy.web.push_responses import created, deleted, session_headers
from proxy.web.responses import COMMON, RequestRefused, cache_headers, empty
from proxy.web.routes import Endpoint, Route
from proxy.web.send import LEFT
from storage.concurrency import run_sized, uninterrupted
from storage.errors import (
    BlobUnknown,
    BlobUploadInvalid,
    BlobUploadUnknown,
    DigestInvalid,
    ManifestInvalid,
    ManifestTooLarge,
    NameInvalid,
    NameUnknown,
    RangeInvalid,
    SizeInvalid,
    UploadStalled,
)
from storage.oci import (
    ALGORITHMS,
    MANIFEST_LIMIT,
    OCTETS,
    Descriptor,
    Digest,
    Manifest,
    Tag,
    declared_type,
    parse_manifest,
)
from storage.registry import Registry, Upload

_CONTENT_RANGE = re.compile(r"(?:bytes )?([0-9]{1,18})-([0-9]{1,18})(?:/(?:[0-9]+|\*))?")

Write = Callable[[bytes], Awaitable[None]]
# Returns the full name of a repository, as the client of a request names it.
FullName = Callable[[web.BaseRequest, Route, str], str]


class Push:
    """Handlers of the endpoints that write.

    Every handler takes the request, its route, the repository's full name, and the exchange.  A client that
    sends nothing of a body for `client_timeout` seconds is answered 408.
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

    async def start(
        self, request: web.BaseRequest, route: Route, name: str, exchange: Exchange
    ) -> web.Response:
        """POST: mount a blob, upload one in a single request, or begin a session."""
        if "mount" in request.query:
            # A blob that cannot be mounted is uploaded: clients expect no error.
            with suppress(BlobUnknown, NameUnknown, NameInvalid, DigestInvalid):
                return await self._mount(request, route, name, exchange)
        algorithm = request.query.get("digest-algorithm", "sha256")
        if "digest" in request.query:
            digest = Digest.parse(request.query["digest"])
            if request.content_length != 0 or digest == Digest.of(b"", digest.algorithm):
                return await self._whole(request, route, name, exchange, digest)
            # Ollama asks so whether the blob is stored; Distribution begins an upload if it is not.
            with suppress(BlobUnknown, NameUnknown):
                await self._registry.resolve_blob(name, digest)
                return created(request, route, Endpoint.BLOB, digest, exchange)
            algorithm = digest.algorithm
        if algorithm not in ALGORITHMS:
            raise DigestInvalid(f"digest-algorithm is {algorithm[:50]!r}, but must be sha256 or sha512")
        upload = await self._registry.start_upload(name, None, algorithm)
        await upload.suspend()
        return empty(202, session_headers(request, route, upload, exchange))

    async def _mount(
        self, request: web.BaseRequest, route: Route, name: str, exchange: Exchange
    ) -> web.Response:
        digest = Digest.parse(request.query["mount"])
        source = request.query.get("from")
        full = self._full_name(request, route, source) if source else None
        if full is not None and not exchange.visible(full):
            raise BlobUnknown(f"the client may not pull from {full}")
        if full is not None and full.partition("/")[0] != name.partition("/")[0]:
            # From another namespace it is a copy, which can take long: it ends if the client leaves.
            copied = await self._registry.mount_blob(name, digest, full)
            return await uninterrupted(self._mounted(request, route, exchange, full, copied))

        async def mount() -> web.Response:
            mounted = await self._registry.mount_blob(name, digest, full, exchange.visible)
            return await self._mounted(request, route, exchange, full, mounted)

        return await uninterrupted(mount())

    async def _mounted(
        self,
        request: web.BaseRequest,
        route: Route,
        exchange: Exchange,
        source: str | None,
        descriptor: Descriptor,
    ) -> web.Response:
        exchange.detail = "mounted"
        await self._events.report("mount", "blob", request, route, exchange, descriptor, source=source)
        return created(request, route, Endpoint.BLOB, descriptor.digest, exchange)

    async def _whole(
        self, request: web.BaseRequest, route: Route, name: str, exchange: Exchange, digest: Digest
    ) -> web.Response:
        upload = await self._registry.start_upload(name, request.content_length, digest.algorithm)
        try:
            await self._receive(request, exchange, upload.write)
        except BaseException as error:
            await upload.cancel(error)  # no client knows its id
            raise

        async def commit() -> web.Response:
            try:
                return await self._commit(request, route, exchange, upload, digest)
            except BaseException as error:
                await upload.cancel(error)
                raise

        return await uninterrupted(commit())

    async def status(
        self, request: web.BaseRequest, route: Route, name: str, exchange: Exchange
    ) -> web.Response:
        """GET: answer how many bytes have been received."""
        upload = await self._registry.resume_upload(name, route.upload)
        await upload.suspend()
        return empty(204, session_headers(request, route, upload, exchange))

    async def append(
        self, request: web.BaseRequest, route: Route, name: str, exchange: Exchange
    ) -> web.Response:
        """PATCH: append a chunk, or the whole body."""
        upload = await self._registry.resume_upload(name, route.upload)
        try:
            self._check_range(request, route, upload, exchange)
            await self._receive(request, exchange, upload.write)
        finally:
            await upload.suspend()
        headers = session_headers(request, route, upload, exchange)
        return empty(202, {**headers, "Content-Length": "0"})

    async def finish(
        self, request: web.BaseRequest, route: Route, name: str, exchange: Exchange
    ) -> web.Response:
        """PUT: append the last chunk, if there is one, and commit the blob under its digest.

        A PUT is idempotent (RFC 9110 §9.2.2): one that comes again is answered as the first one was.
        """
        try:
            return await self._finish(request, route, name, exchange)
        except BlobUploadUnknown:
            with suppress(BlobUnknown, NameUnknown, DigestInvalid):
                return await self._finished(request, route, name, exchange)
            raise

    async def _finished(
        self, request: web.BaseRequest, route: Route, name: str, exchange: Exchange
    ) -> web.Response:
        """Answer for an upload that has ended.  Raises DigestInvalid, BlobUnknown, NameUnknown."""

        async def discard(chunk: bytes) -> None:
            pass

        descriptor = await self._registry.resolve_blob(name, _digest(request, route))
        if not exchange.received:
            await self._receive(request, exchange, discard)
        # The first one may have been cut before its event was published.
        await self._events.report("push", "blob", request, route, exchange, descriptor)
        return created(request, route, Endpoint.BLOB, descriptor.digest, exchange)

    async def _finish(
        self, request: web.BaseRequest, route: Route, name: str, exchange: Exchange
    ) -> web.Response:
        upload = await self._registry.resume_upload(name, route.upload)
        try:
            digest = _digest(request, route)
            # No range describes an empty body: CUE's client writes one that ends before it starts.
            if request.content_length != 0:
                self._check_range(request, route, upload, exchange)
            await self._receive(request, exchange, upload.write)
        except BaseException:
            await upload.suspend()
            raise
        return await uninterrupted(self._commit(request, route, exchange, upload, digest))

    async def _commit(
        self, request: web.BaseRequest, route: Route, exchange: Exchange, upload: Upload, digest: Digest
    ) -> web.Response:
        with step("store.write", attributes={"entrepot.digest": digest}):
            descriptor = await upload.commit(digest)
        await self._events.report("push", "blob", request, route, exchange, descriptor)
        return created(request, route, Endpoint.BLOB, digest, exchange)

    async def cancel(
        self, request: web.BaseRequest, route: Route, name: str, exchange: Exchange
    ) -> web.Response:
        upload = await self._registry.resume_upload(name, route.upload)
        await upload.cancel()
        return empty(204, {**COMMON, **cache_headers(exchange)})

    def _check_range(
        self, request: web.BaseRequest, route: Route, upload: Upload, exchange: Exchange
    ) -> None:
        """Check that a chunk continues the upload; distribution-spec, "Pushing a blob in chunks".

        Raises BlobUploadInvalid, SizeInvalid, and RequestRefused with the state of the session.
        """
        header = request.headers.get("Content-Range")
        if header is None:
            return
        found = _CONTENT_RANGE.fullmatch(header.strip())
        if not found or int(found[2]) < int(found[1]):
            raise BlobUploadInvalid(f"Content-Range is {header[:60]!r}, but must be <first>-<last>")
        first, last = int(found[1]), int(found[2])
        if first != upload.offset:
            error = RangeInvalid(
                f"the chunk begins at byte {first}, but {upload.offset} bytes have been received"
            )
            raise RequestRefused(error, session_headers(request, route, upload, exchange))
        # dockertarpusher states the byte after the last one.  Content-Length says how long the body is.
        if request.content_length not in (None, last - first + 1, last - first):
            raise SizeInvalid(
                f"Content-Range has {last - first + 1} bytes, but Content-Length is {request.content_length}"
            )

    async def _receive(self, request: web.BaseRequest, exchange: Exchange, write: Write) -> None:
        """Read the whole body and pass it to `write`."""
        await _continue(request)
        stream = request.content
        try:
            while True:
                async with asyncio.timeout(self._client_timeout):
                    chunk = await stream.readany()
                if not chunk:
                    break
                exchange.received += len(chunk)
                await write(chunk)
        except TimeoutError:
            raise UploadStalled(f"no data was received for {self._client_timeout:g} s") from None
        except (ConnectionError, web.RequestPayloadError) as error:
            self._fail_cut_off(request, exchange, error)
        finally:
            self._metrics.pushed.labels(exchange.namespace).inc(exchange.received)

    def _fail_cut_off(self, request: web.BaseRequest, exchange: Exchange, error: Exception) -> NoReturn:
        if request.transport is None or request.transport.is_closing():
            exchange.detail = LEFT
        raise SizeInvalid(f"the body was cut off after {exchange.received} bytes") from error

    # Manifests and deletion

    async def push_manifest(
        self, request: web.BaseRequest, route: Route, name: str, exchange: Exchange
    ) -> web.Response:
        assert route.reference is not None
        tags = [Tag.parse(each) for each in dict.fromkeys(request.query.getall("tag", ()))]
        body = await self._manifest_body(request, exchange)
        media_type = request.headers.get("Content-Type", "").partition(";")[0].strip()
        manifest = await run_sized(len(body), _manifest, media_type, body)
        exchange.digest = await uninterrupted(self._push(request, route, name, exchange, manifest, tags))
        response = created(request, route, Endpoint.MANIFEST, Digest(exchange.digest), exchange)
        if (subject := await run_sized(len(body), _subject, body)) is not None:
            response.headers["OCI-Subject"] = subject
        if tags:
            response.headers["OCI-Tag"] = ", ".join(tags)
        return response

    async def _push(
        self,
        request: web.BaseRequest,
        route: Route,
        name: str,
        exchange: Exchange,
        manifest: Manifest,
        tags: Sequence[Tag],
    ) -> Digest:
        assert route.reference is not None
        reference, named = route.reference, manifest.descriptor
        if isinstance(reference, Digest):
            named = replace(named, digest=reference)
        pushed = [reference, *tags] if isinstance(reference, Tag) else tags
        about = request, route, exchange, named
        async with self._events.caused_by("push", "manifest", *about, tags=pushed or (None,)):
            with step("store.write", attributes={"entrepot.digest": manifest.digest}):
                when = parse_conditions(request)
                descriptor = await self._registry.push_manifest(name, reference, manifest, tags, when)
        return descriptor.digest

    async def _manifest_body(self, request: web.BaseRequest, exchange: Exchange) -> bytes:
        body = bytearray()

        async def write(chunk: bytes) -> None:
            if len(body) + len(chunk) > MANIFEST_LIMIT:
                raise too_large
            body.extend(chunk)

        too_large = ManifestTooLarge(f"the manifest is larger than {MANIFEST_LIMIT} bytes")
        if (request.content_length or 0) > MANIFEST_LIMIT:
            raise too_large
        await self._receive(request, exchange, write)
        return bytes(body)

    async def delete_manifest(
        self, request: web.BaseRequest, route: Route, name: str, exchange: Exchange
    ) -> web.Response:
        reference = route.reference
        assert reference is not None

        async def delete() -> None:
            about = request, route, exchange
            if isinstance(reference, Tag):
                events = self._events.caused_by("delete", "tag", *about, tags=[reference])
            else:
                events = self._events.caused_by("delete", "manifest", *about, Descriptor("", reference, -1))
            async with events:
                await self._registry.delete_manifest(name, reference, parse_conditions(request))

        await uninterrupted(delete())
        return deleted(exchange)

    async def delete_blob(
        self, request: web.BaseRequest, route: Route, name: str, exchange: Exchange
    ) -> web.Response:
        digest = route.reference
        assert isinstance(digest, Digest)

        async def delete() -> None:
            gone = Descriptor(OCTETS, digest, -1)
            async with self._events.caused_by("delete", "blob", request, route, exchange, gone):
                await self._registry.delete_blob(name, digest, parse_conditions(request))

        await uninterrupted(delete())
        return deleted(exchange)


def _digest(request: web.BaseRequest, route: Route) -> Digest:
    """The digest with which an upload ends.  Raises DigestInvalid."""
    return Digest.parse(request.query.get("digest", str(route.reference or "")))


async def _continue(request: web.BaseRequest) -> None:
    """Ask for the body only now that it is wanted: a refused client need not send it.  RFC 9110 §10.1.1."""
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # counts the final response only


def _manifest(media_type: str, body: bytes) -> Manifest:
    return Manifest.of(media_type or declared_type(body) or "", body)


def _subject(body: bytes) -> Digest | None:
    try:
        subject = parse_manifest(body).subject
    except ManifestInvalid:
        return None
    return None if subject is None else subject.digest

"""The pull half of a remote registry: its responses become values and errors.

Upstreams' mistakes are corrected or refused here: a missing digest or length, a Content-Type that is useless
or has parameters, a compressed manifest although identity was requested, a 200 in answer to a Range, content
that does not match its digest.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from copy import copy
from typing import Any, NoReturn, Self

import aiohttp
import structlog

from proxy.config.quantities import parse_number
from proxy.telemetry.metrics import Metrics
from proxy.upstream.breaker import HostState
from proxy.upstream.credentials import Credentials
from proxy.upstream.encoding import encoding_of
from proxy.upstream.pages import pages
from proxy.upstream.requests import RequestSender, UpstreamRequest, UpstreamSettings
from proxy.upstream.transport import Transport
from storage.errors import (
    ManifestInvalid,
    ManifestUnknown,
    NameUnknown,
    OriginFailed,
    RegistryError,
    TooManyRequests,
    Unsupported,
)
from storage.oci import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    DOCKER_SCHEMA1,
    MANIFEST_LIMIT,
    OCI_INDEX,
    OCI_MANIFEST,
    OCTETS,
    Descriptor,
    Digest,
    Manifest,
    Reference,
    Span,
    Tag,
    media_type_of,
)
from storage.registry import Blob, Registry

log = structlog.get_logger()

ACCEPT = ", ".join(
    (OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST, f"{DOCKER_SCHEMA1};q=0.5", "*/*;q=0.1")
)
# RFC 9110 §14.4; the name of the unit is case-insensitive.
_CONTENT_RANGE = re.compile(r"bytes[ \t]+([0-9]+)-([0-9]+)/([0-9]+|\*)", re.IGNORECASE)
# Types without meaning: some upstreams serve manifests as these.
_VAGUE = frozenset(("", "application/json", "text/plain", "text/html", OCTETS))


class UpstreamReader(Registry):
    """A remote registry that can be pulled from.

    It is made inside a running event loop, with at least one of `credentials`.
    """

    def __init__(
        self,
        name: str,
        settings: UpstreamSettings,
        credentials: Sequence[Credentials],
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._sender = RequestSender(name, settings, credentials, metrics, clock)
        self.host = self._sender.host

    def as_caller(self, credentials: Credentials) -> Self:
        """This registry with a client's credentials, over the same connections.  Close it before this one."""
        caller = copy(self)
        caller._sender = self._sender.as_caller(credentials)
        return caller

    @property
    def healthy(self) -> bool:
        """Whether it answers, as far as is known."""
        return self._sender.healthy

    @property
    def probe_due(self) -> bool:
        """Whether it has failed and it is time to probe it."""
        return self._sender.probe_due

    @property
    def spares(self) -> bool:
        """Whether its rate limit allows more requests than are reserved."""
        return self._sender.budgets.spares(self._sender.reserve)

    def state(self) -> list[HostState]:
        """The state of each host: the upstream itself first, then those it has redirected to."""
        return self._sender.state()

    async def probe(self) -> None:
        """Send one request, which updates `healthy`."""
        await self._sender.probe()

    async def _send(
        self, method: str, repository: str, path: str, kind: str, headers: dict[str, str]
    ) -> aiohttp.ClientResponse:
        url = self._sender.url(f"{repository}/{path}")
        return await self._sender.send(UpstreamRequest(method, url, kind, repository, headers))

    def _pages(self, path: str, kind: str, repository: str = "", also: str = "") -> AsyncIterator[Any]:
        request = UpstreamRequest("GET", self._sender.url(path), kind, repository, also=also)
        return pages(self._sender, request)

    # Blobs

    async def get_blob(self, repository: str, digest: Digest, span: Span | None = None) -> Blob:
        headers = {}
        if span is not None:
            headers["Range"] = f"bytes={span.start}-{'' if span.stop is None else span.stop - 1}"
        response = await self._send("GET", repository, f"blobs/{digest}", "blob", headers)
        try:
            start, size = self._extent(response, span)
            if encoding_of(response):
                raise OriginFailed(f"{self._name} sent {digest} encoded, although identity was requested")
            if size < 0:
                # Clients want a length, and progress reports need one.
                size = (await self.resolve_blob(repository, digest)).size
            descriptor = Descriptor(OCTETS, digest, size)
            return _Download(self._sender.transport, response, descriptor, start, self._sender.received)
        except BaseException:
            response.close()
            raise

    def _extent(self, response: aiohttp.ClientResponse, span: Span | None) -> tuple[int, int]:
        """The position of the body in the blob, and the size of the blob, or -1 if unknown."""
        if response.status != 206:
            return 0, self._length(response)
        found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
        first, last, total = map(parse_number, found.groups()) if found else (None, None, None)
        unknown = found is not None and found[3] == "*"
        if first is None or last is None or last < first or not (unknown or last < (total or 0)):
            raise OriginFailed(f"{self._name} sent a range whose Content-Range is malformed")
        if span is None or first != span.start:
            raise OriginFailed(f"{self._name} answered with another range than was requested")
        return first, -1 if total is None else total

    async def resolve_blob(self, repository: str, digest: Digest) -> Descriptor:
        path = f"blobs/{digest}"
        try:
            response = await self._send("HEAD", repository, path, "blob", {})
        except Unsupported:  # it does not support HEAD: request the content, and drop it
            response = await self._send("GET", repository, path, "blob", {})
        response.close()
        return Descriptor(OCTETS, digest, self._length(response))

    def _length(self, response: aiohttp.ClientResponse) -> int:
        """Length of the content in bytes; -1 if it is missing or that of the encoded content."""
        length = response.headers.get("Content-Length")
        if length is None or encoding_of(response):
            return -1
        if (number := parse_number(length)) is None:
            raise OriginFailed(f"{self._name} sent a Content-Length that is malformed")
        return number

    # Manifests

    async def get_manifest(self, repository: str, reference: Reference) -> Manifest:
        headers = {"Accept": ACCEPT}
        async with await self._send(
            "GET", repository, f"manifests/{reference}", "manifest", headers
        ) as response:
            content = await self._sender.content(response, MANIFEST_LIMIT)
            media_type = _media_type(response)
            if media_type in _VAGUE:
                try:
                    media_type = media_type_of(content)
                except ManifestInvalid:
                    raise OriginFailed(
                        f"{self._name} answered for {reference} of {repository} with no manifest"
                    ) from None
            stated = stated_digest(response)
        if isinstance(reference, Digest):
            manifest = Manifest.of(media_type, content, reference.algorithm)
            if manifest.digest != reference:
                self._wrong(repository, reference, manifest.digest)
            return manifest
        manifest = Manifest.of(media_type, content, stated.algorithm if stated else "sha256")
        # The digest of a schema 1 manifest does not cover its signatures.
        if stated not in (None, manifest.digest) and media_type != DOCKER_SCHEMA1:
            self._wrong(repository, reference, manifest.digest)
        return manifest

    async def resolve_manifest(self, repository: str, reference: Reference) -> Descriptor:
        """Raises TooManyRequests for a Tag, which its caller knows, if only reserved requests are left."""
        if isinstance(reference, Tag) and not self.spares:
            raise TooManyRequests(
                f"the remaining requests that {self._name} grants are reserved for content that is not cached"
            )
        headers = {"Accept": ACCEPT}
        path = f"manifests/{reference}"
        try:
            async with await self._send("HEAD", repository, path, "manifest", headers) as response:
                digest, size, media_type = (
                    stated_digest(response),
                    self._length(response),
                    _media_type(response),
                )
            matches = isinstance(reference, Tag) or digest == reference
            if digest is not None and matches and size >= 0 and media_type not in _VAGUE:
                return Descriptor(media_type, digest, size)
        except Unsupported:
            pass
        # Some registries send too few headers on HEAD, or do not support it.
        return (await self.get_manifest(repository, reference)).descriptor

    # Listings

    async def tags(self, repository: str, last: str = "", limit: int | None = None) -> list[str]:
        found: set[str] = set()
        async for page in self._pages(f"{repository}/tags/list", "tags", repository):
            tags = page.get("tags") if isinstance(page, dict) else ""
            if not isinstance(tags, list | None):  # Distribution sends null for none
                raise OriginFailed(f"{self._name} answered for the tags of {repository} with no list")
            found.update(tag for tag in tags or () if isinstance(tag, str) and tag > last)
        return sorted(found)[:limit]

    async def referrers(
        self, repository: str, digest: Digest, artifact_type: str | None = None
    ) -> list[Descriptor]:
        found = []
        try:
            async for page in self._pages(f"{repository}/referrers/{digest}", "referrers", repository):
                manifests = page.get("manifests") if isinstance(page, dict) else None
                if not isinstance(manifests, list):
                    raise ManifestUnknown("no index")
                found += [Descriptor.from_json(each) for each in manifests]
        except (ManifestUnknown, NameUnknown, ManifestInvalid):
            # Clients then try the fallback tag; on NAME_UNKNOWN they would give up.
            raise ManifestUnknown(
                f"{self._name} lists no referrers of {digest}; see the tag {digest.replace(':', '-')}"
            ) from None
        return [each for each in found if artifact_type in (None, each.artifact_type)]

    async def repositories(self, last: str = "", limit: int | None = None) -> list[str]:
        """Raises Unsupported if the registry does not list them."""
        found: set[str] = set()
        # Distribution, "Listing Repositories"; and the scope of its token servers for that.
        async for page in self._pages("_catalog", "catalog", also="registry:catalog:*"):
            names = page.get("repositories") if isinstance(page, dict) else ""
            if not isinstance(names, list | None):
                raise OriginFailed(f"{self._name} answered for its repositories with no list")
            found.update(name for name in names or () if isinstance(name, str) and name > last)
        return sorted(found)[:limit]

    def _wrong(self, repository: str, reference: Reference, found: Digest) -> NoReturn:
        log.error(
            "upstream.wrong_digest",
            namespace=self._name,
            repository=repository,
            reference=reference,
            found=found,
        )
        raise OriginFailed(f"{self._name} sent content with digest {found} for {reference} of {repository}")

    async def close(self) -> None:
        await self._sender.close()


class _Download(Blob):
    """A blob that is being downloaded; it can be read once."""

    def __init__(
        self,
        transport: Transport,
        response: aiohttp.ClientResponse,
        descriptor: Descriptor,
        start: int,
        received: Callable[[int], Awaitable[None]],
    ) -> None:
        self.descriptor = descriptor
        self._received = received
        self._transport = transport
        self._response = response
        self._position = start

    async def chunks(self, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        if start < self._position:
            raise ValueError(f"byte {start} has been read already")
        try:
            async for chunk in self._response.content.iter_any():
                await self._received(len(chunk))
                # An upstream that ignores Range sends the bytes before `start` again.
                skipped = min(len(chunk), start - self._position)
                self._position += len(chunk)
                rest = len(chunk) if stop is None else len(chunk) - max(0, self._position - stop)
                if skipped < rest:
                    yield chunk[skipped:rest] if skipped or rest < len(chunk) else chunk
                    start = self._position
                if stop is not None and self._position >= stop:
                    return
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise self._transport.broken(self._response, error) from error

    async def close(self) -> None:
        # Not release(): that would read the rest of a large body.
        self._response.close()


def _media_type(response: aiohttp.ClientResponse) -> str:
    return response.headers.get("Content-Type", "").partition(";")[0].strip()


def stated_digest(response: aiohttp.ClientResponse) -> Digest | None:
    text = response.headers.get("Docker-Content-Digest", "")
    try:
        return Digest.parse(text)
    except RegistryError:
        return None

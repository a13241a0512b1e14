"""The pull half of a registry across the network: its answers become our values and errors.

What upstreams get wrong is put right here or refused here: a missing digest or length, a Content-Type
with parameters or of no use, a compressed manifest though identity was asked, a 200 to a Range, content
that is not what its digest says.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from copy import copy
from typing import Any, NoReturn, Self

import aiohttp
import structlog

from proxy.telemetry.metrics import Metrics
from proxy.upstream.breaker import HostState
from proxy.upstream.credentials import Credentials
from proxy.upstream.requests import RequestSender, Settings, UpstreamRequest, encoding_of
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
    parse_manifest,
)
from storage.registry import Blob, Registry

log = structlog.get_logger()

ACCEPT = ", ".join(
    (OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST, f"{DOCKER_SCHEMA1};q=0.5", "*/*;q=0.1")
)
# Types that say nothing: some upstreams serve manifests as these.
_VAGUE = frozenset(("", "application/json", "text/plain", "text/html", OCTETS))


class UpstreamReader(Registry):
    """Needs a running event loop.  Of `credentials` there is at least one."""

    def __init__(
        self,
        name: str,
        settings: Settings,
        credentials: Sequence[Credentials],
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._sender = RequestSender(name, settings, credentials, metrics, clock)
        self.host = self._sender.host

    def as_caller(self, credentials: Credentials) -> Self:
        """The same, by the same connections, with credentials that are not ours.  To be closed before it."""
        caller = copy(self)
        caller._sender = self._sender.as_caller(credentials)
        return caller

    @property
    def well(self) -> bool:
        """As far as is known, it answers."""
        return self._sender.well

    @property
    def due(self) -> bool:
        """It did not answer, and it is time to find out whether it does."""
        return self._sender.due

    @property
    def spares(self) -> bool:
        """Its rate limit allows more than what is kept in reserve."""
        return self._sender.budgets.spares(self._sender.reserve)

    def state(self) -> list[HostState]:
        """Of the upstream itself first, then of where it has sent us."""
        return self._sender.state()

    async def probe(self) -> None:
        """Find out; `well` tells."""
        await self._sender.probe()

    async def _ask(
        self, method: str, repository: str, path: str, kind: str, headers: dict[str, str]
    ) -> aiohttp.ClientResponse:
        url = self._sender.to(f"{repository}/{path}")
        return await self._sender.send(UpstreamRequest(method, url, kind, repository, headers))

    def _pages(self, path: str, kind: str, repository: str = "", also: str = "") -> AsyncIterator[Any]:
        return self._sender.pages(UpstreamRequest("GET", self._sender.to(path), kind, repository, also=also))

    # Blobs

    async def get_blob(self, repository: str, digest: Digest, span: Span | None = None) -> Blob:
        headers = {}
        if span is not None:
            headers["Range"] = f"bytes={span.start}-{'' if span.stop is None else span.stop - 1}"
        response = await self._ask("GET", repository, f"blobs/{digest}", "blob", headers)
        try:
            start, size = self._extent(response, span)
            if encoding_of(response):
                raise OriginFailed(f"{self._name} encoded {digest} though identity was asked for")
            if size < 0:
                # Clients want a length, and progress needs one.
                size = (await self.resolve_blob(repository, digest)).size
            descriptor = Descriptor(OCTETS, digest, size)
            return _Download(self._sender.transport, response, descriptor, start, self._sender.took)
        except BaseException:
            response.close()
            raise

    def _extent(self, response: aiohttp.ClientResponse, span: Span | None) -> tuple[int, int]:
        """Where the body starts in the blob, and the blob's size, or -1."""
        if response.status != 206:
            return 0, _length(response)
        # RFC 9110 §14.4
        unit, _, rest = response.headers.get("Content-Range", "").partition(" ")
        positions, _, total = rest.partition("/")
        start = positions.partition("-")[0].strip()
        if unit != "bytes" or not start.isdigit() or span is None or int(start) != span.start:
            raise OriginFailed(f"{self._name} answered a range with another one")
        return span.start, int(total) if total.isdigit() else -1

    async def resolve_blob(self, repository: str, digest: Digest) -> Descriptor:
        path = f"blobs/{digest}"
        try:
            response = await self._ask("HEAD", repository, path, "blob", {})
        except Unsupported:  # no HEAD there: ask for the content, and leave it
            response = await self._ask("GET", repository, path, "blob", {})
        response.close()
        return Descriptor(OCTETS, digest, _length(response))

    # Manifests

    async def get_manifest(self, repository: str, reference: Reference) -> Manifest:
        headers = {"Accept": ACCEPT}
        async with await self._ask(
            "GET", repository, f"manifests/{reference}", "manifest", headers
        ) as response:
            content = await self._sender.content(response, MANIFEST_LIMIT)
            media_type = _media_type(response)
            if media_type in _VAGUE:
                try:
                    media_type = parse_manifest(content).media_type
                except ManifestInvalid:
                    raise OriginFailed(
                        f"{self._name} answered {reference} of {repository} with no manifest"
                    ) from None
            said = told_digest(response)
        if isinstance(reference, Digest):
            manifest = Manifest.of(media_type, content, reference.algorithm)
            if manifest.digest != reference:
                self._wrong(repository, reference, manifest.digest)
            return manifest
        manifest = Manifest.of(media_type, content, said.algorithm if said else "sha256")
        # Of a schema 1 manifest the digest leaves out its signatures.
        if said not in (None, manifest.digest) and media_type != DOCKER_SCHEMA1:
            self._wrong(repository, reference, manifest.digest)
        return manifest

    async def resolve_manifest(self, repository: str, reference: Reference) -> Descriptor:
        """Of a Tag only who knows it asks that: below the reserve it is refused with TooManyRequests."""
        if isinstance(reference, Tag) and not self.spares:
            raise TooManyRequests(f"what {self._name} still grants us is kept for what is not known yet")
        headers = {"Accept": ACCEPT}
        path = f"manifests/{reference}"
        try:
            async with await self._ask("HEAD", repository, path, "manifest", headers) as response:
                digest, size, media_type = told_digest(response), _length(response), _media_type(response)
            right = isinstance(reference, Tag) or digest == reference
            if digest is not None and right and size >= 0 and media_type not in _VAGUE:
                return Descriptor(media_type, digest, size)
        except Unsupported:
            pass
        # Some registries say too little on HEAD, or know none.
        return (await self.get_manifest(repository, reference)).descriptor

    # Listings

    async def tags(self, repository: str, last: str = "", limit: int | None = None) -> list[str]:
        found: set[str] = set()
        async for page in self._pages(f"{repository}/tags/list", "tags", repository):
            tags = page.get("tags") if isinstance(page, dict) else ""
            if not isinstance(tags, list | None):  # Distribution says null for none
                raise OriginFailed(f"{self._name} lists as tags of {repository} what is no list")
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
            # Clients then look for the fallback tag; on NAME_UNKNOWN they would give up.
            raise ManifestUnknown(
                f"{self._name} lists no referrers of {digest}; see the tag {digest.replace(':', '-')}"
            ) from None
        return [each for each in found if artifact_type in (None, each.artifact_type)]

    async def repositories(self, last: str = "", limit: int | None = None) -> list[str]:
        """Of those that list them.  Raises Unsupported else."""
        found: set[str] = set()
        # Distribution, "Listing Repositories"; and the scope that its token servers know for it.
        async for page in self._pages("_catalog", "catalog", also="registry:catalog:*"):
            names = page.get("repositories") if isinstance(page, dict) else ""
            if not isinstance(names, list | None):
                raise OriginFailed(f"{self._name} lists as repositories what is no list")
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
        raise OriginFailed(f"{self._name} sent for {reference} of {repository} what is {found}")

    async def close(self) -> None:
        await self._sender.close()


class _Download(Blob):
    """A body under way; it can be read once."""

    def __init__(
        self,
        transport: Transport,
        response: aiohttp.ClientResponse,
        descriptor: Descriptor,
        start: int,
        took: Callable[[int], Awaitable[None]],
    ) -> None:
        self.descriptor = descriptor
        self._took = took
        self._transport = transport
        self._response = response
        self._position = start

    async def chunks(self, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        if start < self._position:
            raise ValueError(f"the body is past byte {start}")
        try:
            async for chunk in self._response.content.iter_any():
                await self._took(len(chunk))
                # An upstream that ignores Range sends what we have once more.
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
        # Not release(): that would read what is left of a large body.
        self._response.close()


def _media_type(response: aiohttp.ClientResponse) -> str:
    return response.headers.get("Content-Type", "").partition(";")[0].strip()


def _length(response: aiohttp.ClientResponse) -> int:
    """Of the content, in bytes; -1 where it is not told, or is that of its encoded form."""
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdigit() and not encoding_of(response) else -1


def told_digest(response: aiohttp.ClientResponse) -> Digest | None:
    text = response.headers.get("Docker-Content-Digest", "")
    try:
        return Digest.parse(text)
    except RegistryError:
        return None

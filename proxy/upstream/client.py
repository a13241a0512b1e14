"""A remote registry, as a Registry: its responses become values and errors.

Mistakes of upstreams are corrected or refused here: a missing digest or length, a useless Content-Type or
one with parameters, a compressed manifest although identity was requested, a 200 in answer to a Range, or
content that does not match its digest.

Pushes are never retried here: the caller knows what is worth another attempt.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from copy import copy
from operator import attrgetter
from typing import Any, NoReturn, Self
from urllib.parse import quote

import aiohttp
import structlog

from proxy.telemetry.metrics import Metrics
from proxy.upstream.breaker import HostState
from proxy.upstream.credentials import Credentials
from proxy.upstream.encoding import encoding_of
from proxy.upstream.messages import PeerLink, UpstreamRequest
from proxy.upstream.pages import pages
from proxy.upstream.requests import RequestSender, UpstreamSettings
from proxy.upstream.responses import Download, stated_digest, stated_extent, stated_length, stated_media_type
from proxy.upstream.shared_limits import KnownUpstream
from proxy.upstream.upload import WRITTEN, UploadSession, UpstreamUpload
from storage.concurrency import run_sized
from storage.conditions import ALWAYS, Conditions
from storage.errors import (
    BlobUnknown,
    ManifestInvalid,
    ManifestUnknown,
    NameUnknown,
    OriginFailed,
    RangeInvalid,
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
from storage.registry import Blob, Registry, Upload, everything, referrers_page

log = structlog.get_logger()

ACCEPT = ", ".join(
    (OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST, f"{DOCKER_SCHEMA1};q=0.5", "*/*;q=0.1")
)
# Types without meaning: some upstreams serve manifests as these.
_VAGUE = frozenset(("", "application/json", "text/plain", "text/html", OCTETS))


class UpstreamRegistry(Registry):
    """A remote registry that can be pulled from and pushed to.

    It is made inside a running event loop.  Raises ValueError if `credentials` is empty.
    """

    def __init__(
        self,
        name: str,
        settings: UpstreamSettings,
        credentials: Sequence[Credentials],
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not credentials:
            raise ValueError(
                f"{name}: credentials is empty: give at least one, such as Credentials() for none"
            )
        self._name = name
        self._sender = RequestSender(name, settings, credentials, metrics, clock)
        self._listings = settings.listings
        self.host = self._sender.host
        self._unread: dict[tuple[str, Digest], Manifest] = {}  # at most one
        self._prefix = ""  # of the names of repositories

    def as_caller(self, credentials: Credentials) -> Self:
        """This registry with a client's credentials, over the same connections.  Close it before this one."""
        caller = copy(self)
        caller._sender = self._sender.as_caller(credentials)
        caller._unread = {}
        return caller

    def as_peer(self, namespace: str, link: PeerLink) -> Self:
        """A namespace of another replica, over the same connections.  Only this one is to be closed."""
        peer = copy(self)
        peer._sender = self._sender.as_peer(link)
        peer._prefix = f"{namespace}/"
        peer._unread = {}
        return peer

    @property
    def known(self) -> KnownUpstream:
        """What is known of it, to be told to other replicas."""
        return self._sender.known

    @property
    def healthy(self) -> bool:
        """Whether it answers, as far as is known."""
        return self._sender.healthy

    @property
    def probe_due(self) -> bool:
        """Whether it has failed and it is time to probe it."""
        return self._sender.probe_due

    @property
    def pause(self) -> float | None:
        """Seconds until to ask it again, if one of its hosts may be back in a moment; else None."""
        return self._sender.transport.pause

    @property
    def moment(self) -> float:
        """For how many seconds one of its hosts may be away that restarts."""
        return self._sender.transport.moment

    @property
    def lost(self) -> bool:
        """Whether its own host has failed, and may be back in a moment."""
        return self._sender.transport.lost

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

    def _request(
        self, method: str, repository: str, path: str, kind: str, headers: dict[str, str]
    ) -> UpstreamRequest:
        url = self._sender.url(f"{self._prefix}{repository}/{path}")
        return UpstreamRequest(method, url, kind, repository, headers)

    async def _send(
        self, method: str, repository: str, path: str, kind: str, headers: dict[str, str]
    ) -> aiohttp.ClientResponse:
        return await self._sender.send(self._request(method, repository, path, kind, headers))

    def _pages(self, path: str, kind: str, repository: str = "", also: str = "") -> AsyncIterator[Any]:
        request = UpstreamRequest("GET", self._sender.url(self._prefix + path), kind, repository, also=also)
        return pages(self._sender, request, self._listings)

    # Pulling blobs

    async def get_blob(self, repository: str, digest: Digest, span: Span | None = None) -> Blob:
        last = "" if span is None or span.stop is None else span.stop - 1
        headers = {} if span is None else {"Range": f"bytes={span.start}-{last}"}
        try:
            response = await self._send("GET", repository, f"blobs/{digest}", "blob", headers)
        except RangeInvalid:  # go-containerregistry's registry refuses each range without an end
            if span is None or span.stop is not None:
                raise
            if (size := (await self.resolve_blob(repository, digest)).size) <= span.start:
                raise
            return await self.get_blob(repository, digest, Span(span.start, size))
        try:
            start, size = stated_extent(self._name, response, span)
            if encoding_of(response):
                raise OriginFailed(f"{self._name} sent {digest} encoded, although identity was requested")
            if size < 0:
                # Clients want a length, and progress reports need one.
                size = (await self.resolve_blob(repository, digest)).size
            descriptor = Descriptor(OCTETS, digest, size)
            return Download(self._sender.transport, response, descriptor, start, self._sender.received)
        except BaseException:
            response.close()
            raise

    async def resolve_blob(self, repository: str, digest: Digest) -> Descriptor:
        path = f"blobs/{digest}"
        try:
            response = await self._send("HEAD", repository, path, "blob", {})
        except Unsupported:  # it does not support HEAD: request the content, and drop it
            response = await self._send("GET", repository, path, "blob", {})
        response.close()
        return Descriptor(OCTETS, digest, stated_length(self._name, response))

    # Pulling manifests

    async def get_manifest(self, repository: str, reference: Reference) -> Manifest:
        if isinstance(reference, Digest) and (unread := self._unread.pop((repository, reference), None)):
            return unread
        request = self._request("GET", repository, f"manifests/{reference}", "manifest", {"Accept": ACCEPT})
        response, content = await self._sender.document(request, MANIFEST_LIMIT)
        media_type = stated_media_type(response)
        if media_type in _VAGUE:
            try:
                media_type = await run_sized(len(content), media_type_of, content)
            except ManifestInvalid:
                raise OriginFailed(f"{self._name} sent no manifest for {reference} of {repository}") from None
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
        path = f"manifests/{reference}"
        try:
            async with await self._send("HEAD", repository, path, "manifest", {"Accept": ACCEPT}) as response:
                digest = stated_digest(response)
                size = stated_length(self._name, response)
                media_type = stated_media_type(response)
            matches = isinstance(reference, Tag) or digest == reference
            if digest is not None and matches and size >= 0 and media_type not in _VAGUE:
                return Descriptor(media_type, digest, size)
        except Unsupported:
            pass
        # Some registries send too few headers on HEAD, or do not support it.  Some of these know no digests.
        manifest = await self.get_manifest(repository, reference)
        self._unread = {(repository, manifest.digest): manifest}
        return manifest.descriptor

    # Listings

    async def tags(self, repository: str, last: str = "", limit: int | None = None) -> list[str]:
        found: set[str] = set()
        async for page in self._pages(f"{repository}/tags/list", "tags", repository):
            tags = page.get("tags") if isinstance(page, dict) else ""
            if not isinstance(tags, list | None):  # Distribution sends null for none
                raise OriginFailed(f"{self._name} sent no list for the tags of {repository}")
            found.update(tag for tag in tags or () if isinstance(tag, str) and tag > last)
        return sorted(found)[:limit]

    async def referrers(
        self,
        repository: str,
        digest: Digest,
        artifact_type: str | None = None,
        last: str = "",
        limit: int | None = None,
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
        ordered = sorted((each for each in found if each.digest > last), key=attrgetter("digest"))
        return referrers_page([ordered], artifact_type, limit)

    async def repositories(self, last: str = "", limit: int | None = None) -> list[str]:
        """Raises Unsupported if the registry does not list them."""
        found: set[str] = set()
        # Distribution, "Listing Repositories"; and the scope of its token servers for that.
        async for page in self._pages("_catalog", "catalog", also="registry:catalog:*"):
            names = page.get("repositories") if isinstance(page, dict) else ""
            if not isinstance(names, list | None):
                raise OriginFailed(f"{self._name} sent no list of its repositories")
            found.update(name for name in names or () if isinstance(name, str) and name > last)
        return sorted(found)[:limit]

    # Pushing and deleting blobs

    async def start_upload(
        self, repository: str, size: int | None = None, algorithm: str = "sha256"
    ) -> Upload:
        session = UploadSession(self._sender, repository)
        # distribution-spec, end-4c: sha256 is the default.
        await session.begin("" if algorithm == "sha256" else f"?digest-algorithm={algorithm}")
        return UpstreamUpload(session)

    async def resume_upload(self, repository: str, id: str) -> Upload:
        session = UploadSession(self._sender, repository)
        return UpstreamUpload(session, await session.find(id))

    async def mount_blob(
        self,
        repository: str,
        digest: Digest,
        source: str | None = None,
        visible: Callable[[str], bool] = everything,
    ) -> Descriptor:
        """Without `source` only if everything is `visible`: the registry does not check `visible`."""
        if source is None and visible is not everything:
            raise BlobUnknown(f"{self._name} cannot mount {digest} without a source repository")
        session = UploadSession(self._sender, repository)
        query = f"?mount={quote(digest, safe='')}" + (f"&from={quote(source, safe='')}" if source else "")
        if await session.begin(query, also=f"repository:{source}:pull" if source else ""):
            # It does not mount, and has started an upload instead.
            await UpstreamUpload(session).cancel()
            raise BlobUnknown(f"{self._name} does not mount {digest} from {source or 'anywhere'}")
        return await self.resolve_blob(repository, digest)

    async def delete_blob(self, repository: str, digest: Digest, when: Conditions = ALWAYS) -> None:
        self._refuse(when)
        await self._delete(repository, f"blobs/{digest}", "blob")

    # Pushing and deleting manifests

    async def push_manifest(
        self,
        repository: str,
        reference: Reference,
        manifest: Manifest,
        tags: Sequence[Tag] = (),
        when: Conditions = ALWAYS,
    ) -> Descriptor:
        """If the registry does not accept several tags in one request, each is pushed by itself."""
        self._refuse(when)
        # Pushed by tag, a manifest gets a sha256 digest, whatever digest it has.
        if not tags and (isinstance(reference, Digest) or manifest.digest.algorithm == "sha256"):
            await self._push(repository, str(reference), manifest)
            return manifest.descriptor
        all_tags = dict.fromkeys((reference, *tags) if isinstance(reference, Tag) else tags)
        digest = manifest.digest if isinstance(reference, Tag) else reference
        # distribution-spec, end-7b: tags may follow a digest.
        query = "&".join(f"tag={tag}" for tag in all_tags)
        confirmed = await self._push(repository, f"{digest}?{query}", manifest)
        for tag in all_tags:
            if tag not in confirmed:
                await self._push(repository, tag, manifest)
        return manifest.descriptor

    async def _push(self, repository: str, path: str, manifest: Manifest) -> set[str]:
        """The tags that the registry confirms."""
        url = self._sender.url(f"{repository}/manifests/{path}")
        headers = {"Content-Type": manifest.media_type}
        request = UpstreamRequest(
            "PUT", url, "manifest", repository, headers, manifest.content, granted=WRITTEN
        )
        response = await self._sender.send(request)
        response.release()
        stated = stated_digest(response)
        # The digest of a schema 1 manifest does not cover its signatures.
        same = stated is None or stated.algorithm != manifest.digest.algorithm or stated == manifest.digest
        if not same and manifest.media_type != DOCKER_SCHEMA1:
            raise OriginFailed(f"{self._name} stored {manifest.digest} of {repository} as {stated}")
        values = response.headers.getall("OCI-Tag", ())
        return {tag.strip() for value in values for tag in value.split(",")}

    async def delete_manifest(self, repository: str, reference: Reference, when: Conditions = ALWAYS) -> None:
        self._refuse(when)
        await self._delete(repository, f"manifests/{reference}", "manifest")

    def _refuse(self, when: Conditions) -> None:
        if when:
            raise Unsupported(f"{self._name} may ignore preconditions, as Distribution does")

    async def _delete(self, repository: str, path: str, kind: str) -> None:
        request = UpstreamRequest(
            "DELETE", self._sender.url(f"{repository}/{path}"), kind, repository, granted=WRITTEN
        )
        (await self._sender.send(request)).release()

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

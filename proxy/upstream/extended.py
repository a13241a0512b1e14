"""An upstream that is an extension, as a Registry: what it returns is checked as that of a remote one is."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

from proxy.extensions.extension import Extension
from proxy.extensions.protocols import OfferedBlob, OfferedManifest
from proxy.telemetry.metrics import Metrics
from storage.errors import BlobUnknown, ManifestUnknown, NameUnknown, RegistryError
from storage.oci import MANIFEST_LIMIT, OCTETS, Descriptor, Digest, Manifest, Reference, Span, Tag
from storage.registry import Blob, Registry

_NOTHING = type(None)


class ExtendedUpstream(Registry):
    """The content that an extension of the kind `upstream` has.  Every method may raise ExtensionFailed."""

    def __init__(self, name: str, extension: Extension, metrics: Metrics) -> None:
        self._name = name
        self._extension = extension
        self._traffic = metrics.traffic(metrics.label(name))

    async def get_blob(self, repository: str, digest: Digest, span: Span | None = None) -> Blob:
        start = 0 if span is None else span.start
        self._traffic.count_request()
        given = repository, str(digest), start
        found = await self._extension.call("blob", *given, gives=(OfferedBlob, _NOTHING))
        if found is None:
            raise BlobUnknown(f"{self._name} has no {digest} in {repository}")
        descriptor = Descriptor(OCTETS, digest, found.size)
        return _ExtensionBlob(self._extension, descriptor, start, found.chunks, self._traffic.count_received)

    async def resolve_blob(self, repository: str, digest: Digest) -> Descriptor:
        blob = await self.get_blob(repository, digest)
        await blob.close()
        return blob.descriptor

    async def get_manifest(self, repository: str, reference: Reference) -> Manifest:
        self._traffic.count_request()
        given = repository, str(reference)
        found = await self._extension.call("manifest", *given, gives=(OfferedManifest, _NOTHING))
        if found is None:
            raise ManifestUnknown(f"{self._name} has no {reference} of {repository}")
        if len(found.content) > MANIFEST_LIMIT:
            raise self._extension.wrong(f"returned a manifest of {len(found.content)} bytes")
        self._traffic.count_received(len(found.content))
        algorithm = reference.algorithm if isinstance(reference, Digest) else "sha256"
        manifest = Manifest.of(found.media_type, found.content, algorithm)
        if isinstance(reference, Digest) and manifest.digest != reference:
            raise self._extension.wrong(f"returned {manifest.digest} for {reference} of {repository}")
        return manifest

    async def resolve_manifest(self, repository: str, reference: Reference) -> Descriptor:
        return (await self.get_manifest(repository, reference)).descriptor

    async def tags(self, repository: str, last: str = "", limit: int | None = None) -> list[str]:
        self._traffic.count_request()
        found: Any = await self._extension.call("tags", repository, gives=(list, tuple, _NOTHING))
        if found is None:
            raise NameUnknown(f"{self._name} has no {repository}")
        try:
            known = sorted({Tag.parse(each) for each in found})
        except (RegistryError, TypeError) as error:
            raise self._extension.wrong(f"returned what is no tag: {error}") from None
        return [str(each) for each in known if each > last][:limit]

    async def referrers(
        self,
        repository: str,
        digest: Digest,
        artifact_type: str | None = None,
        last: str = "",
        limit: int | None = None,
    ) -> list[Descriptor]:
        raise ManifestUnknown(f"{self._name} is an extension, and lists no referrers")


class _ExtensionBlob(Blob):
    """The bytes of a blob from `start` on, which come from the thread of an extension."""

    def __init__(
        self,
        extension: Extension,
        descriptor: Descriptor,
        start: int,
        chunks: AsyncIterator[bytes],
        received: Callable[[int], None],
    ) -> None:
        self.descriptor = descriptor
        self.position = self._position = start
        self._extension = extension
        self._chunks = chunks
        self._received = received
        self._ended = False

    async def chunks(self, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        end = self.descriptor.size if stop is None else min(stop, self.descriptor.size)
        while self._position < end:
            chunk = await self._next()
            first, self._position = self._position, self._position + len(chunk)
            if kept := chunk[max(0, start - first) : end - first]:
                yield kept

    async def _next(self) -> bytes:
        """Raises ExtensionFailed, also at the end, and after more than there should be."""
        found = await self._extension.attend(lambda: _following(self._chunks), (bytes, _NOTHING))
        size, digest = self.descriptor.size, self.descriptor.digest
        if found is None:
            raise self._extension.wrong(f"ended {digest} at byte {self._position} of {size}")
        if self._position + len(found) > size:
            raise self._extension.wrong(f"sent more of {digest} than its {size} bytes")
        self._received(len(found))
        return found

    async def close(self) -> None:
        close = getattr(self._chunks, "aclose", None)
        if close is not None and not self._ended:
            self._ended = True
            self._extension.release(close)


async def _following(chunks: AsyncIterator[bytes]) -> bytes | None:
    """The next chunk; None at the end."""
    return await anext(chunks, None)

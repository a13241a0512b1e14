"""Finds what signs an image, in the repository of the image itself.

- cosign's tags `sha256-….sig` and `.att`: cosign, specs/SIGNATURE_SPEC.md;
- the referrers API, and the tag that stands in for it: distribution-spec, "Listing Referrers".  Clients write
  that tag even where there is the API, so both are looked at.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import suppress

from proxy.signatures.forms import BUNDLES, CLASSIC_ARTIFACT, FORMS, NOTARY_ARTIFACT, FoundSignature
from storage.errors import BlobUnknown, ManifestInvalid, StorageFailed, TagInvalid, Unavailable
from storage.graph import UNLISTED, contents, fallback_tag, signature_tags
from storage.names import written
from storage.oci import Descriptor, Digest, Manifest, Reference, Tag, parse_manifest
from storage.registry import Registry

MOST = 200  # referrers that are looked at
LARGEST = 16 << 20  # bytes of a signature or an attestation
MOST_BYTES = 64 << 20  # of all that is looked at
_ABSENT = (*UNLISTED, BlobUnknown)
_TYPES = (None, *BUNDLES, CLASSIC_ARTIFACT, NOTARY_ARTIFACT)  # None: the list does not say


class SignatureFinder:
    """Finds what signs manifests of a repository, given by its name in `registry`.

    It reads no more than MOST_BYTES, so that an upstream cannot keep it busy.
    """

    def __init__(self, registry: Registry, repository: str) -> None:
        self._registry = registry
        self._repository = repository
        self._left = MOST_BYTES

    async def find(self, digest: Digest) -> AsyncGenerator[FoundSignature, None]:
        """What claims to sign the manifest, each once; nothing is verified.

        What cannot be asked for now is raised at the end, as Unavailable: what is there may be enough.
        """
        failure: Unavailable | None = None
        seen = {digest}
        for ask in (self._tagged, self._referrers, self._listed):
            try:
                found = await ask(digest)
            except Unavailable as error:
                failure = error
                continue
            for each in found:
                if each in seen:
                    continue
                seen.add(each)
                try:
                    if (manifest := await self._manifest(each)) is not None:
                        async for signature in self._read(manifest):
                            yield signature
                except Unavailable as error:
                    failure = error
        if failure is not None:
            raise failure

    async def _tagged(self, digest: Digest) -> list[Digest]:
        found = []
        for tag in signature_tags(digest)[:2]:  # not SBOMs
            with suppress(TagInvalid):  # that of a digest by SHA-512 is too long
                if (manifest := await self._manifest(Tag.parse(tag))) is not None:
                    found.append(manifest.digest)
        return found

    async def _referrers(self, digest: Digest) -> list[Digest]:
        try:
            listed = await self._registry.referrers(self._repository, digest, limit=MOST)
        except UNLISTED:
            return []
        return list(_signing(listed))

    async def _listed(self, digest: Digest) -> list[Digest]:
        if (index := await self._manifest(fallback_tag(digest))) is None:
            return []
        with suppress(ManifestInvalid):
            return list(_signing(parse_manifest(index.content).listed[:MOST]))
        return []

    async def _manifest(self, reference: Reference) -> Manifest | None:
        with suppress(*_ABSENT):
            return await self._registry.get_manifest(self._repository, reference)
        return None

    async def _read(self, manifest: Manifest) -> AsyncIterator[FoundSignature]:
        content = contents(manifest.content)
        source = written(self._repository, manifest.digest)
        for layer in content.layers if content else ():
            if layer.media_type in FORMS and 0 <= layer.size <= min(LARGEST, self._left):
                self._left -= layer.size
                with suppress(*_ABSENT):
                    read = await self._blob(layer)
                    yield FoundSignature(source, layer.media_type, read, layer.annotations or {})

    async def _blob(self, layer: Descriptor) -> bytes:
        """Raises BlobUnknown, and StorageFailed if the content is not what the manifest says."""
        blob = await self._registry.get_blob(self._repository, layer.digest)
        try:
            parts = [bytes(each) async for each in blob.chunks(0, layer.size)]
        finally:
            await blob.close()
        content = b"".join(parts)
        if Digest.of(content, layer.digest.algorithm) != layer.digest:
            raise StorageFailed(f"{layer.digest} is damaged")
        return content


def _signing(listed: list[Descriptor] | tuple[Descriptor, ...]) -> Iterator[Digest]:
    return (each.digest for each in listed if each.artifact_type in _TYPES)

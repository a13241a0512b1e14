"""A remote registry, as a Registry.

reader.py has the pull half; here are pushing and deleting.  They are never retried here: the caller knows
what is worth another attempt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from urllib.parse import quote

from proxy.upstream.reader import UpstreamReader, stated_digest
from proxy.upstream.requests import UpstreamRequest
from proxy.upstream.upload import WRITTEN, UploadSession, UpstreamUpload
from storage.errors import BlobUnknown, OriginFailed
from storage.oci import DOCKER_SCHEMA1, Descriptor, Digest, Manifest, Reference, Tag
from storage.registry import Upload, everything


class UpstreamRegistry(UpstreamReader):
    """A remote registry that can be pulled from and pushed to."""

    # Blobs

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

    async def delete_blob(self, repository: str, digest: Digest) -> None:
        await self._delete(repository, f"blobs/{digest}", "blob")

    # Manifests

    async def push_manifest(
        self, repository: str, reference: Reference, manifest: Manifest, tags: Sequence[Tag] = ()
    ) -> Descriptor:
        """If the registry does not accept several tags in one request, each is pushed by itself."""
        # Pushed by tag, a manifest gets a sha256 digest, whatever digest it has.
        if not tags and (isinstance(reference, Digest) or manifest.digest.algorithm == "sha256"):
            await self._push(repository, str(reference), manifest)
            return manifest.descriptor
        wanted = dict.fromkeys((reference, *tags) if isinstance(reference, Tag) else tags)
        digest = manifest.digest if isinstance(reference, Tag) else reference
        # distribution-spec, end-7b: tags may follow a digest.
        query = "&".join(f"tag={tag}" for tag in wanted)
        taken = await self._push(repository, f"{digest}?{query}", manifest)
        for tag in wanted:
            if tag not in taken:
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
        taken = response.headers.getall("OCI-Tag", ())
        return {tag.strip() for value in taken for tag in value.split(",")}

    async def delete_manifest(self, repository: str, reference: Reference) -> None:
        await self._delete(repository, f"manifests/{reference}", "manifest")

    async def _delete(self, repository: str, path: str, kind: str) -> None:
        request = UpstreamRequest(
            "DELETE", self._sender.url(f"{repository}/{path}"), kind, repository, granted=WRITTEN
        )
        (await self._sender.send(request)).release()

"""A registry across the network, as a Registry.

What is pulled from it is in reading.py; here is what is pushed to it, and deleted there.  Nothing of that is
repeated by itself when it fails: who pushes knows what is worth another try.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from urllib.parse import quote

from proxy.upstream.reader import UpstreamReader, told_digest
from proxy.upstream.requests import UpstreamRequest
from proxy.upstream.upload import WRITTEN, UploadSession, UpstreamUpload
from storage.errors import BlobUnknown, OriginFailed
from storage.oci import DOCKER_SCHEMA1, Descriptor, Digest, Manifest, Reference, Tag
from storage.registry import Upload, everything


class UpstreamRegistry(UpstreamReader):
    """Needs a running event loop.  Of `credentials` there is at least one."""

    # Blobs

    async def start_upload(
        self, repository: str, size: int | None = None, algorithm: str = "sha256"
    ) -> Upload:
        session = UploadSession(self._sender, repository)
        # distribution-spec, end-4c: sha256 is taken for granted.
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
        """Without `source` only where everything is `visible`: the registry would not ask."""
        if source is None and visible is not everything:
            raise BlobUnknown(f"{self._name} cannot tell where {digest} would be mounted from")
        session = UploadSession(self._sender, repository)
        query = f"?mount={quote(digest, safe='')}" + (f"&from={quote(source, safe='')}" if source else "")
        if await session.begin(query, also=f"repository:{source}:pull" if source else ""):
            # It does not mount, and has begun an upload in place of it.
            await UpstreamUpload(session).cancel()
            raise BlobUnknown(f"{self._name} does not mount {digest} from {source or 'anywhere'}")
        return await self.resolve_blob(repository, digest)

    async def delete_blob(self, repository: str, digest: Digest) -> None:
        await self._delete(repository, f"blobs/{digest}", "blob")

    # Manifests

    async def push_manifest(
        self, repository: str, reference: Reference, manifest: Manifest, tags: Sequence[Tag] = ()
    ) -> Descriptor:
        """Where the registry does not take several tags at once, they come one after the other."""
        # By a tag a registry would give it a sha256 digest, whatever it has.
        if not tags and (isinstance(reference, Digest) or manifest.digest.algorithm == "sha256"):
            await self._push(repository, str(reference), manifest)
            return manifest.descriptor
        wanted = dict.fromkeys((reference, *tags) if isinstance(reference, Tag) else tags)
        digest = manifest.digest if isinstance(reference, Tag) else reference
        # distribution-spec, end-7b: beside a digest.
        query = "&".join(f"tag={tag}" for tag in wanted)
        taken = await self._push(repository, f"{digest}?{query}", manifest)
        for tag in wanted:
            if tag not in taken:
                await self._push(repository, tag, manifest)
        return manifest.descriptor

    async def _push(self, repository: str, path: str, manifest: Manifest) -> set[str]:
        """The tags that it says it took."""
        url = self._sender.to(f"{repository}/manifests/{path}")
        headers = {"Content-Type": manifest.media_type}
        question = UpstreamRequest(
            "PUT", url, "manifest", repository, headers, manifest.content, granted=WRITTEN
        )
        response = await self._sender.send(question)
        response.release()
        told = told_digest(response)
        # Of a schema 1 manifest the digest leaves out its signatures.
        same = told is None or told.algorithm != manifest.digest.algorithm or told == manifest.digest
        if not same and manifest.media_type != DOCKER_SCHEMA1:
            raise OriginFailed(f"{self._name} made {told} of {manifest.digest} in {repository}")
        taken = response.headers.getall("OCI-Tag", ())
        return {tag.strip() for value in taken for tag in value.split(",")}

    async def delete_manifest(self, repository: str, reference: Reference) -> None:
        await self._delete(repository, f"manifests/{reference}", "manifest")

    async def _delete(self, repository: str, path: str, kind: str) -> None:
        question = UpstreamRequest(
            "DELETE", self._sender.to(f"{repository}/{path}"), kind, repository, granted=WRITTEN
        )
        (await self._sender.send(question)).release()

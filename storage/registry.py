"""What an OCI registry can do, whoever does it.

Upstream, Store, Cache and Namespaces all are Registries; the HTTP server talks to a Registry and does
not know which.  A method left out raises Unsupported, so a read-only registry is one that overrides
only the pull half.  Any method may raise Denied or Unavailable (errors.py) besides what it names.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

from storage.errors import Unsupported
from storage.oci import Descriptor, Digest, Manifest, Reference, Span, Tag

# Told of a tag that has moved: its repository, by the full name, the tag, the old digest and the new one.
Moved: TypeAlias = Callable[[str, Tag, Digest, Digest], Awaitable[None]]


def everything(repository: str) -> bool:
    return True


class Blob:
    """One blob, open for reading.  It stays readable when it is evicted or deleted.  Close it."""

    descriptor: Descriptor

    def chunks(self, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        """The bytes of [start, stop) in order; waits where they are still on their way.

        Raises what the transfer failed with; then fewer bytes than promised have been yielded.
        """
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError


@runtime_checkable
class OnDisk(Protocol):
    """A Blob whose bytes can be sent from a file: `fileno` is a descriptor opened for reading."""

    descriptor: Descriptor

    def fileno(self) -> int: ...

    async def readable(self, offset: int) -> int:
        """Wait for bytes past `offset`; return where they end for now.  Raises as chunks() does."""
        ...


class Upload:
    """Bytes on their way to becoming a blob; invisible until commit()."""

    id: str
    offset: int

    async def write(self, chunk: bytes) -> None:
        """Append.  May return before the bytes are on disk; what went wrong then is raised later."""
        raise NotImplementedError

    async def commit(self, digest: Digest) -> Descriptor:
        """Verify and make visible.  Raises DigestInvalid, and then the upload is cancelled."""
        raise NotImplementedError

    async def suspend(self, error: BaseException | None = None) -> None:
        """Let go of it, but keep the bytes, to go on with later; whoever follows gets `error`."""
        raise NotImplementedError

    async def cancel(self, error: BaseException | None = None) -> None:
        """Throw the bytes away; whoever follows gets `error`."""
        raise NotImplementedError


class Registry:
    """Every method raises Unsupported until overridden.  Repositories are valid names (oci.parse_name)."""

    # Pull

    async def get_blob(self, repository: str, digest: Digest, span: Span | None = None) -> Blob:
        """The caller will read only `span` of it; `descriptor.size` is the whole blob's all the same.

        Raises NameUnknown, BlobUnknown.
        """
        raise Unsupported("this registry serves no blobs")

    async def resolve_blob(self, repository: str, digest: Digest) -> Descriptor:
        """get_blob without the content.  Never starts a transfer.  Raises NameUnknown, BlobUnknown."""
        raise Unsupported("this registry serves no blobs")

    async def get_manifest(self, repository: str, reference: Reference) -> Manifest:
        """Raises NameUnknown, ManifestUnknown."""
        raise Unsupported("this registry serves no manifests")

    async def resolve_manifest(self, repository: str, reference: Reference) -> Descriptor:
        """get_manifest without the content.  Raises NameUnknown, ManifestUnknown."""
        raise Unsupported("this registry serves no manifests")

    async def tags(self, repository: str, last: str = "", limit: int | None = None) -> list[str]:
        """In lexical order, those after `last`, at most `limit`.  Raises NameUnknown."""
        raise Unsupported("this registry lists no tags")

    async def referrers(
        self, repository: str, digest: Digest, artifact_type: str | None = None
    ) -> list[Descriptor]:
        """What has `digest` as its subject; of `artifact_type` only, where given.

        Raises ManifestUnknown where the registry cannot tell (it has no referrers API).
        """
        raise Unsupported("this registry lists no referrers")

    async def repositories(self, last: str = "", limit: int | None = None) -> list[str]:
        """In lexical order, those after `last`, at most `limit`."""
        raise Unsupported("this registry lists no repositories")

    # Push

    async def start_upload(
        self, repository: str, size: int | None = None, algorithm: str = "sha256"
    ) -> Upload:
        """`size` in bytes, where it is known beforehand; `algorithm` is that of the digest to come."""
        raise Unsupported("this registry takes no pushes")

    async def resume_upload(self, repository: str, id: str) -> Upload:
        """Go on with one that was suspended, by whichever process.  Raises BlobUploadUnknown."""
        raise Unsupported("this registry takes no pushes")

    async def mount_blob(
        self,
        repository: str,
        digest: Digest,
        source: str | None = None,
        visible: Callable[[str], bool] = everything,
    ) -> Descriptor:
        """Show in `repository` what `source` shows already.

        Without `source`, whichever does of those that are `visible` to who asks: to know a digest is no
        permission.  Raises BlobUnknown, NameUnknown.
        """
        raise Unsupported("this registry takes no pushes")

    async def push_manifest(
        self, repository: str, reference: Reference, manifest: Manifest, tags: Sequence[Tag] = ()
    ) -> Descriptor:
        """With further `tags`; all of it or nothing happens.

        Raises ManifestInvalid, ManifestBlobUnknown, DigestInvalid.
        """
        raise Unsupported("this registry takes no pushes")

    async def delete_blob(self, repository: str, digest: Digest) -> None:
        """Raises NameUnknown, BlobUnknown."""
        raise Unsupported("this registry deletes nothing")

    async def delete_manifest(self, repository: str, reference: Reference) -> None:
        """Of a Tag only the tag goes, its manifest stays.  Raises NameUnknown, ManifestUnknown."""
        raise Unsupported("this registry deletes nothing")

    async def close(self) -> None:
        """Cancel what it started and let go of what it holds."""

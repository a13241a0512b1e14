"""The interface of an OCI registry, and of the blobs and uploads that it returns.

UpstreamRegistry, Store, Cache and Namespaces all are a Registry; the HTTP server does not know which one it
serves.  A method that is not overridden raises Unsupported: a read-only registry overrides only the methods
for pulls.  Any method may raise Denied or Unavailable (storage/errors.py) besides the errors that it names.
"""

from __future__ import annotations

import heapq
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from operator import attrgetter
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

from storage.conditions import ALWAYS, Conditions
from storage.errors import Unsupported
from storage.oci import Descriptor, Digest, Manifest, Reference, Span, Tag

# Reads into memory, as RawIOBase.readinto(), in any thread; returns how many bytes, 0 if none is there now.
ReadInto: TypeAlias = Callable[[memoryview], int]


NOTHING = Span(0, 0)


def everything(repository: str) -> bool:
    """A filter that accepts all repositories."""
    return True


def referrers_page(
    sources: Iterable[Iterable[Descriptor]], artifact_type: str | None, limit: int | None
) -> list[Descriptor]:
    """What referrers() returns, from sources that are each in the order of the digests.

    No more of them is read than is returned.  Of descriptors of the same digest the first one counts.
    """
    by_digest = attrgetter("digest")
    known = (next(same) for _, same in groupby(heapq.merge(*sources, key=by_digest), by_digest))
    return list(islice((each for each in known if artifact_type in (None, each.artifact_type)), limit))


class Blob:
    """A blob that is open for reading, and stays readable when it is evicted or deleted.  Close it."""

    descriptor: Descriptor
    position = 0  # of the first byte that an origin sends: 0 if it ignores the requested span
    whole = False  # an origin says that it sends all of the blob, whatever span was requested
    used_at = 0.0  # when a stored blob was last used before it was opened

    @property
    def unread(self) -> int:
        """How many bytes have come from an origin, and would be dropped by close(), as far as is known."""
        return 0

    async def begin(self, span: Span | None = None) -> None:
        """Ask for the bytes of `span`, if they are far away: so what fails does so before any is sent.

        For NOTHING it only sees whether they are there.  Raises BlobUnknown.
        """

    async def locate(self) -> str | None:
        """A URL from which anybody can fetch it for some time; None without one.  Raises BlobUnknown."""
        return None

    def chunks(self, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        """The bytes of [start, stop) in order; waits for bytes that are still in transfer.

        Raises the error of the transfer, after fewer bytes than expected.
        """
        raise NotImplementedError

    def incoming(self) -> Incoming | None:
        """The bytes from `position` on, for a thread to read; then chunks() is not called any more.

        None if only chunks() has them.
        """
        return None

    async def prepare(self, spans: Sequence[Span]) -> None:
        """Say what will be read; [] is all of it.  Raises the error with which that cannot be read at all."""

    async def close(self) -> None:
        """Release what it holds."""


class Incoming(Protocol):
    """The bytes of a transfer, which a thread reads into memory of its own."""

    async def pass_on(self, write: Callable[[ReadInto], Awaitable[int]]) -> bool:
        """Wait for bytes, and have them read by `write`, which returns how many; False at the end.

        Raises the error of the transfer.
        """
        ...


class RelayedBlob(Blob):
    """A blob whose bytes are those of another one, `blob`."""

    def __init__(self, blob: Blob) -> None:
        self.descriptor, self.position, self.whole = blob.descriptor, blob.position, blob.whole
        self._blob = blob
        self._incoming: Incoming | None = None

    @property
    def unread(self) -> int:
        return self._blob.unread

    def incoming(self) -> Incoming | None:
        self._incoming = self._blob.incoming()
        return self if self._incoming is not None else None

    async def pass_on(self, write: Callable[[ReadInto], Awaitable[int]]) -> bool:
        """As Incoming.pass_on(), which is called on what incoming() returns."""
        assert self._incoming is not None
        return await self._incoming.pass_on(write)

    async def close(self) -> None:
        await self._blob.close()


@runtime_checkable
class OnDisk(Protocol):
    """A blob whose bytes can be sent from a file; fileno() is a descriptor that is open for reading."""

    descriptor: Descriptor

    def fileno(self) -> int: ...

    async def readable(self, offset: int, stop: int | None = None) -> int:
        """Wait for bytes past `offset`; return where they end for now.  Raises the errors of chunks().

        `stop` is where those end that the reader wants; None is the end of the blob.
        """
        ...


class Located(NamedTuple):
    """A blob, and the URL from which anybody can fetch it for some time; `used_at` is that of the blob."""

    descriptor: Descriptor
    url: str
    used_at: float = 0.0


class Validity(NamedTuple):
    """How content is served now: `result`, `age` and `ttl` are those of an Exchange."""

    result: str = ""
    age: float | None = None
    ttl: float | None = None


@dataclass(frozen=True, slots=True)
class Held:
    """Content that a registry has, and may serve again without I/O but to see that it still may.

    content: None for a blob that is too large to be held
    validity: None if it is no longer served as it was, or if serving it has effects: ask the registry again.
        It may raise RegistryError for that, too.  It changes nothing.
    """

    descriptor: Descriptor
    content: bytes | None
    validity: Callable[[], Validity | None]


class Upload:
    """The bytes of a future blob, which nothing can read before commit()."""

    id: str
    offset: int

    def expect(self, size: int) -> None:
        """Set the size of the whole blob.  Raises StorageFailed if there is no room for it."""

    async def write(self, chunk: bytes) -> None:
        """Append.  May return before the bytes are on disk; an error is then raised by a later call."""
        raise NotImplementedError

    async def commit(self, digest: Digest) -> Descriptor:
        """Verify the bytes and make them a blob.  Raises DigestInvalid; the upload is then cancelled.

        Where Unavailable is raised, the upload can be resumed, and committed again; or cancelled.
        """
        raise NotImplementedError

    async def suspend(self, error: BaseException | None = None) -> None:
        """Stop, but keep the bytes so that the upload can be resumed; readers get `error`."""
        raise NotImplementedError

    async def cancel(self, error: BaseException | None = None) -> None:
        """Stop and remove the bytes; readers get `error`."""
        raise NotImplementedError


class Registry:
    """An OCI registry.  Every method raises Unsupported until it is overridden.

    Repositories are valid names (oci.parse_name).
    """

    # Pull

    async def get_blob(self, repository: str, digest: Digest, span: Span | None = None) -> Blob:
        """Open a blob, of which the caller reads only parts, `span` first; None means all of it.

        Its descriptor is that of the whole blob.

        Raises NameUnknown, BlobUnknown.
        """
        raise Unsupported("this registry serves no blobs")

    async def locate_blob(self, repository: str, digest: Digest) -> Located | None:
        """Where a client may fetch the blob itself; None if get_blob() is the way.

        Raises NameUnknown, BlobUnknown.
        """
        return None

    async def resolve_blob(self, repository: str, digest: Digest) -> Descriptor:
        """The descriptor of a blob, without starting a transfer.  Raises NameUnknown, BlobUnknown."""
        raise Unsupported("this registry serves no blobs")

    async def get_manifest(self, repository: str, reference: Reference) -> Manifest:
        """The manifest of a tag or a digest.  Raises NameUnknown, ManifestUnknown."""
        raise Unsupported("this registry serves no manifests")

    async def resolve_manifest(self, repository: str, reference: Reference) -> Descriptor:
        """The descriptor of a manifest.  Raises NameUnknown, ManifestUnknown."""
        raise Unsupported("this registry serves no manifests")

    def hold_blob(self, repository: str, digest: Digest) -> Held | None:
        """What get_blob() and resolve_blob() have just served; None if it cannot be held.

        May raise the errors of get_blob().
        """
        return None

    def hold_manifest(self, repository: str, reference: Reference) -> Held | None:
        """What get_manifest() and resolve_manifest() have just served; None if it cannot be held.

        May raise the errors of get_manifest().
        """
        return None

    async def tags(self, repository: str, last: str = "", limit: int | None = None) -> list[str]:
        """The tags after `last` in lexical order, at most `limit`.  Raises NameUnknown."""
        raise Unsupported("this registry lists no tags")

    async def referrers(
        self,
        repository: str,
        digest: Digest,
        artifact_type: str | None = None,
        last: str = "",
        limit: int | None = None,
    ) -> list[Descriptor]:
        """The manifests whose subject is `digest`; only those of `artifact_type`, if it is given.

        They come in the order of their digests: those after `last`, at most `limit`.
        Raises ManifestUnknown if the registry has no referrers API.
        """
        raise Unsupported("this registry lists no referrers")

    async def repositories(self, last: str = "", limit: int | None = None) -> list[str]:
        """The repositories after `last` in lexical order, at most `limit`."""
        raise Unsupported("this registry lists no repositories")

    # Push

    async def start_upload(
        self, repository: str, size: int | None = None, algorithm: str = "sha256"
    ) -> Upload:
        """Start an upload of `size` bytes, if that is known; `algorithm` is that of its digest."""
        raise Unsupported("this registry does not accept pushes")

    async def resume_upload(self, repository: str, id: str) -> Upload:
        """Resume an upload that any process suspended.  Raises BlobUploadUnknown."""
        raise Unsupported("this registry does not accept pushes")

    async def mount_blob(
        self,
        repository: str,
        digest: Digest,
        source: str | None = None,
        visible: Callable[[str], bool] = everything,
    ) -> Descriptor:
        """Show in `repository` a blob that the repository `source` shows.

        Without `source`, any repository will do that is `visible` to the client: knowing a digest is not a
        permission.  Raises BlobUnknown, NameUnknown.
        """
        raise Unsupported("this registry does not accept pushes")

    async def push_manifest(
        self,
        repository: str,
        reference: Reference,
        manifest: Manifest,
        tags: Sequence[Tag] = (),
        when: Conditions = ALWAYS,
    ) -> Descriptor:
        """Store a manifest and point `reference`, if it is a tag, and `tags` to it; all of it or nothing.

        Only `when` it may be, by what `reference` is at that moment.
        Raises ManifestInvalid, ManifestBlobUnknown, DigestInvalid, PreconditionFailed.
        """
        raise Unsupported("this registry does not accept pushes")

    async def delete_blob(self, repository: str, digest: Digest, when: Conditions = ALWAYS) -> None:
        """Remove a blob from the repository.  Raises NameUnknown, BlobUnknown, PreconditionFailed."""
        raise Unsupported("this registry does not delete content")

    async def delete_manifest(self, repository: str, reference: Reference, when: Conditions = ALWAYS) -> None:
        """Delete a manifest, or only the tag if a tag is given.

        Raises NameUnknown, ManifestUnknown, PreconditionFailed.
        """
        raise Unsupported("this registry does not delete content")

    async def close(self) -> None:
        """Cancel the work in progress and release all resources."""

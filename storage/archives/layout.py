"""The content of an archive, by digest: bundles, OCI image layouts, and archives written by `docker save`.

listing.py reads what an archive lists, saved.py the list of docker save.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from storage.archives.archive import Archive, ArchivePart, read
from storage.archives.bundle import (
    BundleContents,
    blob_name,
)
from storage.errors import ArchiveInvalid
from storage.oci import MANIFEST_LIMIT, Descriptor, Digest

if TYPE_CHECKING:
    pass

SAVED = "manifest.json"
CONFIG, LAYER = "application/vnd.oci.image.config.v1+json", "application/vnd.oci.image.layer.v1.tar"


@dataclass(frozen=True, slots=True)
class Root:
    """A manifest that an archive lists.

    `name` is the name that it has there, in any form, or None.  `left_out` are the manifests below it that
    the archive omits on purpose, None if the archive does not say.  `validated` is when an origin last
    confirmed the tag, in seconds since the epoch.
    """

    descriptor: Descriptor
    name: str | None
    left_out: frozenset[str] | None = None
    validated: float | None = None


@dataclass(slots=True)
class Layout:
    """The content of an archive by digest.  Methods block, and raise ArchiveInvalid.

    `contents` is the document entrepot.json of a bundle, None for other archives.  `notes` say what of the
    archive is not imported as it is.
    """

    archive: Archive
    contents: BundleContents | None = None
    roots: list[Root] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _generated: dict[Digest, bytes] = field(default_factory=dict)
    _parts: dict[Digest, str] = field(default_factory=dict)

    @property
    def what(self) -> str:
        return self.archive.what

    def size(self, digest: Digest) -> int | None:
        """The size of a manifest or blob in bytes; None if the archive does not contain it."""
        generated = self._generated.get(digest)
        return self.archive.size(self._part(digest)) if generated is None else len(generated)

    def position(self, digest: Digest) -> int:
        return self.archive.position(self._part(digest))

    @contextmanager
    def opened(self, digest: Digest) -> Iterator[ArchivePart]:
        """Open a blob, whose content the caller verifies."""
        with self.archive.opened(self._part(digest)) as part:
            yield part

    def manifest(self, digest: Digest) -> bytes:
        """Read a manifest and verify its digest."""
        content = self._generated.get(digest)
        if content is None:
            content = read(self.archive, self._part(digest), MANIFEST_LIMIT)
        if (found := Digest.of(content, digest.algorithm)) != digest:
            raise ArchiveInvalid(f"{self.what}: {self._part(digest)} is damaged: its content is {found}")
        return content

    def place(self, digest: Digest, name: str) -> None:
        """Note that the part `name` has the content with this digest."""
        self._parts[digest] = name

    def generate(self, media_type: str, content: bytes) -> Descriptor:
        """Add a manifest that the archive does not contain."""
        descriptor = Descriptor(media_type, Digest.of(content), len(content))
        self._generated[descriptor.digest] = content
        return descriptor

    def _part(self, digest: Digest) -> str:
        return self._parts.get(digest) or blob_name(digest)

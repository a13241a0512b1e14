"""Distribution's layout of a registry on a file system, read; nothing of it is ever changed.

    blobs/<algorithm>/<ab>/<encoded>/data                              every blob and manifest, as it is
    repositories/<name>/_layers/<algorithm>/<encoded>/link             a blob that the repository shows
    repositories/<name>/_manifests/revisions/<algorithm>/<encoded>/link  a manifest of it
    repositories/<name>/_manifests/tags/<tag>/current/link             what a tag points to
    repositories/<name>/_uploads/                                      what is no content, and is left alone

A link is a digest in ASCII, and names the data; that may be by another algorithm than the link's own path,
which is what clients ask by.  A repository shows what has a link there and data.  Whatever else lies about
(empty directories, temporary files of writes that were cut) means nothing, and is passed by.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from storage.errors import DigestInvalid, ManifestInvalid
from storage.oci import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    MANIFEST_LIMIT,
    OCI_INDEX,
    OCI_MANIFEST,
    Digest,
    Manifest,
    parse_manifest,
)

PLACES = ("docker/registry/v2", "registry/v2", "v2", ".")  # where it is, from what people call the directory
_LINK_LIMIT = 200  # bytes
_TYPES = (OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST)


class Absent(Exception):
    """What should be there is not, or is not what it should be; why, as part of a sentence."""


@dataclass(frozen=True, slots=True)
class TagLink:
    """`moved_at` is in seconds since the epoch."""

    name: str
    digest: Digest
    moved_at: float


class DistributionTree:
    """Raises ValueError where there is none.  Everything blocks."""

    def __init__(self, directory: Path) -> None:
        for place in PLACES:
            self.root = directory / place
            if (self.root / "repositories").is_dir() and (self.root / "blobs").is_dir():
                return
        raise ValueError(
            f"{directory} is no directory of Distribution: there is no docker/registry/v2 with repositories"
            " and blobs in it"
        )

    def repositories(self) -> Iterator[str]:
        """Those that have manifests, or had; in order.  Names nest."""
        yield from self._repositories(self.root / "repositories", "")

    def _repositories(self, directory: Path, prefix: str) -> Iterator[str]:
        for name in _directories(directory):
            if name.startswith("_"):
                continue
            if (directory / name / "_manifests").is_dir():
                yield prefix + name
            yield from self._repositories(directory / name, f"{prefix}{name}/")

    def manifests(self, repository: str) -> Iterator[str]:
        """What their links say they are, digests if all is well; in order."""
        revisions = self._of(repository) / "_manifests" / "revisions"
        for algorithm in _directories(revisions):
            for encoded in _directories(revisions / algorithm):
                if (revisions / algorithm / encoded / "link").exists():
                    yield f"{algorithm}:{encoded}"

    def layers(self, repository: str) -> int:
        """How many blobs it has links to."""
        layers = self._of(repository) / "_layers"
        return sum(
            (layers / algorithm / encoded / "link").exists()
            for algorithm in _directories(layers)
            for encoded in _directories(layers / algorithm)
        )

    def tags(self, repository: str) -> Iterator[str]:
        """Their names, in order."""
        tags = self._of(repository) / "_manifests" / "tags"
        yield from (name for name in _directories(tags) if (tags / name / "current").is_dir())

    def tag(self, repository: str, name: str) -> TagLink:
        """Raises Absent."""
        link = self._of(repository) / "_manifests" / "tags" / name / "current" / "link"
        digest = _linked(link)
        try:
            return TagLink(name, digest, link.stat().st_mtime)
        except OSError as error:
            raise Absent(f"its link cannot be read: {error.strerror}") from None

    def manifest(self, repository: str, digest: Digest) -> Manifest:
        """Raises Absent, also where its content is not what its digest says."""
        path = self._shown(repository, Path("_manifests", "revisions"), digest)
        with suppress(OSError):
            if path.stat().st_size > MANIFEST_LIMIT:
                raise Absent(f"it is larger than any manifest, {path.stat().st_size} bytes")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise Absent(f"{path} cannot be read: {error.strerror}") from None
        if (found := Digest.of(content, digest.algorithm)) != digest:
            raise Absent(f"it is damaged: its content is {found}")
        return Manifest(_media_type(content), content, digest)

    def blob(self, repository: str, digest: Digest) -> Path:
        """The file with its bytes, which nobody has verified.  Raises Absent."""
        return self._shown(repository, Path("_layers"), digest)

    def _shown(self, repository: str, kind: Path, digest: Digest) -> Path:
        link = self._of(repository) / kind / digest.algorithm / digest.encoded / "link"
        target = _linked(link)
        data = self.root / "blobs" / target.algorithm / target.encoded[:2] / target.encoded / "data"
        try:
            if stat.S_ISREG(data.lstat().st_mode):
                return data
        except FileNotFoundError:
            raise Absent("it is missing: there is a link to it, but no data") from None
        except OSError as error:
            raise Absent(f"{data} cannot be read: {error.strerror}") from None
        raise Absent(f"{data} is no file")

    def _of(self, repository: str) -> Path:
        return self.root / "repositories" / repository


class _Version(msgspec.Struct, rename="camel"):
    schema_version: int = 0


def _media_type(content: bytes) -> str:
    """As Distribution tells it: the type is stored nowhere.  Raises Absent."""
    try:
        found = parse_manifest(content)
        version = msgspec.json.decode(content, type=_Version).schema_version
    except (ManifestInvalid, msgspec.DecodeError) as error:
        raise Absent(f"it cannot be read: {error}") from None
    if found.declared is None and version != 2:
        raise Absent(f"it is of schema {version}, which no client of today pulls")
    if found.media_type not in _TYPES:
        raise Absent(f"it is of type {found.media_type[:100]}, which is none of an image or index")
    return found.media_type


def _linked(link: Path) -> Digest:
    """Raises Absent."""
    try:
        with link.open("rb") as file:
            text = file.read(_LINK_LIMIT).decode("ascii").strip()
        return Digest.parse(text)
    except FileNotFoundError:
        raise Absent("it is missing: there is no link to it in this repository") from None
    except OSError as error:
        raise Absent(f"its link cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, DigestInvalid):
        raise Absent("its link is damaged") from None


def _directories(path: Path) -> list[str]:
    """Names in order; links to directories are not followed, so nothing is found twice, or for ever."""
    try:
        with os.scandir(path) as entries:
            return sorted(each.name for each in entries if each.is_dir(follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return []

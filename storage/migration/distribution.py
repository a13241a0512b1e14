"""A registry on disk in the layout of Distribution, read without changing anything.

    blobs/<algorithm>/<ab>/<encoded>/data                              every blob and manifest, as it is
    repositories/<name>/_layers/<algorithm>/<encoded>/link             a blob of the repository
    repositories/<name>/_manifests/revisions/<algorithm>/<encoded>/link  a manifest of the repository
    repositories/<name>/_manifests/tags/<tag>/current/link             the target of a tag
    repositories/<name>/_uploads/                                      uploads in progress, ignored

A link file contains the digest of the data in ASCII.  That digest may use another algorithm than the path of
the link, which is the digest that clients use.  A repository contains what has a link there and data.
Everything else (empty directories, temporary files of interrupted writes) is ignored.
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

ROOTS = ("docker/registry/v2", "registry/v2", "v2", ".")  # the registry's root in a given directory
_LINK_LIMIT = 200  # bytes
_TYPES = (OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST)


class Absent(Exception):
    """Content is missing or damaged; the message is part of a sentence."""


@dataclass(frozen=True, slots=True)
class TagLink:
    """A tag and its target.  `moved_at` is in seconds since the epoch."""

    name: str
    digest: Digest
    moved_at: float


class DistributionTree:
    """A registry on disk.  Raises ValueError if `directory` contains none.  Methods block."""

    def __init__(self, directory: Path) -> None:
        for root in ROOTS:
            self.root = directory / root
            if (self.root / "repositories").is_dir() and (self.root / "blobs").is_dir():
                return
        raise ValueError(
            f"{directory} is not a directory of Distribution: it contains no docker/registry/v2 with"
            " repositories and blobs"
        )

    def repositories(self) -> Iterator[str]:
        """The names of the repositories that have or had manifests, in order.  Names can nest."""
        yield from self._repositories(self.root / "repositories", "")

    def _repositories(self, directory: Path, prefix: str) -> Iterator[str]:
        for name in _directories(directory):
            if name.startswith("_"):
                continue
            if (directory / name / "_manifests").is_dir():
                yield prefix + name
            yield from self._repositories(directory / name, f"{prefix}{name}/")

    def manifests(self, repository: str) -> Iterator[str]:
        """The names of the links of manifests, which are digests unless damaged; in order."""
        revisions = self._of(repository) / "_manifests" / "revisions"
        for algorithm in _directories(revisions):
            for encoded in _directories(revisions / algorithm):
                if (revisions / algorithm / encoded / "link").exists():
                    yield f"{algorithm}:{encoded}"

    def layers(self, repository: str) -> int:
        """How many links to blobs the repository has."""
        layers = self._of(repository) / "_layers"
        return sum(
            (layers / algorithm / encoded / "link").exists()
            for algorithm in _directories(layers)
            for encoded in _directories(layers / algorithm)
        )

    def tags(self, repository: str) -> Iterator[str]:
        """The names of the tags, in order."""
        tags = self._of(repository) / "_manifests" / "tags"
        yield from (name for name in _directories(tags) if (tags / name / "current").is_dir())

    def tag(self, repository: str, name: str) -> TagLink:
        """The target of a tag.  Raises Absent."""
        link = self._of(repository) / "_manifests" / "tags" / name / "current" / "link"
        digest = _linked(link)
        try:
            return TagLink(name, digest, link.stat().st_mtime)
        except OSError as error:
            raise Absent(f"its link cannot be read: {error.strerror}") from None

    def manifest(self, repository: str, digest: Digest) -> Manifest:
        """Read and verify a manifest.  Raises Absent."""
        path = self._linked_file(repository, Path("_manifests", "revisions"), digest)
        with suppress(OSError):
            if path.stat().st_size > MANIFEST_LIMIT:
                raise Absent(f"it has {path.stat().st_size} bytes, more than a manifest may have")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise Absent(f"{path} cannot be read: {error.strerror}") from None
        if (found := Digest.of(content, digest.algorithm)) != digest:
            raise Absent(f"it is damaged: its content is {found}")
        return Manifest(_media_type(content), content, digest)

    def blob(self, repository: str, digest: Digest) -> Path:
        """The path of the file with its content, which is not verified.  Raises Absent."""
        return self._linked_file(repository, Path("_layers"), digest)

    def _linked_file(self, repository: str, kind: Path, digest: Digest) -> Path:
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
        raise Absent(f"{data} is not a file")

    def _of(self, repository: str) -> Path:
        return self.root / "repositories" / repository


class _Version(msgspec.Struct, rename="camel"):
    schema_version: int = 0


def _media_type(content: bytes) -> str:
    """The media type, found as Distribution does, since it is not stored.  Raises Absent."""
    try:
        found = parse_manifest(content)
        version = msgspec.json.decode(content, type=_Version).schema_version
    except (ManifestInvalid, msgspec.DecodeError) as error:
        raise Absent(f"it cannot be read: {error}") from None
    if found.declared is None and version != 2:
        raise Absent(f"it has schema version {version}, which is not supported")
    if found.media_type not in _TYPES:
        raise Absent(f"its type {found.media_type[:100]} is not that of an image or index")
    return found.media_type


def _linked(link: Path) -> Digest:
    """Read a link file.  Raises Absent."""
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
    """The names of subdirectories, in order.  Links are not followed, so that nothing is found twice."""
    try:
        with os.scandir(path) as entries:
            return sorted(each.name for each in entries if each.is_dir(follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return []

"""How much of images is stored.

What many manifests name is looked at once in a call, and a call does only so much: what an image names beyond
that is not counted, and its size is then unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from proxy.admin.models import PlatformRow
from storage.errors import ManifestUnknown
from storage.graph import Walk, contents, unread
from storage.oci import Descriptor, Digest
from storage.store import Store

# Work is counted in manifests and blobs that are looked at; 200 bytes of a manifest are about one of them.
MOST = 150_000  # of a call: half a second
LEAST = 3_000  # of each image, whatever was done for others
LOOK_UP = 3  # to look whether a blob is stored, against counting it once more
BYTES = 200


class Sum(NamedTuple):
    """Bytes of content that are stored, and all of its bytes; `complete` if nothing is missing."""

    held: int
    whole: int
    complete: bool


@dataclass(frozen=True, slots=True)
class Measured:
    """An image, or what is known of it: `whole` is None if it is not stored, or could not all be counted."""

    media_type: str | None
    held: int = 0
    whole: int | None = None
    complete: bool = False
    platforms: Sequence[PlatformRow] = ()


@dataclass(frozen=True, slots=True)
class _Manifest:
    """A manifest by itself: its bytes and its blobs, each its size and whether it is stored.

    `unread` if it may name more; without a media type it is not stored.
    """

    media_type: str | None
    parts: dict[Digest, tuple[int, bool]]
    children: Sequence[Descriptor] = ()
    unread: bool = False
    sum: Sum = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sum", _sum(self.parts))


class Measurer:
    """Measures the images of one call, which may be of several repositories.

    Every method blocks, and may raise StorageFailed.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._left = MOST
        self._manifests: dict[tuple[str, Digest], _Manifest] = {}
        self._sums: dict[tuple[str, frozenset[Digest]], Sum] = {}
        self._kept = 0  # parts of those manifests

    def measure(self, repository: str, digest: Digest) -> Measured:
        """The sizes of an image and of each of its platforms; each manifest and blob counts once."""
        self._left = max(self._left, LEAST)
        if self._kept > MOST:
            self._manifests.clear()
            self._sums.clear()
            self._kept = 0
        top = self._manifest(repository, digest, -1)
        if top is None:
            return Measured(self._store.manifest(repository, digest)[0].media_type)
        if top.media_type is None:
            return Measured(None)
        reached, cut = {digest: top}, False
        platforms, known = [], dict[Digest, PlatformRow]()  # an index may name a manifest many times
        for child in top.children:
            if child.digest not in known:
                below = self._below(repository, child)
                cut = cut or below is None
                reached |= below or {}
                known[child.digest] = self._platform(repository, below)
            platforms.append(msgspec.structs.replace(known[child.digest], platform=child.platform))
        total = None if cut else self._sum(repository, reached)
        if total is None:
            return Measured(top.media_type, top.sum.held, None, False, platforms)
        complete = total.complete and not any(each.unread for each in reached.values())
        return Measured(top.media_type, total.held, total.whole, complete, platforms)

    def _platform(self, repository: str, below: dict[Digest, _Manifest] | None) -> PlatformRow:
        total = None if below is None else self._sum(repository, below)
        if below is None or total is None:
            return PlatformRow(platform=None, complete=False, bytes_held=0, bytes_whole=None)
        first = next(iter(below.values()))
        return PlatformRow(
            platform=None,
            complete=total.complete and not any(each.unread for each in below.values()),
            bytes_held=total.held,
            bytes_whole=None if first.media_type is None else total.whole,
        )

    def _below(self, repository: str, top: Descriptor) -> dict[Digest, _Manifest] | None:
        """A manifest and all below it, itself first; None if it is too much.

        No recursion: indexes may be nested to any depth.
        """
        found: dict[Digest, _Manifest] = {}
        steps = Walk([top])
        for named in steps:
            if named.digest in found:
                continue
            manifest = self._manifest(repository, named.digest, named.size)
            if manifest is None:
                return None
            found[named.digest] = manifest
            self._left -= 1 + len(manifest.children)
            steps.add(manifest.children)
        return found

    def _sum(self, repository: str, manifests: dict[Digest, _Manifest]) -> Sum | None:
        """The sum over all of them, in which each blob counts once; None if it is too much."""
        self._left -= len(manifests)
        alone = [each.sum for each in manifests.values() if len(each.parts) == 1]
        several = {digest: each for digest, each in manifests.items() if len(each.parts) > 1}
        if len(several) == 1:
            found = next(iter(several.values())).sum
        else:
            key = repository, frozenset(several)
            if key not in self._sums:
                self._left -= sum(len(each.parts) for each in several.values())
                if self._left < 0:
                    return None
                parts: dict[Digest, tuple[int, bool]] = {}
                for each in several.values():
                    parts |= {digest: part for digest, part in each.parts.items() if digest not in parts}
                self._sums[key] = _sum(parts)
            found = self._sums[key]
        held, whole = (found[at] + sum(each[at] for each in alone) for at in (0, 1))
        return Sum(held, whole, found.complete and all(each.complete for each in alone))

    def _manifest(self, repository: str, digest: Digest, size: int) -> _Manifest | None:
        """A manifest of `size` bytes, as far as it is known; None if it is too much."""
        key = repository, digest
        if key not in self._manifests:
            found = self._read(repository, digest, size)
            if found is None:
                self._left = 0
                return None
            self._manifests[key] = found
            self._kept += len(found.parts) + len(found.children)
        return self._manifests[key]

    def _read(self, repository: str, digest: Digest, size: int) -> _Manifest | None:
        if self._left <= 0:
            return None
        try:
            manifest = self._store.manifest(repository, digest)[0]
        except ManifestUnknown:
            self._left -= LOOK_UP
            return _Manifest(None, {digest: (max(0, size), False)})
        self._left -= len(manifest.content) // BYTES
        if self._left < 0:
            return None
        parts = {digest: (len(manifest.content), True)}
        content = contents(manifest.content)
        if content is None:
            return _Manifest(manifest.media_type, parts, unread=True)
        blobs = {each.digest: each for each in content.blobs if each.distributable}
        self._left -= LOOK_UP * len(blobs)
        if self._left < 0:
            return None
        for each, blob in blobs.items():
            if each not in parts:
                parts[each] = max(0, blob.size), self._store.linked(repository, each) is not None
        return _Manifest(manifest.media_type, parts, content.children, unread(content))


def _sum(parts: dict[Digest, tuple[int, bool]]) -> Sum:
    held = sum(size for size, here in parts.values() if here)
    whole = sum(size for size, _ in parts.values())
    return Sum(held, whole, all(here for _, here in parts.values()))

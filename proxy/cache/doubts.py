"""Doubts: what an origin no longer has of images whose tags are still fresh."""

from __future__ import annotations

from collections.abc import Callable

from storage.errors import ManifestUnknown
from storage.oci import Digest, digests_in
from storage.store import Store

REPOSITORIES, LOST = 1000, 1000  # of which so many digests are remembered, and how many of each
CHILDREN = 100  # of an index: so many of its manifests are looked into


class Doubts:
    """What an origin has answered 404 for, by digest, in memory; the oldest is dropped first.

    Gitea deletes what a tag stood for as soon as it moves, and other registries do so later.  So a tag that
    names an image of which something is gone has most likely moved.
    """

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._lost: dict[str, dict[Digest, float]] = {}

    def add(self, name: str, digest: Digest) -> None:
        lost = self._lost.pop(name, {})
        lost.pop(digest, None)
        lost[digest] = self._clock()
        self._lost[name] = lost
        if len(lost) > LOST:
            del lost[next(iter(lost))]
        if len(self._lost) > REPOSITORIES:
            del self._lost[next(iter(self._lost))]

    def any(self, name: str, since: float) -> bool:
        """Whether something has been missing there since then, and about() has to be asked."""
        return name in self._lost and next(reversed(self._lost[name].values())) > since

    def about(self, name: str, content: bytes, since: float) -> bool:
        """Whether it is of the image of this manifest.  It reads records."""
        lost = {digest for digest, at in self._lost.get(name, {}).items() if at > since}
        named = digests_in(content)
        return not lost.isdisjoint(named) or any(
            not lost.isdisjoint(digests_in(self._stored(name, each))) for each in named[:CHILDREN]
        )

    def forget(self, name: str) -> None:
        self._lost.pop(name, None)

    def _stored(self, name: str, digest: Digest) -> bytes:
        try:
            return self._store.manifest(name, digest)[0].content
        except ManifestUnknown:
            return b""

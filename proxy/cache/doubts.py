"""Doubts: what an origin no longer has of images whose tags are still fresh."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, field

from storage.errors import ManifestUnknown
from storage.oci import Digest, Tag, digests_in
from storage.store import Store

REPOSITORIES, LOST = 1000, 1000  # of which so many digests are remembered, and how many of each
CHILDREN = 100  # of an index: so many of its manifests are looked into


@dataclass(slots=True)
class _Repository:
    """Times: of what is lost, the newest last; and of the newest that is not of a tag's image."""

    lost: dict[Digest, float] = field(default_factory=dict)
    cleared: dict[Tag, float] = field(default_factory=dict)

    @property
    def newest(self) -> float:
        return next(reversed(self.lost.values()))


class Doubts:
    """What an origin has answered 404 for, by digest, in memory; the oldest is dropped first.

    Gitea deletes what a tag stood for as soon as it moves, and other registries do so later.  So a tag that
    names an image of which something is gone has most likely moved.
    """

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._repositories: dict[str, _Repository] = {}

    def add(self, name: str, digest: Digest) -> None:
        found = self._repositories.pop(name, None) or _Repository()
        found.lost.pop(digest, None)
        found.lost[digest] = self._clock()
        self._repositories[name] = found
        if len(found.lost) > LOST:
            del found.lost[next(iter(found.lost))]
        if len(self._repositories) > REPOSITORIES:
            del self._repositories[next(iter(self._repositories))]

    def any(self, name: str, tag: Tag, since: float) -> bool:
        """Whether something has been missing there since then, and may be of the tag's image."""
        found = self._repositories.get(name)
        return found is not None and found.newest > max(since, found.cleared.get(tag, since))

    async def about(self, name: str, tag: Tag, content: bytes, since: float) -> bool:
        """Whether something of the image of a tag, of this manifest, has been missing since then.

        Raises StorageFailed.
        """
        if (found := self._repositories.get(name)) is None:
            return False
        newest, lost = found.newest, {digest for digest, at in found.lost.items() if at > since}
        if await self._store.read(self._names, name, content, lost):
            return True
        found.cleared[tag] = newest  # else each pull would look again
        return False

    def _names(self, name: str, content: bytes, lost: Set[Digest]) -> bool:
        named = digests_in(content)
        return not lost.isdisjoint(named) or any(
            not lost.isdisjoint(digests_in(self._stored(name, each))) for each in named[:CHILDREN]
        )

    def forget(self, name: str) -> None:
        self._repositories.pop(name, None)

    def _stored(self, name: str, digest: Digest) -> bytes:
        try:
            return self._store.manifest(name, digest)[0].content
        except ManifestUnknown:
            return b""

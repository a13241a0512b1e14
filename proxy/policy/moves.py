"""Tags of upstreams that are held where they point when they move, until the move is old enough or approved.

    held <repository> <tag>       JSON of a HeldTag: where a tag is held, and where it would move

There is such a record for each tag that was resolved and that a rule is about, so that what it stands for
is known before an upstream is asked.  A digest that a tag moved to is a candidate: it becomes what the tag
stands for when the rule says so, or when an operator does.  Records of tags that no rule is about any more
are forgotten when a server starts: such tags moved meanwhile without being held.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from typing import TypeAlias

import msgspec
import structlog

from proxy.config.policy import MoveRule
from proxy.telemetry.metrics import Metrics
from storage.errors import ManifestUnknown, StorageFailed
from storage.keys import HELD
from storage.oci import Digest, Tag
from storage.records import Batch
from storage.store import Store

log = structlog.get_logger()

KEPT = 20  # digests of a tag that were rejected, the last ones
# Called when a tag is held, with its repository's full name, where it is held, and where it would move.
TagHeld: TypeAlias = Callable[[str, Tag, Digest, Digest], Awaitable[None]]


class HeldTag(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where a tag is held: at `digest`.

    candidate: the digest that the upstream gives for it; empty if that is `digest`
    seen: when the upstream first gave that, in seconds since the epoch
    approved: a digest to which the tag may move as soon as the upstream gives it
    rejected: digests to which it never moves by itself
    """

    digest: str
    candidate: str = ""
    seen: float = 0.0
    approved: str = ""
    rejected: tuple[str, ...] = ()

    def offered(self, digest: Digest, rule: MoveRule, now: float) -> HeldTag:
        """The record after the upstream has given `digest` for the tag."""
        if digest == self.digest:
            return msgspec.structs.replace(self, candidate="", seen=0.0)
        seen = self.seen if digest == self.candidate else now
        found = msgspec.structs.replace(self, candidate=str(digest), seen=seen)
        moves = digest == self.approved or (digest not in self.rejected and now >= found.moves_at(rule))
        return HeldTag(str(digest), rejected=self.rejected) if moves else found

    def moves_at(self, rule: MoveRule) -> float:
        """When the tag moves to the candidate by itself; infinity if an operator has to approve it."""
        return (
            math.inf if rule.min_age is None or self.candidate in self.rejected else self.seen + rule.min_age
        )


class TagHolds:
    """The tags of the caches in `store` that `rules` are about, the first that matches.

    `held` is called when the candidate of a tag is a new one.  Repositories are full names.
    """

    def __init__(
        self,
        store: Store,
        rules: Sequence[MoveRule],
        clock: Callable[[], float],
        metrics: Metrics,
        held: TagHeld | None = None,
    ) -> None:
        self._store = store
        self._rules = rules
        self._clock = clock
        self._metrics = metrics
        self._held = held

    def rule(self, repository: str, tag: Tag) -> MoveRule | None:
        """The rule about a tag."""
        return next((each for each in self._rules if each.matches(repository, tag)), None)

    def of(self, repository: str, tag: Tag) -> HeldTag | None:
        """What is known of a tag.  Raises StorageFailed."""
        return _parse(self._store.records.get(HELD.key(repository, tag)))

    async def begin(self, repository: str, tag: Tag) -> HeldTag | None:
        """What is known of a tag, before the upstream is asked: at least where it points now, if anywhere.

        It is recorded if it can be: a disk that cannot be written to holds tags all the same.  Raises
        StorageFailed if it cannot be read.
        """
        if (known := self.of(repository, tag)) is not None:
            return known
        if (pointer := self._store.pointer(repository, tag)) is None:
            return None
        here = HeldTag(str(pointer.digest))
        with suppress(StorageFailed):
            _, here = await self._change(repository, tag, lambda known: known or here)
        return here

    async def resolve(
        self, repository: str, tag: Tag, rule: MoveRule, digest: Digest, begun: HeldTag | None
    ) -> Digest:
        """What a tag stands for, of which the upstream says that it is `digest`.

        `begun` is what was known of it before the upstream was asked.
        """

        def offer(known: HeldTag | None) -> HeldTag:
            return HeldTag(str(digest)) if known is None else known.offered(digest, rule, now)

        now, known = self._clock(), self.of(repository, tag) or begun
        if known is not None and offer(known) == known:
            return Digest(known.digest)
        try:
            known, found = await self._change(repository, tag, lambda recorded: offer(recorded or begun))
        except StorageFailed:  # the next request tries again
            return Digest(offer(known).digest)
        if known is not None and found.digest != known.digest:
            _tell_released(repository, tag, known.digest, found.digest, rule)
        elif known is not None and found.candidate and found.candidate != known.candidate:
            await self._tell(repository, tag, found, rule)
        return Digest(found.digest)

    async def _tell(self, repository: str, tag: Tag, found: HeldTag, rule: MoveRule) -> None:
        namespace, _, name = repository.partition("/")
        self._metrics.policy_held.labels(self._metrics.label(namespace), rule.name).inc()
        log.info(
            "tag.held", rule=rule.name, namespace=namespace, repository=name, tag=tag, digest=found.digest,
            candidate=found.candidate,
        )  # fmt: skip
        if self._held is not None:
            await self._held(repository, tag, Digest(found.digest), Digest(found.candidate))

    async def approve(self, repository: str, tag: Tag, digest: Digest) -> HeldTag:
        """Let the tag move to a digest: now if the upstream has given it, or else when it does.

        Raises ManifestUnknown if the tag is not held anywhere.
        """

        def change(known: HeldTag | None) -> HeldTag:
            if known is None:
                raise _not_held(repository, tag)
            rejected = tuple(each for each in known.rejected if each != digest)
            if digest in (known.candidate, known.digest):
                return HeldTag(str(digest), rejected=rejected)
            return msgspec.structs.replace(known, approved=str(digest), rejected=rejected)

        known, found = await self._change(repository, tag, change)
        if known is not None and found.digest != known.digest:
            _tell_released(repository, tag, known.digest, found.digest, self.rule(repository, tag))
        return found

    async def reject(self, repository: str, tag: Tag, digest: Digest) -> HeldTag:
        """Never let the tag move to a digest by itself.

        Raises ManifestUnknown if the tag is not held anywhere, and ValueError if it stands for the digest.
        """

        def change(known: HeldTag | None) -> HeldTag:
            if known is None:
                raise _not_held(repository, tag)
            if digest == known.digest:
                raise ValueError(
                    f"{tag} stands for {digest} already: only what it would move to can be rejected"
                )
            rejected = (*(each for each in known.rejected if each != digest), str(digest))[-KEPT:]
            approved = "" if known.approved == digest else known.approved
            return msgspec.structs.replace(known, rejected=rejected, approved=approved)

        _, found = await self._change(repository, tag, change)
        log.info("tag.rejected", repository=repository, tag=tag, digest=found.digest, candidate=digest)
        return found

    def waiting(self) -> Iterator[tuple[str, Tag, MoveRule, HeldTag]]:
        """The tags that upstreams have moved and that are held.  Raises StorageFailed."""
        for key, value in self._store.records.scan(HELD.prefix()):
            repository, tag = HELD.parse(key)
            found, rule = _parse(value), self.rule(repository, Tag(tag))
            if found is not None and found.candidate and rule is not None:
                yield repository, Tag(tag), rule, found

    async def forget(self) -> None:
        """Forget the tags that no rule is about.  Raises StorageFailed."""

        def unruled() -> None:
            for key in list(self._store.records.keys(HELD.prefix())):
                repository, tag = HELD.parse(key)
                if self.rule(repository, Tag(tag)) is None:
                    self._store.records.delete(key)

        await self._store.run(unruled)

    async def _change(
        self, repository: str, tag: Tag, change: Callable[[HeldTag | None], HeldTag]
    ) -> tuple[HeldTag | None, HeldTag]:
        """Change the record in a transaction; what it was, and what it is."""
        key = HELD.key(repository, tag)

        def work(batch: Batch) -> tuple[HeldTag | None, HeldTag]:
            known = _parse(batch.get(key))
            found = change(known)
            if found != known:
                batch.put(key, msgspec.json.encode(found))
            return known, found

        return await self._store.run(self._store.records.transaction, work)


def _parse(record: bytes | None) -> HeldTag | None:
    with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return msgspec.json.decode(record or b"", type=HeldTag)
    return None


def _tell_released(repository: str, tag: Tag, old: str, new: str, rule: MoveRule | None) -> None:
    log.info("tag.released", repository=repository, tag=tag, old=old, new=new, rule=rule.name if rule else "")


def _not_held(repository: str, tag: Tag) -> ManifestUnknown:
    return ManifestUnknown(
        f"{repository}:{tag} is not held: no rule of policy.moves is about it, or it was not pulled yet"
    )

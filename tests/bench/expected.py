"""What the random writes of writes.py need: records and a bucket that fail, and what is expected."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from obstore.store import LocalStore

from storage.bucket.objects import Bucket, healthy
from storage.conditions import Conditions
from storage.disk.records import SQLiteRecords
from storage.errors import StorageUnavailable
from storage.maintenance.retention import KeepTags, RetentionRules
from storage.postgres.records import PostgresRecords
from storage.records import Batch
from tests.conftest import Clock

GRACE = 86400.0  # seconds
PAUSED = 0.2  # the share of what waits for a moment
IMMUTABLE = re.compile("v.*")
_LETTERS = (re.compile("[a-z]"),)
_KEPT = (
    KeepTags(_LETTERS, last=1),
    KeepTags(_LETTERS, pulled_within=3 * GRACE),
    KeepTags(_LETTERS, last=1, pushed_within=3 * GRACE),
)
RULES = (None, *(RetentionRules(2 * GRACE, (each,), (IMMUTABLE,)) for each in _KEPT))
ANY = Conditions(none_match=frozenset("*"))  # of a push that is to make what is not there

Key = tuple[str, str, str]  # blob, manifest or tag; the repository; the digest or the name


class Made(NamedTuple):
    """What a manifest names, and its size; 1, which is wrong, of what is imported."""

    blobs: Sequence[str] = ()
    children: Sequence[str] = ()
    subject: str | None = None
    size: int = 1


class Failures:
    """Waits now and then, or fails: before something is done, or after it."""

    def __init__(self, random: Random) -> None:
        self.share, self.number = 0.0, 0
        self._random = random

    @contextmanager
    def around(self) -> Iterator[None]:
        if self._random.random() < PAUSED:
            time.sleep(self._random.random() / 500)  # so that another one comes in between
        self._fail()
        yield
        self._fail()

    def _fail(self) -> None:
        if self._random.random() < self.share:
            self.number += 1
            raise StorageUnavailable("it fails as it was told to")


class FailingRecords(SQLiteRecords):
    def __init__(self, directory: Path, clock: Clock, failures: Failures, remote: bool) -> None:
        super().__init__(directory, clock)
        self.remote = remote
        self._failures = failures

    def put(self, key: str, value: bytes) -> None:
        self.transaction(lambda batch: batch.put(key, value), shared=True)

    def delete(self, key: str) -> bool:
        return self.transaction(lambda batch: batch.delete(key), shared=True)

    def transaction(self, work: Callable[[Batch], Any], shared: bool = False) -> Any:
        with self._failures.around():
            return super().transaction(work, shared)


class FailingPostgres(PostgresRecords):
    def __init__(self, url: str, clock: Clock, failures: Failures) -> None:
        super().__init__(url, clock)
        self._failures = failures

    def transaction(self, work: Callable[[Batch], Any], shared: bool = False) -> Any:
        with self._failures.around():
            return super().transaction(work, shared)


class FailingBucket(Bucket):
    def __init__(self, directory: Path, failures: Failures) -> None:
        store = LocalStore(directory, mkdir=True)
        super().__init__(store, "a bucket", healthy("a bucket", directory))
        self._failures = failures

    async def put(self, *arguments: Any) -> None:
        with self._failures.around():
            await super().put(*arguments)


class Expected:
    """What may be there, by what was acknowledged; with `rules`, collections remove images, too."""

    def __init__(self, clock: Clock, rules: RetentionRules | None) -> None:
        self.held: dict[Key, str | None] = {}  # what was read last
        self.images: dict[str, Made] = {}
        self.wrong: list[str] = []
        self.rules = rules
        self._clock = clock
        self._used: dict[Key, float] = {}
        self._pulled: dict[Key, float] = {}  # tags
        self._begun: dict[Key, float] = {}  # when somebody began to push it last
        self._done: list[tuple[Key, str | None, bool]] = []  # in this round, and whether that is sure
        self._unknown: list[tuple[Key, str]] = []
        self._conditional: list[tuple[Key, Conditions, bool]] = []
        self._whole: set[Key] = set()  # manifests all of whose blobs are there

    def may(self, key: Key, value: str | None) -> None:
        """Something was begun; None is a deletion."""
        self._done.append((key, value, False))
        if value is not None:
            self._begun[key] = self._clock()

    def did(self, key: Key, value: str | None) -> None:
        """It was acknowledged, or seen by one who may rely on it."""
        self._done.append((key, value, True))

    def pulled(self, repository: str, digest: str) -> None:
        """It counts for the tags that point to it, or to an index that lists it."""
        for key, seen in self.held.items():
            if key[:2] == ("tag", repository) and seen and self._lists(seen, digest):
                self._pulled[key] = self._clock()

    def _lists(self, image: str, digest: str) -> bool:
        return image == digest or any(self._lists(each, digest) for each in self.images[image].children)

    def unknown(self, key: Key, why: str) -> None:
        """A client was told that there is none."""
        self._unknown.append((key, why))

    def conditional(self, key: Key, when: Conditions, done: bool) -> None:
        """A push with a condition was done, or refused because of that."""
        if when:
            self._conditional.append((key, when, done))

    def keys(self) -> set[Key]:
        return {*self.held, *(key for key, _, _ in self._done), *(key for key, _ in self._unknown)}

    def moved(self) -> list[tuple[Key, str]]:
        """The tags that one operation of this round, and no other, has moved, and to where."""
        found = []
        for key, value, sure in self._done:
            others = [each for each in self._done if each[0] == key]
            moved = self.held.get(key) not in (None, value)
            if key[0] == "tag" and value is not None and sure and moved and len(others) == 2:
                found.append((key, value))
        return found

    def set_unanswered(self, found: dict[Key, str | None]) -> list[tuple[Key, str, bool]]:
        """The tags that one operation alone has set, without an answer: to what, and whether they moved."""
        by_key: dict[Key, list[str | None]] = {}
        for key, value, _ in self._done:
            by_key.setdefault(key, []).append(value)
        return [
            (key, value, self.held.get(key) is not None)
            for key, (value, *others) in by_key.items()
            if key[0] == "tag" and value is not None and not others
            if found.get(key) == value != self.held.get(key)
        ]

    def compare(self, found: dict[Key, str | None], collected: bool, erased: bool, what: str) -> None:
        """At the end of a round, in which a collection ran, or an operator deleted, among `what` ran."""
        kept, fixed = self._kept(erased), self._fixed()
        for key, seen in found.items():
            sure = {value for each, value, is_sure in self._done if each == key and is_sure}
            may = {value for each, value, _ in self._done if each == key}
            may |= sure or {self.held.get(key)}
            taken = collected and key not in kept and not self._is_needed(key, kept)
            if (taken and not sure) or (erased and key[0] != "blob" and key not in fixed):
                may.add(None)
            if seen not in may or (_is_fixed(key) and self.held.get(key) not in (None, seen)):
                self.wrong.append(f"{what}: {key} was {self.held.get(key)}, is {seen}, and may be {may}")
            told = [why for each, why in self._unknown if each == key]
            if told and self.held.get(key) and not taken and None not in may:
                self.wrong.append(f"{what}: {key} was unknown to {told}")
            self._compare_conditional(key, taken or None in may, what)
        self._used.update((key, self._clock()) for key, value, is_sure in self._done if is_sure and value)
        if not collected and not erased:  # what loses a tag is kept from then on
            lost = {key: value for key, value in self.held.items() if key[0] == "tag" and value != found[key]}
            self._used.update(
                (("manifest", key[1], str(value)), self._clock()) for key, value in lost.items()
            )
        self.held = found
        self._done, self._unknown, self._conditional = [], [], []
        self._whole = {
            each
            for each, seen in found.items()
            if each[0] == "manifest"
            and seen
            and all(found.get(("blob", each[1], blob)) for blob in self.images[each[2]].blobs)
        }

    def _compare_conditional(self, key: Key, may_go: bool, what: str) -> None:
        held = self.held.get(key)
        begun = [value for each, value, sure in self._done if each == key and value and not sure]
        asked = [(when, done) for each, when, done in self._conditional if each == key]
        created = [done for when, done in asked if when == ANY and done]
        if not may_go and len(created) > (held is None):
            self.wrong.append(f"{what}: {key} was {held}, and was created {len(created)} times")
        for when, done in asked:
            match = when.match or set()
            if when == ANY:
                wrong = not done and held is None and len(begun) < 2
            elif done:
                wrong = held not in match and match.isdisjoint(begun)
            else:
                wrong = held in match and not may_go and len(begun) < 2
            if wrong:
                self.wrong.append(f"{what}: {key} was {held}, and a push was {done} for {when}")

    # What stays

    def _kept(self, erased: bool) -> set[Key]:
        """The tags and manifests that no collection removes."""
        if erased:
            return self._fixed()
        gone = {key for key, value, _ in self._done if value is None}
        changed = {key for key, _, _ in self._done}
        held = {key for key, seen in self.held.items() if seen}
        tags = {key for key in held - changed if key[0] == "tag"}
        manifests = {key for key in held - gone if key[0] == "manifest"}
        if self.rules is None:
            return tags | manifests
        (rule,) = self.rules.keep_tags
        tags = {
            each for each in tags if _is_fixed(each) or self._is_young(each) or self._is_kept_by(rule, each)
        }
        roots = {("manifest", each[1], str(self.held[each])) for each in tags}
        roots |= {each for each in manifests if self._is_young(each)}
        return tags | self._reach(roots, manifests)

    def _reach(self, roots: set[Key], manifests: set[Key]) -> set[Key]:
        found, steps = set[Key](), [*roots]
        while steps:
            if (key := steps.pop()) in manifests and key not in found:
                found.add(key)
                children = self.images[key[2]].children
                steps += [("manifest", key[1], each) for each in children]
                steps += [
                    each for each in manifests if each[1] == key[1] and self.images[each[2]].subject == key[2]
                ]
        return found

    def _fixed(self) -> set[Key]:
        """The immutable tags, and the manifests that they keep, whatever an operator deletes."""
        tags = {key for key, seen in self.held.items() if _is_fixed(key) and seen}
        gone = {key for key, value, _ in self._done if value is None}
        manifests = {key for key, seen in self.held.items() if key[0] == "manifest" and seen} - gone
        return tags | self._reach({("manifest", key[1], str(self.held[key])) for key in tags}, manifests)

    def _is_young(self, key: Key) -> bool:
        return self._clock() <= self._used.get(key, 0.0) + GRACE

    def _is_kept_by(self, rule: KeepTags, key: Key) -> bool:
        pushed, pulled = self._used.get(key, 0.0), self._pulled.get(key, 0.0)
        return (
            (rule.last is not None and self._is_newest(key))
            or self._clock() - pushed <= (rule.pushed_within or 0.0)
            or self._clock() - max(pushed, pulled) <= (rule.pulled_within or 0.0)
        )

    def _is_newest(self, key: Key) -> bool:
        """Whether it is the tag of its repository that was pushed last, which the rules keep."""
        others = [
            at
            for each, at in self._begun.items()
            if each[:2] == key[:2] and each != key and not _is_fixed(each)
        ]
        return self._used.get(key, 0.0) > max(others, default=0.0)

    def _is_needed(self, key: Key, kept: set[Key]) -> bool:
        """Whether it is a blob that was used lately, or is named by an image that stays."""
        kind, repository, digest = key
        if kind != "blob":
            return False
        images = [each[2] for each in self._whole & kept if each[1] == repository]
        return self._is_young(key) or any(digest in self.images[each].blobs for each in images)


def _is_fixed(key: Key) -> bool:
    return key[0] == "tag" and IMMUTABLE.fullmatch(key[2]) is not None

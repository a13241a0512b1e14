"""Retention rules: which tags and manifests of a repository are kept.

A tag is kept if one of the rules that match it keeps it, and if no rule matches it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import msgspec

from storage.maintenance.pins import Pin
from storage.maintenance.watched_time import WatchedTime

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


@dataclass(frozen=True, slots=True)
class KeepTags:
    """A rule for the tags that match one of `tags`; without any, for all.

    It keeps a tag if one of its conditions holds; None is a condition that never holds.

    last: it is one of so many pushed last, of those tags for which this is the first rule with `last`
    pushed_within: it was pushed in so many seconds
    pulled_within: it was pulled, or pushed, in so many seconds
    """

    tags: tuple[re.Pattern[str], ...] = ()
    last: int | None = None
    pushed_within: float | None = None
    pulled_within: float | None = None

    def matches(self, tag: str) -> bool:
        return not self.tags or any(each.fullmatch(tag) for each in self.tags)

    def __str__(self) -> str:
        """Why it does not keep a tag."""
        reasons = [] if self.last is None else [f"not one of the last {self.last} pushed"]
        for done, seconds in (("pushed", self.pushed_within), ("pulled", self.pulled_within)):
            if seconds is not None:
                reasons.append(f"not {done} within {_duration(seconds)}")
        return ", ".join(reasons)


@dataclass(frozen=True, slots=True)
class RetentionRules:
    """Which tags and manifests of a repository are kept.

    `keep_untagged_for` is in seconds.  Tags and manifests that are `pinned`, and tags that match one of
    `immutable`, are kept, and the tags not counted.
    """

    keep_untagged_for: float = math.inf
    keep_tags: tuple[KeepTags, ...] = ()
    immutable: tuple[re.Pattern[str], ...] = ()
    pins: tuple[Pin, ...] = ()

    def pinned(self, repository: str, reference: str) -> bool:
        return any(each.matches(repository, reference) for each in self.pins)

    def fixed(self, repository: str, tag: str, digest: str) -> bool:
        """Whether no rule applies to a tag that points to `digest`."""
        return (
            any(each.fullmatch(tag) for each in self.immutable)
            or self.pinned(repository, tag)
            or self.pinned(repository, digest)
        )


class ExpiredTag(msgspec.Struct, frozen=True):
    """A tag that no rule keeps.

    pulled_at: when it was last requested, also by digest; 0 if never
    reason: why each of the rules that match does not keep it
    """

    tag: str
    digest: str
    pushed_at: float
    pulled_at: float
    reason: str


@dataclass(frozen=True, slots=True)
class TagTimes:
    """When the tags of a repository, given by their numbers, were pushed and used.

    slack: for how many seconds a use may not have been recorded
    """

    pushed_at: Sequence[float]
    used_at: Callable[[int], float]
    time: WatchedTime
    slack: float

    def keeps(self, rule: KeepTags, tag: int) -> bool:
        """Whether the rule keeps the tag by its age."""
        pushed, pulled = rule.pushed_within, rule.pulled_within
        if pushed is not None and self.time.age(self.pushed_at[tag]) <= pushed:
            return True
        return pulled is not None and self._unused_for(tag) <= pulled + self.slack

    def _unused_for(self, tag: int) -> float:
        return self.time.age(max(self.pushed_at[tag], self.used_at(tag), self.time.since))


def released(
    rules: Sequence[KeepTags], tags: Iterable[tuple[int, str]], times: TagTimes
) -> dict[int, tuple[KeepTags, ...]]:
    """The tags, given by number and name, that no rule keeps, each with those that match; oldest first."""
    matching: dict[int, tuple[KeepTags, ...]] = {}
    counted: dict[KeepTags, list[int]] = {}
    same: dict[tuple[KeepTags, ...], tuple[KeepTags, ...]] = {}  # one for all tags with the same rules
    for number, tag in tags:
        if found := tuple(each for each in rules if each.matches(tag)):
            matching[number] = same.setdefault(found, found)
            if first := next((each for each in found if each.last is not None), None):
                counted.setdefault(first, []).append(number)
    kept: set[int] = set()
    for rule, numbers in counted.items():
        numbers.sort(key=times.pushed_at.__getitem__)  # of the same time, in the order of their names
        kept.update(numbers[-(rule.last or 0) :])
    left = [
        number
        for number, found in matching.items()
        if number not in kept and not any(times.keeps(each, number) for each in found)
    ]
    return {number: matching[number] for number in sorted(left, key=times.pushed_at.__getitem__)}


def _duration(seconds: float) -> str:
    unit = next((each for each, size in _UNITS.items() if seconds % size == 0), "s")
    return f"{seconds / _UNITS[unit]:g}{unit}"

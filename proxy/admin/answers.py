"""The answers of the replicas of a fleet, and how their rows are told apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import msgspec

from proxy.processes.rows import ReplicaModel

T = TypeVar("T")
R = TypeVar("R", bound=ReplicaModel)
S = TypeVar("S", bound=msgspec.Struct)

SAME = 5.0  # seconds between two times that mean the same: no act reaches all replicas at one moment


@dataclass(frozen=True, slots=True)
class Answers(Generic[T]):
    """The answers of replicas to one operation by their URLs, that of this one first if it has one.

    arguments: those of the operation
    without: the replicas that do not have what was asked for
    """

    found: Mapping[str, T]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    without: Sequence[str] = ()

    @property
    def all(self) -> list[T]:
        return list(self.found.values())

    @property
    def first(self) -> T:
        return self.all[0]


def told_apart(found: Mapping[str, Sequence[R]], key: Callable[[R], Any], *but: str) -> list[R]:
    """The rows of all replicas: those of one key together, in the order in which keys are found.

    Rows are alike if their fields are, `but` those with such names.
    """
    rows: dict[Any, dict[str, R]] = {}
    for url, listed in found.items():
        for each in listed:
            rows.setdefault(key(each), {})[url] = each
    together: list[R] = []
    for replicas in rows.values():
        one, *others = replicas.values()
        if len(replicas) == len(found) and all(_alike(one, each, but) for each in others):
            together.append(one)
        else:
            together += [of_replica(url, each) for url, each in replicas.items()]
    return together


def of_replica(url: str, row: R) -> R:
    return msgspec.structs.replace(row, replica=url)


def _alike(one: msgspec.Struct, other: msgspec.Struct, but: Sequence[str]) -> bool:
    names = [name for name in one.__struct_fields__ if name not in but]
    return all(_same(getattr(one, name), getattr(other, name)) for name in names)


def _same(one: object, other: object) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= SAME
    return one == other


def summed(structs: Sequence[S], *names: str) -> S:
    """The first of them, with the sums of these fields."""
    return msgspec.structs.replace(structs[0], **{name: total_of(structs, name) for name in names})


def total_of(structs: Sequence[msgspec.Struct], name: str) -> int:
    return sum(getattr(each, name) for each in structs)

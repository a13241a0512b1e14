"""A graph in little memory: its nodes are numbers, its edges and what is known of the nodes are in arrays.

A set of nodes is a `bytearray` with a 1 for each node that is in it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from itertools import chain, compress, count, repeat

from storage.oci import Digest

NO_EDGE = -1
_BYTES = {32: "sha256", 64: "sha512"}


class DigestNumbers:
    """Digests as numbers, in the order in which they were first seen."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self._digests: list[bytes] = []

    def __len__(self) -> int:
        return len(self._digests)

    def number(self, digest: str) -> int:
        """The number of a digest, which may be a new one.  Raises DigestInvalid."""
        packed = bytes.fromhex(Digest.parse(digest).encoded)  # its length tells the algorithm
        if (number := self._numbers.get(packed)) is None:
            number = self._numbers[packed] = len(self._digests)
            self._digests.append(packed)
        return number

    def digest(self, number: int) -> Digest:
        packed = self._digests[number]
        return Digest(f"{_BYTES[len(packed)]}:{packed.hex()}")


class Edges:
    """Edges from numbers to numbers: lists that are linked through arrays, with eight bytes for an edge."""

    def __init__(self) -> None:
        self._first = array("i")
        self._next = array("i")
        self._target = array("i")

    def add(self, source: int, target: int) -> None:
        if source >= len(self._first):
            self._first.extend(repeat(NO_EDGE, source + 1 - len(self._first)))
        self._next.append(self._first[source])
        self._first[source] = len(self._target)
        self._target.append(target)

    def of(self, source: int) -> Iterator[int]:
        edge = self._first[source] if source < len(self._first) else NO_EDGE
        while edge != NO_EDGE:
            yield self._target[edge]
            edge = self._next[edge]


class Prefixes:
    """A set of numbers of 64 bits, for look-ups in about their order: eight bytes for each."""

    def __init__(self) -> None:
        self._parts = [array("Q") for _ in range(256)]
        self._part, self._current = -1, frozenset[int]()

    def update(self, prefixes: Iterable[int]) -> None:
        for each in prefixes:
            self._parts[each >> 56].append(each)
        self._part = -1

    def __contains__(self, prefix: int) -> bool:
        if (part := prefix >> 56) != self._part:
            self._part, self._current = part, frozenset(self._parts[part])
        return prefix in self._current


def members(nodes: bytearray) -> Iterator[int]:
    """The nodes that are in a set."""
    return compress(count(), nodes)


def both(some: bytearray, others: bytearray) -> bytearray:
    """The nodes that are in both sets, which are of the same graph."""
    found = int.from_bytes(some, "little") & int.from_bytes(others, "little")
    return bytearray(found.to_bytes(len(some), "little"))


def without(some: bytearray, others: bytearray) -> bytearray:
    """The nodes of `some` that are not in `others`, which are of the same graph."""
    common = int.from_bytes(some, "little") & int.from_bytes(others, "little")
    return bytearray((int.from_bytes(some, "little") ^ common).to_bytes(len(some), "little"))


def below(number: int, edges: Edges) -> Iterator[int]:
    """The nodes that are reached from one, which is the first."""
    seen, steps = set[int](), [number]
    while steps:
        if (number := steps.pop()) not in seen:
            seen.add(number)
            yield number
            steps.extend(edges.of(number))


def above(kept: bytearray, nodes: Iterable[int], *edges: Edges) -> bytearray:
    """The nodes from which one of `kept` is reached, including themselves."""
    if not any(kept):
        return kept
    parents = Edges()
    for number in nodes:
        for target in chain.from_iterable(each.of(number) for each in edges):
            parents.add(target, number)
    found, steps = bytearray(len(kept)), list(members(kept))
    while steps:
        if not found[number := steps.pop()]:
            found[number] = 1
            steps += parents.of(number)
    return found

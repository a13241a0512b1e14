"""Negatives: what an origin said it does not know, remembered for a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from storage.errors import RegistryError

REMEMBERED = 10_000  # negatives and pauses a cache keeps in memory
# What is asked for: the error that says there is none, the repository in the store, and which.  A digest
# may be that of a blob and of a manifest, and clients do try the one after the other.
Key: TypeAlias = tuple[type[RegistryError], str, str]


class Negatives:
    """What holds for some seconds only, in memory; the oldest go when they are many."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._known: dict[Key, tuple[float, float, RegistryError]] = {}

    def get(self, key: Key) -> RegistryError | None:
        since, seconds, known = self._known.get(key, (0.0, -1.0, None))
        # A clock that was set back must not make seconds of days.
        return known.copy() if known is not None and 0 <= self._clock() - since < seconds else None

    def put(self, key: Key, seconds: float, error: RegistryError) -> None:
        self._known.pop(key, None)  # so that the order is that of the last put
        # A copy here and there: one that was raised holds on to all that its frames knew.
        self._known[key] = self._clock(), seconds, error.copy()
        if len(self._known) > REMEMBERED:
            del self._known[next(iter(self._known))]

    def forget(self, repository: str) -> None:
        self._known = {key: known for key, known in self._known.items() if key[1] != repository}

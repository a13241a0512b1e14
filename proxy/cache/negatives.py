"""Negatives: errors of an origin, remembered for a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from storage.errors import RegistryError

REMEMBERED = 10_000  # errors that a cache keeps in memory, of each kind
# What is requested: the error that says there is none, the repository's name in the store, and the item.  A
# digest may be that of a blob and of a manifest, and clients do try one after the other.
RequestKey: TypeAlias = tuple[type[RegistryError], str, str]


class Negatives:
    """Errors that are remembered in memory, each for some seconds; the oldest are dropped first."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._known: dict[RequestKey, tuple[float, float, RegistryError]] = {}

    def get(self, key: RequestKey) -> RegistryError | None:
        since, seconds, known = self._known.get(key, (0.0, -1.0, None))
        # A clock that was set back must not turn seconds into days.
        return known if known is not None and 0 <= self._clock() - since < seconds else None

    def put(self, key: RequestKey, seconds: float, error: RegistryError) -> None:
        self._known.pop(key, None)  # so that the order is that of the last put
        # A copy, since an error that was raised keeps alive all that its frames refer to.
        self._known[key] = self._clock(), seconds, error.copy()
        if len(self._known) > REMEMBERED:
            del self._known[next(iter(self._known))]

    def drop(self, key: RequestKey) -> None:
        self._known.pop(key, None)

    def forget(self, repository: str) -> None:
        self._known = {key: known for key, known in self._known.items() if key[1] != repository}

"""How a stand-in for an upstream fails."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from threading import Lock

__all__ = ["FailurePlan", "UpstreamFailure"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamFailure:
    """A failure, and which requests it concerns.

    status: is answered instead of content; None if it is not
    retry_after: seconds in the header Retry-After of that answer
    cut: bytes of a body after which the connection breaks
    rate: bytes per second of a body
    after: requests that are answered as usual before the first that fails
    times: how many fail
    seconds: how long it lasts, from when it was planned
    path: a regular expression that the path and query of a request contain
    """

    status: int | None = None
    retry_after: int | None = None
    cut: float = math.inf
    rate: float = math.inf
    after: int = 0
    times: float = math.inf
    seconds: float = math.inf
    path: str = ""


NONE = UpstreamFailure()


class FailurePlan:
    """The failures of a stand-in.  Methods may be called in any thread.

    clock: seconds, which only grow
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = Lock()
        self._planned: list[tuple[UpstreamFailure, count[int], float]] = []

    def add(self, failure: UpstreamFailure) -> None:
        with self._lock:
            self._planned.append((failure, count(), self._clock() + failure.seconds))

    def clear(self) -> None:
        with self._lock:
            self._planned.clear()

    def next(self, path: str) -> UpstreamFailure:
        """How the request for `path` and query fails: the first status, and the narrowest of other limits."""
        with self._lock:
            struck = [each for each in self._planned if re.search(each[0].path, path)]
            due = [failure for failure, seen, end in struck if self._is_due(failure, next(seen), end)]
        refusing = next((each for each in due if each.status is not None), NONE)
        return UpstreamFailure(
            status=refusing.status,
            retry_after=refusing.retry_after,
            cut=min((each.cut for each in due), default=math.inf),
            rate=min((each.rate for each in due), default=math.inf),
        )

    def _is_due(self, failure: UpstreamFailure, before: int, end: float) -> bool:
        return failure.after <= before < failure.after + failure.times and self._clock() < end

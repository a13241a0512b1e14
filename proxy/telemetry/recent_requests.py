"""The requests of a process so far: how many, and which of the last ones were the slowest."""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable

import msgspec

from proxy.telemetry.exchange import STORED, UNKNOWN, Exchange

NUMBER = 20  # requests that are remembered
SPAN = 600.0  # seconds for which they are


class SlowRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A client's request that has ended, `at` seconds since the epoch.

    `first` is the number of seconds to the beginning of its response, `seconds` that to its end.
    """

    at: float
    first: float
    seconds: float
    id: str
    trace: str
    client: str
    method: str
    kind: str
    name: str
    reference: str
    status: int
    result: str
    bytes: int


class RequestTotals(msgspec.Struct, kw_only=True):
    """Requests of clients since the process started, and the bytes of their responses.

    Content came from the cache for those `served`, though an upstream may have been asked whether it still
    holds, and from an upstream for the `misses`.
    """

    requests: int = 0
    served: int = 0
    misses: int = 0
    errors: int = 0
    sent: int = 0

    def add(self, result: str, number: int, bytes: int) -> None:
        """Count requests with this result."""
        self.requests += number
        self.sent += bytes
        self.served += number if result in STORED else 0
        self.misses += number if result == "miss" else 0
        self.errors += number if result == "error" else 0


class RecentRequests:
    """The totals of this process, and the slowest requests of the last minutes.

    A request is as slow as the beginning of its response: its end depends on the client, and on its size.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.totals = RequestTotals()
        self._clock = clock
        self._slow: list[tuple[float, int, SlowRequest]] = []  # the fastest of them first
        self._count = 0
        self._least = -math.inf  # what is faster is not one of them

    def add(self, method: str, exchange: Exchange, status: int, first: float, seconds: float) -> None:
        """Remember a request, if it is one of the slowest."""
        if first <= self._least:
            return
        named = "" if exchange.namespace == UNKNOWN else exchange.namespace
        request = SlowRequest(
            at=self._clock(),
            first=first,
            seconds=seconds,
            id=exchange.id,
            trace=exchange.span.trace_id,
            client=exchange.client,
            method=method,
            kind=exchange.kind,
            name="/".join(filter(None, (named, exchange.repository))),
            reference=exchange.reference,
            status=status,
            result=exchange.result,
            bytes=exchange.bytes,
        )
        self._count += 1
        heapq.heappush(self._slow, (first, self._count, request))
        if len(self._slow) > NUMBER:
            self._forget()
        if len(self._slow) >= NUMBER:
            self._least = self._slow[0][0]

    def slowest(self) -> list[SlowRequest]:
        """The slowest first."""
        self._forget()
        return [request for _, _, request in sorted(self._slow, reverse=True)]

    def _forget(self) -> None:
        """Forget those that are too old, and the fastest ones beyond the number."""
        oldest = self._clock() - SPAN
        recent = [each for each in self._slow if each[2].at >= oldest]
        self._slow = heapq.nlargest(NUMBER, recent)
        heapq.heapify(self._slow)
        self._least = self._slow[0][0] if len(self._slow) >= NUMBER else -math.inf

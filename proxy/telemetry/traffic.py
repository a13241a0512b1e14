"""Traffic with upstreams."""

from __future__ import annotations

from prometheus_client import Counter

from proxy.telemetry.exchange import current, in_exchange


class Traffic:
    """Requests to, and bytes from, the upstreams of a namespace since this process started.

    `ahead` of them is what no client's request caused: warming, pins, refreshes.
    """

    def __init__(self, received: Counter) -> None:
        self.requests = 0
        self.received = 0  # bytes
        self.ahead_requests = 0
        self.ahead_received = 0
        self._received = received

    def count_request(self) -> None:
        self.requests += 1
        self.ahead_requests += not in_exchange()
        current().upstream_requests += 1

    def count_received(self, number: int) -> None:
        """Count `number` bytes of a body."""
        self.received += number
        self.ahead_received += 0 if in_exchange() else number
        self._received.inc(number)

"""Credentials that an upstream, or its token server, refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import structlog

from proxy.telemetry.metrics import Metrics

log = structlog.get_logger()

SILENCE = 3600.0  # seconds between two events for the same credential and host


@dataclass(frozen=True, slots=True)
class Refusal:
    """A host answered with `status`, 401 or 403, to a credential, `age` seconds ago.

    `credential` is its number in the configuration.  Nothing has been granted to it there since.
    """

    credential: int
    host: str
    status: int
    age: float


class Refusals:
    """The refusals of one upstream's configured credentials.

    A host refuses without credentials what it does not show to everybody.  That is no refusal, and is not
    recorded here.
    """

    def __init__(self, namespace: str, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._namespace = namespace
        self._metrics = metrics
        self._clock = clock
        self._standing: dict[tuple[int, str], tuple[int, float]] = {}  # status and time
        self._logged: dict[tuple[int, str], float] = {}

    def answered(self, credential: int, host: str, status: int) -> None:
        """Record the status with which a host answered to a credential."""
        key = credential, host
        if status not in (401, 403):
            if status < 400:
                self._standing.pop(key, None)
            return
        now = self._clock()
        self._standing[key] = status, now
        self._metrics.refused.labels(self._namespace, host, str(credential)).inc()
        self._logged = {each: at for each, at in self._logged.items() if 0 <= now - at < SILENCE}
        if key not in self._logged:
            self._logged[key] = now
            log.warning(
                "upstream.refused",
                namespace=self._namespace,
                host=host,
                credential=credential,
                status=status,
            )

    def state(self) -> list[Refusal]:
        now = self._clock()
        return [
            Refusal(credential, host, status, max(0.0, now - at))
            for (credential, host), (status, at) in sorted(self._standing.items())
        ]

"""Credentials that an upstream, or its token server, refuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import structlog

from proxy.telemetry.metrics import Metrics
from storage.shared import SharedTable

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


class _Standing(msgspec.Struct, array_like=True):
    """What a host last answered to a credential, and when; `status` is None once it has granted something.

    `logged` is when the last event was logged.
    """

    status: int | None = None
    at: float = 0.0
    logged: float = -math.inf


class Refusals:
    """The refusals of one upstream's configured credentials, by `table` those that any process has met.

    A host refuses without credentials what it does not show to everybody.  That is no refusal, and is not
    recorded here.  `accounts` are those of the credentials; others, after a reload, are news.
    """

    def __init__(
        self,
        namespace: str,
        metrics: Metrics,
        clock: Callable[[], float],
        table: SharedTable | None = None,
        accounts: Sequence[str] = (),
    ) -> None:
        self._namespace = namespace
        self._metrics = metrics
        self._clock = clock
        self._table = table or SharedTable()
        self._accounts = tuple(accounts)
        self._met: set[tuple[int, str]] = set()  # by this process: credentials and hosts

    def _key(self, credential: int, host: str) -> int:
        return self._table.key("refusal", self._namespace, self._accounts, credential, host)

    def _standing(self, credential: int, host: str) -> _Standing:
        return self._table.get(self._key(credential, host), _Standing) or _Standing()

    def answered(self, credential: int, host: str, status: int) -> None:
        """Record the status with which a host answered to a credential."""
        refused = status in (401, 403)
        if not refused and status >= 400:
            return
        now = self._clock()
        with self._table.lock:
            standing = self._standing(credential, host)
            news = refused and not 0 <= now - standing.logged < SILENCE
            if refused:
                standing.status, standing.at = status, now
                standing.logged = now if news else standing.logged
            elif standing.status is None:
                return
            else:
                standing.status = None
            self._table.put(self._key(credential, host), standing)
        if refused:
            self._met.add((credential, host))
            label = self._metrics.label(self._namespace)
            host_label = host if label == self._namespace else label
            self._metrics.refused.labels(label, host_label, str(credential)).inc()
        if news:
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
            Refusal(credential, host, standing.status, max(0.0, now - standing.at))
            for credential, host in sorted(self._met)
            if (standing := self._standing(credential, host)).status is not None
        ]

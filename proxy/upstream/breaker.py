"""Circuit breakers: a host that fails gets no requests for a while."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum, auto

import msgspec

from proxy.upstream.ratelimit import LimitState, time_left
from proxy.upstream.refusals import Refusal
from storage.errors import OriginFailed, OriginTimeout, RegistryError
from storage.shared import SharedState

FAILURES = 3  # in a row that open a breaker, if one alone is not final
LONGEST = 200  # characters of an error's message that all processes can read
PATIENCE = 1.0  # seconds to wait for another request, which probes the host
FIRST, LAST = 1.0, 30.0  # seconds that a breaker stays open: the first time, and at most
SOON = 0.25  # seconds that it stays open at least while a failure may be over in a moment
HEARSAY = 60.0  # seconds after which an opening elsewhere is no news any more
NOTED = 1.0  # seconds after an answer in which another one is not recorded


class Outlook(Enum):
    """What a failure says of when its host answers again.

    LATER: not in a moment
    SOON: it may be over in a moment, as when the host restarts
    ALONE: so it may, and the host has answered other requests since this one failed before
    UNKNOWN: nothing; the host has answered others for longer than it takes to restart
    """

    LATER = auto()
    SOON = auto()
    ALONE = auto()
    UNKNOWN = auto()


@dataclass(frozen=True, slots=True)
class HostState:
    """The state of one host: that of the upstream at `url`, or one to which it redirects.

    open: it gets no requests for `seconds` more; then one request probes it
    limits: the rate limits of the upstream's credentials
    refused: where credentials of the upstream are refused
    """

    url: str
    host: str
    open: bool
    seconds: float
    error: str | None
    limits: list[LimitState]
    refused: list[Refusal]


class Opening(msgspec.Struct, array_like=True, frozen=True):
    """That a breaker has opened, `age` seconds ago, with an `error`."""

    age: float
    error: str
    timeout: bool


class _Circuit(msgspec.Struct, array_like=True):
    """What all processes know of a host.

    failures: in a row, while it is closed
    error: the message of what opened it, OriginTimeout or OriginFailed; None: it is closed
    since, seconds: when it opened last, and for how long
    lost: since when the host has failed in a way that may be over in a moment; -inf: it has not
    told: how many seconds to leave it alone then, because of what it has answered
    heard: another server has said so
    answered: when the host answered last, or up to NOTED seconds before
    """

    failures: int = 0
    error: str | None = None
    timeout: bool = False
    since: float = 0.0
    seconds: float = 0.0
    lost: float = -math.inf
    told: float = 0.0
    openings: int = 0
    heard: bool = False
    answered: float = -math.inf


class Breaker:
    """A circuit breaker.  Closed: requests are sent.  Open: none is.  Then half-open: one is, the probe.

    All processes of a server that have a breaker of the same `name` share its state.  `changed` is called, in
    one of them, with the error that opened it, and with None when it has closed.  A host that restarts may be
    back within `moment` seconds.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        changed: Callable[[RegistryError | None], None] = lambda error: None,
        shared: SharedState | None = None,
        name: object = "",
        moment: float = 0.0,
    ) -> None:
        shared = shared or SharedState()
        self._clock = clock
        self._moment = moment
        self._changed = changed
        self._table = shared.upstreams
        self._key = self._table.key("circuit", name)
        self._probes = shared.slots
        self._probe = self._probes.key("probe", name)
        self._bell = shared.bell

    def _circuit(self) -> _Circuit:
        return self._table.get(self._key, _Circuit) or _Circuit()

    @property
    def closed(self) -> bool:
        return self._circuit().error is None

    @property
    def due(self) -> bool:
        """Whether it is half-open and no probe is under way."""
        return self._half_open and not self._probes.held(self._probe)

    @property
    def _half_open(self) -> bool:
        circuit = self._circuit()
        return circuit.error is not None and not self._left(circuit)

    @property
    def pause(self) -> float | None:
        """Seconds until to ask the host again, if it may be back in a moment; else None."""
        circuit, now = self._circuit(), self._clock()
        is_open = circuit.error is not None
        # Whoever comes in the last pause waits for its end as well.
        if not time_left(circuit.lost, self._moment, circuit.since if is_open else now):
            return None
        return self._left(circuit) or (0.0 if self.due else SOON) if is_open else self._rest(circuit, now)

    def _rest(self, circuit: _Circuit, now: float) -> float:
        """Seconds between two requests to a host that may be back in a moment: more, the longer it takes."""
        return max(SOON, circuit.told, (now - circuit.lost) / 2)

    def answered_after(self, when: float) -> bool:
        """Whether the host has answered since then, as far as that is recorded."""
        return self._circuit().answered > when

    async def probed(self) -> None:
        """Wait for the outcome of a probe that is under way, whichever process has sent it, but not long.

        As an outage ends many clients ask at once, and the answer to the first helps them all.
        """
        if not self._half_open or self.due:
            return
        with suppress(TimeoutError, OSError):  # no descriptors are left
            async with asyncio.timeout(PATIENCE):
                with self._bell.listen() as rung:
                    while self._half_open and not self.due:
                        await rung.wait()
                        rung.clear()

    def state(
        self, url: str, host: str, limits: Sequence[LimitState] = (), refused: Sequence[Refusal] = ()
    ) -> HostState:
        circuit = self._circuit()
        is_open = circuit.error is not None
        seconds = self._left(circuit) if is_open else 0.0
        return HostState(url, host, is_open, seconds, circuit.error, list(limits), list(refused))

    def _left(self, circuit: _Circuit) -> float:
        return time_left(circuit.since, circuit.seconds, self._clock())

    @contextmanager
    def call(self) -> Iterator[Attempt]:
        """A context for one request, whose outcome is reported to the Attempt; a cancelled one has none.

        Raises the error that opened it, OriginFailed or OriginTimeout, while no request may be sent.
        """
        with self._table.lock:
            circuit = self._circuit()
            probe = circuit.error is not None
            if probe and ((seconds := self._left(circuit)) or not self._probes.take(self._probe, 1)):
                kind = OriginTimeout if circuit.timeout else OriginFailed
                message = f"{circuit.error}; the next attempt is not due yet"
                raise kind(message, retry_after=seconds or FIRST)
        try:
            yield Attempt(self, circuit.openings, self._clock())
        finally:
            if probe:
                self._probes.release(self._probe)
                self._bell.ring()

    def succeeded(self) -> None:
        """Record a response, whenever its request was sent: the host is alive."""
        now = self._clock()
        with self._table.lock:
            circuit = self._circuit()
            was_open = circuit.error is not None
            if was_open or circuit.failures or now - circuit.answered >= NOTED:
                self._table.put(self._key, _Circuit(openings=circuit.openings, answered=now))
        if was_open:
            self._changed(None)

    def failed(
        self,
        error: RegistryError,
        outlook: Outlook,
        opening: int,
        *,
        final: bool,
        sent: float,
    ) -> None:
        """Record a failure; a `final` one is as any if the host has answered since the request was `sent`."""
        now = self._clock()
        with self._table.lock:
            circuit = self._circuit()
            # 1. many requests are sent  2. one times out and opens it  3. so do the others: that is no news.
            if opening != circuit.openings:
                return
            circuit.failures += 1
            was_open = circuit.error is not None
            opens = was_open or (final and sent >= circuit.answered) or circuit.failures >= FAILURES
            if outlook is not Outlook.UNKNOWN:
                self._foresee(circuit, outlook, now)
                # What fails alone is asked for once more, at the end; others need not wait for it.
                alone = outlook is Outlook.ALONE and not opens
                circuit.told = self._moment if alone else (error.retry_after or 0.0)
            if opens:
                circuit.error, circuit.timeout = str(error)[:LONGEST], isinstance(error, OriginTimeout)
                if time_left(circuit.lost, self._moment, now):
                    circuit.seconds = self._rest(circuit, now)
                else:
                    circuit.seconds = min(LAST, max(FIRST, circuit.seconds * 2)) if was_open else FIRST
                circuit.since = now
                circuit.openings += 1
                circuit.heard = False
            self._table.put(self._key, circuit)
        if opens and not was_open:
            self._changed(error)

    def _foresee(self, circuit: _Circuit, outlook: Outlook, now: float) -> None:
        """Note since when the host has failed in a way that may be over in a moment, if it has."""
        if outlook is Outlook.LATER:
            circuit.lost = -math.inf
        elif circuit.error is None and not time_left(circuit.lost, self._moment, now):
            circuit.lost = now

    def opened(self) -> Opening | None:
        """What to tell other servers, None while it is closed; not what they have told."""
        circuit = self._circuit()
        if circuit.error is None or circuit.heard:
            return None
        return Opening(max(0.0, self._clock() - circuit.since), circuit.error, circuit.timeout)

    def learn(self, opened: Opening) -> None:
        """Another server has opened its breaker of the host: the next request is a probe.

        It is sent at once, since the fault may be in the network of the other server; for that reason, too,
        the host's own answer of the last seconds counts more.
        """
        now = self._clock()
        if not 0 <= opened.age < HEARSAY:
            return
        with self._table.lock:
            circuit = self._circuit()
            if circuit.error is not None or now - circuit.answered <= max(opened.age, LAST):
                return
            error = f"another replica found: {opened.error}"[:LONGEST]
            heard = _Circuit(error=error, timeout=opened.timeout, since=now - opened.age, heard=True)
            heard.openings = circuit.openings + 1
            heard.lost = -math.inf if opened.timeout else heard.since
            self._table.put(self._key, heard)
        self._changed((OriginTimeout if opened.timeout else OriginFailed)(error))


class Attempt:
    """One request that a breaker has allowed."""

    def __init__(self, breaker: Breaker, opening: int, sent: float) -> None:
        self._breaker = breaker
        self._opening = opening
        self._sent = sent

    def succeeded(self) -> None:
        self._breaker.succeeded()

    def failed(self, error: RegistryError, outlook: Outlook = Outlook.LATER, *, final: bool = False) -> None:
        """Record a failure; a `final` one proves alone that others would fail, unless some were answered."""
        self._breaker.failed(error, outlook, self._opening, final=final, sent=self._sent)

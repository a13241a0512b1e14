"""A drill: for some time upstreams count as out of reach; what clients would have needed of them is noted.

Each process of a server has a Drill of its own; all are begun and ended together (proxy/live.py), and each
ends by itself when its time is up, whatever has become of whoever began it.

What is on its way in when a drill begins comes in: it is requests that are cut, not transfers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import msgspec

from proxy.telemetry.exchange import current

MOST = 10_000  # failures that are told apart; those that are beyond are only counted


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """For `seconds` from `begun` on, by the clock; `namespaces` are cut off, all if there is none."""

    begun: float
    seconds: float
    namespaces: tuple[str, ...] = ()


class Missed(msgspec.Struct, frozen=True, kw_only=True):
    """What `client` asked for so often, and is not here.  `kind` is manifest, blob, tags or referrers."""

    client: str
    kind: str
    namespace: str
    repository: str
    reference: str
    count: int
    first: float
    last: float


class DrillState(msgspec.Struct, frozen=True, kw_only=True):
    """`left` is how many seconds more it lasts, 0 if it has ended; `untold` were too many to tell apart."""

    order: Order | None
    left: float
    missed: list[Missed]
    untold: int


class Drill:
    """Of this process.  Of one that has ended the state is known until the next.

    `begun` is called when one begins.
    """

    def __init__(
        self, clock: Callable[[], float] = time.time, begun: Callable[[], None] = lambda: None
    ) -> None:
        self._clock = clock
        self._begun = begun
        self._order: Order | None = None
        self._ended = False
        self._missed: dict[tuple[str, ...], list[float]] = {}
        self._untold = 0

    def begin(self, order: Order) -> None:
        """Also where it has begun already: who is told twice begins once."""
        if self._order != order:
            self._order, self._ended = order, False
            self._missed, self._untold = {}, 0
            self._begun()

    def end(self) -> None:
        self._ended = True

    @property
    def left(self) -> float:
        """Seconds; 0: there is none."""
        order = self._order
        if order is None or self._ended:
            return 0.0
        passed = self._clock() - order.begun
        # A clock that was set back must not make hours of minutes.
        return order.seconds - passed if 0 <= passed < order.seconds else 0.0

    def cuts(self, namespace: str) -> bool:
        """Whether its upstream must not be asked now."""
        if self._order is None:  # mostly
            return False
        return self.left > 0 and (not self._order.namespaces or namespace in self._order.namespaces)

    def missed(self) -> None:
        """The client that is being served would have needed an upstream."""
        now = current()
        if not now.id:  # it is none
            return
        key = (now.client, now.kind, now.namespace, now.repository, now.reference)
        at = self._clock()
        if (known := self._missed.get(key)) is not None:
            known[0] += 1
            known[2] = at
        elif len(self._missed) < MOST:
            self._missed[key] = [1, at, at]
        else:
            self._untold += 1

    def state(self) -> DrillState:
        return DrillState(
            order=self._order,
            left=self.left,
            missed=[
                Missed(
                    client=client,
                    kind=kind,
                    namespace=namespace,
                    repository=repository,
                    reference=str(reference),
                    count=int(count),
                    first=first,
                    last=last,
                )
                for (client, kind, namespace, repository, reference), (count, first, last) in (
                    self._missed.items()
                )
            ],
            untold=self._untold,
        )


def merged(states: Iterable[DrillState]) -> DrillState | None:
    """What those tell together that are of the latest drill; None where there was none."""
    told = [each for each in states if each.order is not None]
    if not told:
        return None
    order = max((each.order for each in told if each.order), key=lambda each: each.begun)
    told = [each for each in told if each.order == order]
    missed: dict[tuple[str, ...], Missed] = {}
    for each in (each for state in told for each in state.missed):
        key = (each.client, each.kind, each.namespace, each.repository, each.reference)
        known = missed.get(key)
        missed[key] = each if known is None else _both(known, each)
    return DrillState(
        order=order,
        left=max((each.left for each in told), default=0.0),
        missed=sorted(missed.values(), key=lambda each: (each.first, each.client, each.reference)),
        untold=sum(each.untold for each in told),
    )


def _both(one: Missed, other: Missed) -> Missed:
    return msgspec.structs.replace(
        one,
        count=one.count + other.count,
        first=min(one.first, other.first),
        last=max(one.last, other.last),
    )

"""Drills: for some time upstreams are treated as unreachable, and requests that would need them are recorded.

Each process of a server has its own Drill.  All begin and end together (proxy/processes/drills.py), and each
ends by itself when its time is up, even if the process that began it has ended.

A drill cuts off requests, not transfers: those in flight when it begins are completed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import msgspec

from proxy.telemetry.exchange import current

MOST = 10_000  # missed requests that are listed; more are only counted


class DrillOrder(msgspec.Struct, frozen=True, kw_only=True):
    """An order to cut off `namespaces` (none means all) for `seconds`, from the time `begun`."""

    begun: float
    seconds: float
    namespaces: tuple[str, ...] = ()


class MissedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Content that `client` requested `count` times, and that is not stored.

    `kind` is manifest, blob, tags or referrers.
    """

    client: str
    kind: str
    namespace: str
    repository: str
    reference: str
    count: int
    first: float
    last: float


class DrillState(msgspec.Struct, frozen=True, kw_only=True):
    """The state of a drill: the seconds left, 0 once it has ended, and the requests that missed.

    `untold` is the number of requests beyond those that are listed.
    """

    order: DrillOrder | None
    left: float
    missed: list[MissedRequest]
    untold: int


class Drill:
    """The drill of this process, current or last; the state of the last one is kept until the next begins.

    `begun` is called when a drill begins.  An order for a `key_of` a namespace is one for the namespace.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.time,
        begun: Callable[[], None] = lambda: None,
        key_of: Callable[[str], str] = str,
    ) -> None:
        self._clock = clock
        self._begun = begun
        self._key_of = key_of
        self._order: DrillOrder | None = None
        self._ended = False
        self._missed: dict[tuple[str, ...], list[float]] = {}
        self._untold = 0

    def begin(self, order: DrillOrder) -> None:
        """Begin a drill; the same order twice begins one."""
        if self._order != order:
            self._order, self._ended = order, False
            self._missed, self._untold = {}, 0
            self._begun()

    def end(self) -> None:
        self._ended = True

    @property
    def left(self) -> float:
        """Seconds left; 0 if there is no drill."""
        order = self._order
        if order is None or self._ended:
            return 0.0
        passed = self._clock() - order.begun
        # A clock that was set back must not turn minutes into hours.
        return order.seconds - passed if 0 <= passed < order.seconds else 0.0

    def cuts(self, namespace: str) -> bool:
        """Whether the upstream of `namespace` must not get requests now."""
        if self._order is None:  # the usual case
            return False
        ordered = self._order.namespaces
        return self.left > 0 and (not ordered or not {namespace, self._key_of(namespace)}.isdisjoint(ordered))

    def missed(self) -> None:
        """Record that the current request of a client would have needed an upstream."""
        now = current()
        if not now.id:  # not a request of a client
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
                MissedRequest(
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


def merged(states: Sequence[DrillState]) -> DrillState | None:
    """The states of the latest drill in all processes, as one; None if there was no drill."""
    orders = [each.order for each in states if each.order is not None]
    if not orders:
        return None
    order = max(orders, key=lambda each: each.begun)
    states = [each for each in states if each.order == order]
    missed: dict[tuple[str, ...], MissedRequest] = {}
    for each in (each for state in states for each in state.missed):
        key = (each.client, each.kind, each.namespace, each.repository, each.reference)
        known = missed.get(key)
        missed[key] = each if known is None else _both(known, each)
    return DrillState(
        order=order,
        left=max(each.left for each in states),
        missed=sorted(missed.values(), key=lambda each: (each.first, each.client, each.reference)),
        untold=sum(each.untold for each in states),
    )


def _both(one: MissedRequest, other: MissedRequest) -> MissedRequest:
    return msgspec.structs.replace(
        one,
        count=one.count + other.count,
        first=min(one.first, other.first),
        last=max(one.last, other.last),
    )

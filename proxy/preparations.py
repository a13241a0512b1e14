"""What prepares for upstreams being away, and proves it: warm, ready, drill; a part of Operations."""

from __future__ import annotations

import math
from collections.abc import Sequence

from proxy.answers import Drilling, MissedRow, ReadyRow, WarmRow
from proxy.cache.drill import DrillState
from proxy.drills import Drills
from proxy.live import Everyone
from proxy.namespaces.composition import Composition
from proxy.namespaces.references import FieldInvalid, ReferenceReader, read_platforms
from proxy.readiness import Readiness
from proxy.warming import Warmer
from storage.concurrency import run_in_thread
from storage.errors import Unsupported


class Preparations:
    """Every method raises RegistryError, or BadField where what it is given cannot be read.  To be closed."""

    def __init__(self, composition: Composition, everyone: Everyone, drills: Drills | None) -> None:
        self._cached = composition.caches
        self._names = ReferenceReader(composition.namespaces)
        self._readiness = Readiness(composition.store, composition.private, composition.hosted)
        self._warmer = Warmer(composition.namespaces, self._readiness, everyone.forget)
        self._drills = drills

    async def warm(self, reference: str, platforms: Sequence[str] = (), referrers: bool = True) -> WarmRow:
        """See Warmer.warm()."""
        return await self._warmer.warm(reference, read_platforms("platforms", platforms), referrers)

    async def ready(
        self, references: Sequence[str], platforms: Sequence[str] = (), referrers: bool = True
    ) -> list[ReadyRow]:
        """See Readiness.judge(); one for each, also for what cannot be read."""
        wanted = read_platforms("platforms", platforms)
        return await run_in_thread(lambda: [self._judge(each, wanted, referrers) for each in references])

    def _judge(self, text: str, platforms: Sequence[str], referrers: bool) -> ReadyRow:
        try:
            asked = self._names.reference("references", text)
        except FieldInvalid as error:
            return ReadyRow(
                asked=text, repository="", reference="", digest=None, state="absent", error=str(error)
            )
        return self._readiness.judge(asked, platforms, referrers)

    async def begin_drill(self, seconds: float, namespaces: Sequence[str] = ()) -> Drilling:
        """Cut upstreams off, those of `namespaces` or all.  Raises Denied while another drill goes on."""
        if not 0 < seconds < math.inf:
            raise FieldInvalid("seconds", "must be more than 0")
        for each in namespaces:
            if each not in self._cached:
                raise FieldInvalid("namespaces", f"{each} is not configured, or is no cache")
        return _drilling(await self._running.begin(seconds, namespaces))

    async def drill(self) -> Drilling:
        """The one that goes on, or the last."""
        return _drilling(await self._running.state())

    async def end_drill(self) -> Drilling:
        return _drilling(await self._running.end())

    @property
    def _running(self) -> Drills:
        if self._drills is None:
            raise Unsupported("no server is running: nothing could be cut off")
        return self._drills

    async def close(self) -> None:
        if self._drills is not None:
            self._drills.close()


def _drilling(state: DrillState) -> Drilling:
    order = state.order
    return Drilling(
        running=state.left > 0,
        begun=order.begun if order else 0.0,
        seconds=order.seconds if order else 0.0,
        left=state.left,
        namespaces=list(order.namespaces) if order else [],
        missed=[
            MissedRow(
                client=each.client,
                kind=each.kind,
                repository=f"{each.namespace}/{each.repository}",
                reference=each.reference,
                count=each.count,
                first=each.first,
                last=each.last,
            )
            for each in state.missed
        ],
        untold=state.untold,
    )

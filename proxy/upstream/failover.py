"""Upstreams with the same content, as one registry: mirrors first, the registry itself last.

If one does not serve a request, for whatever reason, the next one gets it.  If none does, the error is that
of the last one: a mirror's "unknown" or refusal says nothing about the registry.  One that would ask this
server in turn, as two servers that are each other's upstream, has said nothing.  One that is known to fail
comes after the healthy ones, and is probed in the background.

If none can be asked, and one has failed only just, as when it restarts, who asks for content waits for it.

In a fleet other replicas come first, those that own what is asked for: see peers.py.  Their "unknown" and
refusals are those of the upstreams.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeAlias, TypeVar

import structlog

from proxy.telemetry.exchange import current, needed, origin_age
from proxy.upstream.breaker import SOON, HostState
from proxy.upstream.client import UpstreamRegistry
from proxy.upstream.errors import MOMENT, OriginAway, OriginLooped
from proxy.upstream.peers import Owners
from storage.concurrency import SingleFlight
from storage.errors import (
    BlobUnknown,
    ManifestUnknown,
    NameUnknown,
    OriginDenied,
    RegistryError,
    StorageFailed,
    Unavailable,
)
from storage.oci import Descriptor, Digest, Manifest, Reference, Span
from storage.registry import Blob, ReadInto, Registry, RelayedBlob

log = structlog.get_logger()
T = TypeVar("T")
Holders: TypeAlias = Callable[[], Awaitable[Sequence[UpstreamRegistry]]]

FINAL = (BlobUnknown, ManifestUnknown, NameUnknown, OriginDenied)  # answers of an owner
AGAIN = 60.0  # seconds within which a second request for a blob means that the first transfer failed
REMEMBERED = 1000  # blobs
ROUNDS = 8  # of requests to all, or of probes, at most, while one may be back in a moment


class Failover(Registry):
    """Upstreams with the same content, as one read-only registry, which closes them.

    There must be at least one.  `owners` says which other replicas are asked before them; `rest` sleeps.
    """

    def __init__(
        self,
        upstreams: Sequence[UpstreamRegistry],
        clock: Callable[[], float] = time.monotonic,
        owners: Owners | None = None,
        rest: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._upstreams = list(upstreams)
        self._clock = clock
        self._owners = owners
        self._rest = rest
        # Until when, the upstream, and whether it broke off, or has sent all there is.
        self._transfers: dict[Digest, tuple[float, UpstreamRegistry | None, bool]] = {}
        self._probes: set[asyncio.Task[None]] = set()
        self._flights = SingleFlight()

    async def get_blob(self, repository: str, digest: Digest, span: Span | None = None) -> Blob:
        """After a transfer that broke off, or of all there is, the next upstream is tried first.

        While a transfer is under way, the other ranges of the blob come from the same upstream.
        """
        until, last, ended = self._transfers.get(digest, (0.0, None, False))
        again = ended or (span is None and until < math.inf)
        source, blob = await self._first(
            lambda each: each.get_blob(repository, digest, span),
            await self._sources(repository, digest),
            partial(self._holders, repository, digest),
            last if self._clock() < until else None,
            again,
        )
        part = span is not None and span.stop is not None
        if not part:
            self._note(digest, math.inf, source, False)
        return _Transfer(blob, part, partial(self._ended, digest, source))

    def _ended(self, digest: Digest, source: UpstreamRegistry, part: bool, ended: bool) -> None:
        if ended or not part:
            self._note(digest, self._clock() + AGAIN, source, ended)

    def _note(self, digest: Digest, until: float, source: UpstreamRegistry, ended: bool) -> None:
        self._transfers.pop(digest, None)
        self._transfers[digest] = until, source, ended
        if len(self._transfers) > REMEMBERED:
            del self._transfers[next(iter(self._transfers))]

    async def resolve_blob(self, repository: str, digest: Digest) -> Descriptor:
        sources = await self._sources(repository, digest)
        holders = partial(self._holders, repository, digest)
        return (await self._first(lambda each: each.resolve_blob(repository, digest), sources, holders))[1]

    async def get_manifest(self, repository: str, reference: Reference) -> Manifest:
        sources = await self._sources(repository)
        holders = partial(self._holders, repository)
        return (await self._first(lambda each: each.get_manifest(repository, reference), sources, holders))[1]

    async def resolve_manifest(self, repository: str, reference: Reference) -> Descriptor:
        sources = await self._sources(repository)
        return (await self._first(lambda each: each.resolve_manifest(repository, reference), sources))[1]

    async def tags(self, repository: str, last: str = "", limit: int | None = None) -> list[str]:
        sources = await self._sources(repository)
        return (await self._first(lambda each: each.tags(repository, last, limit), sources))[1]

    async def referrers(
        self,
        repository: str,
        digest: Digest,
        artifact_type: str | None = None,
        last: str = "",
        limit: int | None = None,
    ) -> list[Descriptor]:
        wanted = digest, artifact_type, last, limit
        sources = await self._sources(repository)
        return (await self._first(lambda each: each.referrers(repository, *wanted), sources))[1]

    async def _sources(self, repository: str, digest: Digest | None = None) -> list[UpstreamRegistry]:
        """In the order to ask them; a `digest` is that of a blob."""
        owners = [] if self._owners is None else await self._owners.of(repository, digest)
        return [*owners, *self._upstreams]

    async def _holders(self, repository: str, digest: Digest | None = None) -> list[UpstreamRegistry]:
        """Other replicas, which may have stored what the upstreams cannot be asked for."""
        return [] if self._owners is None else await self._owners.holders(repository, digest)

    async def _first(
        self,
        ask: Callable[[UpstreamRegistry], Awaitable[T]],
        sources: Sequence[UpstreamRegistry],
        holders: Holders | None = None,
        last: UpstreamRegistry | None = None,
        again: bool = False,
    ) -> tuple[UpstreamRegistry, T]:
        """The one that served, and the result.

        If all are healthy, `last` comes first, or with `again` the one after it.  If the upstreams cannot be
        asked, the `holders` are; then one that may be back in a moment is waited for.  A request without
        them is for what may be known, and one of another replica has other sources: these wait for nobody.
        """
        start = sources.index(last) + again if last is not None and last in sources else 0
        waits = not current().peer and (holders is not None or needed.get())
        pause, rested = None, 0.0
        for _ in range(ROUNDS - 1 if waits else 0):
            if pause is None:
                try:
                    return await self._ask_all(ask, self._order(sources, start), holders)
                except Unavailable as error:
                    pause = self.pause
                    if pause is None and isinstance(error, OriginAway) and not rested:
                        # It has answered another request meanwhile.
                        pause = min(SOON, self._upstreams[-1].moment) or None
                    if pause is None or rested >= MOMENT:
                        raise
            await self._rest(pause)
            rested += pause
            pause = await self._still_lost() if rested < MOMENT else None
        return await self._ask_all(ask, self._order(sources, start), holders)

    async def _still_lost(self) -> float | None:
        """The pause before the next round, if hosts were lost and none of them is back: one probe tells."""
        lost = [each for each in self._upstreams if each.lost]
        await asyncio.gather(*(self._flights.join(each, each.probe) for each in lost))
        return self.pause if lost and all(each.lost for each in lost) else None

    async def _ask_all(
        self,
        ask: Callable[[UpstreamRegistry], Awaitable[T]],
        order: Sequence[UpstreamRegistry],
        holders: Holders | None,
    ) -> tuple[UpstreamRegistry, T]:
        errors: dict[UpstreamRegistry, RegistryError] = {}
        for source in order:
            origin_age.set(0.0)
            try:
                return source, await ask(source)
            except RegistryError as error:
                log.debug("upstream.passed_by", host=source.host, error=str(error))
                if source not in self._upstreams and isinstance(error, FINAL):
                    raise error.copy(remembered=True) from None
                errors[source] = error
        said = [errors[each] for each in self._upstreams if not isinstance(errors[each], OriginLooped)]
        final = said[-1] if said else errors[self._upstreams[-1]]
        if holders is not None and isinstance(final, Unavailable):
            for source in await holders():
                with suppress(RegistryError):
                    return source, await ask(source)
        raise final

    def _order(self, sources: Sequence[UpstreamRegistry], start: int) -> list[UpstreamRegistry]:
        count = len(sources)
        order = [sources[(start + step) % count] for step in range(count)]
        failing = [each for each in order if not each.healthy]
        if not failing or len(failing) == count:
            return order
        for each in failing:
            if each.probe_due:
                probe = asyncio.create_task(each.probe())
                self._probes.add(probe)
                probe.add_done_callback(self._probes.discard)
        return [each for each in order if each not in failing] + failing

    @property
    def healthy(self) -> bool:
        """Whether at least one has a closed circuit."""
        return any(each.healthy for each in self._upstreams)

    @property
    def probe_due(self) -> bool:
        """Whether at least one has failed and it is time to probe it."""
        return any(each.probe_due for each in self._upstreams)

    async def probe(self) -> None:
        """Send one request to each that is due, which updates `healthy`."""
        await asyncio.gather(*(each.probe() for each in self._upstreams if each.probe_due))

    @property
    def pause(self) -> float | None:
        """Seconds until to ask one again that may be back in a moment; None: there is none."""
        pauses = [each.pause for each in self._upstreams]
        return min((each for each in pauses if each is not None), default=None)

    @property
    def spares(self) -> bool:
        """Whether at least one has requests left that are not reserved."""
        return any(each.spares for each in self._upstreams)

    def state(self) -> list[HostState]:
        """The state of the hosts of each upstream, in order."""
        return [state for each in self._upstreams for state in each.state()]

    async def close(self) -> None:
        for probe in self._probes:
            probe.cancel()
        await asyncio.gather(*self._probes, self._flights.close(), return_exceptions=True)
        if self._owners is not None:
            self._owners.close()
        for upstream in self._upstreams:
            await upstream.close()


class _Transfer(RelayedBlob):
    """A blob, or a `part` of it, that is being transferred; when it is closed it calls `closed`.

    `closed` gets `part`, and whether the next request is for another upstream: after an error, and after all
    there is, for if that had been right, nobody would ask again.
    """

    def __init__(self, blob: Blob, part: bool, closed: Callable[[bool, bool], None]) -> None:
        super().__init__(blob)
        self._part = part
        self._ended = not part
        self._closed = closed

    async def chunks(self, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        self._ended = False
        try:
            async for chunk in self._blob.chunks(start, stop):
                yield chunk
        except RegistryError:
            self._ended = True
            raise
        self._ended = not self._part

    async def pass_on(self, write: Callable[[ReadInto], Awaitable[int]]) -> bool:
        self._ended = False
        try:
            more = await super().pass_on(write)
        except StorageFailed:  # of the disk to which it is written
            raise
        except RegistryError:
            self._ended = True
            raise
        self._ended = not more and not self._part
        return more

    async def close(self) -> None:
        self._closed(self._part, self._ended)
        await super().close()

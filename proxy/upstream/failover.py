"""Several upstreams with the same content, as one registry: mirrors first, the registry itself last.

The next one is asked wherever one does not serve, whatever its reason.  If none does, the last one's reason
is the answer: a mirror's "unknown" or refusal says nothing of the registry.  One that is known to fail is
not waited for while another is well; whether it is back is found out on the side.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

import structlog

from proxy.upstream.breaker import HostState
from proxy.upstream.client import UpstreamRegistry
from storage.errors import RegistryError
from storage.oci import Descriptor, Digest, Manifest, Reference, Span
from storage.registry import Blob, Registry

log = structlog.get_logger()
T = TypeVar("T")

AGAIN = 60.0  # seconds within which a second request for a blob means that the first was of no use
REMEMBERED = 1000  # blobs


class Failover(Registry):
    """Read-only.  `upstreams` are at least one, and are closed with it."""

    def __init__(
        self, upstreams: Sequence[UpstreamRegistry], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._upstreams = list(upstreams)
        self._clock = clock
        self._given: dict[Digest, tuple[float, int]] = {}  # until when, and by whom
        self._probes: set[asyncio.Task[None]] = set()

    async def get_blob(self, repository: str, digest: Digest, span: Span | None = None) -> Blob:
        """After a transfer that broke off, or gave wrong bytes, the next one comes first."""
        if span is not None and span.stop is not None:
            return (await self._first(lambda each: each.get_blob(repository, digest, span)))[1]
        until, giver = self._given.get(digest, (0.0, 0))
        start = giver + 1 if self._clock() < until else 0
        number, blob = await self._first(lambda each: each.get_blob(repository, digest, span), start)
        return _Given(blob, lambda: self._ended(digest, number))

    def _ended(self, digest: Digest, giver: int) -> None:
        self._given.pop(digest, None)
        self._given[digest] = self._clock() + AGAIN, giver
        if len(self._given) > REMEMBERED:
            del self._given[next(iter(self._given))]

    async def resolve_blob(self, repository: str, digest: Digest) -> Descriptor:
        return (await self._first(lambda each: each.resolve_blob(repository, digest)))[1]

    async def get_manifest(self, repository: str, reference: Reference) -> Manifest:
        return (await self._first(lambda each: each.get_manifest(repository, reference)))[1]

    async def resolve_manifest(self, repository: str, reference: Reference) -> Descriptor:
        return (await self._first(lambda each: each.resolve_manifest(repository, reference)))[1]

    async def tags(self, repository: str, last: str = "", limit: int | None = None) -> list[str]:
        return (await self._first(lambda each: each.tags(repository, last, limit)))[1]

    async def referrers(
        self, repository: str, digest: Digest, artifact_type: str | None = None
    ) -> list[Descriptor]:
        return (await self._first(lambda each: each.referrers(repository, digest, artifact_type)))[1]

    async def _first(self, ask: Callable[[UpstreamRegistry], Awaitable[T]], start: int = 0) -> tuple[int, T]:
        """Who served, by number, and what; `start` is who would be asked first if all were well."""
        errors: dict[int, RegistryError] = {}
        for number in self._order(start):
            try:
                return number, await ask(self._upstreams[number])
            except RegistryError as error:
                log.debug("upstream.passed_by", host=self._upstreams[number].host, error=str(error))
                errors[number] = error
        raise errors[len(self._upstreams) - 1]

    def _order(self, start: int) -> list[int]:
        count = len(self._upstreams)
        order = [(start + step) % count for step in range(count)]
        failing = [number for number in order if not self._upstreams[number].well]
        if not failing or len(failing) == count:
            return order
        for number in failing:
            if self._upstreams[number].due:
                probe = asyncio.create_task(self._upstreams[number].probe())
                self._probes.add(probe)
                probe.add_done_callback(self._probes.discard)
        return [number for number in order if number not in failing] + failing

    @property
    def spares(self) -> bool:
        """One at least does."""
        return any(each.spares for each in self._upstreams)

    def state(self) -> list[HostState]:
        """Of each upstream, in their order."""
        return [state for each in self._upstreams for state in each.state()]

    async def close(self) -> None:
        for probe in self._probes:
            probe.cancel()
        await asyncio.gather(*self._probes, return_exceptions=True)
        for upstream in self._upstreams:
            await upstream.close()


class _Given(Blob):
    """A blob under way that tells when it is done with."""

    def __init__(self, blob: Blob, ended: Callable[[], None]) -> None:
        self.descriptor = blob.descriptor
        self._blob = blob
        self._ended = ended

    def chunks(self, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        return self._blob.chunks(start, stop)

    async def close(self) -> None:
        self._ended()
        await self._blob.close()

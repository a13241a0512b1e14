"""Counts what requests do in memory, and records it periodically: uses, moved tags, counters of namespaces.

No single request causes a write: a write is a transaction, and only one process can write at a time.  Counts
that are not recorded yet are lost if the process is killed.

Serving a manifest is a use of everything that it names: clients that hold a base layer already never ask for
it, yet the next client needs it.  So recording marks the manifests of an index as used, though not as
requested, and sets the time of last use of the blobs of config and layers.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice

from proxy.telemetry.exchange import UNKNOWN, Exchange
from proxy.telemetry.metrics import PEERS, Metrics
from storage.concurrency import run_in_thread
from storage.disk.blobs import TOUCH
from storage.errors import StorageFailed
from storage.graph import walk
from storage.maintenance.pull_journal import PullJournal
from storage.maintenance.resolutions import KEPT, Resolution
from storage.maintenance.usage import HOUR, Counters, Move, Usage, Use
from storage.oci import Digest, Tag
from storage.records import BATCH
from storage.store import Store

EVERY = 10.0  # seconds between recordings
MOST = 50_000  # references, and moves, that wait to be recorded; more only count for their namespace


@dataclass(slots=True)
class Window:
    """What is counted between two recordings.

    pulls: by repository, reference, digest and who; only where they are recorded
    uses: of manifests, by namespace, repository, reference and digest; each is a number of uses and the times
    of the last and the first one
    """

    counts: dict[tuple[int, str], Counters] = field(default_factory=dict)
    uses: dict[tuple[str, str, str, str], list[float]] = field(default_factory=dict)
    moves: list[tuple[str, Tag, Move]] = field(default_factory=list)
    pulls: dict[tuple[str, str, str, str], tuple[int, float]] = field(default_factory=dict)

    def count_pull(self, pulled: tuple[str, str, str], exchange: Exchange, now: float) -> None:
        """Count a pull for the one who asked; `pulled` is a repository, a reference and a digest."""
        key = *pulled, exchange.user or exchange.client
        if (known := self.pulls.get(key)) is not None or len(self.pulls) < MOST:
            self.pulls[key] = (known[0] if known else 0) + 1, now

    def counters(self, namespace: str, now: float) -> Counters:
        key = int(now) // HOUR * HOUR, namespace
        found = self.counts.get(key)
        if found is None:
            found = self.counts[key] = Counters()
        return found


class UsageRecorder:
    """Counts the requests of one process and records them, in one event loop.

    Counts that cannot be recorded are kept until the next attempt.  `journal` records who pulled what.
    """

    def __init__(
        self,
        store: Store,
        usage: Usage,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
        journal: PullJournal | None = None,
    ) -> None:
        self._store = store
        self._usage = usage
        self._journal = journal
        self._metrics = metrics
        self._clock = clock
        self._window = Window()
        self._flushing = asyncio.Lock()
        # Of each namespace the numbers of Traffic that are counted here already.
        self._traffic: dict[str, tuple[int, int, int, int]] = {}
        # Only flush() uses the attributes below, in its thread.
        self._counts: dict[tuple[int, str], Counters] = {}
        self._uses: dict[tuple[str, str], Use] = {}
        self._moves: list[tuple[str, Tag, Move]] = []
        self._resolved: dict[tuple[str, str], list[Resolution]] = {}
        self._pulls: dict[tuple[str, str, str, str], tuple[int, float]] = {}
        self._served: dict[tuple[str, Digest], float] = {}  # when; their blobs are still to be touched
        self._touched: dict[tuple[str, Digest], float] = {}

    # Called for every request: no I/O, no locks

    def served(self, exchange: Exchange, status: int) -> None:
        """Count a request that has ended."""
        namespace = exchange.namespace
        if namespace == UNKNOWN:
            return
        now, window = self._clock(), self._window
        counters = window.counters(self._metrics.label(namespace), now)
        counters.requests += 1
        counters.sent_bytes += exchange.bytes
        counters.pushed_bytes += exchange.received
        match exchange.result:
            case "hit":
                counters.hits += 1
                counters.hit_bytes += exchange.bytes
            case "miss":
                counters.misses += 1
            case "revalidated":
                counters.revalidated += 1
                counters.hit_bytes += exchange.bytes
            case "stale":
                counters.stale += 1
                counters.hit_bytes += exchange.bytes
            case "negative":
                counters.negative += 1
            case "error":
                counters.errors += 1
        if exchange.kind == "manifest" and exchange.digest and status in (200, 304):
            # What a tag stood for in the past is no use of the tag.
            reference = exchange.reference if exchange.as_of is None else exchange.digest
            key = namespace, exchange.repository, reference, exchange.digest
            if self._journal is not None and not exchange.peer:
                window.count_pull((f"{namespace}/{exchange.repository}", *key[2:]), exchange, now)
            use = window.uses.get(key)
            if use is not None:
                use[0] += 1
                use[1] = now
            elif len(window.uses) < MOST:
                window.uses[key] = [1, now, now]

    def moved(self, repository: str, tag: Tag, old: Digest, new: Digest) -> None:
        """Count a moved tag; `repository` is a full name."""
        if len(self._window.moves) < MOST:
            self._window.moves.append((repository, tag, Move(self._clock(), old, new)))

    # Called periodically

    async def run(self) -> None:
        """Record every `EVERY` seconds, until cancelled."""
        while True:
            await asyncio.sleep(EVERY)
            await self.flush()

    async def flush(self) -> None:
        """Record all counts."""
        async with self._flushing:
            window, self._window = self._window, Window()
            self._count_traffic(window)
            await run_in_thread(self._record, window)
            waiting = len(self._uses) + len(self._moves) + len(self._counts) + len(self._pulls)
            self._metrics.unrecorded.set(waiting)

    async def close(self) -> None:
        await self.flush()

    def _count_traffic(self, window: Window) -> None:
        for namespace, traffic in self._metrics.upstreams.items():
            total = traffic.requests, traffic.received, traffic.ahead_requests, traffic.ahead_received
            known = self._traffic.get(namespace, (0, 0, 0, 0))
            if total != known and namespace != PEERS:
                counters = window.counters(namespace, self._clock())
                counters.upstream_requests += total[0] - known[0]
                counters.received_bytes += total[1] - known[1]
                counters.ahead_requests += total[2] - known[2]
                counters.ahead_bytes += total[3] - known[3]
                self._traffic[namespace] = total

    def _record(self, window: Window) -> None:
        self._take(window)
        with suppress(StorageFailed):  # DiskHealth has logged it
            self._touch()
        with suppress(StorageFailed):
            while self._journal is not None and self._pulls:
                pulls = dict(islice(self._pulls.items(), BATCH))
                self._journal.record(pulls)
                for pulled in pulls:
                    del self._pulls[pulled]
        with suppress(StorageFailed):
            while self._uses or self._moves or self._counts:
                uses = dict(islice(self._uses.items(), BATCH))
                resolved = {key: self._resolved[key] for key in uses if key in self._resolved}
                self._usage.record(uses, self._moves, self._counts, resolved)
                self._moves, self._counts = [], {}
                for key in uses:
                    del self._uses[key]
                    self._resolved.pop(key, None)

    def _take(self, window: Window) -> None:
        for at, counters in window.counts.items():
            self._counts[at] = self._counts.get(at, Counters()) + counters
        self._moves += window.moves[: MOST - len(self._moves)]
        for pulled, (times, latest) in window.pulls.items():
            if (before := self._pulls.get(pulled)) is not None or len(self._pulls) < MOST:
                self._pulls[pulled] = times + (before[0] if before else 0), latest
        for (namespace, name, reference, digest), (count, last, first) in window.uses.items():
            repository = f"{namespace}/{name}"
            for each in {reference, digest}:
                self._use(repository, each, Use(int(count), last, first))
            if reference != digest and (repository, reference) in self._uses:
                known = self._resolved.setdefault((repository, reference), [])
                if not known or known[-1][1] != digest:  # more than the changes would grow while a disk fails
                    known.append((first, Digest(digest)))
                    del known[:-KEPT]
            if len(self._served) < MOST:
                key = repository, Digest(digest)
                self._served[key] = max(last, self._served.get(key, last))

    def _use(self, repository: str, reference: str, use: Use) -> None:
        key = repository, reference
        known = self._uses.get(key)
        if known is not None:
            self._uses[key] = known + use
        elif len(self._uses) < 2 * MOST:  # the tag and the digest of each served manifest
            self._uses[key] = use

    def _touch(self) -> None:
        """Mark everything that a served manifest names as used, at most once per minute."""
        self._touched = {key: at for key, at in self._touched.items() if 0 <= self._clock() - at < TOUCH}
        used: dict[Digest, float] = {}
        try:
            while self._served:
                (repository, digest), at = next(iter(self._served.items()))
                if (repository, digest) not in self._touched:
                    named = walk(self._store, repository, digest)
                    for each in named.manifests - {digest}:
                        self._use(repository, each, Use(0, at, at))
                    used.update((blob, max(at, used.get(blob, -math.inf))) for blob in named.blobs)
                    self._touched[repository, digest] = at
                del self._served[repository, digest]
        finally:
            for blob, at in used.items():
                self._store.files.touch(blob, at)

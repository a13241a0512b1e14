"""What an operator can see and do: the methods of the admin API, and of the commands on a directory.

Patterns are globs over full names, `<namespace>/<repository>`, with `:<tag>` or `@<digest>` where it is about
these.  References, and patterns whose repository holds no wildcard, are read as a client's are: `alpine:3`
is that of the default namespace.  What takes long is done in threads.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import chain

import structlog

from proxy.admin.drills import DrillControl
from proxy.admin.explain import Explainer
from proxy.admin.inventory import Inventory, merged
from proxy.admin.models import FillRow, ImageTree, Listed, PinRow, Stats, WebhookRow
from proxy.admin.operations import PAGE
from proxy.admin.peers import ServerProcesses
from proxy.admin.processes import FillState
from proxy.admin.purge import Purge
from proxy.admin.readiness import Readiness
from proxy.admin.reports import (
    Collected,
    Drilling,
    Evicted,
    Purged,
    ReadyRow,
    Refreshed,
    Scrubbing,
    Unpinned,
    WarmRow,
    Why,
)
from proxy.admin.rows import collected, drilling, evicted, scrub_row, stats_row, webhook_row
from proxy.admin.warm import Warmer
from proxy.cache.refresh import refresh
from proxy.namespaces.composition import Composition
from proxy.namespaces.references import (
    FieldInvalid,
    ReferenceReader,
    read_pattern,
    read_platforms,
    read_seconds,
)
from proxy.transfer.bundle_export import BundleExport
from proxy.transfer.bundle_import import BundleImport
from storage.concurrency import run_in_thread
from storage.errors import NameUnknown, RegistryError, Unsupported
from storage.graph import walk
from storage.maintenance.collection import Collection
from storage.maintenance.pins import Pin
from storage.maintenance.scrub import Heal, Progress, Scrub
from storage.maintenance.usage import Counters
from storage.names import is_glob
from storage.oci import Digest

log = structlog.get_logger()

LOOK = 1.0  # seconds between two looks that a fill's speed is told from, at least


class LocalOperations:
    """Every method raises RegistryError, or BadField where what it is given cannot be read.  To be closed.

    `evicting` is what others hold who evict in this process; `heal` fetches what a scrub found damaged;
    without `drills` no server is running.
    """

    remote = False

    def __init__(
        self,
        composition: Composition,
        everyone: ServerProcesses,
        evicting: asyncio.Lock | None = None,
        heal: Heal | None = None,
        drills: DrillControl | None = None,
    ) -> None:
        parts = self._composition = composition
        self._everyone = everyone
        self._reading = ReferenceReader(parts.namespaces)
        self._evicting = evicting or nullcontext()
        self._inventory = Inventory(parts.config, parts.store, parts.usage, parts.pins)
        self._inventories = [self._inventory]
        if parts.private is not None:
            self._inventories.append(Inventory(parts.config, parts.private, parts.usage, parts.pins))
        self._purging = Purge(parts.store, parts.pins)
        self.exports = BundleExport(parts)
        self.imports = BundleImport(parts)
        self._reasons = Explainer(parts.config, parts.usage, parts.pins, self._inventory_of, parts.clock)
        self._looks: dict[str, tuple[float, int, float]] = {}
        # Beside those that are slow, and take days: who asks wants to know.  They share the work.
        self._scrubs = [
            Scrub(each.store, None, parts.clock, kept=each.kept) for each in parts.maintenance.scrubs
        ]
        self._scrubbing: asyncio.Task[None] | None = None
        self._scrub_error: str | None = None
        self._heal = heal
        self._readiness = Readiness(parts.store, parts.private, parts.hosted)
        self._warmer = Warmer(parts.namespaces, self._readiness, everyone.forget)
        self._drills = drills

    # What is stored

    async def repositories(self, match: str = "*") -> Listed:
        wanted = self._reading.pattern("match", match)
        found = [await run_in_thread(each.repositories, wanted) for each in self._inventories]
        return Listed(repositories=sorted(chain(*found), key=lambda row: row.repository))

    async def images(self, match: str = "*", limit: int = PAGE, last: str = "") -> Listed:
        wanted = self._reading.pattern("match", match)
        if last:
            read_pattern("last", last)
        pages = [await run_in_thread(each.images, wanted, limit, last) for each in self._inventories]
        return merged(pages, limit)

    async def show(self, ref: str) -> ImageTree:
        asked = self._reading.reference("ref", ref)
        inventory = self._inventory_of(asked.namespace)
        return await run_in_thread(inventory.tree, asked.repository, asked.reference)

    def _inventory_of(self, namespace: str) -> Inventory:
        """Of the store in which it lies."""
        return self._inventories[namespace in self._composition.hosted]

    # What goes on

    async def stats(self, period: str = "24h") -> Stats:
        seconds = read_seconds("period", period)
        parts = self._composition
        since = parts.clock() - seconds
        counted = await run_in_thread(parts.usage.stats, since)
        return Stats(
            period=seconds,
            since=since,
            namespaces=[stats_row(name, each) for name, each in sorted(counted.items())],
            total=stats_row("", sum(counted.values(), Counters())),
            stored_bytes=await run_in_thread(parts.maintenance.eviction.stored),
            limit=parts.config.disk.cache_limit,
        )

    async def fills(self) -> list[FillRow]:
        """Those of all processes, the oldest first."""
        found = await self._everyone.fills()
        now = self._composition.clock()
        going_on = {each.digest for each in found}
        self._looks = {digest: look for digest, look in self._looks.items() if digest in going_on}
        return [self._fill(each, now) for each in found]

    def _fill(self, fill: FillState, now: float) -> FillRow:
        at, had, speed = self._looks.get(fill.digest, (fill.started, 0, 0.0))
        if now - at >= LOOK:
            speed = max(0.0, (fill.bytes - had) / (now - at))
            self._looks[fill.digest] = now, fill.bytes, speed
        return FillRow(
            digest=fill.digest,
            namespace=fill.namespace,
            repository=fill.repository,
            bytes=fill.bytes,
            size=fill.size,
            started=fill.started,
            followers=fill.followers,
            pid=fill.pid,
            own=fill.own,
            speed=speed,
            eta=(fill.size - fill.bytes) / speed if speed and fill.size >= 0 else None,
        )

    # What is done

    async def purge(self, pattern: str, *, dry_run: bool = False, force: bool = False) -> Purged:
        """See Purging.purge()."""
        wanted = self._reading.pattern("pattern", pattern)
        purged = await run_in_thread(self._purging.purge, wanted, dry_run, force)
        if not dry_run:
            repositories = {Pin(each).parts[0] for each in purged.references}
            if not is_glob(wanted.parts[0]):
                repositories.add(wanted.parts[0])
            for each in repositories:
                await self._everyone.forget(each)
            log.info(
                "purge.done",
                pattern=wanted.pattern,
                references=len(purged.references),
                manifests=purged.manifests,
                links=purged.links,
                blobs=purged.blobs,
                bytes=purged.bytes,
            )
        return purged

    async def refresh(self, reference: str, platforms: Sequence[str] = ()) -> Refreshed:
        """Ask upstream what it is now, and have all of it here."""
        asked = self._reading.reference("reference", reference)
        wanted = read_platforms("platforms", platforms)
        await self._everyone.forget(asked.repository)
        done = await refresh(self._composition.namespaces, asked.repository, asked.reference, wanted)
        return Refreshed(
            repository=done.repository,
            reference=str(done.reference),
            digest=str(done.digest),
            new=done.new,
            moved=None if done.moved is None else str(done.moved),
            manifests=done.manifests,
            blobs=done.blobs,
            fetched=done.fetched,
            bytes=done.bytes,
        )

    async def pins(self) -> list[PinRow]:
        """Those of the configuration first."""
        return await run_in_thread(lambda: [self._pin_row(pin) for pin in self._composition.pins.list()])

    async def pin(
        self, pattern: str, keep_fresh: float | None = None, platforms: Sequence[str] = ()
    ) -> list[PinRow]:
        """In place of what was pinned by command with the same pattern."""
        wanted = self._reading.pattern("pattern", pattern)
        only = read_platforms("platforms", platforms)
        try:
            pin = Pin(wanted.pattern, keep_fresh, only, self._composition.clock())
        except ValueError as error:
            raise FieldInvalid("keep_fresh", error) from None
        try:
            await run_in_thread(self._composition.pins.add, pin)
        except ValueError as error:
            raise FieldInvalid("pattern", error) from None
        log.info("pin.added", pattern=pin.pattern, keep_fresh=keep_fresh, platforms=pin.platforms)
        return [await run_in_thread(self._pin_row, pin)]

    async def unpin(self, pattern: str) -> Unpinned:
        """Raises NameUnknown where there is no such pin by command."""
        pins = self._composition.pins
        for each in dict.fromkeys(
            (read_pattern("pattern", pattern).pattern, self._reading.pattern("pattern", pattern).pattern)
        ):
            if await run_in_thread(pins.remove, each):
                log.info("pin.removed", pattern=each)
                return Unpinned(pattern=each)
            if any(pin.pattern == each for pin in await run_in_thread(pins.list)):
                raise NameUnknown(f"{each} is pinned by the configuration: take it back there")
        raise NameUnknown(f"{pattern} is not pinned: a pin is taken back as it is listed")

    def _pin_row(self, pin: Pin) -> PinRow:
        parts = self._composition
        manifests: set[Digest] = set()
        blobs: dict[Digest, int] = {}
        references = 0
        for repository, reference in parts.pins.matching(pin):
            references += 1
            if (digest := self._inventory.digest(repository, reference)) is not None:
                found = walk(parts.store, repository, digest, pin.platforms)
                manifests |= found.manifests
                blobs |= {each: named.size for each, named in found.blobs.items()}
        held = [max(0, size) for digest, size in blobs.items() if parts.store.holds(digest)]
        return PinRow(
            pattern=pin.pattern,
            keep_fresh=pin.keep_fresh,
            platforms=list(pin.platforms),
            since=pin.since,
            references=references,
            manifests=len(manifests),
            blobs=len(held),
            bytes=sum(held),
        )

    async def webhooks(self) -> list[WebhookRow]:
        """In the order of the configuration."""
        queue = self._composition.queue
        if queue is None:
            return []
        webhooks = self._composition.config.webhooks
        return await run_in_thread(lambda: [webhook_row(each, queue) for each in webhooks])

    async def evict(self, to: int | None = None, *, dry_run: bool = False) -> Evicted:
        """Until `to` bytes are left; without it, what is too old goes, and what the limits do not allow."""
        if to is not None and to < 0:
            raise FieldInvalid("to", "must be a number of bytes, 0 or more")
        async with self._evicting:
            return await run_in_thread(self._evict, to, dry_run)

    def _evict(self, to: int | None, dry_run: bool) -> Evicted:
        eviction = self._composition.maintenance.eviction
        if to is not None:
            return evicted([eviction.shrink(0, to, dry_run)], dry_run)
        expired = eviction.expire(dry_run)
        if not dry_run:
            return evicted([expired, eviction.shrink()], dry_run)
        # Nothing has gone, so a second report would tell much of that again: what is old goes first in both.
        if eviction.over() <= expired.bytes:
            return evicted([expired], dry_run)
        return evicted([eviction.shrink(0, None, dry_run)], dry_run)

    async def scrub(self) -> Scrubbing:
        """Begin a pass at full speed, where none that was asked for goes on."""
        if self._scrubbing is None or self._scrubbing.done():
            for each in self._scrubs:
                each.progress = Progress(self._composition.clock())
            self._scrubbing = asyncio.create_task(self._run_scrub())
        return await self.scrubbing()

    async def _run_scrub(self) -> None:
        self._scrub_error = None
        cache, *private = self._scrubs
        try:
            await cache.run(self._heal)
            for each in private:
                await each.run()
        except RegistryError as error:
            self._scrub_error = str(error)
        except Exception as error:
            log.exception("scrub.failed", error=str(error))
            self._scrub_error = f"{type(error).__name__}: {error}"
        finally:
            for each in self._scrubs:
                if each.progress is not None:
                    each.progress.running = False

    async def scrubbing(self) -> Scrubbing:
        """How far it is."""
        background, asked = scrub_row(self._composition.maintenance.scrubs), scrub_row(self._scrubs)
        return Scrubbing(background=background, asked=asked, error=self._scrub_error)

    async def collect(self, *, dry_run: bool = False) -> Collected:
        """Now, whatever the schedule.  Raises Unsupported where no namespace is of our own."""
        return collected(await run_in_thread(self._collection().run, dry_run))

    async def collected(self) -> Collected:
        """The last time, by whomever."""
        return collected(await run_in_thread(self._collection().last))

    def _collection(self) -> Collection:
        if self._composition.maintenance.collection is None:
            raise Unsupported("no namespace of the configuration has store: nothing was pushed")
        return self._composition.maintenance.collection

    # What prepares for upstreams being away, and proves it

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
            asked = self._reading.reference("references", text)
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
            if each not in self._composition.caches:
                raise FieldInvalid("namespaces", f"{each} is not configured, or is no cache")
        return drilling(await self._running.begin(seconds, namespaces))

    async def drill(self) -> Drilling:
        """The one that goes on, or the last."""
        return drilling(await self._running.state())

    async def end_drill(self) -> Drilling:
        return drilling(await self._running.end())

    @property
    def _running(self) -> DrillControl:
        if self._drills is None:
            raise Unsupported("no server is running: nothing could be cut off")
        return self._drills

    async def close(self) -> None:
        if self._drills is not None:
            self._drills.close()
        if self._scrubbing is not None:
            self._scrubbing.cancel()
            await asyncio.gather(self._scrubbing, return_exceptions=True)

    # What would be done

    async def why(self, ref: str) -> Why:
        asked = self._reading.reference("ref", ref)
        states = [each for state in await self._everyone.states() for each in state.upstreams]
        return await run_in_thread(self._reasons.why, asked, states)

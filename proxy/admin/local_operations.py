"""The operations, done in this process: for the admin API of a server, and for commands on a directory."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import nullcontext, suppress
from itertools import chain

import msgspec
import structlog

from proxy.admin import activity_reports, extension_reports, models, policy_reports, reports, tag_reports
from proxy.admin.activity import activity_of, stats_of
from proxy.admin.audit_control import audit_rows
from proxy.admin.eviction_control import EvictionControl
from proxy.admin.explain import Explainer, absence_of, owner_of, upstream_rows
from proxy.admin.extension_list import extension_rows
from proxy.admin.fill_feed import FillFeed
from proxy.admin.fill_speeds import FillSpeeds, idle_rows
from proxy.admin.inspection import Inspection
from proxy.admin.inventory import Inventory, merged
from proxy.admin.key_control import KeyOperations
from proxy.admin.operations import PAGE
from proxy.admin.pin_control import PinControl
from proxy.admin.policy_control import (
    HoldControl,
    OverrideControl,
    explained,
    held_now,
    judged_by_name,
    pulled_rows,
)
from proxy.admin.purge import Purge, together
from proxy.admin.readiness import Readiness
from proxy.admin.rows import collected, drilling, refreshed, webhook_row
from proxy.admin.scrub_control import ScrubControl
from proxy.admin.store_control import StoreControl
from proxy.admin.tag_history import TagChronicle
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
from proxy.processes.drills import DrillControl
from proxy.processes.server_processes import ServerProcesses, ended_of, fills_of
from proxy.processes.state import refusal_notes
from proxy.transfer.bundle_export import BundleExport
from proxy.transfer.bundle_import import BundleImport
from storage.concurrency import run_in_thread
from storage.errors import StorageFailed, Unsupported
from storage.maintenance.collection import Collection
from storage.maintenance.pins import Pin
from storage.maintenance.scrub import Heal
from storage.names import is_glob

log = structlog.get_logger()


class LocalOperations(KeyOperations):
    """The Operations of a server on itself, or of a command on the directory.  Must be closed.

    Others that evict in this process hold `evicting`.  `heal` fetches content that a scrub found damaged.
    `drills` is None if no server is running.
    """

    remote = False

    def __init__(
        self,
        composition: Composition,
        processes: ServerProcesses,
        evicting: asyncio.Lock | None = None,
        heal: Heal | None = None,
        drills: DrillControl | None = None,
    ) -> None:
        super().__init__(composition)
        parts = self._composition = composition
        self._processes = processes
        self._reader = ReferenceReader(parts.namespaces)
        self._drills = drills
        stores = [parts.store, *([] if parts.private is None else [parts.private])]
        self._inventories = [Inventory(parts.config, each, parts.usage, parts.pins) for each in stores]
        self._pins = PinControl(parts.pins, self._inventories, self._reader)
        self._purges = [Purge(each, parts.pins) for each in (parts.common, parts.store) if each is not None]
        self._stores = StoreControl(parts)
        self._eviction = EvictionControl(parts, evicting or nullcontext())
        self._tags = TagChronicle(parts, self._reader, self._inventory_of)
        self._inspection = Inspection(self._inventories, self._reader, self._inventory_of)
        self._explainer = Explainer(parts.config, parts.usage, parts.pins, self._inventory_of, parts.clock)
        self._holds = HoldControl(parts.guard.holds, self._reader)
        self._overrides = OverrideControl(parts.guard.overrides, self._reader)
        self._speeds = FillSpeeds()
        self._feed = FillFeed(self.look)
        self._scrub = ScrubControl(parts.maintenance.scrubs, heal, parts.clock)
        self._readiness = Readiness(parts.store, parts.private, parts.hosted)
        self._warmer = Warmer(parts.namespaces, self._readiness, processes.forget)
        self.exports = BundleExport(parts)
        self.imports = BundleImport(parts)

    # Content

    async def repositories(self, match: str = "*") -> models.Listed:
        parsed = self._reader.listing("match", match)
        await self._processes.record()
        await self._count()
        found = [await run_in_thread(each.repositories, parsed) for each in self._inventories]
        rows = sorted(chain(*found), key=lambda row: row.repository)
        return models.Listed(repositories=rows, notes=await self._notes())

    async def _count(self) -> None:
        """Count what was not counted yet, if no server does."""
        if self._drills is None:
            for each in self._composition.maintenance.countings:
                with suppress(StorageFailed):  # it is shown as not counted
                    await run_in_thread(each.run)

    async def images(self, match: str = "*", limit: int = PAGE, last: str = "") -> models.Listed:
        parsed = self._reader.listing("match", match)
        if last:
            read_pattern("last", last)
        await self._processes.record()
        pages = [await run_in_thread(each.images, parsed, limit, last) for each in self._inventories]
        return msgspec.structs.replace(merged(pages, limit), notes=await self._notes())

    async def _notes(self) -> list[str]:
        return refusal_notes([each for state in await self._processes.states() for each in state.upstreams])

    async def find(
        self,
        match: str = "*",
        sort: models.Sort = "name",
        reverse: bool = False,
        offset: int = 0,
        limit: int = PAGE,
    ) -> models.Found:
        await self._processes.record()
        return await self._inspection.find(match, sort, reverse, offset, limit)

    async def config(self, ref: str) -> models.ConfigReport:
        return await self._inspection.config(ref)

    async def files(
        self, ref: str, search: str = "", offset: int = 0, limit: int = PAGE
    ) -> models.LayerFiles:
        return await self._inspection.files(ref, search, offset, limit)

    async def show(self, ref: str) -> models.ImageTree:
        image = self._reader.reference("ref", ref)
        await self._processes.record()
        inventory = self._inventory_of(image.namespace)
        return await run_in_thread(inventory.tree, image.repository, image.reference)

    async def history(self, ref: str) -> tag_reports.TagHistory:
        await self._processes.record()
        return await run_in_thread(self._tags.history, ref)

    async def diff(self, ref: str, other: str = "") -> tag_reports.ImageDiff:
        await self._processes.record()
        return await self._tags.diff(ref, other)

    def _inventory_of(self, namespace: str) -> Inventory:
        return self._inventories[namespace in self._composition.hosted]

    # Activity

    async def stats(self, period: str = "7d") -> models.Stats:
        seconds = read_seconds("period", period)
        await self._processes.record()
        return await run_in_thread(stats_of, self._composition, seconds)

    async def fills(self) -> list[models.FillRow]:
        parts, fills = self._composition, await self._processes.fills()
        running, root = {each.digest for each in fills}, parts.store.files.root
        idle = await run_in_thread(idle_rows, parts.maintenance.eviction, root, running)
        return self._speeds.rows(fills, parts.clock()) + idle

    async def look(self) -> activity_reports.FillsNow:
        states, now = await self._processes.states(), self._composition.clock()
        return activity_reports.FillsNow(
            at=now, fills=self._speeds.rows(fills_of(states), now), ended=ended_of(states)
        )

    def watch(self, once: bool = False) -> AsyncIterator[activity_reports.FillsNow]:
        return self._feed.follow(once)

    async def end_streams(self) -> None:
        """End what is watched, since the server stops."""
        await self._feed.close()

    async def audit(self, match: str = "", limit: int = PAGE) -> list[activity_reports.AuditRow]:
        return await run_in_thread(audit_rows, self._composition.config.audit, match, limit)

    async def webhooks(self) -> list[models.WebhookRow]:
        queue = self._composition.queue
        if queue is None:
            return []
        webhooks = self._composition.config.webhooks
        return await run_in_thread(lambda: [webhook_row(each, queue) for each in webhooks])

    async def extensions(self) -> list[extension_reports.ExtensionRow]:
        states = await self._processes.states()
        return await run_in_thread(extension_rows, self._composition.config, states)

    async def activity(self) -> activity_reports.Activity:
        return await run_in_thread(activity_of, self._composition, await self._processes.states())

    async def upstreams(self) -> list[reports.UpstreamRow]:
        return upstream_rows([each for state in await self._processes.states() for each in state.upstreams])

    async def why(self, ref: str) -> reports.Why:
        image = self._reader.reference("ref", ref)
        await self._processes.record()
        states = [each for state in await self._processes.states() for each in state.upstreams]
        absent = await absence_of(self._composition, image)
        found = await run_in_thread(self._explainer.why, image, states, absent)
        held = await run_in_thread(held_now, self._composition.guard.holds, image)
        owner = await owner_of(self._composition, image, states)
        policy = await run_in_thread(judged_by_name, self._composition, image)
        if policy is not None and policy.verdict == "deny" and policy.mode == "enforce":
            because = f"policy rule {policy.rule} refuses it: {policy.reason}"
            found = msgspec.structs.replace(found, verdict="refused", because=because)
        access = await self.pullers(image.repository)
        return msgspec.structs.replace(found, policy=policy, held=held, owner=owner, access=access)

    async def policy(self, ref: str) -> policy_reports.PolicyExplained:
        return await explained(self._composition, self._reader.reference("ref", ref))

    async def held(self) -> list[policy_reports.HeldRow]:
        return await run_in_thread(self._holds.rows)

    async def approve(self, reference: str) -> policy_reports.HeldRow:
        return await self._holds.approve(reference)

    async def reject(self, reference: str) -> policy_reports.HeldRow:
        return await self._holds.reject(reference)

    async def overrides(self) -> list[policy_reports.OverrideRow]:
        return await run_in_thread(self._overrides.rows)

    async def override(self, reference: str, seconds: float, reason: str) -> policy_reports.OverrideRow:
        return await self._overrides.begin(reference, seconds, reason)

    async def end_override(self, reference: str) -> policy_reports.OverrideRow:
        return await self._overrides.end(reference)

    async def pulled(self, period: str = "7d") -> list[policy_reports.PulledRow]:
        seconds = read_seconds("period", period)
        await self._processes.record()
        return await run_in_thread(pulled_rows, self._composition, seconds)

    # Changes

    async def purge(self, pattern: str, *, dry_run: bool = False, force: bool = False) -> reports.Purged:
        parsed = self._reader.pattern("pattern", pattern)
        self._stores.refuse_store(parsed)
        # The store of all servers first: else a client would have the content fetched again from there.
        purges = [await run_in_thread(each.purge, parsed, dry_run, force) for each in self._purges]
        purged = purges[0] if len(purges) == 1 else together(purges)
        if not dry_run:
            repositories = {Pin(each).parts[0] for each in purged.references}
            if not is_glob(parsed.parts[0]):
                repositories.add(parsed.parts[0])
            for each in repositories:
                await self._processes.forget(each)
            log.info(
                "purge.done",
                pattern=parsed.pattern,
                references=len(purged.references),
                manifests=purged.manifests,
                links=purged.links,
                blobs=purged.blobs,
                bytes=purged.bytes,
                absences=purged.absences,
            )
        return purged

    async def delete(
        self,
        pattern: str,
        *,
        older_than: float | None = None,
        keep: int | None = None,
        dry_run: bool = False,
    ) -> reports.Deleted:
        return await self._stores.delete(self._reader.pattern("pattern", pattern), older_than, keep, dry_run)

    async def tag(self, source: str, target: str) -> reports.Tagged:
        found = self._reader.reference("source", source)
        return await self._stores.tag(found, self._reader.reference("target", target))

    async def refresh(self, reference: str, platforms: Sequence[str] = ()) -> reports.Refreshed:
        image = self._reader.reference("reference", reference)
        only = read_platforms("platforms", platforms)
        await self._processes.forget(image.repository)
        return refreshed(await refresh(self._composition.namespaces, image.repository, image.reference, only))

    async def pins(self) -> list[models.PinRow]:
        return await run_in_thread(self._pins.rows)

    async def pin(
        self, pattern: str, keep_fresh: float | None = None, platforms: Sequence[str] = ()
    ) -> list[models.PinRow]:
        now = self._composition.clock()
        return [await run_in_thread(self._pins.add, pattern, keep_fresh, platforms, now)]

    async def unpin(self, pattern: str) -> reports.Unpinned:
        return reports.Unpinned(pattern=await run_in_thread(self._pins.remove, pattern))

    async def evict(self, to: int | None = None, *, dry_run: bool = False) -> reports.Evicted:
        return await self._eviction.evict(to, dry_run)

    async def evictable(self, limit: int = PAGE) -> activity_reports.Evictable:
        return await run_in_thread(self._eviction.upcoming, limit)

    async def scrub(self) -> reports.Scrubbing:
        self._scrub.start()
        return self._scrub.state()

    async def scrubbing(self) -> reports.Scrubbing:
        return self._scrub.state()

    async def collect(self, *, dry_run: bool = False) -> reports.Collected:
        return collected(await run_in_thread(self._collection().run, dry_run))

    async def collected(self) -> reports.Collected:
        return collected(await run_in_thread(self._collection().last))

    def _collection(self) -> Collection:
        if self._composition.maintenance.collection is None:
            raise Unsupported("no namespace in the configuration has a store: there is nothing to collect")
        return self._composition.maintenance.collection

    # Preparation for an outage

    async def warm(
        self, reference: str, platforms: Sequence[str] = (), referrers: bool = True
    ) -> reports.WarmRow:
        return await self._warmer.warm(reference, read_platforms("platforms", platforms), referrers)

    async def ready(
        self, references: Sequence[str], platforms: Sequence[str] = (), referrers: bool = True
    ) -> list[reports.ReadyRow]:
        only = read_platforms("platforms", platforms)
        return await run_in_thread(lambda: [self._judge(each, only, referrers) for each in references])

    def _judge(self, text: str, platforms: Sequence[str], referrers: bool) -> reports.ReadyRow:
        try:
            image = self._reader.reference("references", text)
        except FieldInvalid as error:
            return reports.ReadyRow(
                asked=text, repository="", reference="", digest=None, state="absent", error=error.cause
            )
        return self._readiness.judge(image, platforms, referrers)

    async def begin_drill(self, seconds: float, namespaces: Sequence[str] = ()) -> reports.Drilling:
        if not 0 < seconds < math.inf:
            raise FieldInvalid("seconds", "must be more than 0")
        for each in namespaces:
            if not self._composition.is_cache(each):
                raise FieldInvalid("namespaces", f"{each} is not a configured cache")
        return drilling(await self._drill_control().begin(seconds, namespaces))

    async def drill(self) -> reports.Drilling:
        return drilling(await self._drill_control().state())

    async def end_drill(self) -> reports.Drilling:
        return drilling(await self._drill_control().end())

    async def reload(self) -> reports.Reloading:
        return reports.Reloading(self._processes.reload())

    def _drill_control(self) -> DrillControl:
        if self._drills is None:
            raise Unsupported("no server is running: there is nothing to cut off")
        return self._drills

    async def close(self) -> None:
        await self._feed.close()
        if self._drills is not None:
            self._drills.close()
        await self._scrub.close()
        await self.close_keys()

"""What an operator changes in private registries: images are deleted, and get further tags."""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence

import structlog

from proxy.admin.reports import Deleted, KeptRow, Tagged
from proxy.namespaces.composition import Composition
from proxy.namespaces.references import FieldInvalid, ImageReference
from proxy.webhooks.event import Event, causing, deletion
from storage.concurrency import run_in_thread
from storage.errors import Unsupported
from storage.graph import contents
from storage.maintenance.deletion import Deletion, DeletionRequest
from storage.maintenance.leases import Leases
from storage.maintenance.pins import Pin
from storage.names import is_glob, literal_prefix
from storage.oci import Digest, Manifest, Tag
from storage.records import Batch
from storage.store import Store

log = structlog.get_logger()


class StoreControl:
    """Changes the private registries of a composition."""

    def __init__(self, parts: Composition) -> None:
        self._parts = parts

    def refuse_store(self, pattern: Pin) -> None:
        """Raise Unsupported if a pattern for caches means a private registry."""
        if (namespace := _namespace(pattern)) in self._parts.hosted:
            raise Unsupported(
                f"{namespace} is a private registry, and purge only empties caches: entrepot delete"
                f" {pattern.pattern}"
            )

    def _store(self, namespace: str, command: str) -> Store:
        """The private store.  Raises Unsupported if the namespace is a cache, or if there is no store."""
        if self._parts.is_cache(namespace):
            raise Unsupported(f"{namespace} is a cache, and not a private registry{command}")
        if self._parts.private is None:
            raise Unsupported("no namespace in the configuration has a store")
        return self._parts.private

    # Deletion

    async def delete(
        self, pattern: Pin, older_than: float | None, keep: int | None, dry_run: bool
    ) -> Deleted:
        if "@" in pattern.pattern and (older_than is not None or keep is not None):
            raise FieldInvalid("pattern", "older_than and keep choose among tags, and this names digests")
        store = self._store(_namespace(pattern), f": entrepot purge {pattern.pattern}")
        leases = Leases(store, self._parts.config.disk.collect_grace, self._parts.clock)
        work = Deletion(store, leases, self._immutable, self._parts.clock, self._record_deletions)
        request = DeletionRequest(pattern, older_than, keep)
        found = await run_in_thread(work.run, request, dry_run)
        if not dry_run and found.references:
            if self._parts.outbox is not None:
                await self._parts.outbox.flush()
            counts = {"references": len(found.references), "manifests": found.manifests}
            log.info("delete.done", pattern=pattern.pattern, **counts, blobs=found.blobs, bytes=found.bytes)
        return Deleted(
            references=found.references,
            kept=[KeptRow(reference, why) for reference, why in found.kept.items()],
            manifests=found.manifests,
            blobs=found.blobs,
            bytes=found.bytes,
            dry_run=dry_run,
        )

    def _immutable(self, repository: str) -> tuple[re.Pattern[str], ...]:
        hosting = self._parts.config.hosted().get(repository.partition("/")[0])
        return () if hosting is None else hosting.immutable_tags

    def _record_deletions(self, batch: Batch, references: Sequence[str]) -> None:
        if (outbox := self._parts.outbox) is None:
            return
        now = self._parts.clock()
        for each in references:
            repository, _, digest = each.partition("@")
            tag = ""
            if not digest:
                repository, _, tag = each.rpartition(":")
            outbox.record(batch, [deletion(now, repository, tag, digest)])

    # Tags

    async def tag(self, source: ImageReference, target: ImageReference) -> Tagged:
        if not isinstance(target.reference, Tag):
            raise FieldInvalid("target", "name a tag, not a digest")
        store = self._store(target.namespace, ", which takes no tags")
        namespaces = self._parts.namespaces
        pointer = store.pointer(target.repository, target.reference)
        manifest = await namespaces.get_manifest(source.repository, source.reference)
        copied = 0
        if source.repository != target.repository:
            copied = await self._copy(store, source, target, manifest)
        event = Event(
            id=str(uuid.uuid4()),
            at=self._parts.clock(),
            action="push",
            kind="manifest",
            repository=target.repository,
            digest=str(manifest.digest),
            media_type=manifest.media_type,
            size=len(manifest.content),
            tag=str(target.reference),
        )
        with causing([event]):  # the private registry records it with the push, and publishes it
            await namespaces.push_manifest(target.repository, target.reference, manifest)
        former = None if pointer is None or pointer.digest == manifest.digest else str(pointer.digest)
        log.info("tag.set", repository=target.repository, tag=target.reference, digest=str(manifest.digest))
        return Tagged(
            repository=target.repository,
            tag=str(target.reference),
            digest=str(manifest.digest),
            former=former,
            copied=copied,
        )

    async def _copy(self, store: Store, source: ImageReference, target: ImageReference, top: Manifest) -> int:
        """Copy to another repository what the manifest names; how many manifests and blobs that is."""
        blobs: set[Digest] = set()
        known: dict[Digest, Manifest] = {top.digest: top}
        done: set[Digest] = set()
        stack = [top]
        while stack:  # children before their parents
            manifest = stack[-1]
            content = contents(manifest.content)
            if content is None:
                raise Unsupported(f"{manifest.digest} is of an unknown type: what it names is unknown")
            missing = [each.digest for each in content.children if each.digest not in known]
            for digest in missing:
                known[digest] = await self._parts.namespaces.get_manifest(source.repository, digest)
                stack.append(known[digest])
            if missing:
                continue
            stack.pop()
            for blob in {each.digest for each in content.blobs} - blobs:
                await self._mount(store, source, target, blob)
                blobs.add(blob)
            if manifest is not top and manifest.digest not in done:
                await self._parts.namespaces.push_manifest(target.repository, manifest.digest, manifest)
                done.add(manifest.digest)
        return len(done) + len(blobs)

    async def _mount(
        self, store: Store, source: ImageReference, target: ImageReference, digest: Digest
    ) -> None:
        if self._parts.is_cache(source.namespace):
            await self._parts.namespaces.mount_blob(target.repository, digest, source.repository)
        else:  # all private registries have one store
            await store.mount_blob(target.repository, digest, source.repository)


def _namespace(pattern: Pin) -> str:
    """The namespace that a pattern names, "" if it may match in several."""
    glob = pattern.parts[0]
    named = literal_prefix(glob) if is_glob(glob) else glob
    namespace, slash, _ = named.partition("/")
    return namespace if slash else ""

"""A namespace of the private registry: its part of the private store, and its rules for pushes.

A manifest is accepted if it has the form that its media type demands, and if all content that it names is
stored, unless the namespace is sparse.  An immutable tag is neither moved nor deleted.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from proxy.cache.copies import BlobCopies
from proxy.namespaces.push_validation import parse_pushed
from proxy.telemetry.exchange import current, in_exchange
from proxy.webhooks.event import about_tag, take_caused
from storage.concurrency import run_sized
from storage.conditions import ALWAYS, Conditions
from storage.disk.health import MakeRoom, make_no_room
from storage.errors import (
    BlobUnknown,
    Denied,
    ManifestBlobUnknown,
    ManifestInvalid,
    ManifestUnknown,
    NameUnknown,
)
from storage.graph import IndexEntries, fallback_tag
from storage.held import held_blob, held_manifest
from storage.keys import LINK, MANIFEST, MOVES, PULLED, TAG
from storage.maintenance.leases import Leases
from storage.maintenance.pulls import Pulls
from storage.maintenance.usage import Move, record_move
from storage.oci import (
    Descriptor,
    Digest,
    Manifest,
    ManifestContent,
    Reference,
    Span,
    Tag,
)
from storage.records import Batch, Records
from storage.registry import (
    NOTHING,
    Blob,
    Held,
    Located,
    Registry,
    Upload,
    Validity,
    everything,
    referrers_page,
)
from storage.store import Store
from storage.values import Pointer
from storage.writers import FILES, OBJECTS, check_whole

if TYPE_CHECKING:  # only a server with webhooks imports it
    from proxy.webhooks.outbox import Outbox

T = TypeVar("T")
ROOM = 1 << 30  # bytes that are made free for an upload of unknown size
OUTDATED = "the database of this registry cannot be reached: this is what was known here before"
_MISSING = 100  # digests that an error names at most


@dataclass(frozen=True, slots=True)
class PushRules:
    """The rules for pushes to a namespace.

    sparse: a manifest may name content that is not stored
    immutable: patterns of tags
    """

    sparse: bool = False
    immutable: tuple[re.Pattern[str], ...] = ()


class Hosted(Registry):
    """One namespace of the private registry, as a Registry.

    Its methods take names within the namespace; the store has them under `<namespace>/`.

    pulls: records the pulls of tags
    make_room: is called before an upload for which the disk has no room
    outbox: records events for webhooks
    copies: keeps what is pulled from a bucket here
    """

    def __init__(
        self,
        namespace: str,
        store: Store,
        leases: Leases,
        rules: PushRules = PushRules(),
        pulls: Pulls | None = None,
        make_room: MakeRoom = make_no_room,
        outbox: Outbox | None = None,
        clock: Callable[[], float] = time.time,
        copies: BlobCopies | None = None,
    ) -> None:
        self._namespace = namespace
        self._store = store
        self._leases = leases
        self._rules = rules
        self._pulls = pulls
        self._make_room = make_room
        self._outbox = outbox
        self._clock = clock
        self._copies = copies
        self._indexes = IndexEntries()

    def _full(self, repository: str) -> str:
        return f"{self._namespace}/{repository}"

    # Pull

    async def get_blob(self, repository: str, digest: Digest, span: Span | None = None) -> Blob:
        name = self._full(repository)
        if self._copies is None or self._store.files.path(digest) is not None:
            blob = await self._found(self._store.get_blob(name, digest, span))
            used_at = blob.used_at
        else:
            place = self._namespace, self._store, repository
            blob, used_at = await self._found(self._copies.get_blob(*place, digest, span))
        self._note_outage()
        try:
            await self._leases.blob(name, digest, used_at)
        except BaseException:
            await blob.close()
            raise
        return blob

    async def locate_blob(self, repository: str, digest: Digest) -> Located | None:
        name = self._full(repository)
        if (found := await self._found(self._store.locate_blob(name, digest))) is not None:
            self._note_outage()
            await self._leases.blob(name, digest, found.used_at)
        return found

    async def resolve_blob(self, repository: str, digest: Digest) -> Descriptor:
        blob = await self.get_blob(repository, digest, NOTHING)
        await blob.close()
        return blob.descriptor

    async def get_manifest(self, repository: str, reference: Reference) -> Manifest:
        name = self._full(repository)
        reading = self._store.read(self._store.manifest, name, reference)
        manifest, stored_at = await self._found(reading)
        self._note_outage()
        if isinstance(reference, Digest):  # otherwise the tag keeps it
            await self._leases.manifest(name, reference, stored_at)
        elif self._pulls is not None:
            await self._pulls.pulled(name, reference)
        return manifest

    async def _found(self, finding: Awaitable[T]) -> T:
        """What is found.  Raises StorageUnavailable for what is not, if the registry was moved elsewhere.

        Processes that began before a move serve pulls until new ones do, to which it may have been pushed.
        """
        try:
            return await finding
        except (BlobUnknown, ManifestUnknown, NameUnknown):
            content = OBJECTS if self._store.files.remote else FILES
            await self._store.read(check_whole, self._store.records, content)
            raise

    def _note_outage(self) -> None:
        """Note in the exchange that its answer is what was known before, if the records cannot be reached."""
        if self._store.cut_off and in_exchange():
            now = current()
            now.result, now.detail, now.warning = "stale", "database", OUTDATED

    async def resolve_manifest(self, repository: str, reference: Reference) -> Descriptor:
        return (await self.get_manifest(repository, reference)).descriptor

    def hold_blob(self, repository: str, digest: Digest) -> Held | None:
        if self._store.records.remote:
            return None

        def validity(linked_at: float, used_at: float) -> Validity | None:
            return None if self._leases.due(used_at) else Validity()

        return held_blob(self._store, self._full(repository), digest, validity)

    def hold_manifest(self, repository: str, reference: Reference) -> Held | None:
        if self._store.records.remote:
            return None
        name = self._full(repository)

        def read() -> tuple[Manifest, float]:
            manifest, stored_at = self._store.manifest(name, reference)
            if isinstance(reference, Tag):
                return manifest, 0.0
            return manifest, max(stored_at, self._leases.of(name, reference))

        def validity(leased_at: float) -> Validity | None:
            if isinstance(reference, Tag):
                due = self._pulls is not None and self._pulls.due(name, reference)
            else:
                due = self._leases.due(leased_at)
            return None if due else Validity()

        return held_manifest(self._store, read, validity)

    async def tags(self, repository: str, last: str = "", limit: int | None = None) -> list[str]:
        return await self._found(self._store.tags(self._full(repository), last, limit))

    async def referrers(
        self,
        repository: str,
        digest: Digest,
        artifact_type: str | None = None,
        last: str = "",
        limit: int | None = None,
    ) -> list[Descriptor]:
        name = self._full(repository)
        recorded = self._store.referrers_after(name, digest, last)
        listed = await self._fallback(name, digest, last)
        sources = [recorded, self._stored(name, listed)]
        return await self._store.run(referrers_page, sources, artifact_type, limit)

    async def _fallback(self, name: str, digest: Digest, last: str) -> list[Descriptor]:
        """Referrers that clients listed under a tag, as for registries without the referrers API.

        distribution-spec, "Referrers Tag Schema" and "Enabling the Referrers API".
        """
        try:
            return await self._indexes.after(await self._store.get_manifest(name, fallback_tag(digest)), last)
        except (ManifestUnknown, ManifestInvalid):
            return []

    def _stored(self, name: str, listed: Iterable[Descriptor]) -> Iterator[Descriptor]:
        for each in listed:
            with suppress(ManifestUnknown):
                self._store.manifest(name, each.digest)
                yield each

    async def repositories(self, last: str = "", limit: int | None = None) -> list[str]:
        start = len(self._namespace) + 1
        full = await self._store.repositories(self._full(last), limit, within=self._namespace)
        return [each[start:] for each in full]

    # Push

    async def start_upload(
        self, repository: str, size: int | None = None, algorithm: str = "sha256"
    ) -> Upload:
        needed = ROOM if size is None else size
        if self._store.files.room() < needed:
            await self._make_room(needed)  # cached content is evicted before a push is refused
        return await self._store.start_upload(self._full(repository), size, algorithm)

    async def resume_upload(self, repository: str, id: str) -> Upload:
        return await self._store.resume_upload(self._full(repository), id)

    async def mount_blob(
        self,
        repository: str,
        digest: Digest,
        source: str | None = None,
        visible: Callable[[str], bool] = everything,
    ) -> Descriptor:
        start = self._full("")

        def ours(full: str) -> bool:
            return full.startswith(start) and visible(full.removeprefix(start))

        name = None if source is None else self._full(source)
        return await self._store.mount_blob(self._full(repository), digest, name, ours)

    async def push_manifest(
        self,
        repository: str,
        reference: Reference,
        manifest: Manifest,
        tags: Sequence[Tag] = (),
        when: Conditions = ALWAYS,
    ) -> Descriptor:
        """Raises Denied if a tag is immutable and would move."""
        name = self._full(repository)
        content = await run_sized(len(manifest.content), parse_pushed, manifest)
        digest = reference if isinstance(reference, Digest) else manifest.digest
        pushed = [*([reference] if isinstance(reference, Tag) else []), *tags]
        record, flush = self._recording()

        def allowed(batch: Batch) -> None:
            if content is not None and not self._rules.sparse:
                self._check_complete(batch, name, content)
            for tag in pushed:
                self.retag(batch, repository, tag, digest)
            record(batch)

        descriptor = await self._store.push_manifest(name, reference, manifest, tags, when, allowed)
        await flush()
        return descriptor

    async def delete_blob(self, repository: str, digest: Digest, when: Conditions = ALWAYS) -> None:
        record, flush = self._recording()
        await self._store.delete_blob(self._full(repository), digest, when, record)
        await flush()

    async def delete_manifest(self, repository: str, reference: Reference, when: Conditions = ALWAYS) -> None:
        """Raises Denied if a tag that would be deleted is immutable."""
        name = self._full(repository)
        record, flush = self._recording()

        def allowed(batch: Batch, tags: Sequence[Tag]) -> None:
            for tag in tags:
                batch.delete(PULLED.key(name, tag))
                batch.delete(MOVES.key(name, tag))
                if (pointer := Pointer.parse(batch.get(TAG.key(name, tag)))) is not None:
                    self._check_mutable(repository, tag)
                    self._leases.untagged(batch, name, pointer.digest)
            if isinstance(reference, Digest):
                self._leases.drop(batch, name, reference)
            kind = MANIFEST if isinstance(reference, Digest) else TAG
            if batch.get(kind.key(name, reference)) is not None:
                record(batch)

        await self._store.delete_manifest(name, reference, when, allowed)
        await flush()

    def _recording(self) -> tuple[Callable[[Batch], None], Callable[[], Awaitable[None]]]:
        """What a transaction of this context calls, to record its events; and what is called after it."""
        if (outbox := self._outbox) is None:
            return _record_nothing, _flush_nothing
        events = take_caused()
        return lambda batch: outbox.record(batch, events), outbox.flush

    def _check_complete(self, batch: Batch, name: str, content: ManifestContent) -> None:
        def stored(digest: Digest) -> bool:
            return batch.get(LINK.key(name, digest)) is not None and self._store.holds(digest)

        missing = [
            str(each.digest)
            for each in content.distributable + content.children
            if not stored(each.digest)
            and (each not in content.listed or batch.get(MANIFEST.key(name, each.digest)) is None)
        ]
        if missing:
            raise ManifestBlobUnknown(
                f"{len(missing)} of the blobs and manifests that it names are not in {name}: push them first",
                missing=list(dict.fromkeys(missing))[:_MISSING],
            )

    @property
    def sparse(self) -> bool:
        """Whether a manifest may name content that is not stored."""
        return self._rules.sparse

    def check_tag(self, records: Records | Batch, repository: str, tag: Tag, digest: Digest) -> Digest | None:
        """The digest that the tag would move from, if it would move.  Raises Denied if it must not."""
        pointer = Pointer.parse(records.get(TAG.key(self._full(repository), tag)))
        if pointer is None or pointer.digest == digest:
            return None
        self._check_mutable(repository, tag)
        return pointer.digest

    def retag(self, batch: Batch, repository: str, tag: Tag, digest: Digest) -> Digest | None:
        """check_tag() for a transaction that moves the tag: the digest that it had gets a lease.

        The move is recorded, for webhooks, and since a policy judges digests by the tags that led to them.
        """
        former, name = self.check_tag(batch, repository, tag, digest), self._full(repository)
        if former is not None:
            self._leases.untagged(batch, name, former)
            now = self._clock()
            record_move(batch, name, tag, Move(now, former, digest))
            if self._outbox is not None:
                self._outbox.record(batch, [about_tag("move", now, name, tag, former, digest)])
        return former

    def _check_mutable(self, repository: str, tag: Tag) -> None:
        if any(each.fullmatch(tag) for each in self._rules.immutable):
            raise Denied(f"tag {tag} of {self._full(repository)} is immutable (store.immutable_tags)")


def _record_nothing(batch: Batch) -> None:
    pass


async def _flush_nothing() -> None:
    pass

"""Purging: an operator wants something gone, and with it all that only it needed.

What is named goes.  Of what it consists of, in its repository stays what another tag names, or a manifest
that did not come with it.  Of the blobs that then are linked there no more, those go from the disk that no
other repository links: so what others see does not change.

What is pinned goes only when it is named exactly, or by force.  What a client pulls meanwhile may dangle
for a moment: a link without its blob is a miss, and the cache fetches it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import islice

from proxy.admin.reports import Purged
from storage.disk.records import Batch
from storage.errors import RegistryError
from storage.graph import Walk, contents
from storage.keys import LINK, LISTING, MANIFEST, MOVES, REFERRER, TAG, USE
from storage.maintenance.pins import Pin, Pins
from storage.names import is_glob, written
from storage.oci import Digest, Reference, Tag
from storage.store import Store

BATCH = 500  # records in a transaction: nobody else can write while it lasts
KINDS = (TAG, MANIFEST, LINK, LISTING)  # in which a repository has records


class AllPinned(RegistryError):
    """All that was named is pinned."""

    code, status = "PINNED", 409


@dataclass(slots=True)
class PurgePlan:
    """What of a repository is to go; `keys` are records, tags first, and `blobs` what loses its link."""

    repository: str
    references: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    manifests: int = 0
    blobs: set[Digest] = field(default_factory=set)


@dataclass(slots=True)
class ManifestParents:
    """Which of a repository's manifests names which, or is referred to by which."""

    children: dict[Digest, list[Digest]]
    referrers: dict[Digest, list[Digest]]

    def below(self, tops: Iterable[Digest]) -> set[Digest]:
        """Those that are stored, `tops` included."""
        steps = Walk(tops)
        for digest in steps:
            if digest in self.children:
                steps.add((*self.children[digest], *self.referrers.get(digest, [])))
        return steps.reached & self.children.keys()

    def next_to(self, tops: Iterable[Digest]) -> set[Digest]:
        """What they name, or what refers to them."""
        return {each for top in tops for each in (*self.children[top], *self.referrers.get(top, []))}


class Purge:
    """Blocks.  Every method may raise StorageFailed."""

    def __init__(self, store: Store, pins: Pins) -> None:
        self._store = store
        self._records = store.records
        self._pins = pins

    def purge(self, wanted: Pin, dry_run: bool = False, force: bool = False) -> Purged:
        """A pattern that says neither tag nor digest means all of a repository.

        Raises AllPinned where all that matches is pinned.
        """
        pins = [] if force else self._pins.list()
        plans = [self._plan(repository, wanted, pins) for repository in self._repositories(wanted)]
        kept = [each for plan in plans for each in plan.kept]
        references = [each for plan in plans for each in plan.references]
        if kept and not references:
            raise AllPinned(
                f"{kept[0]}{f' and {len(kept) - 1} more' if kept[1:] else ''}: pinned, or part of what is"
                " pinned; name what is pinned exactly, purge by force, or unpin it"
            )
        links = {(plan.repository, digest) for plan in plans for digest in plan.blobs}
        if not dry_run:
            for plan in plans:
                self._delete(plan.keys)
        blobs, size = self._sweep(links, dry_run)
        return Purged(
            references=references,
            kept=kept,
            manifests=sum(plan.manifests for plan in plans),
            links=len(links),
            blobs=blobs,
            bytes=size,
            dry_run=dry_run,
        )

    def _repositories(self, wanted: Pin) -> list[str]:
        pattern = wanted.parts[0]
        if not is_glob(pattern):
            return [pattern]
        names = {name for kind in KINDS for name in self._records.groups(kind.prefix())}
        return sorted(name for name in names if fnmatchcase(name, pattern))

    # What is to go

    def _plan(self, repository: str, wanted: Pin, pins: Sequence[Pin]) -> PurgePlan:
        tags = self._tags(repository)
        names = self._who_names_whom(repository)
        exact = None if is_glob(wanted.pattern) else wanted.parts[2]

        def pinned(reference: Reference) -> bool:
            return reference != exact and any(pin.matches(repository, reference) for pin in pins)

        keep = {tag for tag in tags if pinned(tag)}
        held = {digest for digest in names.children if pinned(digest)}
        stay = names.below({tags[tag] for tag in keep} | held)
        named_tags = {tag for tag in tags if _whole(wanted) or wanted.matches(repository, tag)}
        named = {each for each in names.children if _whole(wanted) or wanted.matches(repository, each)}
        manifests = named - stay
        gone = named_tags - keep | {tag for tag, digest in tags.items() if digest in manifests} - keep
        if _whole(wanted):
            going = manifests
        else:
            below = names.below({tags[tag] for tag in gone} | manifests)
            roots = {digest for tag, digest in tags.items() if tag not in gone}
            going = below - names.below(roots | names.children.keys() - below) | manifests
            going -= stay
        plan = PurgePlan(repository)
        plan.kept = [written(repository, tag) for tag in sorted(named_tags & keep)]
        # Of a whole repository what stays for its tags' sake is not told one by one.
        plan.kept += [
            written(repository, each) for each in sorted(named & (held if _whole(wanted) else stay))
        ]
        if _whole(wanted):
            # And what goes with its tags neither.
            manifests = manifests - names.below({tags[tag] for tag in gone}) - names.next_to(manifests)
        plan.references = [written(repository, each) for each in sorted(gone)]
        plan.references += [written(repository, each) for each in sorted(manifests)]
        plan.manifests = len(going)
        self._list_records(plan, gone, going, _whole(wanted))
        return plan

    def _tags(self, repository: str) -> dict[Tag, Digest]:
        return {
            Tag(TAG.parse(key)[1]): Digest(value.partition(b" ")[0].decode("utf-8", "replace"))
            for key, value in self._records.scan(TAG.prefix(repository))
        }

    def _who_names_whom(self, repository: str) -> ManifestParents:
        children: dict[Digest, list[Digest]] = {}
        for digest, content in self._manifests(repository):
            found = contents(content)
            children[digest] = [each.digest for each in found.listed] if found else []
        referrers: dict[Digest, list[Digest]] = defaultdict(list)
        for key, _ in self._records.scan(REFERRER.prefix(repository)):
            _, subject, referrer = REFERRER.parse(key)
            referrers[Digest(subject)].append(Digest(referrer))
        return ManifestParents(children, referrers)

    def _manifests(self, repository: str) -> Iterator[tuple[Digest, bytes]]:
        for key, value in self._records.scan(MANIFEST.prefix(repository)):
            yield Digest(MANIFEST.parse(key)[1]), value.partition(b"\n")[2]

    def _list_records(self, plan: PurgePlan, tags: set[Tag], manifests: set[Digest], whole: bool) -> None:
        name = plan.repository
        plan.keys = [TAG.key(name, tag) for tag in sorted(tags)]
        plan.keys += [MANIFEST.key(name, digest) for digest in sorted(manifests)]
        if not whole or plan.kept:
            plan.keys += [USE.key(name, each) for each in (*tags, *manifests)]
            plan.keys += [MOVES.key(name, tag) for tag in tags]
        plan.keys += [
            key for key, _ in self._records.scan(REFERRER.prefix(name)) if REFERRER.parse(key)[2] in manifests
        ]
        named, stay = self._blobs(name, manifests)
        if whole:
            named.update(Digest(LINK.parse(key)[1]) for key, _ in self._records.scan(LINK.prefix(name)))
            # An origin is asked anew what it has.
            plan.keys += [key for key, _ in self._records.scan(LISTING.prefix(name))]
        if whole and not plan.kept:
            for kind in (REFERRER, USE, MOVES):
                plan.keys += [key for key, _ in self._records.scan(kind.prefix(name))]
        plan.blobs = {
            digest for digest in named - stay if self._records.get(LINK.key(name, digest)) is not None
        }
        plan.keys += [LINK.key(name, digest) for digest in sorted(plan.blobs)]
        if plan.keys and not plan.references and not plan.kept:
            plan.references = [name]  # nothing of it has a name, but there is something

    def _blobs(self, repository: str, going: set[Digest]) -> tuple[set[Digest], set[Digest]]:
        """What the manifests that go name, and what of the rest those that stay."""
        named: set[Digest] = set()
        stay: set[Digest] = set()
        for digest, content in self._manifests(repository):
            if (found := contents(content)) is not None:
                (named if digest in going else stay).update(each.digest for each in found.blobs)
        return named, stay

    # Doing it

    def _delete(self, keys: list[str]) -> None:
        # In their order: whatever cuts it short, no tag points at a manifest that went before it.
        rest = iter(keys)
        while batch := list(islice(rest, BATCH)):
            self._records.transaction(_deleting(batch))

    def _sweep(self, links: set[tuple[str, Digest]], dry_run: bool) -> tuple[int, int]:
        """Remove what nobody else links: how many blobs, and bytes."""
        candidates = {digest for _, digest in links}
        if candidates:
            for key, _ in self._records.scan(LINK.prefix()):
                repository, linked = LINK.parse(key)
                if linked in candidates and (repository, linked) not in links:
                    candidates.remove(Digest(linked))
        blobs = size = 0
        for each in candidates:
            path = self._store.files.path(each)
            with self._store.files.guard(path), suppress(FileNotFoundError):
                found = path.stat().st_size
                if not dry_run:
                    path.unlink()
                blobs, size = blobs + 1, size + found
        return blobs, size


def _whole(wanted: Pin) -> bool:
    """Whether it means all of a repository."""
    return wanted.pattern == wanted.parts[0]


def _deleting(keys: list[str]) -> Callable[[Batch], None]:
    def work(batch: Batch) -> None:
        for key in keys:
            batch.delete(key)

    return work

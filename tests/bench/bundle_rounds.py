"""Rounds of random writes to private registries, with bundles that are exported and imported: writes.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec

from proxy.namespaces.composition import Composition
from proxy.namespaces.routing import Member, Namespaces
from proxy.namespaces.tag_move_recorder import TagMoveRecorder
from proxy.transfer.bundle_export import BundleExport, Selection, earlier
from proxy.transfer.bundle_import import BundleImport
from storage.archives.bundle import BundleContents, BundledReference
from storage.archives.exporter import named
from storage.disk.blobs import BlobFiles
from storage.disk.records import SQLiteRecords
from storage.errors import ArchiveInvalid, Denied, Incomplete, ManifestUnknown, NameUnknown
from storage.store import Store
from tests.bench.expected import Key
from tests.bench.image_writes import TAGS, Server
from tests.bench.moving_rounds import MovingRounds
from tests.bench.rounds import Operation, Rounds

BUNDLES = ("bundles, files", "bundles, bucket", "bundles, two servers", "bundles, PostgreSQL")
MOVING_BUNDLES = ("bundles, moved, two servers",)
SHARE = 0.5  # of the rounds, in which bundles are written or read
LAST = 6  # bundles that may be imported


class Bundle:
    """A bundle, which is a directory, and those that it is a delta of."""

    def __init__(self, path: Path, base: list[Bundle]) -> None:
        self.path = path
        self.base = base
        self.contents = msgspec.json.decode((path / "entrepot.json").read_bytes(), type=BundleContents)
        self.verified = False

    @property
    def complete(self) -> bool:
        """Whether it has all that its indexes list."""
        return all(each.complete for each in self.contents.references)


class BundleRounds(Rounds):
    """Rounds in which bundles are exported and imported, at the same time, too.

    An import that fails may have done any part of it, and one that succeeded all.  What an export wrote can
    be imported where nothing is, and is then whole.
    """

    def _open(self, kind: str, database: str) -> None:
        self._bundles: list[Bundle] = []
        self._number = 0
        self._in_files = kind.endswith("files")
        super()._open(kind.removeprefix("bundles, "), database)

    def _chosen(self) -> list[Operation]:
        chosen = super()._chosen()
        if self._random.random() < SHARE:
            chosen += [
                self._random.choice((self.export, self.import_))
                for _ in range(self._random.choice((1, 1, 2)))
            ]
        return chosen

    def _parts(self, server: Server) -> Composition:
        parts: Any = SimpleNamespace(
            clock=self.clock, store=SimpleNamespace(files=server.store.files), outbox=None
        )
        parts.namespaces = Namespaces([Member(server.hosted, "local")])
        parts.stores, parts.hosted = [server.store], {"local": server.hosted}
        parts.store_of = lambda namespace: server.store
        return cast(Composition, parts)

    async def export(self, server: Server, repository: str) -> None:
        name, digests = f"local/{repository}", [*self.expected.images]
        patterns = ["local/*", name, f"{name}:*", f"{name}:x", *(f"{name}@{each}" for each in digests[-2:])]
        chosen = self._random.sample(patterns, self._random.choice((1, 1, 2)))
        base = self._random.sample(self._bundles, 1) if self._bundles and self._random.random() < 0.3 else []
        selection = Selection(
            chosen,
            referrers=self._random.random() < 0.8,
            since=[earlier(each.path) for each in base],
            skip_incomplete=self._random.random() < 0.8,
        )
        self._number += 1
        path = self._place / f"bundle-{self._number}"
        with suppress(Incomplete, NameUnknown, ManifestUnknown):
            await BundleExport(self._parts(server)).export(selection, str(path), lambda _: named(path))
            self._bundles.append(Bundle(path, base))
            self.done["exported"] += 1

    async def import_(self, server: Server, repository: str) -> None:
        if not self._bundles:
            return
        bundle = self._random.choice(self._bundles[-LAST:])
        keys = [*self._keys(bundle)]
        for key, value in keys:
            self.expected.may(key, value)
        try:
            imported = await BundleImport(self._parts(server)).import_(bundle.path)
            tags = {(each.repository.removeprefix("local/"), each.tag) for each in imported.references}
            for key, value in keys:
                if key[0] != "tag" or key[1:] in tags:
                    self.expected.did(key, value)
            self.done["imported"] += 1
        except Denied as error:  # to move an immutable tag
            assert any(
                each.tag in TAGS and each.tag.startswith("v") for each in bundle.contents.references
            ), error
        except ArchiveInvalid as error:  # it needs the one before, or is not whole
            if not bundle.base and bundle.complete:
                self.expected.wrong.append(f"{bundle.path} was refused: {error}")

    def _keys(self, bundle: Bundle) -> Iterator[tuple[Key, str]]:
        """What an import of the bundle makes."""
        for each in (*bundle.contents.references, *bundle.contents.referrers):
            repository = each.repository.removeprefix("local/")
            if isinstance(each, BundledReference) and each.tag is not None:
                yield ("tag", repository, each.tag), each.digest
            for digest in self._below(bundle, each.digest):
                kind = "manifest" if digest in self.expected.images else "blob"
                yield (kind, repository, digest), digest

    def _below(self, bundle: Bundle, digest: str) -> Iterator[str]:
        blobs = {*bundle.contents.blobs.get("local", ()), *bundle.contents.elsewhere.get("local", ())}
        steps = [digest]
        while steps:
            if (each := steps.pop()) in blobs:
                yield each
                if each in self.expected.images:
                    steps += [*self.expected.images[each].blobs, *self.expected.images[each].children]

    async def round(self) -> None:
        await super().round()
        for bundle in self._bundles:
            if not bundle.verified:
                await self._verify(bundle)

    async def _verify(self, bundle: Bundle) -> None:
        """Import it where there is nothing, and read all of it."""
        bundle.verified = True
        self._number += 1
        place = self._place / f"site-{self._number}"
        store = Store(BlobFiles(place, self.clock), SQLiteRecords(place / "records", self.clock), self.clock)
        parts: Any = SimpleNamespace(clock=self.clock, store=store, outbox=None, hosted={}, stores=[store])
        parts.namespaces, parts.moves = Namespaces([Member(store, "local")]), TagMoveRecorder(None, None)
        try:
            steps, whole = [bundle], list[Bundle]()
            while steps:
                whole.append(steps.pop())
                steps += whole[-1].base
            for each in reversed(whole):
                await BundleImport(cast(Composition, parts)).import_(each.path)
            for key, value in self._keys(bundle):
                if (found := await self._read(store, key)) != value:
                    self.expected.wrong.append(f"{bundle.path}: {key} is {found}, and not {value}")
        except Exception as error:
            self.expected.wrong.append(f"{bundle.path} cannot be imported: {error!r}")
        finally:
            await store.close()


class MovingBundleRounds(BundleRounds, MovingRounds):
    """Rounds in which the registry is moved, too."""

"""What is done at random to images: see writes.py."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import NamedTuple

from proxy.namespaces.hosted import Hosted
from storage.concurrency import run_in_thread, uninterrupted
from storage.conditions import ALWAYS, Conditions
from storage.errors import (
    BlobUnknown,
    Denied,
    ManifestBlobUnknown,
    ManifestUnknown,
    PreconditionFailed,
)
from storage.graph import fallback_tag
from storage.maintenance.collection import Collection
from storage.maintenance.deletion import Deletion, DeletionRequest
from storage.maintenance.pins import Pin
from storage.migration.distribution import DistributionTree
from storage.migration.migration import Migration
from storage.oci import OCI_INDEX, OCI_MANIFEST, Digest, Manifest, Tag
from storage.store import Store
from tests.bench.expected import ANY, IMMUTABLE, RULES, Expected, Failures, Key, Made
from tests.conftest import Clock
from tests.layout import Layout

REPOSITORIES, TAGS = ("a", "b"), (Tag("x"), Tag("y"), Tag("v1"))
SIZES = (0, 10, 3000, 50_000)  # bytes of blobs


class Server(NamedTuple):
    hosted: Hosted
    store: Store
    collection: Collection


class ImageWrites:
    """What several clients, and an operator, do to the images in `place`."""

    def __init__(self, place: Path, random: Random) -> None:
        self.clock = Clock()
        self.expected = Expected(self.clock, random.choice(RULES))
        self.failures = Failures(Random(random.random()))
        self._random = random
        self._place = place
        self._blobs = {str(Digest.of(each)): each for each in map(random.randbytes, SIZES)}

    async def image(self, server: Server, repository: str) -> None:
        """Push an image or an index; it may have a subject, which may be there, and a condition."""
        manifest = self._index() if self._random.random() < 0.3 else self._image()
        tag, digest = self._random.choice((None, None, *TAGS)), str(manifest.digest)
        if self.expected.images[digest].children and self._random.random() < 0.4:  # it lists referrers
            tag = fallback_tag(Digest(self._random.choice([*self.expected.images])))
        keys: list[Key] = [("manifest", repository, digest), *([("tag", repository, tag)] if tag else [])]
        for key in keys:
            self.expected.may(key, digest)
        held = self.expected.held.get(keys[-1])
        match = Conditions(match=frozenset([held or digest]))
        when = self._random.choice((ALWAYS, ALWAYS, ALWAYS, ANY, match))
        pushed = server.hosted.push_manifest(repository, tag or manifest.digest, manifest, (), when)
        try:
            await uninterrupted(pushed)
            for key in keys:
                self.expected.did(key, digest)
            self.expected.conditional(keys[-1], when, True)
        except ManifestBlobUnknown as error:
            for each in error.missing:
                kind = "blob" if each in self._blobs else "manifest"
                self.expected.unknown((kind, repository, each), "an image")
        except PreconditionFailed:
            self.expected.conditional(keys[-1], when, False)
        except Denied:  # to move an immutable tag
            assert tag is not None and IMMUTABLE.fullmatch(tag)

    def _image(self) -> Manifest:
        named = self._random.sample([*self._blobs], self._random.choice((1, 1, 2)))
        layers = [{"mediaType": "x/y", "digest": each, "size": len(self._blobs[each])} for each in named]
        return self._made(OCI_MANIFEST, Made(named), config=layers[0], layers=layers)

    def _index(self) -> Manifest:
        known = [*self.expected.images]
        named = self._random.sample(known, min(len(known), self._random.choice((1, 2))))
        sizes = {each: self.expected.images[each].size for each in named}
        children = [{"mediaType": OCI_MANIFEST, "digest": each, "size": sizes[each]} for each in named]
        return self._made(OCI_INDEX, Made((), named), manifests=children)

    def _made(self, media_type: str, made: Made, **more: object) -> Manifest:
        tree = {"schemaVersion": 2, "mediaType": media_type, **more}
        if self.expected.images and self._random.random() < 0.3:
            made = made._replace(subject=self._random.choice([*self.expected.images]))
            tree["subject"] = {"mediaType": OCI_MANIFEST, "digest": made.subject, "size": 1}
        manifest = Manifest.of(media_type, json.dumps(tree).encode())
        self.expected.images[str(manifest.digest)] = made._replace(size=len(manifest.content))
        return manifest

    async def pull_image(self, server: Server, repository: str) -> None:
        if not self.expected.images:
            return
        key = ("manifest", repository, self._random.choice([*self.expected.images]))
        try:
            await server.hosted.get_manifest(repository, Digest(key[2]))
            if not self.failures.share:  # else it may not have been recorded
                self.expected.did(key, key[2])
                self.expected.pulled(repository, key[2])
        except ManifestUnknown:
            self.expected.unknown(key, "a pull")

    async def pull_tag(self, server: Server, repository: str) -> None:
        with suppress(ManifestUnknown):
            found = await server.hosted.resolve_manifest(repository, self._random.choice(TAGS))
            if not self.failures.share:
                self.expected.pulled(repository, str(found.digest))

    async def delete(self, server: Server, repository: str) -> None:
        kind = self._random.choice(("blob", "manifest", "tag"))
        known = self.expected.keys()
        tags = {*TAGS, *(key[2] for key in known if key[:2] == ("tag", repository))}
        names = {"blob": [*self._blobs], "manifest": [*self.expected.images], "tag": sorted(tags)}[kind]
        if not names:
            return
        name = self._random.choice(names)
        if kind == "tag" and IMMUTABLE.fullmatch(name):
            with suppress(ManifestUnknown, Denied):
                await uninterrupted(server.hosted.delete_manifest(repository, Tag(name)))
                self.expected.did(("tag", repository, name), None)
            return
        self.expected.may(key := (kind, repository, name), None)
        if kind == "manifest":
            for tag in tags:
                self.expected.may(("tag", repository, tag), None)  # if it is one of its tags
        try:
            if kind == "blob":
                await uninterrupted(server.hosted.delete_blob(repository, Digest(name)))
            else:
                reference = Tag(name) if kind == "tag" else Digest(name)
                await uninterrupted(server.hosted.delete_manifest(repository, reference))
            self.expected.did(key, None)
        except (BlobUnknown, ManifestUnknown):
            self.expected.unknown(key, "a deletion")
        except Denied:
            assert kind == "manifest"

    async def erase(self, server: Server, repository: str) -> None:
        """Delete as an operator does."""
        name, digests = f"local/{repository}", [*self.expected.images]
        patterns = [name, f"{name}:x", f"{name}:*", *(f"{name}@{each}" for each in digests[-2:])]
        request = DeletionRequest(Pin(self._random.choice(patterns)))
        leases = server.collection.leases
        deletion = Deletion(server.store, leases, lambda name: (IMMUTABLE,), self.clock)
        await run_in_thread(deletion.run, request)

    async def take_over(self, server: Server, repository: str) -> None:
        """Import what another registry has on the disk."""
        number = self._random.random()
        layout = Layout(self._place / f"{number}")
        for tag in self._random.sample(TAGS, 2):
            layers = self._random.sample([*self._blobs.values()], 2)
            digest = layout.image(repository, layers=layers)
            layout.point(repository, tag, digest, self.clock() - self._random.choice((-60, 60, 86400)))
            blobs = [f'{{"of": "{repository}"}}'.encode(), *layers]
            self._blobs |= {str(Digest.of(each)): each for each in blobs}
            named = [str(Digest.of(each)) for each in blobs]
            self.expected.images[digest] = Made(named)
            self.expected.may(("tag", repository, tag), digest)
            self.expected.may(("manifest", repository, digest), digest)
            for each in named:
                self.expected.may(("blob", repository, each), each)
        source = DistributionTree(layout.directory)
        migration = Migration(
            server.store,
            source,
            immutable=lambda tag: IMMUTABLE.fullmatch(tag) is not None,
            retag=server.hosted.retag,
        )
        with suppress(BlobUnknown, ManifestUnknown):  # deleted meanwhile, twice
            await run_in_thread(migration.run, [repository], lambda name: f"local/{name}")

    async def compare_referrers(self, server: Server, found: dict[Key, str | None], what: str) -> None:
        """The referrers that are listed are manifests that are there: by their subjects, and by a tag."""
        images = self.expected.images
        for repository in REPOSITORIES:
            there = [key[2] for key, seen in found.items() if seen and key[:2] == ("manifest", repository)]
            for subject in images:
                index = found.get(("tag", repository, fallback_tag(Digest(subject))))
                known = () if index is None else images[index].children
                expected = sorted(each for each in there if images[each].subject == subject or each in known)
                listed: list[str] = []
                limit = self._random.randint(1, 3)
                while page := await server.hosted.referrers(
                    repository, Digest(subject), last=listed[-1] if listed else "", limit=limit
                ):
                    listed += [str(each.digest) for each in page]
                if listed != expected:
                    self.expected.wrong.append(f"{what}: {subject} has {listed}, and not {expected}")

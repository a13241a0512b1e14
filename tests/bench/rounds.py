"""Rounds of random writes to private registries: see writes.py."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

from proxy.namespaces.hosted import Hosted, PushRules
from storage.bucket.blobs import BucketBlobs
from storage.concurrency import run_in_thread, uninterrupted
from storage.content import BlobContent
from storage.disk.blobs import BlobFiles
from storage.errors import (
    BlobUnknown,
    BlobUploadUnknown,
    DigestInvalid,
    ManifestUnknown,
    StorageFailed,
    Unavailable,
)
from storage.keys import LEFTOVER, LINK, MANIFEST, OBJECT, UPLOAD
from storage.maintenance.collection import Collection
from storage.maintenance.leases import Leases
from storage.maintenance.pulls import Pulls
from storage.maintenance.retention import RetentionRules
from storage.oci import Digest, Tag
from storage.records import Records
from storage.registry import Upload
from storage.store import Store
from storage.values import StoredObject
from tests.bench.expected import GRACE, IMMUTABLE, FailingBucket, FailingPostgres, FailingRecords, Key
from tests.bench.image_writes import REPOSITORIES, ImageWrites, Server
from tests.counted import counts, plain, totals

DAY = 86400.0
PIECE = 20_000  # bytes that are written at a time
PAUSES = (0, 0, 1, 60, 3600, DAY / 3, 0.7 * DAY, 1.7 * DAY)  # seconds between two rounds
FAILING = (0.0, 0.0, 0.05, 0.25)  # the share of what fails, in a round
Operation = Callable[[Server, str], Awaitable[None]]


class Rounds(ImageWrites):
    """Rounds on the servers of a registry, which are in `place`."""

    def __init__(self, kind: str, place: Path, random: Random, database: str = "") -> None:
        super().__init__(place, random)
        self.done: Counter[str] = Counter()
        self._uploads: dict[str, tuple[str, bytes]] = {}  # the repository, and what is to be sent
        self._favourite = ""  # an upload of which several requests are likely
        self._in_files = kind == "files"
        self._records: Records
        self._servers: list[Server]
        self._open(kind, database)

    def _open(self, kind: str, database: str) -> None:
        self._records = FailingRecords(
            self._place / "records", self.clock, self.failures, kind == "two servers"
        )
        self._servers = []
        for name in ("one", "other")[: 2 - (kind in ("files", "bucket"))]:
            if database:
                self._records = FailingPostgres(database, self.clock, self.failures)
            content = self._content(name, self._records, self._in_files)
            self._servers.append(self._server(content, self._records))

    def _content(self, name: str, records: Records, in_files: bool) -> BlobContent:
        if in_files:
            return BlobFiles(self._place / name, self.clock, private=True, ticks=self.clock)
        bucket = FailingBucket(self._place / "bucket", self.failures)
        return BucketBlobs(bucket, records, self._place / name, self.clock, ticks=self.clock)

    def _server(self, content: BlobContent, records: Records) -> Server:
        store = Store(content, records, self.clock, collected=True)
        leases = Leases(store, GRACE, self.clock)
        rules = self.expected.rules or RetentionRules()
        collection = Collection(store, lambda name: rules, leases, self.clock, lambda seconds: None)
        pushed = PushRules(immutable=(IMMUTABLE,))
        pulls = Pulls(store, self.clock)
        return Server(Hosted("local", store, leases, pushed, pulls, clock=self.clock), store, collection)

    async def round(self) -> None:
        chosen = self._chosen()
        self.failures.share = self._random.choice(FAILING)
        if self._random.random() < 0.3:
            self._favourite = ""
        await asyncio.gather(*map(self._try, chosen))
        self.failures.share = 0.0
        self._settle()
        keys, what = self.expected.keys(), ", ".join(each.__name__ for each in chosen)
        for server in self._servers:
            found = {key: await self._read(server.store, key) for key in keys}
            self.expected.compare(found, self.collect in chosen, self.erase in chosen, what)
            await self.compare_referrers(server, found, what)
        self.clock.advance(self._random.choice(PAUSES))

    def _chosen(self) -> list[Operation]:
        """What is to be done in a round."""
        kinds: list[Operation] = [self.begin] * 2 + [self.go_on] * 7
        kinds += [self.finish] * 7 + [self.cancel, self.push] + [self.mount] * 3 + [self.image] * 8
        kinds += (
            [self.delete] * 3
            + [self.pull] * 4
            + [self.pull_image, self.pull_tag] * 2
            + [self.reap, self.collect] * 2
        )
        kinds += [self.erase] + [self.take_over] * self._in_files
        return [self._random.choice(kinds) for _ in range(self._random.randint(1, 6))]

    def _settle(self) -> None:
        """Do what servers do after a round; nothing fails."""

    async def _try(self, operation: Operation) -> None:
        with suppress(StorageFailed, Unavailable):
            await operation(self._random.choice(self._servers), self._random.choice(REPOSITORIES))
            self.done[operation.__name__] += 1

    async def _read(self, store: Store, key: Key) -> str | None:
        """What is there, by the records, and to the byte."""
        kind, repository, name = key
        with suppress(BlobUnknown, ManifestUnknown):
            if kind != "blob":
                reference = Tag(name) if kind == "tag" else Digest(name)
                if kind == "tag" and (pointer := store.pointer(f"local/{repository}", Tag(name))):
                    reference = pointer.digest
                    if not store.records.holds(MANIFEST.key(f"local/{repository}", reference)):
                        return "nothing"
                return str(store.manifest(f"local/{repository}", reference)[0].digest)
            blob = await store.get_blob(f"local/{repository}", Digest(name))
            try:
                content = b"".join([bytes(each) async for each in blob.chunks()])
            finally:
                await blob.close()
            return name if content == self._blobs[name] else f"{len(content)} other bytes"
        return None

    # Uploads

    def _upload(self) -> str:
        if self._favourite not in self._uploads:
            self._favourite = self._random.choice([*self._uploads, ""])
        return self._favourite

    async def begin(self, server: Server, repository: str) -> None:
        upload = await server.hosted.start_upload(repository)
        await upload.suspend()
        self._uploads[upload.id] = repository, self._random.choice([*self._blobs.values()])

    async def _resumed(self, server: Server) -> tuple[Upload, str, bytes] | None:
        id = self._upload()
        if id in self._uploads:
            repository, content = self._uploads[id]
            try:
                return await server.hosted.resume_upload(repository, id), repository, content
            except BlobUploadUnknown:
                self._uploads.pop(id, None)
        return None

    async def _send(self, upload: Upload, content: bytes, stop: int) -> None:
        try:
            for start in range(upload.offset, stop, PIECE):
                await upload.write(content[start : min(stop, start + PIECE)])
        except BaseException:
            await upload.suspend()
            raise

    async def go_on(self, server: Server, _: str) -> None:
        if (found := await self._resumed(server)) is not None:
            upload, _, content = found
            part = self._random.random() < 0.25
            stop = self._random.randrange(len(content) + 1) if part else len(content)
            with suppress(BlobUploadUnknown):  # another one has just ended it
                await self._send(upload, content, stop)
                await upload.suspend()

    async def finish(self, server: Server, _: str) -> None:
        if (found := await self._resumed(server)) is None:
            return
        upload, repository, content = found
        if self._random.random() < 0.4:
            await self._send(upload, content, len(content))
        if upload.offset < len(content):
            with suppress(BlobUploadUnknown):
                await upload.suspend()
            return
        digest = Digest.of(content + b"?") if self._random.random() < 0.1 else Digest.of(content)
        self.expected.may(key := ("blob", repository, digest), digest)
        with suppress(BlobUploadUnknown, DigestInvalid):  # of several requests at once one wins
            await uninterrupted(upload.commit(digest))
            self.expected.did(key, digest)

    async def cancel(self, server: Server, _: str) -> None:
        if (found := await self._resumed(server)) is not None:
            await found[0].cancel()

    async def push(self, server: Server, repository: str) -> None:
        content = self._random.choice([*self._blobs.values()])
        digest = Digest.of(content)
        upload = await server.hosted.start_upload(repository, len(content))
        self.expected.may(key := ("blob", repository, digest), digest)
        try:
            await self._send(upload, content, len(content))
            await uninterrupted(upload.commit(digest))
        except BaseException as error:
            await upload.cancel(error)
            raise
        self.expected.did(key, digest)

    # The rest

    async def mount(self, server: Server, repository: str) -> None:
        source, digest = self._random.choice(REPOSITORIES), Digest(self._random.choice([*self._blobs]))
        self.expected.may(key := ("blob", repository, digest), digest)
        try:
            await uninterrupted(server.hosted.mount_blob(repository, digest, source))
            self.expected.did(key, digest)
        except BlobUnknown:
            self.expected.unknown(("blob", source, digest), "a mount")

    async def pull(self, server: Server, repository: str) -> None:
        key = ("blob", repository, self._random.choice([*self._blobs]))
        try:
            await (await server.hosted.get_blob(repository, Digest(key[2]))).close()
            if not self.failures.share:  # else it may not have been recorded
                self.expected.did(key, key[2])
        except BlobUnknown:
            self.expected.unknown(key, "a pull")

    async def reap(self, server: Server, _: str) -> None:
        await run_in_thread(server.store.files.reap, DAY)

    async def collect(self, server: Server, _: str) -> None:
        self.done["collected blobs"] += (await run_in_thread(server.collection.run)).blobs

    async def end(self) -> None:
        """Have removed what is not in use, and look whether anything is left or wrong."""
        for step in (self.reap, self.collect, self.collect, self.reap):
            self.clock.advance(2 * DAY)
            for server in self._servers:
                await step(server, "")
        self.expected.wrong += [f"left: {each}" for each in self._left()]
        self.expected.wrong += [
            f"unreferenced: {each}" for each in self._unreferenced(self._servers[0].store)
        ]
        for server in self._servers:
            if plain(totals(server.store)) != plain(counts(server.store)):
                self.expected.wrong.append("the totals are wrong")
        for server in self._servers:
            await server.store.close()

    def _unreferenced(self, store: Store) -> Iterator[str]:
        """Links that no manifest of their repository needs, and blobs that no link names."""
        named: dict[str, set[str]] = {}
        for key in store.records.keys(MANIFEST.prefix()):
            repository, digest = MANIFEST.parse(key)
            named.setdefault(repository, set()).update(self.expected.images[digest].blobs)
        linked = [LINK.parse(key) for key in store.records.keys(LINK.prefix())]
        yield from (f"{digest} in {name}" for name, digest in linked if digest not in named.get(name, ()))
        stored = {str(each.digest) for portion in store.files.portions() for each in portion}
        yield from stored - {digest for _, digest in linked}

    def _left(self) -> Iterator[str]:
        for server in self._servers:
            root = server.store.files.root
            yield from (str(path) for name in ("partial", "locks") for path in (root / name).iterdir())
        if self._in_files:
            return
        records, bucket = self._records, self._place / "bucket"
        yield from (key for kind in (UPLOAD, LEFTOVER) for key in records.keys(kind.prefix()))
        objects = [StoredObject.parse(value) for _, value in records.scan(OBJECT.prefix())]
        known = {each.key for each in objects if each is not None} | {"entrepot"}
        files = (str(path.relative_to(bucket)) for path in bucket.rglob("*") if path.is_file())
        yield from (each for each in files if each not in known)

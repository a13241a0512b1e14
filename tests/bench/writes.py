"""Random writes to private registries at once, while database and bucket fail: what is lost, wrong or left.

In rounds: in each, one to six operations run at once, on a registry whose content is in files or in a bucket,
or on two servers over one bucket and one database.  Uploads in pieces, of which several requests go on with
one; mounts, images, deletions, pulls, collections with and without rules, and the removal of what was
abandoned.  Images have referrers, tags that are immutable, and conditions.  A transaction or an object may
fail, or succeed and look as if it had failed.  After each round all is read and compared with
what may be there, and up to two days pass.  At the end nothing may be left but what is in use.
"""

from __future__ import annotations

import asyncio
import os
import platform
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from random import Random

import click
import structlog

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
from storage.keys import LEFTOVER, MANIFEST, OBJECT, UPLOAD
from storage.maintenance.collection import Collection
from storage.maintenance.leases import Leases
from storage.maintenance.retention import RetentionRules
from storage.oci import Digest, Tag
from storage.records import Records
from storage.registry import Upload
from storage.store import Store
from storage.values import StoredObject
from tests.bench.clients import BenchError
from tests.bench.expected import GRACE, IMMUTABLE, RULES, FailingBucket, FailingPostgres, FailingRecords, Key
from tests.bench.image_writes import REPOSITORIES, ImageWrites, Server
from tests.counted import counts, plain, totals
from tests.postgres import PostgresServer

DAY = 86400.0
PIECE = 20_000  # bytes that are written at a time
PAUSES = (0, 0, 1, 60, 3600, DAY / 3, 0.7 * DAY, 1.7 * DAY)  # seconds between two rounds
FAILING = (0.0, 0.0, 0.05, 0.25)  # the share of what fails, in a round


class Run(ImageWrites):
    """Rounds on the `servers`, which are in `place`."""

    def __init__(self, kind: str, place: Path, random: Random, database: str = "") -> None:
        super().__init__(place, random)
        self.done: Counter[str] = Counter()
        self._files = kind == "files"
        self._records: Records = FailingRecords(
            place / "records", self.clock, self.failures, kind == "two servers"
        )
        self._servers = []
        for name in ("one", "other")[: 2 - (kind in ("files", "bucket"))]:
            if database:
                self._records = FailingPostgres(database, self.clock, self.failures)
            self._servers.append(self._server(kind, name))
        self._uploads: dict[str, tuple[str, bytes]] = {}  # the repository, and what is to be sent
        self._favourite = ""  # an upload of which several requests are likely

    def _server(self, kind: str, name: str) -> Server:
        files: BlobContent = BlobFiles(self._place / name, self.clock, private=True, ticks=self.clock)
        if kind != "files":
            bucket = FailingBucket(self._place / "bucket", self.failures)
            files = BucketBlobs(bucket, self._records, self._place / name, self.clock, ticks=self.clock)
        store = Store(files, self._records, self.clock, collected=True)
        leases = Leases(store, GRACE, self.clock)
        rules = RULES if self.expected.rules else RetentionRules()
        collection = Collection(store, lambda name: rules, leases, self.clock, lambda seconds: None)
        pushed = PushRules(immutable=(IMMUTABLE,))
        return Server(Hosted("local", store, leases, pushed, clock=self.clock), store, collection)

    async def round(self) -> None:
        kinds: list[Callable[[Server, str], Awaitable[None]]] = [self.begin] * 2 + [self.go_on] * 7
        kinds += [self.finish] * 7 + [self.cancel, self.push] + [self.mount] * 3 + [self.image] * 8
        kinds += [self.delete] * 3 + [self.pull] * 4 + [self.pull_image] * 2 + [self.reap, self.collect] * 2
        kinds += [self.erase] + [self.take_over] * self._files
        chosen = [self._random.choice(kinds) for _ in range(self._random.randint(1, 6))]
        self.failures.share = self._random.choice(FAILING)
        if self._random.random() < 0.3:
            self._favourite = ""
        await asyncio.gather(*map(self._try, chosen))
        self.failures.share = 0.0
        keys, what = self.expected.keys(), ", ".join(each.__name__ for each in chosen)
        for server in self._servers:
            found = {key: await self._read(server.store, key) for key in keys}
            self.expected.compare(found, self.collect in chosen, self.erase in chosen, what)
            self.compare_referrers(server.store, found, what)
        self.clock.advance(self._random.choice(PAUSES))

    async def _try(self, operation: Callable[[Server, str], Awaitable[None]]) -> None:
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
        wrong, records = self.expected.wrong, self._records
        wrong += [f"left: {key}" for kind in (UPLOAD, LEFTOVER) for key in records.keys(kind.prefix())]
        objects = [StoredObject.parse(value) for _, value in records.scan(OBJECT.prefix())]
        known = {each.key for each in objects if each is not None} | {"entrepot"}
        files = {path for path in (self._place / "bucket").rglob("*") if path.is_file()}
        wrong += [
            f"left: {each}"
            for path in files
            if (each := str(path.relative_to(self._place / "bucket"))) not in known
        ]
        for server in self._servers:
            root = server.store.files.root
            wrong += [f"left: {path}" for name in ("partial", "locks") for path in (root / name).iterdir()]
            if plain(totals(server.store)) != plain(counts(server.store)):
                wrong.append("the totals are wrong")
        for server in self._servers:
            await server.store.close()


@contextmanager
def postgres() -> Iterator[Callable[[], str]]:
    """A server, and what makes the URL of an empty database."""
    server = PostgresServer()
    try:
        server.start()
        yield server.database
        server.stop()
    finally:
        server.remove()


async def sample(kind: str, seed: int, rounds: int, database: str = "") -> Run:
    with tempfile.TemporaryDirectory(prefix="entrepot-bench-") as place:
        run = Run(kind, Path(place), Random(seed), database)
        for _ in range(rounds):
            await run.round()
        await run.end()
    return run


@click.command()
@click.option("--rounds", default=150, show_default=True, help="Of each seed.")
@click.option("--seeds", default=10, show_default=True)
@click.option("--seed", default=0, show_default=True, help="The first one.")
@click.option("--only", help="Part of the name of a kind.")
def main(rounds: int, seeds: int, seed: int, only: str | None) -> None:
    """Write at random and compare; prints a table."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))  # failures are what is meant
    print(f"- command: `{shlex.join(['python', '-m', 'tests.bench.writes', *sys.argv[1:]])}`")
    print(f"- {datetime.now(UTC):%Y-%m-%d}; {os.cpu_count()} cores, Python {platform.python_version()}\n")
    print(
        "| content | operations | failures | collected blobs | wrong or left | CPU s |\n"
        "|---|--:|--:|--:|--:|--:|"
    )
    wrong = 0
    for kind in ("files", "bucket", "two servers", "PostgreSQL"):
        if only is not None and only not in kind:
            continue
        begun, runs = time.process_time(), []
        with postgres() if kind == "PostgreSQL" else nullcontext(lambda: "") as database:
            for number in range(seed, seed + seeds):
                runs.append(asyncio.run(sample(kind, number, rounds, database())))
                for each in runs[-1].expected.wrong:
                    print(f"  seed {number}: {each}", file=sys.stderr)
        collected = sum(each.done.pop("collected blobs") for each in runs)
        failures, found = (
            sum(each.failures.number for each in runs),
            sum(len(each.expected.wrong) for each in runs),
        )
        operations, seconds = sum(each.done.total() for each in runs), time.process_time() - begun
        print(
            f"| {kind} | {operations:,} | {failures:,} | {collected:,} | {found} | {seconds:.0f} |",
            flush=True,
        )
        wrong += found
    if wrong:
        raise BenchError(f"{wrong} times something was lost, wrong or left")


if __name__ == "__main__":
    main(prog_name="python -m tests.bench.writes")

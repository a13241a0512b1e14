"""Collection while others push: in any order of steps, from several processes, and killed in the middle."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.namespaces.hosted import Hosted
from storage.disk.records import SQLiteRecords
from storage.errors import BlobUnknown, ManifestBlobUnknown, ManifestUnknown
from storage.maintenance.retention import KeepTags, RetentionRules
from storage.oci import OCI_INDEX, OCI_MANIFEST, Digest, Manifest, Tag
from storage.records import Batch
from tests.collecting import APP, DAY, GONE, GRACE, Place, descriptor, place
from tests.conftest import Clock
from tests.preloaded import PROGRAM

__all__ = ["place"]  # the fixture

# Any order of steps

CONTENTS = [b"content 0", b"content 1"]
NAMES = ["a", "b"]
WAITS = [GRACE * 0.7, GRACE, GONE]

Step = tuple[Any, ...]
_name, _content = st.sampled_from(["a", "a", "a", "b"]), st.sampled_from(CONTENTS)
STEP: st.SearchStrategy[Step] = st.one_of(
    st.tuples(st.sampled_from(["head", "head", "upload", "mount"]), _name, _content),
    st.tuples(st.sampled_from(["push", "dare", "look"]), _name, st.sampled_from(["v1", "v2", None])),
    st.tuples(st.sampled_from(["index", "untag"]), _name, st.sampled_from(["v1", "v2"])),
    st.tuples(st.just("wait"), st.sampled_from(WAITS)),
)
# What happens before a collection, how long before, and before each of its transactions.
ROUND = st.tuples(
    st.lists(STEP, max_size=4), st.sampled_from(WAITS), st.lists(st.lists(STEP, max_size=2), max_size=3)
)


class Client:
    """It sends nothing that it was told within the grace is here, and is never to be told else in its push.

    `told` is when it was told of a blob, `held` the digest that each tag was acknowledged to have.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.clock = place.clock
        self.hosted = Hosted("local", place.store, place.leases)
        self.told: dict[tuple[str, Digest], float] = {}
        self.pushed: dict[tuple[str, Digest], float] = {}
        self.held: dict[tuple[str, str], Digest] = {}

    async def do(self, step: Step) -> None:
        kind, *arguments = step
        await getattr(self, kind)(*arguments)

    def known(self, told: dict[tuple[str, Digest], float], name: str) -> list[Digest]:
        return [each for (at, each), when in told.items() if at == name and self.clock.now - when <= GRACE]

    async def upload(self, name: str, content: bytes) -> None:
        upload = await self.hosted.start_upload(name)
        await upload.write(content)
        await upload.commit(Digest.of(content))
        self.told[name, Digest.of(content)] = self.clock.now

    async def head(self, name: str, content: bytes) -> None:
        digest = Digest.of(content)
        try:
            await self.hosted.resolve_blob(name, digest)
        except BlobUnknown:
            assert digest not in self.known(self.told, name)
            return
        self.told[name, digest] = self.clock.now

    async def mount(self, name: str, content: bytes) -> None:
        digest = Digest.of(content)
        try:
            await self.hosted.mount_blob(name, digest, next(each for each in NAMES if each != name))
        except BlobUnknown:
            return
        self.told[name, digest] = self.clock.now

    async def push(self, name: str, tag: str | None) -> None:
        tree = {"schemaVersion": 2, "layers": [descriptor(each) for each in self.known(self.told, name)]}
        await self.put(name, Manifest.of(OCI_MANIFEST, json.dumps(tree).encode()), tag)

    async def dare(self, name: str, tag: str | None) -> None:
        """Push what names blobs that it was not told of."""
        tree = {"schemaVersion": 2, "layers": [descriptor(Digest.of(each)) for each in CONTENTS[:2]]}
        with suppress(ManifestBlobUnknown):
            await self.put(name, Manifest.of(OCI_MANIFEST, json.dumps(tree).encode()), tag)

    async def look(self, name: str, tag: str | None) -> None:
        """Ask for a manifest by digest, to name it in an index later."""
        for at, digest in list(self.pushed):
            if at == name:
                try:
                    await self.hosted.resolve_manifest(name, digest)
                except ManifestUnknown:
                    assert digest not in self.known(self.pushed, name)
                else:
                    self.pushed[name, digest] = self.clock.now

    async def index(self, name: str, tag: str) -> None:
        tree = {"schemaVersion": 2, "manifests": [descriptor(each) for each in self.known(self.pushed, name)]}
        await self.put(name, Manifest.of(OCI_INDEX, json.dumps(tree).encode()), tag)

    async def put(self, name: str, manifest: Manifest, tag: str | None) -> None:
        await self.hosted.push_manifest(name, Tag(tag) if tag else manifest.digest, manifest)
        self.pushed[name, manifest.digest] = self.clock.now
        if tag:
            self.held[name, tag] = manifest.digest

    async def untag(self, name: str, tag: str) -> None:
        if self.held.pop((name, tag), None) is not None:
            await self.hosted.delete_manifest(name, Tag(tag))

    async def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    async def check(self) -> None:
        for (name, tag), digest in self.held.items():
            assert (await self.hosted.resolve_manifest(name, Tag(tag))).digest == digest
            await self.check_manifest(name, digest)
        for (name, digest), at in self.pushed.items():
            if self.clock.now - at <= GRACE:
                await self.check_manifest(name, digest)

    async def check_manifest(self, name: str, digest: Digest) -> None:
        manifest, _ = self.place.store.manifest(f"local/{name}", digest)  # leases nothing
        for each in json.loads(manifest.content).get("manifests", []):
            await self.check_manifest(name, Digest(each["digest"]))
        for each in json.loads(manifest.content).get("layers", []):
            blob, _ = self.place.store.blob(f"local/{name}", Digest(each["digest"]))
            assert hashlib.sha256(os.pread(blob.fileno(), 100, 0)).hexdigest() == each["digest"][7:]
            await blob.close()


class Interleaved:
    """SQLiteRecords.transaction; before each of `collecting`'s, the steps of one of `slots` happen."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.slots: list[list[Step]] = []
        self.collecting: int | None = None
        self._loop = asyncio.get_running_loop()
        self._transaction = SQLiteRecords.transaction

    def __call__(self, records: SQLiteRecords, work: Callable[[Batch], object]) -> object:
        if threading.get_ident() == self.collecting and self.slots:
            steps = self.slots.pop(0)
            asyncio.run_coroutine_threadsafe(self._do(steps), self._loop).result()
        return self._transaction(records, work)

    async def _do(self, steps: list[Step]) -> None:
        for step in steps:
            await self.client.do(step)

    async def collect(self, before: list[Step], seconds: float, slots: list[list[Step]]) -> None:
        await self._do(before)
        await self.client.wait(seconds)
        self.slots = slots
        await asyncio.to_thread(self._collect)
        for steps in self.slots:  # there were not so many transactions
            await self._do(steps)

    def _collect(self) -> None:
        self.collecting = threading.get_ident()
        try:
            self.client.place.collect()
        finally:
            self.collecting = None


@pytest.mark.clients
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(ROUND, min_size=2, max_size=5))
def test_nothing_that_is_acknowledged_is_lost(
    tmp_path_factory: pytest.TempPathFactory, rounds: list[tuple[list[Step], float, list[list[Step]]]]
) -> None:
    asyncio.run(play(tmp_path_factory.mktemp("private"), rounds))


async def play(root: Path, rounds: list[tuple[list[Step], float, list[list[Step]]]]) -> None:
    place = Place(root, Clock())
    place.rules = RetentionRules(keep_untagged_for=DAY)
    client = Client(place)
    interleaved = Interleaved(client)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            SQLiteRecords, "transaction", lambda records, work, shared=False: interleaved(records, work)
        )
        for each in rounds:
            await interleaved.collect(*each)
            await client.check()
    place.records.close()


# Several processes

# Arguments: the directory, the grace, then a role.  What is acknowledged is printed, as JSON lines.
PROCESS = """
import asyncio, json, random, re, sys, threading, time
from pathlib import Path
from proxy.telemetry import metrics
from proxy.namespaces.hosted import Hosted
from storage.maintenance import collection, reachability, retention
from storage.maintenance.collection import Collection
from storage.errors import BlobUnknown, ManifestBlobUnknown
from storage.disk.blobs import BlobFiles
from storage.maintenance.leases import Leases
from storage.oci import OCI_MANIFEST, Digest, Manifest, Tag
from storage.disk.records import SQLiteRecords
from storage.store import Store
from proxy.telemetry import logs

logs.configure("json", "error")
root, grace, role, *rest = sys.argv[1:]
files = BlobFiles(Path(root), private=True)
store = Store(files, SQLiteRecords(Path(root) / "records"), collected=True)
leases = Leases(store, float(grace))

def say(**fields):
    print(json.dumps(fields), flush=True)

def collect():
    # Until its standard input ends; and then once more, as if that were later: nothing is young any more.
    over, later = threading.Event(), 0.0
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    collection.BATCH = 2
    now = lambda: time.time() + later
    rules = retention.RetentionRules(keep_untagged_for=float(grace))
    leases = Leases(store, float(grace), now)
    collector = Collection(store, lambda repository: rules, leases, now, lambda seconds: None)
    meanwhile = 0
    # The rest lets pushers in: who waits for SQLite's lock looks for it now and then only.
    while not over.wait(0.01):
        meanwhile += collector.run().links
    later = 60.0
    say(meanwhile=meanwhile, links=collector.run().links)

async def push(hosted, name, tag, contents):
    digests = []
    for content in contents:
        digest = Digest.of(content)
        digests.append(digest)
        try:
            await hosted.resolve_blob(name, digest)
        except BlobUnknown:
            upload = await hosted.start_upload(name)
            await upload.write(content)
            await upload.commit(digest)
    layers = [{"mediaType": "x", "digest": each, "size": 1} for each in map(str, digests)]
    body = json.dumps({"schemaVersion": 2, "layers": layers}).encode()
    await hosted.push_manifest(name, Tag(tag), Manifest.of(OCI_MANIFEST, body))

async def pusher(number):
    # Out of a few blobs, so that what one lets go of another one wants.
    hosted, chance, held = Hosted("local", store, leases), random.Random(number), {}
    refused = 0
    for step in range(60):
        name, tag = f"r{chance.randrange(2)}", f"v{number}-{chance.randrange(4)}"
        contents = [b"blob %d" % chance.randrange(12) for _ in range(3)]
        while True:
            try:
                await push(hosted, name, tag, contents)
                break
            except (BlobUnknown, ManifestBlobUnknown):
                refused += 1  # it took longer than the grace
        held[name, tag] = [content.decode() for content in contents]
        if chance.random() < 0.5:
            name, tag = chance.choice(list(held))
            await hosted.delete_manifest(name, Tag(tag))
            del held[name, tag]
    say(refused=refused, held=[[name, tag, contents] for (name, tag), contents in held.items()])

async def stopped(step):
    # A collection that stands still at a step, to be killed there.
    def stop(place, name, when, after=False):
        real = getattr(place, name)
        def stopping(*arguments, **keys):
            found = real(*arguments, **keys) if after else None
            if when(*arguments):
                say(reached=step)
                threading.Event().wait()
            return found if after else real(*arguments, **keys)
        setattr(place, name, stopping)

    if step == "before manifests go":
        stop(reachability.Reachability, "remove", lambda *_: True)
    elif step == "before that is committed":
        stop(reachability.Reachability, "remove", lambda *_: True, after=True)
    elif step == "before links go":
        stop(collection._CollectionRun, "_remove_links", lambda *_: True)
    elif step == "before files go":
        stop(collection._CollectionRun, "_collect_files", lambda *_: True)
    elif step == "before a file is moved":
        stop(Path, "rename", lambda path, to: "blobs" in str(path))
    elif step == "before a file is removed":
        stop(Path, "unlink", lambda path, *_: "collected-" in path.name)
    keep = retention.KeepTags((re.compile("ci-.*"),), 1)
    rules = retention.RetentionRules(keep_untagged_for=1.0, keep_tags=(keep,))
    Collection(store, lambda repository: rules, leases, pause=lambda seconds: None).run()

if role == "collector":
    collect()
elif role == "pusher":
    asyncio.run(pusher(int(rest[0])))
else:
    asyncio.run(stopped(rest[0]))
store.records.close()
"""


async def start(root: Path, grace: float, *role: str) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        *(*PROGRAM, PROCESS, str(root), str(grace), *role), stdin=pipe, stdout=pipe
    )


async def told(process: asyncio.subprocess.Process) -> Any:
    """Its last word, once it has ended; it is told to."""
    out, _ = await asyncio.wait_for(process.communicate(b""), 120)
    assert process.returncode == 0
    return json.loads(out)


@pytest.mark.clients
async def test_pushes_of_several_processes_against_collection(place: Place) -> None:
    # So short that what was let go of is collected meanwhile; most pushes take less.
    root, grace = place.files.root, 0.05
    collectors = [await start(root, grace, "collector") for _ in range(2)]
    pushers = [await start(root, grace, "pusher", str(number)) for number in range(3)]
    held = [each for process in pushers for each in (await told(process))["held"]]
    collected = [await told(process) for process in collectors]
    assert sum(each["meanwhile"] + each["links"] for each in collected) > 0
    assert len(held) > 5
    wanted = set()
    for name, tag, contents in held:
        manifest = await place.store.get_manifest(f"local/{name}", Tag(tag))
        named = [each["digest"] for each in json.loads(manifest.content)["layers"]]
        assert named == [Digest.of(content.encode()) for content in contents]
        for digest, content in zip(named, contents, strict=True):
            blob = await place.store.get_blob(f"local/{name}", Digest(digest))
            assert os.pread(blob.fileno(), 100, 0).decode() == content
            await blob.close()
            wanted.add(f"link local/{name} {digest}")
    assert set(place.records.keys("link ")) == wanted
    assert len(list(place.records.keys("tag "))) == len(held)


@pytest.mark.parametrize(
    "step",
    [
        "before manifests go",
        "before that is committed",
        "before links go",
        "before files go",
        "before a file is moved",
        "before a file is removed",
    ],
)
@pytest.mark.clients
async def test_a_collection_that_is_killed_loses_nothing(place: Place, step: str) -> None:
    layers = [await place.blob(b"kept"), await place.blob(b"shared")]
    await place.image("v1", *layers)
    for number in range(3):
        place.clock.advance(60)
        await place.image(f"ci-{number}", layers[1], await place.blob(b"of ci-%d" % number))
    unnamed = await place.blob(b"unnamed")
    # The process goes by the real time, which is years later.
    process = await start(place.files.root, GRACE, "stopped", step)
    assert process.stdout is not None
    assert json.loads(await asyncio.wait_for(process.stdout.readline(), 60)) == {"reached": step}
    process.send_signal(signal.SIGKILL)
    await process.communicate()

    async def check(*tags: str) -> None:
        assert place.tags() >= set(tags)
        for tag in place.tags():  # whichever are left
            manifest = await place.store.get_manifest(APP, Tag(tag))
            for each in json.loads(manifest.content)["layers"]:
                await (await place.store.get_blob(APP, Digest(each["digest"]))).close()

    await check("v1", "ci-2")
    place.rules = RetentionRules(keep_untagged_for=1.0, keep_tags=(KeepTags((re.compile("ci-.*"),), 1),))
    place.clock.advance(GONE)
    place.collect()
    await check("v1", "ci-2")
    assert place.tags() == {"v1", "ci-2"}
    assert len(place.manifests()) == 2
    assert place.held(unnamed) == [False]
    assert place.files.reap(DAY) == (step == "before a file is removed")

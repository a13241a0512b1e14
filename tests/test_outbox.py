"""Events are recorded with what they tell of: whenever a process dies, they come into the queues."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import signal
from collections.abc import AsyncIterator, Iterable
from functools import partial
from pathlib import Path

import pytest

from proxy.config.values import Secret
from proxy.config.webhooks import WebhookConfig
from proxy.namespaces.hosted import Hosted, PushRules
from proxy.telemetry.metrics import Metrics
from proxy.webhooks import outbox as module
from proxy.webhooks.event import Event, causing
from proxy.webhooks.outbox import Outbox
from proxy.webhooks.publisher import Publisher
from proxy.webhooks.queue import Queue
from storage.disk.blobs import BlobFiles
from storage.disk.records import SQLiteRecords
from storage.errors import Denied, ManifestUnknown, StorageFailed
from storage.keys import MANIFEST, OUTBOX, TAG
from storage.maintenance.leases import Leases
from storage.oci import OCI_MANIFEST, Manifest, Tag
from storage.postgres.records import PostgresRecords
from storage.records import Records
from storage.store import Store
from tests.conftest import Clock
from tests.deaths import die_before
from tests.moving import forked
from tests.postgres import PostgresServer

ACTIONS = ("push", "move", "delete")
V1 = Tag("v1")
MANIFESTS = [
    Manifest.of(
        OCI_MANIFEST, json.dumps({"schemaVersion": 2, "layers": [], "annotations": {"a": each}}).encode()
    )
    for each in "12"
]


class Server:
    """A process with a private registry and a webhook; another one may have been on its directory."""

    def __init__(
        self, root: Path, clock: Clock, actions: tuple[str, ...] = ACTIONS, records: Records | None = None
    ) -> None:
        self.records = SQLiteRecords(root / "records", clock) if records is None else records
        self.store = Store(BlobFiles(root, clock, private=True), self.records, clock)
        self.queue = Queue(SQLiteRecords(root / "events", clock), clock)
        hook = WebhookConfig(name="a", url=Secret("http://localhost/"), actions=actions)  # type: ignore[arg-type]
        self.publisher = Publisher(self.queue, [hook], Metrics(), clock)
        self.outbox = Outbox(self.store, self.publisher, clock)
        rules = PushRules(sparse=True)
        leases = Leases(self.store, 3600.0, clock)
        self.hosted = Hosted("local", self.store, leases, rules, outbox=self.outbox, clock=clock)
        self.clock = clock

    async def push(self, manifest: Manifest) -> None:
        with causing([self._event("push", str(manifest.digest))]) as left:
            await self.hosted.push_manifest("a", V1, manifest)
        assert left == []

    async def delete(self) -> None:
        with causing([self._event("delete")]):
            await self.hosted.delete_manifest("a", V1)

    def _event(self, action: str, digest: str = "") -> Event:
        happened = {"action": action, "kind": "tag", "repository": "local/a", "tag": "v1", "digest": digest}
        return Event(id=os.urandom(4).hex(), at=self.clock(), **happened)  # type: ignore[arg-type]

    def told(self) -> list[str]:
        """What is in the queue, each event once."""
        events = [each.event for each in self.queue.read("a", "", 99) if each.event]
        return [each.action for each in {each.id: each for each in events}.values()]

    def stored(self) -> list[str]:
        """What was done, as the records say."""
        manifests = [self.records.get(MANIFEST.key("local/a", each.digest)) for each in MANIFESTS]
        tagged = self.records.get(TAG.key("local/a", V1)) is not None
        done = ["push", *(["move", "push"] if manifests[1] else []), *([] if tagged else ["delete"])]
        return done if manifests[0] else []

    def recorded(self) -> int:
        return sum(1 for _ in self.records.keys(OUTBOX.prefix()))

    async def close(self) -> None:
        await self.outbox.close()
        await self.publisher.close()
        self.queue.close()
        await self.store.close()


@pytest.fixture(autouse=True)
async def no_thread_left() -> AsyncIterator[None]:
    yield
    await asyncio.get_running_loop().shutdown_default_executor()  # whose threads have the records open


async def test_events_are_queued_and_their_records_removed(tmp_path: Path, clock: Clock) -> None:
    server = Server(tmp_path, clock)
    await server.push(MANIFESTS[0])
    await server.push(MANIFESTS[1])
    assert server.told() == ["push", "move", "push"]
    await server.outbox.close()
    assert server.recorded() == 0
    await server.outbox.resume()
    assert server.told() == ["push", "move", "push"]
    await server.close()


async def test_what_could_not_be_removed_or_is_queued_meanwhile_is_removed_too(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(tmp_path, clock)
    loop, remove, more = asyncio.get_running_loop(), Outbox._remove, [MANIFESTS[1]]

    def removing(self: Outbox, keys: Iterable[str]) -> None:
        while more:
            asyncio.run_coroutine_threadsafe(server.push(more.pop()), loop).result()
            raise StorageFailed("it is being moved")
        remove(self, keys)

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(Outbox, "_remove", removing)
        for each in ("GATHERED", "AGAIN"):
            meanwhile.setattr(module, each, 0.0)
        await server.push(MANIFESTS[0])
        assert server.outbox._removing is not None
        await asyncio.wait([server.outbox._removing])
    assert (server.recorded(), server.told()) == (0, ["push", "move", "push"])
    await server.close()


async def test_what_fails_is_not_told(tmp_path: Path, clock: Clock) -> None:
    server = Server(tmp_path, clock)
    with pytest.raises(ManifestUnknown):
        await server.delete()
    await server.push(MANIFESTS[0])
    server.hosted._rules = PushRules(sparse=True, immutable=(re.compile("v1"),))
    with pytest.raises(Denied):
        await server.push(MANIFESTS[1])
    assert server.told() == ["push"]
    await server.close()


async def test_what_no_webhook_wants_is_not_recorded(tmp_path: Path, clock: Clock) -> None:
    server = Server(tmp_path, clock, actions=("delete",))
    await server.push(MANIFESTS[0])
    await server.push(MANIFESTS[1])
    assert (server.recorded(), server.told()) == (0, [])
    await server.close()


async def test_records_that_cannot_be_read_fail_no_push(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(tmp_path, clock)

    def fail(prefix: str) -> None:
        raise StorageFailed("it is silent")

    with monkeypatch.context() as silent:
        silent.setattr(server.outbox, "_read", fail)
        await server.push(MANIFESTS[0])
    assert server.told() == []
    clock.advance(module.LEFT + 1)
    await server.outbox.resume()
    assert (server.told(), server.recorded()) == (["push"], 0)
    await server.close()


async def test_queues_that_cannot_be_written_lose_no_event(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(tmp_path, clock)

    def fail(events: object, limit: int) -> None:
        raise StorageFailed("No space left on device")

    with monkeypatch.context() as full:
        full.setattr(server.queue, "put", fail)
        await server.push(MANIFESTS[0])
        await server.push(MANIFESTS[1])
        clock.advance(module.LEFT + 1)
        with pytest.raises(StorageFailed):
            await server.outbox.resume()
    assert (server.told(), server.recorded()) == ([], 3)
    await server.outbox.resume()
    assert (server.told(), server.recorded()) == (["push", "move", "push"], 0)
    await server.close()


@pytest.mark.clients
async def test_of_a_fleet_one_server_tells_what_another_did(
    tmp_path: Path, clock: Clock, postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = postgres_server.database()
    doomed, *others = (Server(tmp_path / name, clock, records=PostgresRecords(url)) for name in "abc")

    async def dies() -> None:
        """It is killed before the queue has the event."""

    with monkeypatch.context() as killed:
        killed.setattr(doomed.outbox, "flush", dies)
        await doomed.push(MANIFESTS[0])
    for each in others:
        await each.outbox.resume()
        assert each.told() == []  # it may be at work still
    clock.advance(module.LEFT + 1)
    await asyncio.gather(*(each.outbox.resume() for each in others))
    assert sorted(each.told() for each in others) == [[], ["push"]]
    assert doomed.recorded() == 0
    for each in (doomed, *others):
        await each.close()


@pytest.mark.clients
async def test_whenever_a_process_dies_what_it_did_is_told(tmp_path: Path, clock: Clock) -> None:
    """It dies before each of its transactions in turn; a transaction is stored whole or not at all."""
    for number in itertools.count(1):
        root = tmp_path / str(number)

        async def work(root: Path = root) -> None:
            server = Server(root, clock)
            await server.push(MANIFESTS[0])
            await server.push(MANIFESTS[1])
            await server.delete()
            await server.close()

        methods = [(SQLiteRecords, "transaction")]
        died = forked(work, partial(die_before, number, methods)) == -signal.SIGKILL
        heir = Server(root, clock)
        clock.advance(module.LEFT + 1)
        await heir.outbox.resume()
        assert heir.told() == heir.stored()
        assert heir.recorded() == 0
        await heir.close()
        if not died:
            assert number > 6
            return

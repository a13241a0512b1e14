"""Two servers over one database and one directory: what is pushed to one is there at the other, at once.

Real servers, of two workers each, and a real database that is killed.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import Any

import aiohttp
import psycopg
import pytest

from proxy.config.errors import StartError
from proxy.config.schema import Config
from proxy.namespaces.private import DATABASE, private_store
from storage.disk.blobs import BlobFiles
from storage.disk.records import SQLiteRecords
from storage.errors import StorageFailed
from storage.maintenance.collection import ELSEWHERE, Collection
from storage.maintenance.leases import Leases
from storage.maintenance.pins import Pin, Pins
from storage.maintenance.retention import RetentionRules
from storage.oci import OCI_INDEX, OCI_MANIFEST, OCTETS, Descriptor, Digest
from storage.postgres.records import PostgresRecords
from storage.store import Store
from tests.conftest import OPEN, Clock, configuration
from tests.postgres import PASSWORD, PostgresServer
from tests.processes import Place, Server, place  # noqa: F401  a fixture
from tests.test_push import image, index
from tests.upstream import Upstream

pytestmark = pytest.mark.clients

APP, OTHER = "/v2/local/team/app", "/v2/local/other"
CONFIG = b"{}"


class Answer:
    def __init__(self, response: aiohttp.ClientResponse, body: bytes) -> None:
        self.status, self.headers, self.body = response.status, response.headers, body


class Fleet:
    """Two servers; `ask` asks one of them."""

    def __init__(self, servers: list[Server], session: aiohttp.ClientSession, url: str) -> None:
        self.servers = servers
        self.url = url  # of the database
        self._session = session

    async def ask(
        self,
        number: int,
        method: str,
        path: str,
        body: bytes = b"",
        kind: str = "",
        admin: bool = False,
        **conditions: str,
    ) -> Answer:
        headers = {name.replace("_", "-"): value for name, value in conditions.items()}
        headers |= {"Content-Type": kind or "application/octet-stream"} if body else {}
        server = self.servers[number]
        url = (server.admin_url if admin else server.url) + path
        async with self._session.request(method, url, data=body or None, headers=headers) as response:
            return Answer(response, await response.read())

    async def blob(self, number: int, content: bytes, repository: str = APP) -> Digest:
        digest = Digest.of(content)
        answer = await self.ask(number, "POST", f"{repository}/blobs/uploads/?digest={digest}", content)
        assert answer.status == 201, answer.body
        return digest

    async def tag(self, number: int, tag: str, content: bytes, repository: str = APP) -> Answer:
        return await self.ask(number, "PUT", f"{repository}/manifests/{tag}", content, OCI_MANIFEST)


@pytest.fixture
def database(postgres_server: PostgresServer) -> str:
    return postgres_server.database()


@pytest.fixture
async def fleet(
    request: pytest.FixtureRequest,
    place: Place,  # noqa: F811
    database: str,
) -> AsyncIterator[Fleet]:
    """Its content is in the directory, or in what the test names."""
    place.tree["namespaces"]["local"] = {"store": {"immutable_tags": ["v*"]}}
    bucket = {}
    if getattr(request, "param", "directory") == "bucket":
        settings = request.getfixturevalue("seaweed").settings("tests", place.home.name)
        bucket = {"bucket": settings.url, "endpoint": settings.endpoint}
        bucket |= {"access_key": settings.access_key, "secret_key": settings.secret_key}
    place.tree |= {"access": OPEN, "shared": {"records": database, **bucket}}
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        servers = []
        for number in range(2):
            if bucket:  # then nothing is on a disk that both need
                place.tree["disk"] = {"path": str(place.home / f"disk{number}")}
            servers.append(await place.start())
        yield Fleet(servers, session, database)


@pytest.mark.parametrize("fleet", ["directory", "bucket"], indirect=True)
async def test_two_servers_are_one_registry(fleet: Fleet) -> None:
    await _pulled_at_the_next_moment(fleet)
    await _pushed_in_parts(fleet)
    await _one_winner_of_a_tag(fleet)
    await _nothing_lost_by_those_that_change_a_tag(fleet)


async def _nothing_lost_by_those_that_change_a_tag(fleet: Fleet) -> None:
    """Each adds to what it has read, on condition that it still is there; or begins again."""
    path, all_have_read = f"{APP}/manifests/list", asyncio.Barrier(6)

    async def add(number: int) -> int:
        for tries in itertools.count(1):
            known = await fleet.ask(number % 2, "GET", path)
            new = known.status == 404
            listed = {} if new else json.loads(known.body)["annotations"]
            if tries == 1:
                await all_have_read.wait()
            content = index(annotations={**listed, str(number): "added"})
            when = {"If_None_Match": "*"} if new else {"If_Match": known.headers["ETag"]}
            answer = await fleet.ask(1 - number % 2, "PUT", path, content, OCI_INDEX, **when)
            if answer.status == 201:
                return tries
            assert answer.status == 412, answer.body
        raise AssertionError

    tries = await asyncio.gather(*map(add, range(6)))
    found = json.loads((await fleet.ask(0, "GET", path)).body)["annotations"]
    assert set(found) == set(map(str, range(6)))
    assert tries.count(1) == 1  # of those that had read the same


async def _pulled_at_the_next_moment(fleet: Fleet) -> None:
    for number in range(12):
        one, other = number % 2, 1 - number % 2
        layer = await fleet.blob(one, b"layer %d" % number)
        await fleet.blob(one, CONFIG)
        content = image(layer)
        assert (await fleet.ask(other, "HEAD", f"{APP}/blobs/{layer}")).status == 200
        assert (await fleet.tag(one, "latest", content)).status == 201
        assert (await fleet.ask(other, "GET", f"{APP}/manifests/latest")).body == content
        assert (await fleet.ask(other, "GET", f"{APP}/manifests/{Digest.of(content)}")).body == content
        assert (await fleet.ask(other, "GET", f"{APP}/blobs/{layer}")).body == b"layer %d" % number
        # And again: what is asked for a second time may be answered from memory.
        assert (await fleet.ask(other, "GET", f"{APP}/manifests/latest")).body == content
        assert (await fleet.ask(one, "GET", f"{APP}/manifests/latest")).body == content


async def _pushed_in_parts(fleet: Fleet) -> None:
    """Every part of a push may go to another server."""
    content = b"a layer in parts"
    digest = Digest.of(content)
    location = (await fleet.ask(0, "POST", f"{APP}/blobs/uploads/")).headers["Location"]
    for number, part in enumerate((content[:5], content[5:9])):
        answer = await fleet.ask(1 - number, "PATCH", location, part)
        assert answer.status == 202, answer.body
        location = answer.headers["Location"]
    assert (await fleet.ask(1, "PUT", f"{location}?digest={digest}", content[9:])).status == 201
    assert (await fleet.ask(0, "GET", f"{APP}/blobs/{digest}")).body == content
    mounted = await fleet.ask(0, "POST", f"{OTHER}/blobs/uploads/?mount={digest}&from=local/team/app")
    assert mounted.status == 201
    assert (await fleet.ask(1, "GET", f"{OTHER}/blobs/{digest}")).body == content
    await fleet.blob(1, CONFIG)
    assert (await fleet.tag(0, "a", image(digest))).status == 201
    assert json.loads((await fleet.ask(1, "GET", f"{APP}/tags/list")).body)["tags"] == ["a", "latest"]
    assert (await fleet.ask(1, "DELETE", f"{APP}/manifests/a")).status == 202
    assert (await fleet.ask(0, "GET", f"{APP}/manifests/a")).status == 404
    assert (await fleet.ask(0, "DELETE", f"{OTHER}/blobs/{digest}")).status == 202
    assert (await fleet.ask(1, "GET", f"{OTHER}/blobs/{digest}")).status == 404
    assert (await fleet.ask(1, "GET", f"{APP}/blobs/{digest}")).body == content


async def _one_winner_of_a_tag(fleet: Fleet) -> None:
    """Both find no such tag, which is immutable: one of them has to learn that there is one."""
    contents = [image(annotations={"by": str(number)}) for number in range(2)]
    for round in range(10):
        answers = await asyncio.gather(*(fleet.tag(each, f"v{round}", contents[each]) for each in range(2)))
        assert sorted(each.status for each in answers) == [201, 403]
        winner = next(each for each in range(2) if answers[each].status == 201)
        for each in range(2):
            assert (await fleet.ask(each, "GET", f"{APP}/manifests/v{round}")).body == contents[winner]


@pytest.mark.errors("records.failed")
async def test_the_database_is_killed_and_comes_back(
    fleet: Fleet, postgres_server: PostgresServer, upstream: Upstream
) -> None:
    await _silent_for_a_while(fleet, postgres_server, upstream)
    await _killed_in_the_middle_of_pushes(fleet, postgres_server, upstream)
    await _killed_between_pushes(fleet, postgres_server)
    await _a_server_is_killed_in_the_middle_of_pushes(fleet)


async def _a_server_is_killed_in_the_middle_of_pushes(fleet: Fleet) -> None:
    """Its locks end with it, and nothing of a push is there unless all of it is."""
    pushed = {f"k{number}": image(annotations={"k": str(number)}) for number in range(8)}
    with psycopg.connect(fleet.url) as other:
        other.execute("LOCK TABLE entrepot_writers IN EXCLUSIVE MODE")
        under_way = [asyncio.create_task(fleet.tag(0, tag, content)) for tag, content in pushed.items()]
        await _waiting_for_a_lock(other)
        await fleet.servers[0].kill()
    for found in await asyncio.gather(*under_way, return_exceptions=True):
        assert isinstance(found, aiohttp.ClientError) or found.status == 503  # it waited too long
    assert (await fleet.tag(1, "after", image())).status == 201
    for tag, content in pushed.items():
        answer = await fleet.ask(1, "GET", f"{APP}/manifests/{tag}")
        assert (answer.status, answer.body) == (200, content) or answer.status == 404
        assert (await fleet.tag(1, tag, content)).status == 201


async def _waiting_for_a_lock(other: psycopg.Connection[Any]) -> None:
    waiting = "SELECT FROM pg_locks WHERE relation = 'entrepot_writers'::regclass AND NOT granted"
    while other.execute(waiting).fetchone() is None:  # noqa: ASYNC110  no event tells
        await asyncio.sleep(0)


async def _silent_for_a_while(fleet: Fleet, postgres_server: PostgresServer, upstream: Upstream) -> None:
    """However many wait for the database, those who need none wait for nobody."""
    cached = upstream.image("library/busybox", "latest", layers=[b"a layer of busybox"])
    await fleet.blob(0, CONFIG)
    with postgres_server.silent():
        waiting = [asyncio.create_task(fleet.tag(0, f"silent-{number}", image())) for number in range(40)]
        waiting += [asyncio.create_task(fleet.ask(0, "GET", f"{APP}/manifests/any")) for _ in range(40)]
        for path in ("manifests/latest", *(f"blobs/{each}" for each in (cached.config, *cached.layers))):
            answer = await fleet.ask(0, "GET", f"/v2/library/busybox/{path}")
            assert answer.status == 200
        assert not any(each.done() for each in waiting[:40])
    found = [(await each).status for each in waiting]
    assert found[:40] == [201] * 40
    assert {*found[40:]} <= {404, 503}  # if that took more than three seconds


async def _killed_in_the_middle_of_pushes(
    fleet: Fleet, postgres_server: PostgresServer, upstream: Upstream
) -> None:
    cached = upstream.image("library/alpine", "latest")
    assert (await fleet.tag(0, "before", image())).status == 201
    pushed = {f"t{number}": image(annotations={"n": str(number)}) for number in range(12)}
    other = psycopg.connect(fleet.url, autocommit=True)
    other.execute("BEGIN; LOCK TABLE entrepot_writers IN EXCLUSIVE MODE")
    under_way = [
        asyncio.create_task(fleet.tag(number % 2, tag, content))
        for number, (tag, content) in enumerate(pushed.items())
    ]
    await _waiting_for_a_lock(other)
    with postgres_server.lost():
        other.close()
        for each in under_way:
            answer = await each
            assert answer.status == 503, answer.body
            assert int(answer.headers["Retry-After"]) > 0
            assert json.loads(answer.body)["errors"][0]["code"] == "UNAVAILABLE"
            assert PASSWORD.encode() not in answer.body
        # What needs no database goes on.
        for number in range(2):
            answer = await fleet.ask(number, "GET", "/v2/library/alpine/manifests/latest")
            assert (answer.status, answer.body) == (200, cached.content)
        assert (await fleet.ask(0, "GET", f"{APP}/manifests/never")).status == 503
        ready = json.loads((await fleet.ask(0, "GET", "/readyz", admin=True)).body)
        assert ready["status"] == "degraded"
        assert "/postgres: " in ready["store"]
    for number, (tag, content) in enumerate(pushed.items()):
        assert (await fleet.tag(number % 2, tag, content)).status == 201
    for number in range(2):
        assert (await fleet.ask(number, "GET", f"{APP}/manifests/before")).body == image()
        for tag, content in pushed.items():
            assert (await fleet.ask(number, "GET", f"{APP}/manifests/{tag}")).body == content


async def _killed_between_pushes(fleet: Fleet, postgres_server: PostgresServer) -> None:
    """All that was acknowledged is there."""
    acknowledged: dict[str, bytes] = {}
    several = asyncio.Event()

    async def push(by: int) -> None:
        for number in range(1000):
            tag, content = f"t{by}-{number}", image(annotations={"n": f"{by} {number}"})
            answer = await fleet.tag(by % 2, tag, content)
            if answer.status != 201:
                assert answer.status == 503, answer.body
                return
            acknowledged[tag] = content
            if len(acknowledged) == 40:
                several.set()

    pushing = [asyncio.create_task(push(by)) for by in range(4)]
    await several.wait()
    with postgres_server.lost():
        await asyncio.gather(*pushing)
    assert len(acknowledged) >= 40
    for tag, content in acknowledged.items():
        assert (await fleet.ask(1, "GET", f"{APP}/manifests/{tag}")).body == content


# Which records belong to a directory


def configured(directory: Path, **shared: Any) -> Config:
    tree = {
        "disk": {"path": str(directory / "disk")},
        "namespaces": {"local": {"store": {}}},
        "shared": shared,
    }
    return configuration(directory, tree)


async def push_one(store: Store) -> None:
    upload = await store.start_upload("local/a")
    await upload.write(CONFIG)
    await upload.commit(Digest.of(CONFIG))


async def test_a_database_without_the_records_of_the_directory_is_not_used(
    tmp_path: Path, database: str
) -> None:
    """Otherwise a collection would remove all content: no record names it.  A move brings them."""
    with closing((store := private_store(configured(tmp_path))).records):
        await push_one(store)
    for config in (configured(tmp_path, records=database), configured(tmp_path)):
        with closing((store := private_store(config)).records):
            assert store.linked("local/a", Digest.of(CONFIG))
            assert not store.records.remote


async def test_a_directory_whose_records_are_in_a_database_is_refused_without_it(
    tmp_path: Path, database: str, postgres_server: PostgresServer
) -> None:
    with closing((store := private_store(configured(tmp_path, records=database))).records):
        await push_one(store)
    with pytest.raises(StartError, match=f"{DATABASE}.*: set shared.records"):
        private_store(configured(tmp_path))
    with pytest.raises(StartError, match="belongs to another database"):
        private_store(configured(tmp_path, records=postgres_server.database()))
    with closing((store := private_store(configured(tmp_path, records=database))).records):
        assert store.linked("local/a", Digest.of(CONFIG))


@pytest.mark.errors("records.failed")
async def test_a_database_that_is_another_one_when_it_comes_back_is_not_used(
    tmp_path: Path, database: str, postgres_server: PostgresServer
) -> None:
    private_store(configured(tmp_path, records=database)).records.close()
    other = postgres_server.database()
    with postgres_server.lost():
        store = private_store(configured(tmp_path, records=other))  # it may come up after the server
    with closing(store.records), pytest.raises(StorageFailed, match="belongs to another database"):
        store.records.get("a")


def test_a_url_that_is_invalid_is_not_shown(tmp_path: Path) -> None:
    for url in (
        "postgresql://a:hunter2 word@h/x",
        "postgresql://a:hunter2%@h/x",
        "postgresql://h/x?hunter2=1",
    ):
        with pytest.raises(StartError, match=r"^shared\.records: it is no valid URL") as caught:
            private_store(configured(tmp_path, records=url))
        assert "hunter2" not in str(caught.value)
        assert "hunter2" not in repr(configured(tmp_path, records=url))


# One at a time


async def test_one_server_at_a_time_collects(tmp_path: Path, database: str, clock: Clock) -> None:
    config = configured(tmp_path, records=database)
    store, other = private_store(config, clock), private_store(config, clock)
    with closing(store.records), closing(other.records):
        await push_one(store)
        clock.advance(1e6)
        collections = [
            Collection(each, lambda repository: RetentionRules(), Leases(each, 3600.0, clock), clock)
            for each in (store, other)
        ]
        with other.records.turn("collect"):
            report = collections[0].run()
            assert (report.refused, report.blobs) == (ELSEWHERE, 0)
            assert collections[0].run(dry_run=True).links == 1  # which removes nothing
            assert collections[0].last().begun == 0
        assert store.linked("local/a", Digest.of(CONFIG))
        assert collections[1].run().links == 1
        assert collections[0].last().links == 1
        assert store.linked("local/a", Digest.of(CONFIG)) is None


async def test_a_blob_that_is_linked_meanwhile_is_not_collected(
    tmp_path: Path, database: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. a collection finds a blob that no link names  2. another server links it  3. the file stays."""
    config = configured(tmp_path, records=database)
    store, other = private_store(config, clock), private_store(config, clock)
    with closing(store.records), closing(other.records):
        await push_one(store)
        await store.delete_blob("local/a", Digest.of(CONFIG))
        clock.advance(1e6)
        collection = Collection(store, lambda name: RetentionRules(), Leases(store, 3600.0, clock), clock)
        transaction, linked = PostgresRecords.transaction, []

        def meddle(records: PostgresRecords, work: Any, shared: bool = False) -> Any:
            if not shared and not linked:
                linked.append(1)
                other._link("local/b", Descriptor(OCTETS, Digest.of(CONFIG), len(CONFIG)))
            return transaction(records, work, shared)

        monkeypatch.setattr(PostgresRecords, "transaction", meddle)
        assert collection.run().blobs == 0
        assert linked
        assert other.linked("local/b", Digest.of(CONFIG))


# Pins


@pytest.mark.errors("records.failed")
def test_a_pin_of_one_server_holds_on_all(
    tmp_path: Path, database: str, postgres_server: PostgresServer, clock: Clock
) -> None:
    shared = private_store(configured(tmp_path, records=database)).records
    homes = [Store(BlobFiles(tmp_path / name), SQLiteRecords(tmp_path / name / "records")) for name in "ab"]
    one, other = (Pins(home, [Pin("docker.io/a:1")], clock, shared) for home in homes)
    one.add(Pin("local/team/app:ci-7", 60.0))
    other.add(Pin("local/other"))
    former = Pin("docker.io/b", since=1.0)  # from before there was a database
    Pins(homes[0]).add(former)
    pinned = [Pin("local/other", since=clock.now), Pin("local/team/app:ci-7", 60.0, since=clock.now)]
    assert one.list() == [Pin("docker.io/a:1"), former, *pinned]
    assert other.list() == other.known() == [Pin("docker.io/a:1"), *pinned]
    with postgres_server.lost():
        with pytest.raises(StorageFailed):
            other.list()  # a collection would remove what is pinned
        assert other.known() == [Pin("docker.io/a:1"), pinned[0]]
    assert one.remove("local/team/app:ci-7")
    assert not one.remove("local/team/app:ci-7")
    assert other.list() == [Pin("docker.io/a:1"), pinned[0]]
    for each in (shared, *(home.records for home in homes)):
        each.close()

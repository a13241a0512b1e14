"""Two servers over one database and a bucket: while these are lost, pulls go on from what each has itself."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path

import aiohttp
import psycopg
import pytest

from storage.disk.records import SQLiteRecords
from storage.keys import LEFTOVER, OBJECT, REMEMBERED
from storage.oci import Digest
from tests.conftest import OPEN
from tests.postgres import PostgresServer
from tests.processes import Place, place  # noqa: F401  a fixture
from tests.seaweed import Seaweed, seaweed_server
from tests.test_fleet import APP, CONFIG, Fleet, _waiting_for_a_lock
from tests.test_push import image

pytestmark = [pytest.mark.clients, pytest.mark.errors("records.failed")]

LAYER = b"a layer" * 1000
OUTDATED = '299 - "the database of this registry cannot be reached: this is what was known here before"'


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[Seaweed]:
    with seaweed_server(tmp_path / "seaweed") as server:
        yield server


@pytest.fixture
async def fleet(
    place: Place,  # noqa: F811
    postgres_server: PostgresServer,
    bucket: Seaweed,
) -> AsyncIterator[Fleet]:
    settings, database = bucket.settings("tests", "outage"), postgres_server.database()
    keys = {"access_key": settings.access_key, "secret_key": settings.secret_key}
    shared = {"records": database, "bucket": settings.url, "endpoint": settings.endpoint, **keys}
    place.tree["namespaces"]["local"] = {"store": {}}
    place.tree |= {"access": OPEN, "shared": shared, "drain": "1ms"}
    servers = []
    async with aiohttp.ClientSession() as session:
        for number in range(2):
            place.tree["disk"] = {"path": str(place.home / f"disk{number}")}
            servers.append(await place.start())
        yield Fleet(servers, session, database)


async def push(fleet: Fleet) -> tuple[bytes, list[Digest]]:
    """Push an image to one server: its manifest and its blobs."""
    blobs = [await fleet.blob(0, each) for each in (CONFIG, LAYER)]
    manifest = image(blobs[1])
    assert (await fleet.tag(0, "latest", manifest)).status == 201
    return manifest, blobs


async def pull(fleet: Fleet, number: int, manifest: bytes, blobs: list[Digest], outage: bool = True) -> None:
    """Pull it, by tag and by digest, and say whether the answers are marked as they should be."""
    warning = OUTDATED if outage else None
    for reference in ("latest", Digest.of(manifest)):
        answer = await fleet.ask(number, "GET", f"{APP}/manifests/{reference}")
        assert (answer.status, answer.body) == (200, manifest), answer.body
        assert answer.headers.get("Warning") == warning
        assert answer.headers.get("Cache-Status") == ("entrepot; hit; detail=database" if outage else None)
        assert answer.headers["Cache-Control"] == ("no-cache" if outage else answer.headers["Cache-Control"])
    for digest, content in zip(blobs, (CONFIG, LAYER), strict=True):
        assert (await fleet.ask(number, "HEAD", f"{APP}/blobs/{digest}")).status == 200
        answer = await fleet.ask(number, "GET", f"{APP}/blobs/{digest}")
        assert (answer.status, answer.body) == (200, content), answer.body
        assert answer.headers.get("Warning") == warning


async def remembered(fleet: Fleet, number: int, records: int) -> None:
    """Wait until a server has written down what its workers have read."""
    directory = fleet.servers[number].directory.with_name(f"disk{number}") / "cache" / "records"
    with closing(SQLiteRecords(directory)) as here:
        while len(list(here.keys(REMEMBERED.prefix()))) < records:  # noqa: ASYNC110  no event tells
            await asyncio.sleep(0)
        assert here.first(REMEMBERED.prefix() + OBJECT.prefix()) is not None


async def refused(fleet: Fleet, number: int) -> None:
    """A push is, and so is a pull of what was never pulled there."""
    for answer in (
        await fleet.tag(number, "other", image()),
        await fleet.ask(number, "GET", f"{APP}/manifests/never"),
    ):
        assert answer.status == 503
        assert int(answer.headers["Retry-After"]) > 0


@pytest.mark.errors("records.failed", "bucket.failed")
async def test_a_database_that_is_killed_and_a_bucket(
    fleet: Fleet, postgres_server: PostgresServer, bucket: Seaweed
) -> None:
    manifest, blobs = await push(fleet)
    await pull(fleet, 1, manifest, blobs, outage=False)
    await remembered(fleet, 1, 6)
    other = image(blobs[1], annotations={"a": "b"})
    with postgres_server.lost():
        for _ in range(8):  # by both workers
            await pull(fleet, 1, manifest, blobs)
            await refused(fleet, 1)
        ready = json.loads((await fleet.ask(1, "GET", "/readyz", admin=True)).body)
        assert ready["status"] == "degraded"
        assert "/postgres: " in ready["store"]
        # The one that was pushed to has pulled nothing, and knows what it has pushed.
        await pull(fleet, 0, manifest, blobs)
        bucket.kill()
        for _ in range(4):
            await pull(fleet, 1, manifest, blobs)
    await pull(fleet, 1, manifest, blobs, outage=False)
    assert (await fleet.tag(0, "latest", other)).status == 201
    for number in range(2):
        answer = await fleet.ask(number, "GET", f"{APP}/manifests/latest")
        assert (answer.body, answer.headers.get("Warning")) == (other, None)


async def test_a_database_that_is_silent_and_one_without_free_connections(
    fleet: Fleet, postgres_server: PostgresServer
) -> None:
    manifest, blobs = await push(fleet)
    await pull(fleet, 1, manifest, blobs, outage=False)
    await remembered(fleet, 1, 6)
    with postgres_server.silent():
        await asyncio.gather(*(pull(fleet, 1, manifest, blobs) for _ in range(20)))
        ready = json.loads((await fleet.ask(1, "GET", "/readyz", admin=True)).body)
        assert ready["status"] == "degraded", ready
    await answering(fleet, manifest)
    with psycopg.connect(fleet.url) as other:
        other.execute("LOCK TABLE entrepot_writers IN EXCLUSIVE MODE")
        pushes = [asyncio.create_task(fleet.tag(1, f"t{number}", manifest)) for number in range(40)]
        await _waiting_for_a_lock(other)
        for _ in range(2):
            answer = await fleet.ask(1, "GET", f"{APP}/manifests/latest")
            assert (answer.status, answer.body) == (200, manifest)
    assert {(await each).status for each in pushes} <= {201, 503}
    await answering(fleet, manifest)
    assert (await fleet.tag(1, "last", manifest)).status == 201


async def test_a_server_stops_though_its_database_is_silent(
    fleet: Fleet, postgres_server: PostgresServer
) -> None:
    manifest, blobs = await push(fleet)
    with postgres_server.silent():
        await pull(fleet, 0, manifest, blobs)  # after which it looks whether the database answers
        await fleet.servers[0].stop()  # none of its processes is killed, which would be an error


async def test_a_server_stops_though_its_bucket_is_silent(fleet: Fleet, bucket: Seaweed) -> None:
    await push(fleet)
    known = await leftovers(fleet)
    bucket.process.send_signal(signal.SIGSTOP)
    try:
        contents = (b"new", b"another", LAYER)  # of which the last is there: that is looked at
        pushes = [asyncio.create_task(fleet.blob(0, each)) for each in contents]
        while await leftovers(fleet) < known + 2:  # noqa: ASYNC110  no event tells that two are being put
            await asyncio.sleep(0)
        await fleet.servers[0].stop()
        for each in await asyncio.gather(*pushes, return_exceptions=True):
            assert isinstance(each, aiohttp.ClientError | AssertionError)
    finally:
        bucket.process.send_signal(signal.SIGCONT)


async def leftovers(fleet: Fleet) -> int:
    """How many objects are being put, or were."""
    async with await psycopg.AsyncConnection.connect(fleet.url) as connection:
        select = "SELECT count(*) FROM entrepot_records WHERE key >= %s AND key < %s"
        prefix = LEFTOVER.prefix().encode()
        row = await (await connection.execute(select, (prefix, prefix + b"\xff"))).fetchone()
        return int(row[0]) if row else 0


async def answering(fleet: Fleet, manifest: bytes) -> None:
    """Wait until both workers of a server have noticed that the database answers."""
    fresh = 0
    while fresh < 10:
        answer = await fleet.ask(1, "GET", f"{APP}/manifests/latest")
        assert (answer.status, answer.body) == (200, manifest)
        fresh = 0 if "Warning" in answer.headers else fresh + 1

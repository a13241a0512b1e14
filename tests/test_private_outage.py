"""What clients of a private registry are answered while its database is away, or its content is lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from proxy.access.records import AGAIN, RECENT, STALE, AccessRecords
from proxy.cache.copies import SMALL
from proxy.namespaces.private import DATABASE
from storage.errors import StorageFailed, StorageUnavailable
from storage.oci import Digest
from storage.records import Batch
from tests.conftest import Clock, Serve, Site
from tests.objects import FakeBucket, answer
from tests.test_access import ALICE, users  # noqa: F401
from tests.test_api_keys import TEAM, Keyed
from tests.test_bucket_server import APP, Registry, shared
from tests.test_remembered import Database
from tests.test_token_endpoint import bearer
from tests.upstream import Upstream

LAYER = b"a layer"
LARGE = bytes(SMALL + 1)  # which is filled
URL = "postgresql://entrepot@db.example/entrepot"
DAMAGED = pytest.mark.errors("blob.damaged")


class Away(Database):
    """A database that can be away."""

    remote = True
    check: Callable[[str], None]  # that of the last who has opened it

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, Clock())

    def get(self, key: str) -> bytes | None:
        if self.away:
            raise StorageUnavailable("away", retry_after=1.0)
        return super().get(key)

    def scan(self, prefix: str, after: str = "") -> Iterator[tuple[str, bytes]]:
        self.get("")
        return super().scan(prefix, after)

    def transaction(self, work: Callable[[Batch], Any], shared: bool = False) -> Any:
        self.get("")
        return super().transaction(work, shared)


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Away:
    made = Away(tmp_path / "database")

    def open(config: object, clock: object, troubles: object, check: Callable[[str], None]) -> Away:
        made.check = check
        if not made.away:
            check("one")
        return made

    monkeypatch.setattr("proxy.namespaces.private.database", open)
    return made


@pytest.fixture
async def bucket(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeBucket]:
    at_once = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=2)}
    once = {"max_retries": 1, "retry_timeout": timedelta(seconds=30), "backoff": at_once}
    monkeypatch.setattr("storage.bucket.settings._RETRY", once)
    async with FakeBucket() as fake:
        yield fake


async def pulled(registry: Registry, digest: Digest, status: int, outdated: bool = False) -> None:
    for method, headers in (("HEAD", {}), ("GET", {}), ("GET", {"Range": "bytes=1-3"})):
        found = await registry.ask(method, f"{APP}/blobs/{digest}", **headers)
        assert found.status == (206 if headers and status == 200 else status), (method, found.content_read)
        assert ("Retry-After" in found.headers) == (status == 503)
        if status == 200:
            assert ("Warning" in found.headers) == outdated


async def stop(*sites: Site) -> None:
    """Stop them, and wait until their threads have closed what they have open of the database."""
    for site in sites:
        private = site.app.composition.private
        await site.app.stop()
        assert private is not None and private._threads is not None
        private._threads.shutdown()
    await asyncio.get_running_loop().shutdown_default_executor()


@pytest.mark.parametrize("content", [LAYER, LARGE], ids=["small", "large"])
@pytest.mark.parametrize(
    ("objects", "away", "copied", "status"),
    [
        ("there", False, False, 200),
        ("there", True, False, 200),
        ("there", True, True, 200),
        # The database has confirmed that it should be there: who has it can push it again.
        pytest.param("lost", False, False, 404, marks=DAMAGED),
        ("lost", False, True, 200),
        ("lost", True, False, 503),
        ("lost", True, True, 200),
        pytest.param("ill", False, False, 503, marks=pytest.mark.errors("bucket.failed")),
        pytest.param("ill", True, False, 503, marks=pytest.mark.errors("bucket.failed")),
        ("ill", True, True, 200),
    ],
)
async def test_a_blob_of_a_bucket(
    serve: Serve,
    upstream: Upstream,
    database: Away,
    bucket: FakeBucket,
    content: bytes,
    objects: str,
    away: bool,
    copied: bool,
    status: int,
) -> None:
    top = {"shared": {**shared(bucket), "records": URL}}
    registry = Registry(await serve(upstream, top=top, more={"local": {"store": {}}}), bucket)
    digest = await registry.push(content)
    await pulled(registry, digest, 200)
    await registry.filled()
    await registry.site.app.composition.copies.settled()
    if not copied:
        await registry.evict()
    if objects == "lost":
        bucket.objects.clear()
    bucket.down = answer(503, "SlowDown") if objects == "ill" else None
    database.away = away
    await pulled(registry, digest, status, outdated=away)
    if away:
        await pulled(registry, Digest.of(b"never pulled"), 503)
    database.away = False
    await stop(registry.site)


@pytest.mark.parametrize(
    ("away", "status"), [pytest.param(False, 404, marks=DAMAGED), (True, 503)], ids=["well", "away"]
)
async def test_a_blob_that_clients_fetch_from_the_bucket(
    serve: Serve, upstream: Upstream, database: Away, bucket: FakeBucket, away: bool, status: int
) -> None:
    settings = {**shared(bucket), "records": URL}
    top = {"shared": settings, "redirect": {"above": "1MiB", "endpoint": settings["endpoint"]}}
    registry = Registry(await serve(upstream, top=top, more={"local": {"store": {}}}), bucket)
    path = f"{APP}/blobs/{await registry.push(LARGE)}"
    assert (await registry.ask("GET", path)).status == 307
    bucket.objects.clear()
    database.away = away
    assert (await registry.ask("GET", path)).status == status
    database.away = False
    await stop(registry.site)


@pytest.mark.parametrize(("away", "status"), [(False, 404), (True, 503)], ids=["well", "away"])
async def test_a_blob_of_a_directory_that_servers_share(
    serve: Serve, upstream: Upstream, database: Away, bucket: FakeBucket, away: bool, status: int
) -> None:
    site = await serve(upstream, top={"shared": {"records": URL}}, more={"local": {"store": {}}})
    registry = Registry(site, bucket)
    digest = await registry.push(LAYER)
    await pulled(registry, digest, 200)
    (file,) = (site.directory / "private" / "blobs").glob("*/*/*")
    database.away = away
    await pulled(registry, digest, 200, outdated=away)
    file.unlink()
    await pulled(registry, digest, status)
    database.away = False
    await stop(registry.site)


async def test_what_is_remembered_is_of_the_database_of_the_directory(
    serve: Serve, upstream: Upstream, database: Away, bucket: FakeBucket
) -> None:
    async def start() -> Registry:
        top = {"shared": {**shared(bucket), "records": URL}}
        return Registry(await serve(upstream, top=top, more={"local": {"store": {}}}), bucket)

    first = await start()
    digest = await first.push(LAYER)
    await pulled(first, digest, 200)
    database.away = True
    again = await start()  # while the database is away
    await pulled(again, digest, 200, outdated=True)
    with pytest.raises(StorageFailed, match="belongs to another database"):
        database.check("another")
    await pulled(again, digest, 503)
    database.away = False
    await pulled(again, digest, 200)
    database.away = True
    await pulled(again, digest, 200, outdated=True)
    (again.site.directory / "private" / DATABASE).unlink()
    last = await start()  # nobody knows which database is that of this directory
    await pulled(last, digest, 503)
    database.away = False
    await stop(first.site, again.site, last.site)


async def test_a_token_of_a_locked_key_stays_locked(
    serve: Serve, upstream: Upstream, tmp_path: Path, database: Away, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = Clock()
    monkeypatch.setattr("proxy.access.records.AccessRecords", partial(AccessRecords, clock=seconds))
    good, bad = upstream.image("a/b", "v1", [b"good"]), upstream.image("a/b", "v2", [b"bad"])
    lock = tmp_path / "images.lock"
    lock.write_text(f"docker.io/a/b:v1@{good.digest}\n")
    top = {"access": {"api_keys": True, "token_endpoint": {}}, "shared": {"records": URL}}
    door = Keyed(await serve(upstream, top=top, more={"local": {"store": {}}}))
    key = bearer(await door.key("edge", "--locked", str(lock)))
    token = bearer(json.loads((await door.ask("GET", "/token", key)).body)["token"])
    for away, passed, status in ((False, 0.0, 403), (True, RECENT, 403), (True, STALE, 503)):
        database.away = away
        seconds.advance(passed)
        for headers in (key, token):
            assert (await door.ask("GET", f"/v2/a/b/manifests/{bad.digest}", headers)).status == status
    database.away = False
    await stop(door.site)


async def test_what_credentials_are_answered(
    serve: Serve,
    upstream: Upstream,
    database: Away,
    users: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = Clock()
    monkeypatch.setattr("proxy.access.records.AccessRecords", partial(AccessRecords, clock=seconds))
    access = {"api_keys": True, "token_endpoint": {}, "rules": [], "htpasswd": str(users)}
    access["rules"] = [{"who": ["user:alice"], "may": ["pull"], "where": ["local/*"]}]
    shared = {"records": URL, "remember_for": "1h"}
    site = await serve(upstream, top={"shared": shared, "access": access}, more={"local": {"store": {}}})
    door = Keyed(site)
    key = await door.key("ci", "--scope", TEAM)
    assert (await door.push(bearer(key))).status == 201

    async def token(headers: dict[str, str]) -> dict[str, str]:
        said = await door.ask("GET", "/token?scope=repository:local/team/app:pull", headers)
        return bearer(json.loads(said.body)["token"])

    of_key, of_user = await token(bearer(key)), await token(ALICE)

    async def answers(*given: dict[str, str]) -> list[int]:
        return [(await door.act("pull", each)).status for each in given]

    assert await answers(bearer(key), of_key, of_user, ALICE) == [200] * 4
    later = bearer(await door.key("later", "--scope", TEAM))  # of which the server has not learned
    database.away = True
    seconds.advance(RECENT)
    assert await answers(later) == [503]
    for passed, keys, tokens in ((AGAIN, 200, 200), (STALE, 503, 200), (3600.0, 503, 503)):
        seconds.now = Clock().now + passed
        assert await answers(bearer(key), of_key, of_user, ALICE) == [keys, keys, tokens, 200], passed
    database.away = False
    assert await answers(bearer(key), of_key, of_user, ALICE) == [200] * 4  # at once
    await door.run("revoke", "ci")
    seconds.advance(RECENT)
    assert await answers(bearer(key), of_key, of_user, ALICE) == [401, 401, 200, 200]
    await stop(site)

"""Collection in a running server: over HTTP, by schedule, by command; what it tells, what clients notice."""

from __future__ import annotations

import asyncio
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from structlog.testing import LogCapture

from proxy.cli.main import main
from proxy.server import housekeeping
from storage.disk.blobs import BlobFiles
from storage.disk.reaper import Reaper
from storage.oci import OCI_INDEX, Digest, Tag
from tests.conftest import Clock, Serve, Site
from tests.events import Ear
from tests.test_admin import conforms
from tests.test_push import APP, Client, image, index
from tests.upstream import Upstream

pytestmark = pytest.mark.housekeeping

DAY = 86400.0
NAME = "local/team/app"
RULES = {"keep_untagged_for": "30d", "keep_tags": [{"match": "ci-*", "last": 1}], "immutable_tags": ["ci-0"]}


@pytest.fixture
async def client(request: pytest.FixtureRequest, serve: Serve, upstream: Upstream, tmp_path: Path) -> Client:
    """Its parameter is `collect_every`."""
    every = getattr(request, "param", "off")
    top = {"disk": {"path": str(tmp_path / "disk"), "min_free": 0, "scrub": "off", "collect_every": every}}
    return Client(await serve(upstream, top=top, more={"local": {"store": RULES}}))


async def admin(client: Client, method: str, body: object = None) -> Any:
    """An answer of the API, which is as its document says."""
    url = client.site.app.admin_url
    assert url is not None
    path = "/api/v1/collect"
    async with client.site.session.request(method, url.with_path(path), json=body) as response:
        found = await response.json()
        conforms(method, path, response.status, found)
        return found


async def pushed(client: Client, tag: str, *contents: bytes) -> Digest:
    content = image(*[await client.blob(each) for each in contents], config=await client.blob(b"{}"))
    assert (await client.manifest(tag, content)).status == 201
    return Digest.of(content)


def files(client: Client) -> set[str]:
    return {f"sha256:{path.name}" for path in (client.site.directory / "private/blobs").glob("*/*/*")}


async def test_what_the_rules_let_go_of_goes_by_the_api(
    client: Client, clock: Clock, events: LogCapture
) -> None:
    for number in range(4):
        clock.advance(60)
        await pushed(client, f"ci-{number}", b"shared", b"of %d" % number)
    assert await admin(client, "GET") | {"seconds": 0} == {
        "begun": 0,
        "seconds": 0,
        "dry_run": False,
        "repositories": 0,
        "tags": 0,
        "manifests": 0,
        "links": 0,
        "blobs": 0,
        "bytes": 0,
        "young": 0,
        "refused": "",
        "rows": [],
    }
    clock.advance(2 * DAY)
    dry = await admin(client, "POST", {"dry_run": True})
    assert len(files(client)) == 6
    found = await admin(client, "POST", {})
    # ci-0 is immutable, ci-3 the last.
    assert [found[name] for name in ("tags", "manifests", "links", "blobs", "bytes")] == [2, 2, 2, 2, 8]
    assert {**dry, "dry_run": False, "seconds": 0} == {**found, "seconds": 0}
    row = {
        "repository": NAME,
        "tags": 2,
        "manifests": 2,
        "links": 2,
        "young": 0,
        "refused": "",
        "replica": None,
    }
    (reported,) = found["rows"]
    expired = reported.pop("expired")
    assert reported == row
    assert [(each["tag"], each["reason"]) for each in expired] == [
        ("ci-1", "not one of the last 1 pushed"),
        ("ci-2", "not one of the last 1 pushed"),
    ]
    assert [clock.now - each["pushed_at"] for each in expired] == [2 * DAY + 120, 2 * DAY + 60]
    reported["expired"] = expired
    assert await admin(client, "GET") == found
    assert files(client) == {Digest.of(each) for each in (b"{}", b"shared", b"of 0", b"of 3")}
    (event,) = [each for each in events.entries if each["event"] == "collect.done"]
    assert (event["blobs"], event["bytes"], event["repositories"]) == (2, 8, 1)
    metrics = await client.site.metrics()
    assert "entrepot_collected_tags_total 2.0" in metrics
    assert "entrepot_collected_blobs_total 2.0" in metrics
    assert "entrepot_collected_bytes_total 8.0" in metrics
    (at,) = re.findall(r"^entrepot_collected_timestamp_seconds (\S+)$", metrics, re.MULTILINE)
    assert float(at) == clock.now


async def test_what_lost_its_tag_is_kept_for_its_time_from_then_on(client: Client, clock: Clock) -> None:
    digest = await pushed(client, "latest", b"old")
    clock.advance(99 * DAY)
    await pushed(client, "latest", b"new")
    clock.advance(29 * DAY)
    assert (await admin(client, "POST", {}))["manifests"] == 0
    assert (await client.ask("GET", f"{APP}/manifests/{digest}")).status == 200  # used: its time begins anew
    clock.advance(29 * DAY)
    assert (await admin(client, "POST", {}))["manifests"] == 0
    clock.advance(2 * DAY)
    assert (await admin(client, "POST", {}))["manifests"] == 1
    assert (await client.ask("GET", f"{APP}/manifests/{digest}")).status == 404


async def test_a_deleted_tag_leaves_its_manifest_for_its_time(client: Client, clock: Clock) -> None:
    digest = await pushed(client, "v1", b"layer")
    clock.advance(99 * DAY)
    assert (await client.ask("DELETE", f"{APP}/manifests/v1")).status == 202
    clock.advance(29 * DAY)
    assert (await admin(client, "POST", {}))["manifests"] == 0
    assert (await client.ask("DELETE", f"{APP}/manifests/{digest}")).status == 202
    store = client.site.app.composition.private
    assert store is not None
    assert list(store.records.keys("lease ")) == []
    assert (await admin(client, "POST", {}))["blobs"] == 2


@pytest.mark.parametrize("method", ["HEAD", "GET"])
async def test_what_a_client_was_told_is_here_is_here_when_it_pushes(
    client: Client, clock: Clock, method: str
) -> None:
    """It asked for all that it needs, and sends what is not here, as docker does; then all is collected."""
    layer, config = await client.blob(b"layer"), await client.blob(b"{}")
    child = image(layer, config=config)
    assert (await client.manifest(Digest.of(child), child)).status == 201
    clock.advance(1.4 * DAY)
    for path in (f"blobs/{layer}", f"blobs/{config}", f"manifests/{Digest.of(child)}"):
        assert (await client.ask(method, f"{APP}/{path}")).status == 200
    clock.advance(0.9 * DAY)
    assert (await admin(client, "POST", {}))["manifests"] == 0
    assert (await client.manifest("multi", index(child), OCI_INDEX)).status == 201
    assert (await client.manifest("v1", image(layer, config=config, annotations={"a": "b"}))).status == 201


@pytest.mark.parametrize("client", ["1d"], indirect=True)
async def test_it_is_done_when_it_is_due(client: Client, clock: Clock) -> None:
    await client.site.app.housekeeper._collect()
    begun = (await admin(client, "GET"))["begun"]
    assert begun == clock.now
    unnamed = await client.blob(b"unnamed")
    clock.advance(DAY - 1)
    await client.site.app.housekeeper._collect()
    assert (await admin(client, "GET"))["begun"] == begun
    clock.advance(DAY)
    await client.site.app.housekeeper._collect()
    assert (await admin(client, "GET"))["blobs"] == 1
    assert unnamed not in files(client)


async def test_the_keeper_does_it_by_itself(
    serve: Serve, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(housekeeping, "SETTLED", 0.0)
    ear = Ear()
    await serve(upstream, more={"local": {"store": {}}})
    assert (await ear.heard("collect.done"))["repositories"] == 0


async def reaped(site: Site, files: BlobFiles) -> int:
    """How many files the next round of the housekeeper removes from the directory."""
    done = asyncio.get_running_loop().create_future()
    real, files.reap = files.reap, lambda age: told(real(age))  # type: ignore[method-assign]

    def told(count: int) -> int:
        done.get_loop().call_soon_threadsafe(done.set_result, count)
        return count

    work = asyncio.create_task(site.app.housekeeper._round())
    try:
        return int(await done)
    finally:
        files.reap = real  # type: ignore[method-assign]
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)


async def test_the_keeper_reaps_abandoned_uploads(client: Client, clock: Clock) -> None:
    location = await client.started()
    assert (await client.ask("PATCH", location, b"begun")).status == 202
    (partial,) = (client.site.directory / "private" / "partial").iterdir()
    private = client.site.app.composition.private
    assert private is not None
    wall, ticks = Clock(time.time()), Clock(7.0)
    private.files._reaper = Reaper(wall, ticks)
    assert await reaped(client.site, private.files) == 0
    wall.advance(DAY + 1)  # a jump
    assert await reaped(client.site, private.files) == 0
    assert (await client.ask("PATCH", location, b" and more")).status == 202
    assert await reaped(client.site, private.files) == 0
    ticks.advance(DAY + 1)
    assert await reaped(client.site, private.files) == 1
    assert not partial.exists()
    assert (await client.ask("GET", location)).status == 404


async def test_without_a_store_of_our_own_there_is_nothing_to_collect(
    serve: Serve, upstream: Upstream
) -> None:
    client = Client(await serve(upstream))
    assert (await admin(client, "POST", {}))["code"] == "UNSUPPORTED"
    assert (await admin(client, "GET"))["code"] == "UNSUPPORTED"


async def test_what_was_pushed_to_a_namespace_that_was_taken_out_stays(
    client: Client, serve: Serve, upstream: Upstream, clock: Clock
) -> None:
    digest = await pushed(client, "ci-1", b"one")
    await pushed(client, "ci-2", b"two")
    await client.site.app.stop()
    other = Client(
        await serve(
            upstream,
            directory=client.site.directory,
            top={"disk": {"path": str(client.site.directory), "scrub": "off", "collect_every": "off"}},
            more={"other": {"store": RULES}},
        )
    )
    clock.advance(99 * DAY)
    assert (await admin(other, "POST", {}))["tags"] == 0
    store = other.site.app.composition.private
    assert store is not None
    assert (await store.resolve_manifest(NAME, Tag("ci-1"))).digest == digest


@pytest.mark.clients
async def test_rules_by_pull_and_repository_of_a_server(
    serve: Serve, upstream: Upstream, tmp_path: Path, clock: Clock, events: LogCapture
) -> None:
    rules = [{"repositories": ["team/*"], "tags": ["ci-*"], "pulled_within": "3d"}]
    top = {"disk": {"path": str(tmp_path / "disk"), "min_free": 0, "scrub": "off", "collect_every": "off"}}
    client = Client(await serve(upstream, top=top, more={"local": {"store": {"keep_tags": rules}}}))
    for tag in ("ci-1", "ci-2", "ci-3", "v1"):
        await pushed(client, tag, tag.encode())
    for _ in range(5):
        clock.advance(DAY)
        assert (await client.ask("GET", f"{APP}/manifests/ci-1")).status == 200
        assert (await client.ask("HEAD", f"{APP}/manifests/ci-2")).status == 200
        await client.site.app.housekeeper._round()
    (row,) = (await admin(client, "POST", {}))["rows"]
    assert [(each["tag"], each["reason"]) for each in row["expired"]] == [("ci-3", "not pulled within 3d")]
    (event,) = [each for each in events.entries if each["event"] == "tag.expired"]
    assert (event["repository"], event["tag"], event["reason"]) == (NAME, "ci-3", "not pulled within 3d")
    assert (await client.ask("DELETE", f"{APP}/manifests/ci-1")).status == 202
    private = client.site.app.composition.private
    assert private is not None
    assert [*private.records.keys("pulled ")] == [f"pulled {NAME} ci-2"]


# What was damaged


@pytest.mark.errors("blob.damaged", "blob.missing")
async def test_the_scrub_sets_aside_what_was_pushed_and_tells_until_it_is_pushed_again(
    client: Client, events: LogCapture
) -> None:
    await pushed(client, "v1", b"layer")
    digest = Digest.of(b"layer")
    private = client.site.app.composition.private
    assert private is not None
    private.files.path(digest).write_bytes(b"LAYER")
    await client.site.app.housekeeper._scrub()
    (event,) = [each for each in events.entries if each["event"] == "blob.damaged"]
    assert (event["digest"], event["repositories"], event["action"]) == (digest, [NAME], "set aside")
    assert Path(event["path"]).read_bytes() == b"LAYER"
    assert (await client.ask("HEAD", f"{APP}/blobs/{digest}")).status == 404
    client.site.clock.advance(2 * DAY)
    await client.site.app.housekeeper._scrub()
    (event,) = [each for each in events.entries if each["event"] == "blob.missing"]
    assert (event["repository"], event["reference"]) == (NAME, digest)
    await client.blob(b"layer")
    assert (await client.ask("GET", f"{APP}/blobs/{digest}")).body == b"layer"


@pytest.mark.errors("blob.damaged")
async def test_a_truncated_blob_is_set_aside_when_it_is_asked_for(client: Client, events: LogCapture) -> None:
    digest = await client.blob(b"a layer")
    private = client.site.app.composition.private
    assert private is not None
    private.files.path(digest).write_bytes(b"a lay")
    assert (await client.ask("GET", f"{APP}/blobs/{digest}")).status == 404
    (event,) = [each for each in events.entries if each["event"] == "blob.damaged"]
    assert event["found"] == "5 of 7 bytes"
    assert Path(event["path"]).read_bytes() == b"a lay"


async def test_a_scrub_by_command_reads_what_was_pushed_as_well(client: Client) -> None:
    await pushed(client, "v1", b"layer")
    url = client.site.app.admin_url
    assert url is not None
    async with client.site.session.post(url.with_path("/api/v1/scrub"), json={}) as response:
        found = await response.json()
    while found["asked"]["running"]:
        async with client.site.session.get(url.with_path("/api/v1/scrub")) as response:
            found = await response.json()
    assert (found["asked"]["checked"], found["asked"]["damaged"], found["error"]) == (3, 0, None)


# The command


@pytest.fixture(params=["server", "directory"])
async def shop(request: pytest.FixtureRequest, client: Client, clock: Clock) -> tuple[Client, list[str]]:
    """With something to collect; and how the command gets at it.  A directory goes by the real time."""
    await pushed(client, "ci-1", b"one")
    clock.advance(60)
    await pushed(client, "ci-2", b"two")
    clock.advance(2 * DAY)
    words = ["--config", str(client.site.directory.parent / "entrepot.yml")]
    if request.param == "server":
        words += ["--server", str(client.site.app.admin_url)]
    else:
        await client.site.app.stop()
    return client, words


async def run(*words: str) -> Result:
    return await asyncio.to_thread(CliRunner().invoke, main, ["collect", *words])


async def test_collection(shop: tuple[Client, list[str]]) -> None:
    client, words = shop
    result = await run("--last", *words)
    assert (result.exit_code, result.stdout) == (0, "no collection has run yet\n")
    result = await run("--dry-run", *words)
    assert result.exit_code == 0, result.output
    assert "would be collected: 1 tag, 1 manifest, 1 link, 1 blob, 3 B; nothing was deleted" in result.stdout
    heads, row = result.stdout.splitlines()[:2]
    assert heads.split() == ["TAG", "PUSHED", "PULLED", "WHY"]
    assert row.startswith(f"{NAME}:ci-")
    assert row.endswith("not one of the last 1 pushed")
    assert Digest.of(b"one") in files(client)
    result = await run(*words)
    assert result.exit_code == 0, result.output
    heads, row, goes, looked = result.stdout.splitlines()
    assert heads.split() == ["REPOSITORY", "TAGS", "MANIFESTS", "LINKS", "TOO", "RECENT"]
    assert row.split() == [NAME, "1", "1", "1", "0"]
    assert goes.endswith(": 1 tag, 1 manifest, 1 link, 1 blob, 3 B")
    assert looked == "examined 1 repository; 0 too recent to be collected"
    assert Digest.of(b"one") not in files(client)
    found = json.loads((await run("--last", "--json", *words)).stdout)
    assert (found["tags"], found["bytes"]) == (1, 3)


@pytest.mark.errors("collect.refused")
async def test_collect_refuses_where_records_were_damaged(shop: tuple[Client, list[str]]) -> None:
    client, words = shop
    aside = client.site.directory / "private" / "records.damaged-1"
    aside.mkdir()
    result = await run(*words)
    assert result.exit_code == 1
    assert "remove that directory" in result.stderr
    assert Digest.of(b"one") in files(client)
    result = await run("--json", *words)
    assert json.loads(result.stdout)["refused"].startswith(str(aside))

"""A data directory and a configuration of the former build work unchanged."""

from __future__ import annotations

import asyncio
import json
import math
import tarfile
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from proxy.admin.local_operations import LocalOperations
from proxy.cli.target import composed
from proxy.config.loader import load
from proxy.processes.server_processes import ServerProcesses
from proxy.processes.state import state_of
from storage.keys import LINK, MANIFEST
from storage.maintenance.counting import Counting
from storage.maintenance.eviction import Eviction, EvictionRules
from storage.oci import OCI_INDEX, OCI_MANIFEST, Digest
from storage.values import Link
from tests.conftest import OPEN, Clock, Serve, Site, configuration
from tests.counted import assert_counted
from tests.events import Ear
from tests.upstream import Upstream

FORMER = Path(__file__).parent / "former"

# What was pulled, of library/alpine:3 and library/busybox:1, and what was pushed to local/team/app.
INDEX = "sha256:3b5f0ef61e5eca3d72079c066849428a2cd96e1e024e208afdd06648871eef1b"
AMD64 = "sha256:c37ed0d628769db16798c92c528ba20b90f6c47b80e3101bc0b1e5461bb51ce1"
ARM64 = "sha256:0f18068a223b76bbe72c90ece70c9ce83b4295ffc4e4c063a725fcd04450d90a"
LAYER = b"amd64 layer" * 100
OLD = "sha256:cbd35693c8aea44e4682f0d837921605525410d9c71ca46c243de7d8daef0cf8"
NEW = "sha256:27c54ec07d1a7453829dae89796904274c2e7723470667319556f81b4943036f"
APP = "sha256:b31cf28c856e22c4cb8b86e8284db41d00bee3b5ec776109489f25d178525322"
UPLOAD = "/v2/local/team/app/blobs/uploads/9_WYogMveVC8a8qi_aW-_w.f2c1d59ceba5cb2e"


@pytest.fixture
def may_count(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Is set when what is stored may be counted."""
    run, may = Counting.run, threading.Event()
    may.set()
    monkeypatch.setattr(Counting, "run", lambda counting, *given: may.wait() and run(counting, *given))
    return may


def unpack(place: Path) -> None:
    # The filter of later releases: the Python of Debian 12 has none.
    kept = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(FORMER / "disk.tar.gz") as archive:
        archive.extractall(place, **kept)


@pytest.fixture
async def site(
    serve: Serve, upstream: Upstream, tmp_path: Path, clock: Clock, may_count: threading.Event
) -> AsyncIterator[Site]:
    """A server on the former directory, whose upstream it may not ask."""
    unpack(tmp_path)
    clock.advance(2 * 86400)
    yield await serve(upstream, offline=True, more={"local": {"store": {}}})
    may_count.set()
    for each in tmp_path.glob("disk/*/partial/*"):
        each.unlink()
    assert upstream.log == []


async def test_what_was_pulled_is_served(site: Site) -> None:
    status, headers, _ = await site.get("/v2/library/alpine/manifests/3")
    assert (status, headers["Docker-Content-Digest"], headers["Content-Type"]) == (200, INDEX, OCI_INDEX)
    for digest in (AMD64, ARM64):
        status, headers, content = await site.get(f"/v2/library/alpine/manifests/{digest}")
        assert (status, Digest.of(content), headers["Content-Type"]) == (200, digest, OCI_MANIFEST)
    assert (await site.get(f"/v2/library/alpine/blobs/{Digest.of(LAYER)}"))[::2] == (200, LAYER)
    for reference, digest in (("1", NEW), (OLD, OLD), (NEW, NEW)):
        status, headers, _ = await site.get(f"/v2/library/busybox/manifests/{reference}")
        assert (status, headers["Docker-Content-Digest"]) == (200, digest)
    assert json.loads((await site.get("/v2/library/alpine/tags/list"))[2])["tags"] == ["3"]
    # A link decides who sees a blob.
    assert (await site.get(f"/v2/library/busybox/blobs/{Digest.of(LAYER)}"))[0] == 404


async def test_the_directory_says_its_format_from_now_on(site: Site) -> None:
    assert (site.directory / "format").read_text() == "1\n"


async def test_what_was_pushed_is_served(site: Site) -> None:
    status, headers, content = await site.get("/v2/local/team/app/manifests/1")
    assert (status, headers["Docker-Content-Digest"], Digest.of(content)) == (200, APP, APP)
    assert json.loads((await site.get("/v2/local/team/app/tags/list"))[2])["tags"] == ["1", "2"]
    [referrer] = json.loads((await site.get(f"/v2/local/team/app/referrers/{APP}"))[2])["manifests"]
    assert referrer["artifactType"] == "application/example"
    for layer in json.loads(content)["layers"]:
        assert (await site.get(f"/v2/local/team/app/blobs/{layer['digest']}"))[2] == b"app layer" * 80


async def test_a_manifest_is_deleted_with_its_tags(site: Site) -> None:
    """The former build kept no index of the tags by their target."""
    async with site.request("DELETE", f"/v2/local/team/app/manifests/{APP}") as response:
        assert response.status == 202
    for reference in ("1", APP):
        assert (await site.get(f"/v2/local/team/app/manifests/{reference}"))[0] == 404
    assert json.loads((await site.get("/v2/local/team/app/tags/list"))[2])["tags"] == ["2"]


async def test_an_upload_goes_on(site: Site) -> None:
    whole = b"half of a blob"
    async with site.request("GET", UPLOAD) as response:
        assert (response.status, response.headers["Range"]) == (204, "0-7")
    async with site.request("PUT", f"{UPLOAD}?digest={Digest.of(whole)}", data=whole[8:]) as response:
        assert response.status == 201
    assert (await site.get(f"/v2/local/team/app/blobs/{Digest.of(whole)}"))[2] == whole


async def told(site: Site, path: str, **parameters: str) -> Any:
    assert site.app.admin_url is not None
    async with site.session.get(site.app.admin_url / "api/v1" / path, params=parameters) as response:
        assert response.status == 200
        return await response.json()


async def listed(site: Site, match: str) -> list[tuple[object, ...]]:
    keys = ("repository", "tags", "manifests", "bytes")
    found = (await told(site, "repositories", match=match))["repositories"]
    return [tuple(each[key] for key in keys) for each in found]


@pytest.fixture
def uncounted(may_count: threading.Event) -> threading.Event:
    """What is stored is counted only when this is set."""
    may_count.clear()
    return may_count


@pytest.mark.housekeeping
async def test_what_an_operator_sees_of_it(uncounted: threading.Event, site: Site, tmp_path: Path) -> None:
    names = ["docker.io/library/alpine", "docker.io/library/busybox", "local/team/app"]
    assert await listed(site, "*") == [(name, None, None, None) for name in names]
    files = sum(each.stat().st_size for each in tmp_path.glob("disk/cache/blobs/*/*/*"))
    assert (await told(site, "stats"))["stored_bytes"] == files > 0
    ear = Ear()
    uncounted.set()
    for store in ("cache", "private"):
        await ear.heard("totals.counted", store=store)
    found = await listed(site, "**")  # which was not answered yet
    assert [each[:3] for each in found] == [(names[0], 1, 3), (names[1], 1, 2), (names[2], 2, 4)]
    links = sum(
        link.size
        for _, record in site.app.composition.store.records.scan(LINK.prefix(names[0]))
        if (link := Link.parse(record))
    )
    manifests = sum(
        len(record.partition(b"\n")[2])
        for _, record in site.app.composition.store.records.scan(MANIFEST.prefix(names[0]))
    )
    assert found[0][3] == links + manifests
    assert (await told(site, "stats", period="1d"))["stored_bytes"] == files
    assert_counted(site.app.composition.store)


async def test_room_is_made_while_it_is_being_counted(uncounted: threading.Event, site: Site) -> None:
    """An expiry waits for the totals, and holds up nobody."""
    keeper = site.app.housekeeper
    expiring = asyncio.create_task(keeper.expire())
    await asyncio.sleep(0)
    await keeper.make_room(0)
    rules = EvictionRules(keep_for=lambda repository: math.inf)  # here nothing is kept for being offline
    Eviction(site.app.composition.store, rules).shrink(to=1000)
    assert sum(each.stat().st_size for each in (site.directory / "cache").glob("blobs/*/*/*")) <= 1000
    assert not expiring.done()
    uncounted.set()
    await expiring


async def test_a_command_without_a_server_counts_itself(tmp_path: Path, clock: Clock) -> None:
    unpack(tmp_path)
    tree = {
        "disk": {"path": str(tmp_path / "disk")},
        "namespaces": {"docker.io": {"upstream": "http://127.0.0.1:9"}, "local": {"store": {}}},
        "access": OPEN,
    }
    async with composed(configuration(tmp_path, tree)) as composition:
        operations = LocalOperations(composition, ServerProcesses(state_of(composition), None))
        rows = (await operations.repositories()).repositories
        assert [(each.tags, each.manifests) for each in rows] == [(1, 3), (1, 2), (2, 4)]
        await operations.close()
    for each in tmp_path.glob("disk/*/partial/*"):
        each.unlink()


def test_the_configuration_is_read() -> None:
    names = ("HUB_TOKEN", "ADMIN_TOKEN", "DEPLOY_TOKEN", "DEPLOY_SECRET")
    config = load(FORMER / "entrepot.yml", dict.fromkeys(names, "secret"))
    assert str(config.disk.path) == "/var/lib/entrepot"
    assert (config.default_namespace, len(config.namespaces), len(config.pins)) == ("docker.io", 11, 2)
    hub = config.namespaces["docker.io"]
    assert (hub.keep_for, hub.fresh_for, hub.aliases[0]) == (30 * 86400.0, 600.0, "hub")
    assert list(config.hosted()) == ["local"]

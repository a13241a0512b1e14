"""The rules of deploy/prometheus: each alert fires when a server does what it is about, and has a runbook."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml

from proxy.telemetry.metrics import Metrics
from proxy.upstream.transport import RETRIES
from storage.concurrency import Cancelled
from storage.oci import OCI_MANIFEST, Digest
from tests import fleet
from tests.authority import Authority
from tests.conftest import OPEN, Clock, Site
from tests.prometheus import SCRAPED, PrometheusServer, promtool
from tests.relay import Relay
from tests.upstream import Basic, Bearer, Hold, Status, Upstream

ROOT = Path(__file__).parent.parent
RULES = ROOT / "deploy" / "prometheus"
DAY = 86400.0
CONFIG = b"{}"
LAYERS = [b"layer %d" % number for number in range(40)]


def alerts() -> dict[str, dict[str, Any]]:
    [group] = yaml.safe_load((RULES / "alerts.yml").read_text())["groups"]
    return {each["alert"]: each for each in group["rules"]}


@pytest.mark.clients
def test_promtool_accepts_the_rules_and_the_configuration() -> None:
    said = promtool("check", "config", str(RULES / "prometheus.yml"))
    assert said == "" or "SUCCESS" in said
    assert "FAILED" not in said


@pytest.mark.parametrize("name", alerts())
def test_an_alert_says_what_it_means_and_what_to_do(name: str) -> None:
    rule = alerts()[name]
    assert rule["annotations"]["runbook"] == f"docs/operations.md#{name.lower()}"
    text = (ROOT / "docs" / "operations.md").read_text()
    assert len(re.findall(rf"^#### {name}$", text, re.MULTILINE)) == 1
    runbook = re.split(r"^#+ ", text.partition(f"#### {name}\n")[2], flags=re.MULTILINE)[0]
    assert len(runbook.strip().split("\n\n")) >= 2, (
        "it has a paragraph of what it means, and one of what to do"
    )
    assert rule["labels"]["severity"] in ("warning", "critical")


def test_there_is_no_runbook_without_an_alert() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    assert re.findall(r"^#### (Entrepot\w+)$", text, re.MULTILINE) == list(alerts())


def test_rules_name_only_metrics_that_exist() -> None:
    made = set(re.findall(r"entrepot_[a-z_]+", (ROOT / "proxy/telemetry/metrics.py").read_text()))
    for path in (RULES / "alerts.yml", RULES / "recording.yml"):
        used = re.findall(r"entrepot_[a-z_]+", path.read_text())
        assert {each.removesuffix("_bucket") for each in used} <= made


# Firing


@dataclass
class World:
    """Servers that Prometheus scrapes.

    well: everything works there, at first; a replica of `other`
    ill: a server that nothing is right with
    strange: an upstream of `well` that behaves as a test says
    """

    well: Site
    other: fleet.Replica
    ill: Site
    strange: Upstream
    scraped: asyncio.Event
    monkeypatch: pytest.MonkeyPatch

    async def scrape(self) -> None:
        """Wait until Prometheus has seen what was counted so far: a rate needs what was before."""
        for _ in range(4):  # of two servers, and the one under way may have begun before
            self.scraped.clear()
            await self.scraped.wait()

    async def push(self, site: Site, layer: bytes) -> Digest:
        for blob in (CONFIG, layer):
            path = f"/v2/local/app/blobs/uploads/?digest={Digest.of(blob)}"
            async with site.request("POST", path, data=blob) as response:
                assert response.status == 201
        described = [
            {"mediaType": "application/octet-stream", "digest": Digest.of(each), "size": len(each)}
            for each in (CONFIG, layer)
        ]
        manifest = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": described[0],
            "layers": described[1:],
        }
        headers = {"Content-Type": OCI_MANIFEST}
        path = "/v2/local/app/manifests/1"
        async with site.request("PUT", path, data=json.dumps(manifest), headers=headers) as response:
            assert response.status == 201
        return Digest.of(layer)

    async def pull(self, namespace: str, tag: str = "1") -> int:
        status, _, _ = await self.well.get(f"/v2/library/app/manifests/{tag}?ns={namespace}")
        return status


@pytest.fixture
async def world(tmp_path: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    scraped, exposition = asyncio.Event(), Metrics.exposition

    def watched(metrics: Metrics, accept: str = "") -> tuple[bytes, str]:
        scraped.set()
        return exposition(metrics, accept)

    monkeypatch.setattr(Metrics, "exposition", watched)
    now = Clock(time.time())
    ports = fleet.free_ports(4)
    urls = [f"http://127.0.0.1:{port}" for port in ports[:2]]
    nowhere = f"http://127.0.0.1:{ports[2]}"
    cached = {"upstream": {"url": upstream.url}}
    upstream.image("library/app", "1", LAYERS)
    async with AsyncExitStack() as stack:
        strange = await stack.enter_async_context(Upstream())
        strange.image("library/app", "1", [b"layer"])
        closed = await stack.enter_async_context(
            Upstream(auth=Bearer(credentials=Basic("robot", "right"), anonymous=False))
        )
        tree = {
            "access": OPEN,
            "webhooks": [
                {"name": "hook", "url": nowhere, "backoff": "100ms", "backoff_limit": "100ms", "keep": "1h"}
            ],
            "namespaces": {
                "docker.io": cached,
                "down.example": {"upstream": {"url": nowhere}},
                "strange.example": {"upstream": {"url": strange.url}},
                "closed.example": {"upstream": {"url": closed.url, "username": "robot", "password": "wrong"}},
                "local": {"store": {}},
            },
        }
        replicas = []
        for at, more in enumerate((tree, {"namespaces": {"docker.io": cached}})):
            peers = {"urls": urls, "secret": fleet.SECRET, "self": urls[at]}
            keys = {"listen": f"127.0.0.1:{ports[at]}", "peers": peers, **more}
            replicas.append(await fleet.start(tmp_path / str(at), now, keys))
            stack.push_async_callback(replicas[-1].stop)
        ill = await _ill(stack, tmp_path / "ill", upstream)
        yield World(replicas[0], replicas[1], ill, strange, scraped, monkeypatch)


async def _ill(stack: AsyncExitStack, directory: Path, upstream: Upstream) -> fleet.Replica:
    directory.mkdir()
    own, theirs = Authority(directory), trustme.CA()
    theirs.cert_pem.write_to_path(str(directory / "theirs.pem"))
    context, soon = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), time.time() + 5 * DAY
    theirs.issue_cert("localhost", not_after=datetime.fromtimestamp(soon, UTC)).configure_cert(context)
    relay = await stack.enter_async_context(Relay(int(upstream.url.rpartition(":")[2]), context))
    url = {"url": f"https://localhost:{relay.port}", "ca_file": str(directory / "theirs.pem")}
    tree = {
        "listen": "127.0.0.1:0",
        "access": OPEN,
        "tls": own.issue("server", expires=soon),
        "disk": {"path": str(directory / "disk"), "min_free": "99%"},
        "namespaces": {"docker.io": {"upstream": url}, "local": {"store": {}}},
    }
    site = await fleet.start(directory, Clock(time.time() - 4 * DAY), tree)
    stack.push_async_callback(site.stop)
    return site


# What causes an alert


async def errors_of_an_upstream(world: World) -> None:
    for tags in ("a", "bcd"):
        for tag in tags:
            world.strange.next("GET", tag, Status(500), times=1 + RETRIES)
            assert await world.pull("strange.example", tag) >= 500
        await world.scrape()


async def a_slow_upstream(world: World) -> None:
    gate = asyncio.Event()
    world.strange.image("library/app", "slow", [b"layer"])
    world.strange.next("GET", "slow", Hold(gate, after=None))
    asyncio.get_running_loop().call_later(1.2, gate.set)
    assert await world.pull("strange.example", "slow") == 200


async def an_upstream_that_is_down(world: World) -> None:
    assert await world.pull("down.example") >= 500
    await world.scrape()
    assert await world.pull("down.example") >= 500


async def a_rate_limit_that_is_near(world: World) -> None:
    world.strange.ratelimit = (100, 21600, 6)
    assert await world.pull("strange.example") == 200


async def refused_credentials(world: World) -> None:
    assert await world.pull("closed.example") >= 400


async def damaged_content(world: World) -> None:
    digest = await world.push(world.well, b"a pushed layer")
    private = world.well.app.composition.private
    assert private is not None
    path = private.files.path(digest)
    path.chmod(0o600)
    path.write_bytes(b"another layer!")
    await world.well.app.composition.maintenance.scrubs[1].run()


async def a_collection_that_is_refused(world: World) -> None:
    (world.well.directory / "private" / "records.damaged-1").mkdir()
    collection = world.well.app.composition.maintenance.collection
    assert collection is not None
    assert (await asyncio.to_thread(collection.run)).refused


async def an_old_collection(world: World) -> None:
    collection = world.ill.app.composition.maintenance.collection
    assert collection is not None
    await asyncio.to_thread(collection.run)


async def a_task_that_fails(world: World) -> None:
    keeper = world.well.app.housekeeper
    ends = iter([RuntimeError("meant")] * 3 + [Cancelled()])

    async def fail(freshener: object) -> None:
        raise next(ends)

    world.monkeypatch.setattr(type(world.well.app.composition.maintenance.freshener), "run_once", fail)
    await keeper._repeat(keeper._refresh, 0)


async def events_that_are_lost(world: World) -> None:
    assert await world.push(world.well, b"of which nobody hears")
    world.well.clock.advance(3601)


async def a_disk_that_is_full(world: World) -> None:
    await world.ill.app.housekeeper.make_room(0)


async def a_disk_that_fails(world: World) -> None:
    partial = world.ill.directory / "cache" / "partial"
    partial.rmdir()
    partial.touch()  # even root cannot write below a file


async def certificates_that_expire(world: World) -> None:
    assert (await world.ill.get("/v2/library/app/manifests/1"))[0] == 200


async def a_replica_that_is_down(world: World) -> None:
    await world.other.stop()
    for layers in (LAYERS[:20], LAYERS[20:]):  # of both, it owned some
        for layer in layers:
            status, _, _ = await world.well.get(f"/v2/library/app/blobs/{Digest.of(layer)}")
            assert status == 200
        await world.scrape()


CAUSES: dict[Callable[[World], Awaitable[None]], set[str]] = {
    errors_of_an_upstream: {"EntrepotUpstreamErrors", "EntrepotErrorRatio"},
    a_slow_upstream: {"EntrepotUpstreamSlow"},
    an_upstream_that_is_down: {"EntrepotUpstreamDown"},
    a_rate_limit_that_is_near: {"EntrepotRateLimitNear"},
    refused_credentials: {"EntrepotCredentialsRefused"},
    damaged_content: {"EntrepotScrubFoundDamage", "EntrepotWebhookStuck"},
    a_collection_that_is_refused: {"EntrepotCollectionRefused"},
    an_old_collection: {"EntrepotCollectionOverdue"},
    a_task_that_fails: {"EntrepotHousekeepingFailing"},
    certificates_that_expire: {"EntrepotCertificateExpires", "EntrepotUpstreamCertificateExpires"},
    a_disk_that_is_full: {"EntrepotDiskLow", "EntrepotEvictionShort"},
    a_disk_that_fails: {"EntrepotDegraded"},
    a_replica_that_is_down: {"EntrepotReplicaMissing", "EntrepotDown"},
}
AFTER = {events_that_are_lost: {"EntrepotWebhookLost"}}  # when others have fired


@pytest.mark.clients
@pytest.mark.errors(
    "blob.damaged", "collect.refused", "keeper.failed", "disk.failed", "webhook.dropped", "request.failed"
)
@pytest.mark.housekeeping
async def test_every_alert_fires_when_a_server_does_it(world: World, tmp_path: Path) -> None:
    sites = (world.well, world.other, world.ill)
    targets = [f"127.0.0.1:{each.app.admin_url.port}" for each in sites if each.app.admin_url is not None]
    rules = [RULES / "alerts.yml", RULES / "recording.yml"]
    async with PrometheusServer(tmp_path, targets, rules) as prometheus:
        assert await prometheus.wait_for(SCRAPED) == set()
        await world.scrape()
        # The disk of this machine may be full indeed, and the machine too slow to answer in time.
        early = {
            name: each
            for name, each in prometheus.fired.items()
            if name not in (SCRAPED, "EntrepotDiskLow", "EntrepotDown")
        }
        assert {each["instance"] for found in early.values() for each in found} <= {targets[2]}, early
        silent: set[str] = set()
        for causes in (CAUSES, AFTER):
            for cause in causes:
                await cause(world)
            silent |= await prometheus.wait_for(*set().union(*causes.values()))
    assert silent == set()
    assert set().union(*CAUSES.values(), *AFTER.values()) == set(alerts()), "an alert without a cause here"

"""The metrics: their names and formats, and that each counts what it says."""

from __future__ import annotations

import asyncio
import math
import ssl
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

import aiohttp
import pytest
import trustme
from prometheus_client import Counter, Gauge, Histogram, Summary
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics

from proxy.server import observation
from proxy.telemetry.durations import BUCKETS
from proxy.telemetry.exchange import Exchange
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.request_counts import RequestCounts
from proxy.upstream.errors import result_of
from proxy.upstream.transport import RETRIES
from storage.concurrency import Cancelled
from storage.errors import StorageFailed
from storage.maintenance.collection import CollectionReport
from storage.oci import Digest
from storage.shared import SharedState
from tests.authority import Authority
from tests.conftest import Clock, Serve, Site
from tests.processes import Place, place
from tests.prometheus import Samples, promtool, samples
from tests.relay import Relay
from tests.upstream import Hold, RetryAfter, Status, Upstream, digest_of
from tests.wire import connect

__all__ = ["place"]  # a fixture

ALPINE = "/v2/library/alpine"
LAYER = b"a layer" * 1000
OPEN = "application/openmetrics-text; version=1.0.0"
DAY = 86400.0


async def shown(site: Site) -> Samples:
    return samples(await site.metrics())


def everything() -> Metrics:
    """Each metric with a sample."""
    metrics = Metrics()
    metrics.exposition()  # each is made when it is used
    for each in vars(metrics).values():
        if isinstance(each, Counter | Gauge | Histogram | Summary):
            child = each.labels(*["x"] * len(each._labelnames)) if each._labelnames else each
            match child:
                case Counter():
                    child.inc()
                case Gauge():
                    child.set(1)
                case Histogram() | Summary():
                    child.observe(1)
    return metrics


# Names and formats


@pytest.mark.clients
def test_names_and_help_follow_the_conventions_of_prometheus() -> None:
    text, _ = everything().exposition()
    assert promtool("check", "metrics", standard_input=text.decode()) == ""
    broken = "# TYPE entrepot_misnamed counter\nentrepot_misnamed 1\n"
    assert "_total" in promtool("check", "metrics", standard_input=broken)


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("", "text/plain; version=0.0.4"),
        ("*/*", "text/plain; version=0.0.4"),
        (OPEN, "application/openmetrics-text; version=1.0.0"),
        (f"{OPEN},application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
         "application/openmetrics-text; version=1.0.0"),
    ],
)  # fmt: skip
async def test_the_format_is_the_one_that_is_asked_for(
    serve: Serve, upstream: Upstream, accept: str, media_type: str
) -> None:
    site = await serve(upstream)
    assert site.app.admin_url is not None
    async with site.session.get(site.app.admin_url / "metrics", headers={"Accept": accept}) as response:
        text = await response.text()
        assert response.headers["Content-Type"].startswith(media_type)
        assert response.headers["Vary"] == "Accept"
    assert text.endswith("# EOF\n") == ("openmetrics" in media_type)


def test_both_formats_have_the_same_samples() -> None:
    metrics = everything()
    plain, _ = metrics.exposition()
    other, _ = metrics.exposition(OPEN)
    found = {
        (each.name, *sorted(each.labels.items())): each.value
        for family in open_metrics(other.decode())
        for each in family.samples
    }
    assert len(found) == len(samples(plain.decode())) > 100


# Requests


async def test_requests_are_timed_by_kind_and_result(serve: Serve, upstream: Upstream) -> None:
    image = upstream.image("library/alpine", "3", [LAYER])
    site = await serve(upstream)
    for _ in range(3):
        assert (await site.get(f"{ALPINE}/manifests/3"))[0] == 200
    assert (await site.get(f"{ALPINE}/blobs/{digest_of(b'absent')}"))[0] == 404
    assert (await site.get("/v2/"))[0] == 200
    found = await shown(site)
    for name in ("entrepot_request_duration_seconds", "entrepot_time_to_first_byte_seconds"):
        counted = {
            (kind, result): found[f'{name}_count{{kind="{kind}",result="{result}"}}']
            for kind, result in (
                ("manifest", "miss"),
                ("manifest", "hit"),
                ("blob", "error"),
                ("base", "none"),
            )
        }
        assert counted == {
            ("manifest", "miss"): 1, ("manifest", "hit"): 2, ("blob", "error"): 1, ("base", "none"): 1
        }  # fmt: skip
        assert found[f'{name}_bucket{{kind="manifest",le="+Inf",result="hit"}}'] == 2
        assert 0 < found[f'{name}_sum{{kind="manifest",result="miss"}}'] < 60
    assert found['entrepot_responses_total{kind="manifest",status="200"}'] == 3
    assert found['entrepot_responses_total{kind="blob",status="404"}'] == 1
    assert image.digest not in str(found)  # no label names content
    assert "library/alpine" not in str(found)


async def test_the_first_byte_comes_before_the_last(serve: Serve, upstream: Upstream) -> None:
    image = upstream.image("library/alpine", "3", [LAYER])
    gate = asyncio.Event()
    upstream.next("GET", image.layers[0], Hold(gate, after=100))
    site = await serve(upstream)
    async with site.request("GET", f"{ALPINE}/blobs/{image.layers[0]}") as response:
        asyncio.get_running_loop().call_later(0.05, gate.set)
        assert await response.read() == LAYER
    await site.app.composition.fills.ended(Digest(image.layers[0]))
    found = await shown(site)
    labels = '{kind="blob",result="miss"}'
    first = found[f"entrepot_time_to_first_byte_seconds_sum{labels}"]
    assert first + 0.04 < found[f"entrepot_request_duration_seconds_sum{labels}"]


def counts() -> tuple[Metrics, RequestCounts]:
    metrics = Metrics()
    return metrics, RequestCounts(metrics)


@pytest.mark.parametrize(
    ("seconds", "bound"),
    [(0.0, "0.001"), (0.001, "0.001"), (0.0011, "0.0025"), (1.0, "1.0"), (299.0, "300.0"), (301.0, "+Inf")],
)
async def test_a_duration_is_in_all_buckets_that_are_not_shorter(seconds: float, bound: str) -> None:
    metrics, counted = counts()
    counted.add(Exchange(kind="blob", result="hit"), 200, seconds)
    found = samples(metrics.exposition()[0].decode())
    buckets = {
        each: found[f'entrepot_request_duration_seconds_bucket{{kind="blob",le="{each}",result="hit"}}']
        for each in [*map(str, BUCKETS), "+Inf"]
    }
    assert buckets == {each: float(float(each) >= float(bound)) for each in buckets}
    assert found['entrepot_request_duration_seconds_sum{kind="blob",result="hit"}'] == seconds


async def test_many_requests_are_counted_as_each_would_be() -> None:
    together, counted = counts()
    apart = Metrics()
    times = [0.0004 * 2 ** (number % 22) for number in range(300)]
    for each in times:
        counted.add(Exchange(kind="blob", result="hit", bytes=3), 200, each, each / 2)
        apart.seconds.labels("blob", "hit").observe(each)
    found, expected = (samples(each.exposition()[0].decode()) for each in (together, apart))
    for name, value in expected.items():
        if name.startswith("entrepot_request_duration"):
            assert math.isclose(found[name], value), name
    assert found['entrepot_sent_bytes_total{namespace="-"}'] == 900
    assert together.exposition() == together.exposition()  # nothing is counted twice


async def test_what_is_counted_goes_to_the_metrics_without_being_asked_for() -> None:
    metrics, counted = counts()
    counted.add(Exchange(kind="blob", result="hit"), 200, 0.1)
    assert counted._timer is not None
    counted._timer._callback(*counted._timer._args)  # as the loop does, a moment later
    metrics._uncounted.clear()
    assert (
        samples(metrics.exposition()[0].decode())['entrepot_responses_total{kind="blob",status="200"}'] == 1
    )


async def test_a_request_of_a_replica_is_not_among_those_of_clients() -> None:
    metrics, counted = counts()
    counted.add(Exchange(kind="blob", result="hit", bytes=7, peer="http://a"), 200, 0.1)
    found = samples(metrics.exposition()[0].decode())
    assert found['entrepot_peer_requests_total{kind="blob",namespace="-",result="hit"}'] == 1
    assert found['entrepot_peer_sent_bytes_total{namespace="-"}'] == 7
    assert not [each for each in found if each.startswith(("entrepot_request_dur", "entrepot_responses"))]


async def test_what_the_cache_saves(serve: Serve, upstream: Upstream, clock: Clock) -> None:
    image = upstream.image("library/alpine", "3", [LAYER])
    absent = f"{ALPINE}/blobs/{digest_of(b'absent')}"
    site = await serve(upstream)

    async def saved() -> tuple[float, float]:
        found = await shown(site)
        names = ("entrepot_saved_bytes_total", "entrepot_saved_requests_total")
        bytes_saved, requests = (found.get(f'{name}{{namespace="docker.io"}}', 0) for name in names)
        return bytes_saved, requests

    await site.get(f"{ALPINE}/manifests/3")
    await site.get(absent)
    assert await saved() == (0, 0)
    await site.get(f"{ALPINE}/manifests/3")
    assert await saved() == (len(image.content), 1)
    await site.get(absent)  # which is remembered
    assert await saved() == (len(image.content), 2)
    clock.advance(601)
    await site.get(f"{ALPINE}/manifests/3")  # revalidated by a request without a body
    assert await saved() == (2 * len(image.content), 2)
    clock.advance(601)
    upstream.next("HEAD", "3", Status(500), times=1 + RETRIES)
    await site.get(f"{ALPINE}/manifests/3")  # stale, after a request
    assert await saved() == (3 * len(image.content), 2)


# Exemplars


async def test_exemplars_are_in_openmetrics_alone(clock: Clock) -> None:
    shared = SharedState()
    metrics, other = Metrics(shared.exemplars), Metrics(shared.exemplars)  # as of two processes
    counted = RequestCounts(metrics)
    counted.add(Exchange(kind="blob", result="hit"), 200, 0.2, 0.002, {"trace_id": "0af7651916cd43dd"})
    counted.add(Exchange(kind="blob", result="hit"), 200, 0.2, 0.002)
    metrics.flush()
    RequestCounts(other).add(Exchange(kind="blob", result="hit"), 200, 0.2)
    for each in (metrics, other):
        text = each.exposition(OPEN)[0].decode()
        found = {
            (family.name, sample.labels["le"]): (sample.exemplar.labels, sample.exemplar.value)
            for family in open_metrics(text)
            for sample in family.samples
            if sample.exemplar is not None
        }
        expected = ({"trace_id": "0af7651916cd43dd"}, 0.2)
        assert found["entrepot_request_duration_seconds", "0.25"] == expected
        assert len(found) == 2
        assert "trace_id" not in each.exposition()[0].decode()


async def test_an_exemplar_that_is_too_long_is_left_out() -> None:
    metrics, counted = counts()
    counted.add(Exchange(kind="blob", result="hit"), 200, 0.2, None, {"trace_id": "0" * 121})
    text = metrics.exposition(OPEN)[0].decode()
    assert "trace_id" not in text and 'result="hit"' in text


# Upstreams


async def test_requests_to_an_upstream_are_counted_by_host_and_result(
    serve: Serve, upstream: Upstream
) -> None:
    upstream.image("library/alpine", "3", [LAYER])
    site = await serve(upstream)
    for status, tag in ((404, "a"), (500, "b"), (429, "c"), (400, "d"), (403, "e")):
        upstream.next("GET", tag, RetryAfter(1, status))
        await site.get(f"{ALPINE}/manifests/{tag}")
        site.clock.advance(86400)
    await site.get(f"{ALPINE}/manifests/3")
    host = upstream.url.partition("//")[2]
    found = await shown(site)
    labels = f'host="{host}",namespace="docker.io"'
    counted = {
        result: found.get(f'entrepot_upstream_requests_total{{{labels},result="{result}"}}', 0)
        for result in ("ok", "unknown", "failed", "limited", "refused", "denied", "unreachable")
    }
    assert counted == {
        "ok": 1, "unknown": 1, "failed": 1, "limited": 1, "refused": 1, "denied": 1, "unreachable": 0
    }  # fmt: skip
    assert found[f"entrepot_upstream_request_duration_seconds_count{{{labels}}}"] == 6


@pytest.mark.parametrize(
    ("status", "result"),
    [(0, "unreachable"), (200, "ok"), (206, "ok"), (304, "ok"), (307, "ok"), (401, "denied"),
     (403, "denied"), (404, "unknown"), (405, "refused"), (416, "refused"), (429, "limited"),
     (500, "failed"), (504, "failed")],
)  # fmt: skip
def test_the_result_of_a_status(status: int, result: str) -> None:
    assert result_of(status) == result


@pytest.fixture
def not_after() -> datetime:
    return datetime(2036, 5, 4, 3, 2, 1, tzinfo=UTC)


async def test_when_certificates_expire(
    serve: Serve, upstream: Upstream, tmp_path: Path, not_after: datetime
) -> None:
    upstream.image("library/alpine", "3", [LAYER])
    own, theirs = Authority(tmp_path), trustme.CA()
    theirs.cert_pem.write_to_path(str(tmp_path / "theirs.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.issue_cert("localhost", not_after=not_after).configure_cert(context)
    expires = not_after.timestamp()
    async with Relay(int(upstream.url.rpartition(":")[2]), context) as relay:
        site = await serve(
            f"https://localhost:{relay.port}",
            options={"ca_file": str(tmp_path / "theirs.pem")},
            top={"tls": own.issue("server", expires=expires - DAY)},
        )
        before = await shown(site)
        assert (await site.get(f"{ALPINE}/manifests/3"))[0] == 200
        after = await shown(site)
        own.issue("server", expires=expires + DAY)
        async with connect(site.url, tls=own.client()):  # a handshake notices the new file
            renewed = await shown(site)
    listener = 'entrepot_certificate_expiry_timestamp_seconds{listener="clients"}'
    name = "entrepot_upstream_certificate_expiry_timestamp_seconds"
    upstreams = f'{name}{{host="localhost:{relay.port}",namespace="docker.io"}}'
    assert before[listener] == expires - DAY
    assert upstreams not in before  # a time of 0 would be one that has passed
    assert [each for each in before if "expiry" in each] == [listener]
    assert after[upstreams] == expires
    assert renewed[listener] == expires + DAY


# Storage


@pytest.mark.clients
async def test_what_the_housekeeping_does_is_counted(
    serve: Serve, upstream: Upstream, clock: Clock, tmp_path: Path
) -> None:
    image = upstream.image("library/alpine", "3", [LAYER])
    disk = {"path": str(tmp_path / "disk"), "keep_for": "1d", "cache_limit": "1GB", "min_free": "1KB"}
    site = await serve(upstream, top={"disk": disk})
    await site.get(f"{ALPINE}/blobs/{image.layers[0]}")
    await site.app.composition.fills.ended(Digest(image.layers[0]))
    await site.app.housekeeper._round()
    found = await shown(site)
    assert found["entrepot_stored_bytes"] == len(LAYER)
    assert found['entrepot_namespace_stored_bytes{namespace="docker.io"}'] == len(LAYER)
    assert found["entrepot_cache_limit_bytes"] == 10**9
    assert found["entrepot_disk_min_free_bytes"] == 1000
    assert found["entrepot_disk_size_bytes"] > found["entrepot_disk_free_bytes"] > 0
    assert found['entrepot_evicted_bytes_total{reason="ttl"}'] == 0  # an increase of it can be seen
    await site.app.composition.recorder.flush()
    clock.advance(2 * DAY)
    await site.app.housekeeper.expire()
    await site.app.housekeeper._round()
    found = await shown(site)
    assert found['entrepot_evicted_bytes_total{reason="ttl"}'] == len(LAYER)
    assert found['entrepot_evicted_blobs_total{reason="ttl"}'] == 1
    assert found['entrepot_eviction_duration_seconds_count{reason="ttl"}'] >= 1
    assert found['entrepot_namespace_stored_bytes{namespace="docker.io"}'] == 0


async def test_a_limit_that_cannot_be_kept_is_told(serve: Serve, upstream: Upstream, tmp_path: Path) -> None:
    image = upstream.image("library/alpine", "3", [LAYER])
    disk = {"path": str(tmp_path / "disk"), "cache_limit": "1KB", "min_free": 0}
    site = await serve(upstream, top={"disk": disk, "pins": ["docker.io/library/alpine:3"]})
    for path in ("manifests/3", f"blobs/{image.layers[0]}"):
        await site.get(f"{ALPINE}/{path}")
    await site.app.composition.fills.ended(Digest(image.layers[0]))
    await site.app.housekeeper.make_room(0)
    assert (await shown(site))["entrepot_eviction_short_bytes"] > 0


@pytest.mark.errors("keeper.failed")
async def test_runs_of_a_task_are_counted_by_result(serve: Serve, upstream: Upstream) -> None:
    site = await serve(upstream)
    ends = iter([RuntimeError("meant"), None, StorageFailed("meant"), None, Cancelled()])

    async def polish() -> None:
        if (error := next(ends)) is not None:
            raise error

    await site.app.housekeeper._repeat(polish, 0)
    found = await shown(site)
    assert found['entrepot_housekeeping_runs_total{result="failed",task="polish"}'] == 2
    assert found['entrepot_housekeeping_runs_total{result="done",task="polish"}'] == 2
    assert found['entrepot_housekeeping_duration_seconds_count{task="polish"}'] == 2
    at = found['entrepot_housekeeping_last_success_timestamp_seconds{task="polish"}']
    assert at == site.clock()


@pytest.mark.errors("blob.damaged")
async def test_what_a_scrub_finds_is_counted_while_it_runs(serve: Serve, upstream: Upstream) -> None:
    image = upstream.image("library/alpine", "3", [LAYER])
    site = await serve(upstream)
    await site.get(f"{ALPINE}/blobs/{image.layers[0]}")
    await site.app.composition.fills.ended(Digest(image.layers[0]))
    assert (await shown(site))['entrepot_scrub_damaged_total{store="cache"}'] == 0
    path = site.app.composition.store.files.path(Digest(image.layers[0]))
    path.chmod(0o600)
    path.write_bytes(b"X" * len(LAYER))
    await site.app.composition.maintenance.scrubs[0].run(site.app.housekeeper.heal)
    await site.app.composition.fills.ended(Digest(image.layers[0]))
    found = await shown(site)
    assert found['entrepot_scrub_damaged_total{store="cache"}'] == 1
    assert found['entrepot_scrub_healed_total{store="cache"}'] == 1
    assert found['entrepot_scrub_checked_total{store="cache"}'] == 1
    assert found['entrepot_scrub_checked_bytes_total{store="cache"}'] == len(LAYER)


async def test_collections_are_counted_whoever_ran_them(
    serve: Serve, upstream: Upstream, clock: Clock
) -> None:
    site = await serve(upstream, more={"local": {"store": {}}})
    collection = site.app.composition.maintenance.collection
    assert collection is not None
    assert (await shown(site))['entrepot_collections_total{result="done"}'] == 0
    await asyncio.to_thread(collection.run)
    begun = clock()
    found = await shown(site)
    assert found['entrepot_collections_total{result="done"}'] == 1
    assert found["entrepot_collection_duration_seconds_count"] == 1
    assert found["entrepot_collected_timestamp_seconds"] == begun


# The server


async def test_the_states_of_a_server(
    serve: Serve, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = await serve(upstream)
    found = await shown(site)
    assert [name for name in found if name.startswith("entrepot_build_info{")] != []
    assert (found["entrepot_workers"], found["entrepot_degraded"]) == (1, 0)
    monkeypatch.setattr(site.app.composition.store.files.disk, "troubles", lambda: ["the disk is full"])
    assert (await shown(site))["entrepot_degraded"] == 1


@pytest.mark.errors("disk.failed")
async def test_what_fails_is_told_by_its_kind(serve: Serve, upstream: Upstream) -> None:
    site = await serve(upstream)
    kinds = {f'entrepot_troubles{{kind="{each}"}}' for each in observation.TROUBLES}
    found = await shown(site)
    assert {each: found[each] for each in kinds} == dict.fromkeys(kinds, 0)
    partial = site.directory / "cache" / "partial"
    partial.rmdir()
    partial.touch()  # even root cannot write below a file
    found = await shown(site)
    assert (found["entrepot_degraded"], found['entrepot_troubles{kind="blobs"}']) == (1, 1)
    partial.unlink()
    partial.mkdir()
    found = await shown(site)
    assert (found["entrepot_degraded"], found['entrepot_troubles{kind="blobs"}']) == (0, 0)


async def test_a_database_that_hangs_does_not_keep_the_metrics(
    serve: Serve, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observation, "MOMENT", 0.01)
    site = await serve(upstream, more={"local": {"store": {}}})
    collection = site.app.composition.maintenance.collection
    asked, gate = threading.Event(), threading.Event()

    def hang() -> CollectionReport:
        asked.set()
        gate.wait(60)
        return CollectionReport(begun=7.0)

    monkeypatch.setattr(collection, "last", hang)
    found = await shown(site)
    assert (found["entrepot_workers"], found["entrepot_collected_timestamp_seconds"]) == (1, 0)
    await asyncio.to_thread(asked.wait)
    assert (await shown(site))["entrepot_workers"] == 1  # it waits for the same
    gate.set()
    await site.app._observation.close()
    assert (await shown(site))["entrepot_collected_timestamp_seconds"] == 7


@pytest.mark.clients
async def test_all_workers_are_counted_at_once(place: Place, upstream: Upstream) -> None:
    upstream.image("library/alpine", "3", [LAYER])
    server = await place.start()
    for worker in await server.workers():
        for _ in range(3):
            await worker.get(f"{ALPINE}/manifests/3")
    assert await server.metric("entrepot_requests_total", kind="manifest") == 6
    assert await server.metric("entrepot_request_duration_seconds_count", kind="manifest") == 6
    assert await server.metric("entrepot_responses_total", kind="manifest", status="200") == 6
    assert await server.metric("entrepot_workers") == 2
    assert await server.metric("entrepot_build_info") == 1
    assert await server.metric("entrepot_upstream_requests_total", result="ok") >= 1
    async with aiohttp.ClientSession() as session, session.get(f"{server.admin_url}/metrics") as response:
        assert promtool("check", "metrics", standard_input=await response.text()) == ""


OPENED_BY_VALUES = """
import os, sys
from pathlib import Path
from prometheus_client.metrics import MetricWrapperBase
from proxy.telemetry.metrics import Metrics, share_metrics

share_metrics(Path(sys.argv[1]))
metrics = Metrics()
before = sorted(os.listdir(sys.argv[1]))
for metric in vars(metrics).values():
    if isinstance(metric, MetricWrapperBase) and metric._labelnames:
        metric.labels(*("x" for _ in metric._labelnames))
print(before == sorted(os.listdir(sys.argv[1])), len(before) > 3)
"""


@pytest.mark.clients
def test_no_file_is_opened_after_the_start(tmp_path: Path) -> None:
    """There may be no descriptor for it while a crowd of clients is connected."""
    command = [sys.executable, "-c", OPENED_BY_VALUES, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]

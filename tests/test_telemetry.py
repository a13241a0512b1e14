"""What the server says of itself: access lines, metrics, events; and what it must never say."""

from __future__ import annotations

import asyncio
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import structlog
from prometheus_client import Gauge
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import LogCapture

from proxy.telemetry import logs
from proxy.telemetry.exchange import Exchange, current, current_exchange
from proxy.upstream.transport import RETRIES
from tests.conftest import Clock, Serve, Site
from tests.events import Ear
from tests.upstream import Basic, Bearer, Hold, Image, Status, Upstream, digest_of
from tests.wire import connect

BODY = b"a layer" * 1000
ABSENT = digest_of(b"absent")
ALPINE = "/v2/library/alpine"


@pytest.fixture
def image(upstream: Upstream) -> Image:
    return upstream.image("library/alpine", "latest", layers=(BODY,))


async def fills_ended() -> None:
    """Clients have all of a blob a moment before it is in its place."""
    tasks = asyncio.all_tasks()
    await asyncio.gather(*(task for task in tasks if "Fills._run" in str(task.get_coro())))


# The access line


async def test_one_line_a_request(serve: Serve, upstream: Upstream, image: Image, clock: Clock) -> None:
    site = await serve(upstream)
    ear = Ear()
    layer, size = image.layers[0], len(image.content)

    async def line(method: str, path: str, **headers: str) -> tuple[Any, ...]:
        async with site.request(method, path, headers={"User-Agent": "test", **headers}) as response:
            await response.read()
            event = await ear.heard("request.served")
            assert event["id"] == response.headers["X-Request-Id"]
            assert event["status"] == response.status
        assert (event["client"], event["agent"], event["method"]) == ("127.0.0.1", "test", method)
        assert event["seconds"] >= 0
        named = (event["namespace"], event["repository"], event["reference"])
        rest = (event["result"], event["detail"], event["upstream_requests"], event["bytes"])
        return event["kind"], named, *rest

    hub, nobody = ("docker.io", "library/alpine"), ("-", "", "")
    by_tag, by_digest = (*hub, "latest"), (*hub, image.digest)
    assert await line("GET", f"{ALPINE}/manifests/latest") == ("manifest", by_tag, "miss", "", 1, size)
    assert await line("GET", "/v2/alpine/manifests/latest") == ("manifest", by_tag, "hit", "", 0, size)
    assert await line("HEAD", f"{ALPINE}/manifests/latest") == ("manifest", by_tag, "hit", "", 0, 0)
    assert await line("GET", f"{ALPINE}/manifests/{image.digest}") == (
        "manifest",
        by_digest,
        "hit",
        "",
        0,
        size,
    )
    clock.advance(601)
    assert await line("GET", f"{ALPINE}/manifests/latest") == ("manifest", by_tag, "revalidated", "", 1, size)
    clock.advance(601)
    upstream.next("HEAD", "latest", Status(500), times=1 + RETRIES)
    stale = ("manifest", by_tag, "stale", "UNAVAILABLE", 1, size)
    assert await line("GET", f"{ALPINE}/manifests/latest") == stale
    assert await line("GET", f"{ALPINE}/blobs/{layer}") == ("blob", (*hub, layer), "miss", "", 1, len(BODY))
    await fills_ended()
    assert await line("GET", f"{ALPINE}/blobs/{layer}", Range="bytes=0-9") == (
        "blob", (*hub, layer), "hit", "", 0, 10,
    )  # fmt: skip
    assert await line("GET", f"{ALPINE}/blobs/{layer}", Range="bytes=99999-") == (
        "blob", (*hub, layer), "error", "RANGE_INVALID", 0, 0,
    )  # fmt: skip
    absent = (*hub, ABSENT)
    assert await line("GET", f"{ALPINE}/blobs/{ABSENT}") == ("blob", absent, "error", "BLOB_UNKNOWN", 1, 0)
    assert await line("GET", f"{ALPINE}/blobs/{ABSENT}") == ("blob", absent, "negative", "BLOB_UNKNOWN", 0, 0)
    tags = len(b'{"name":"library/alpine","tags":["latest"]}')
    assert await line("GET", f"{ALPINE}/tags/list") == ("tags", (*hub, ""), "miss", "", 1, tags)
    assert await line("HEAD", f"{ALPINE}/tags/list") == ("tags", (*hub, ""), "hit", "", 0, 0)
    kind, named, result, _, asked, _ = await line("GET", f"{ALPINE}/referrers/{image.digest}")
    assert (kind, named, result, asked) == ("referrers", by_digest, "miss", 1)
    assert (await line("GET", "/v2/_catalog"))[:3] == ("catalog", nobody, "")
    assert await line("GET", "/v2/") == ("base", nobody, "", "", 0, 0)
    assert await line("GET", "/nowhere") == ("other", nobody, "error", "UNSUPPORTED", 0, 0)
    assert (await line("PUT", f"{ALPINE}/manifests/latest"))[2:4] == ("error", "UNSUPPORTED")
    unknown = await line("GET", f"{ALPINE}/manifests/latest?ns=no.example")
    assert unknown == ("manifest", ("-", "", "latest"), "error", "NAME_UNKNOWN", 0, 0)


async def test_upstream_requests_are_those_of_who_caused_them(
    serve: Serve, upstream: Upstream, image: Image
) -> None:
    upstream.auth = Bearer()
    gate = asyncio.Event()
    upstream.next("GET", image.layers[0], held := Hold(gate, after=100))
    site = await serve(upstream)
    ear = Ear()
    async with connect(site.url) as first, connect(site.url) as second:
        text = f"GET {ALPINE}/blobs/{image.layers[0]} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        await first.send(text)
        await first.head()
        await held.reached.wait()
        await second.send(text)
        await second.head()
        gate.set()
        for wire in (first, second):
            assert await wire.read(len(BODY)) == BODY
    lines = [await ear.heard("request.served") for _ in range(2)]
    # The refused request, the one for a token, and the one that was answered.
    assert sorted(each["upstream_requests"] for each in lines) == [0, 3]
    assert len(upstream.log) == 3
    assert {each["result"] for each in lines} == {"miss"}


async def test_who_leaves_before_the_headers_is_written_down(
    serve: Serve, upstream: Upstream, image: Image
) -> None:
    gate = asyncio.Event()
    upstream.next("GET", "latest", held := Hold(gate, after=None))
    site = await serve(upstream)
    ear = Ear()
    async with connect(site.url) as wire:
        await wire.send(f"GET {ALPINE}/manifests/latest HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await held.reached.wait()
    event = await ear.heard("request.served")
    assert (event["status"], event["detail"], event["bytes"]) == (499, "client left", 0)
    gate.set()


# Metrics


async def values(site: Site) -> dict[tuple[str, ...], float]:
    """Every sample by its name and the values of its labels, in the order of the labels' names."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(await site.metrics())
        for sample in family.samples
    }


async def test_metrics_after_some_requests(serve: Serve, upstream: Upstream, image: Image) -> None:
    upstream.auth = Bearer()
    site = await serve(upstream)
    ear = Ear()
    for path in (
        f"{ALPINE}/manifests/latest",
        f"{ALPINE}/manifests/latest",
        f"{ALPINE}/blobs/{ABSENT}",
        f"{ALPINE}/blobs/{ABSENT}",
        "/v2/",
        f"{ALPINE}/manifests/latest?ns=no.example",
        f"{ALPINE}/blobs/{image.layers[0]}",
    ):
        await site.get(path)
    await ear.heard("fill.committed")
    await site.get(f"{ALPINE}/blobs/{image.layers[0]}")
    found = await values(site)
    requests = {key[1:]: value for key, value in found.items() if key[0] == "entrepot_requests_total"}
    assert requests == {
        # kind, namespace, result
        ("manifest", "docker.io", "miss"): 1,
        ("manifest", "docker.io", "hit"): 1,
        ("blob", "docker.io", "error"): 1,
        ("blob", "docker.io", "negative"): 1,
        ("blob", "docker.io", "miss"): 1,
        ("blob", "docker.io", "hit"): 1,
        ("base", "-", "none"): 1,
        ("manifest", "-", "error"): 1,
    }
    assert found["entrepot_sent_bytes_total", "docker.io"] == 2 * len(image.content) + 2 * len(BODY)
    assert found["entrepot_received_bytes_total", "docker.io"] >= len(BODY)
    assert found["entrepot_fills_total", "docker.io", "committed"] == 1
    assert found["entrepot_token_fetches_total", "docker.io", "ok"] == 1
    assert found["entrepot_fills_in_flight",] == 0
    assert found["entrepot_followers",] == 0
    assert "entrepot_stored_bytes" in {name for name, *_ in found}
    counts = {key[1:]: value for key, value in found.items() if key[0] == "entrepot_upstream_seconds_count"}
    assert counts == {
        # kind, namespace, status
        ("manifest", "docker.io", "401"): 1,
        ("manifest", "docker.io", "200"): 1,
        ("blob", "docker.io", "404"): 1,
        ("blob", "docker.io", "200"): 1,
    }


async def test_metrics_of_what_goes_on(serve: Serve, upstream: Upstream, image: Image) -> None:
    gate = asyncio.Event()
    upstream.next("GET", image.layers[0], held := Hold(gate, after=100))
    site = await serve(upstream)
    text = f"GET {ALPINE}/blobs/{image.layers[0]} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    async with connect(site.url) as first, connect(site.url) as second:
        for wire in (first, second):
            await wire.send(text)
            await wire.head()
        await held.reached.wait()
        found = await values(site)
        assert (found["entrepot_fills_in_flight",], found["entrepot_followers",]) == (1, 2)
        gate.set()
        for wire in (first, second):
            assert await wire.read(len(BODY)) == BODY
            assert (await wire.ask("GET", "/v2/")).status == 200  # by then the blob is closed
    assert (await values(site))["entrepot_followers",] == 0


async def test_an_upstream_that_is_gone_has_status_0(serve: Serve, upstream: Upstream) -> None:
    await upstream.stop()
    site = await serve(upstream)
    await site.get(f"{ALPINE}/manifests/latest")
    found = await values(site)
    assert found["entrepot_upstream_seconds_count", "manifest", "docker.io", "0"] == 1
    assert found["entrepot_requests_total", "manifest", "docker.io", "error"] == 1


async def test_a_refused_token_is_counted(serve: Serve, upstream: Upstream, image: Image) -> None:
    upstream.auth = Bearer(credentials=Basic("robot", "s3cret"), anonymous=False)
    site = await serve(upstream)
    assert (await site.get(f"{ALPINE}/manifests/latest"))[0] == 404
    assert (await values(site))["entrepot_token_fetches_total", "docker.io", "denied"] == 1


@pytest.mark.housekeeping
async def test_stored_bytes_are_counted(
    serve: Serve, upstream: Upstream, image: Image, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted, plain_set = asyncio.Event(), Gauge.set

    def set_and_tell(gauge: Gauge, value: float) -> None:
        plain_set(gauge, value)
        if gauge.describe()[0].name == "entrepot_stored_bytes":
            counted.set()

    monkeypatch.setattr(Gauge, "set", set_and_tell)
    site = await serve(upstream)
    await counted.wait()
    ear = Ear()
    await site.get(f"{ALPINE}/blobs/{image.layers[0]}")
    await ear.heard("fill.committed")
    await site.app.stop()
    counted.clear()
    clock.advance(3600)
    again = await serve(upstream)
    await counted.wait()
    assert (await values(again))["entrepot_stored_bytes",] == len(BODY)


async def test_servers_do_not_mix_their_metrics(serve: Serve, upstream: Upstream, tmp_path: Path) -> None:
    one = await serve(upstream, directory=tmp_path / "one")
    two = await serve(upstream, directory=tmp_path / "two")
    await one.get("/v2/")
    key = ("entrepot_requests_total", "base", "-", "none")
    assert (await values(one))[key] == 1
    assert key not in await values(two)


# Secrets


async def test_nothing_secret_is_ever_said(
    serve: Serve, upstream: Upstream, image: Image, events: LogCapture
) -> None:
    user = Basic("robot", "hunter2-password")
    upstream.auth, upstream.cdn = Bearer(credentials=user, anonymous=False), True
    options = {"username": user.user, "password": user.password}
    site = await serve(upstream, options=options, top={"log": {"level": "debug"}})
    bodies = []
    client = {"Authorization": "Bearer client-secret", "Cookie": "client-secret"}
    ear = Ear()

    async def pull(path: str) -> int:
        async with site.request("GET", f"{path}?token=client-secret", headers=client) as response:
            bodies.append((await response.read(), dict(response.headers)))
            return int(response.status)

    assert await pull(f"{ALPINE}/manifests/latest") == 200
    assert await pull(f"{ALPINE}/blobs/{image.layers[0]}") == 200
    await ear.heard("fill.committed")
    # And when things go wrong:
    upstream.next("GET", "cdn", Status(403), times=9)
    assert await pull(f"{ALPINE}/blobs/{image.config}") == 404
    upstream.next("GET", lambda request: request.kind == "cdn", Status(500), times=9)
    upstream.expire_tokens()
    upstream.auth = Bearer(credentials=Basic("robot", "changed"), anonymous=False)
    assert await pull(f"{ALPINE}/tags/list") == 404
    await upstream.stop()
    assert await pull(f"{ALPINE}/referrers/{image.digest}") == 502

    sent = [str(each.target) + str(dict(each.headers)) for each in upstream.requests]
    used = [user.header.removeprefix("Basic "), "token-1", "Signature=", "Credential="]
    for secret in used:
        assert any(secret in each for each in sent), f"{secret} was not used, so this proves nothing"
    assert not any("client-secret" in each for each in sent)
    said = repr(events.entries) + await site.metrics() + repr(bodies[2:]) + repr(bodies[0][1])
    assert "request.served" in said
    assert "upstream.asked" in said
    for secret in (*used, user.password, "changed", "client-secret"):
        assert secret not in said


# Events


def written(format: str, level: str = "info") -> io.StringIO:
    stream = io.StringIO()
    logs.configure(format, level, stream)
    return stream


def test_json_is_one_line_an_event() -> None:
    stream = written("auto")  # no terminal
    log = structlog.get_logger()
    try:
        raise ValueError("two\nlines")
    except ValueError:
        log.exception("request.failed", path=Path("/x"), text="\n\udcff")
    log.info("request.served", bytes=1)
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["event"], first["level"], first["path"]) == ("request.failed", "error", "/x")
    assert first["text"] == "\n\udcff"
    assert "ValueError: two\nlines" in first["exception"]
    assert second.pop("timestamp").endswith("Z")
    assert second == {"event": "request.served", "level": "info", "bytes": 1}


def test_console_is_for_people() -> None:
    stream = written("console")
    structlog.get_logger().info("pin.added", pattern="library/alpine", platforms=[])
    assert stream.getvalue().endswith(" pin.added pattern=library/alpine\n")


@pytest.mark.parametrize("format", ["json", "console"])
@pytest.mark.parametrize(
    ("access", "logged"), [("all", [200, 404, 499, 502]), ("errors", [404, 499, 502]), ("off", [])]
)
def test_which_requests_are_logged(format: str, access: str, logged: list[int]) -> None:
    logs.configure(format, "info", stream := io.StringIO(), access)
    log = structlog.get_logger()
    for status in (200, 404, 499, 502):
        log.info("request.served", **REQUEST | {"status": status})
    log.warning("upstream.limited")
    *lines, last = stream.getvalue().splitlines()
    assert [
        re.search(r" (\d{3}) |\"status\":(\d{3})", line)[1 if format == "console" else 2] for line in lines
    ] == [str(each) for each in logged]
    assert "upstream.limited" in last


@pytest.mark.parametrize(
    ("format", "access", "statuses"),
    [("json", "all", [200, 401, 404]), ("json", "errors", [404]), ("console", "all", [404])],
)
def test_health_checks_are_quiet_for_people(format: str, access: str, statuses: list[int]) -> None:
    logs.configure(format, "info", stream := io.StringIO(), access)
    log = structlog.get_logger()
    for status in (200, 401, 404):
        log.info("request.served", **REQUEST | {"kind": "base", "status": status})
    assert len(stream.getvalue().splitlines()) == len(statuses)
    assert str(statuses[-1]) in stream.getvalue()


REQUEST = {
    "id": "1",
    "client": "10.0.0.7",
    "method": "GET",
    "kind": "manifest",
    "user": "",
    "namespace": "docker.io",
    "repository": "library/nginx",
    "reference": "1.27",
    "status": 200,
    "result": "hit",
    "detail": "",
    "reason": "",
    "upstream_requests": 0,
    "bytes": 1500,
    "received": 0,
    "seconds": 0.0123,
    "agent": "test",
}


@pytest.mark.parametrize(
    ("level", "heard"), [("debug", "diwe"), ("info", "iwe"), ("warning", "we"), ("error", "e")]
)
def test_levels(level: str, heard: str) -> None:
    stream = written("json", level)
    log = structlog.get_logger()
    log.debug("d")
    log.info("i")
    log.warning("w")
    log.error("e")
    assert "".join(json.loads(line)["event"] for line in stream.getvalue().splitlines()) == heard


# Exchanges


async def test_a_task_counts_into_the_exchange_that_started_it() -> None:
    now = Exchange("1")
    current_exchange.set(now)

    async def work() -> None:
        current().upstream_requests += 1

    await asyncio.create_task(work())
    assert now.upstream_requests == 1


def test_outside_of_a_request_there_is_a_scratch_exchange() -> None:
    assert isinstance(current(), Exchange)

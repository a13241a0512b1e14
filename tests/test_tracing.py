"""Traces, as a collector receives them."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from structlog.testing import LogCapture

from proxy.telemetry import otel, request_span, tracing
from proxy.telemetry.tracers import configured, make_tracer
from proxy.telemetry.tracing import NoTracer, Tracer
from proxy.web.hits import Hits
from proxy.web.routes import Endpoint
from storage.disk.extents import beside
from storage.disk.writer_note import WriterNote
from storage.oci import Digest
from tests.collector import Collector, collector
from tests.conftest import Clock, Serve, Site
from tests.events import Ear
from tests.fleet import SECRET, free_ports, start
from tests.processes import Place, place
from tests.test_telemetry import fills_ended
from tests.upstream import Bearer, Hold, Image, Status, Upstream, digest_of
from tests.wire import connect

__all__ = ["collector", "place"]  # fixtures

Make = Callable[..., Tracer]

BODY = b"a layer" * 1000
TAG = "/v2/library/alpine/manifests/latest"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"
MANIFEST_ROUTE, BLOB_ROUTE = "/v2/{name}/manifests/{reference}", "/v2/{name}/blobs/{digest}"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for each in list(os.environ):
        if each.startswith("OTEL_"):  # a developer may have set some
            monkeypatch.delenv(each)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")  # milliseconds that a span waits to be sent
    yield
    library = logging.getLogger("opentelemetry")
    library.handlers, library.propagate = [], True


@pytest.fixture
async def tracer(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Make]:
    """Make the tracer of a server; variables may be given, in lower case and without OTEL_."""
    made: list[Tracer] = []

    def make(name: str = "entrepot", **variables: str) -> Tracer:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
            patch.setenv("OTEL_SERVICE_NAME", name)
            for key, value in variables.items():
                patch.setenv(f"OTEL_{key.upper()}", value)
            made.append(make_tracer())
        assert not isinstance(made[-1], NoTracer)
        return made[-1]

    yield make
    collector.gate.set()
    for each in made:
        await each.close()
    for thread in threading.enumerate():  # those that a test did not wait for
        if thread.name in (otel.CLOSING, "OtelBatchSpanRecordProcessor"):
            await asyncio.to_thread(thread.join)
    gc.collect()  # urllib3 closes a connection only then, if one before has failed


@pytest.fixture
def image(upstream: Upstream) -> Image:
    return upstream.image("library/alpine", "latest", layers=(BODY,))


async def pull(site: Site, image: Image, **headers: str) -> None:
    """As clients do: the manifest, then config and layers."""
    for path in (TAG, *(f"/v2/library/alpine/blobs/{each}" for each in (image.config, *image.layers))):
        status, _, _ = await site.get(path, **headers)
        assert status == 200


# A pull through two servers


async def test_a_cold_pull_through_two_servers(
    serve: Serve, upstream: Upstream, image: Image, collector: Collector, tracer: Make, tmp_path: Any
) -> None:
    upstream.auth, upstream.cdn = Bearer(), True
    far_tracer, near_tracer = tracer("far"), tracer("near")
    far = await serve(upstream, directory=tmp_path / "far", tracer=far_tracer)
    near = await serve(far.url, directory=tmp_path / "near", options={"trace": True}, tracer=near_tracer)
    state = "vendor=opaque,other=1"
    await pull(near, image, traceparent=SAMPLED, tracestate=state, User_Agent="test")
    await fills_ended()
    await near_tracer.close()
    await far_tracer.close()
    assert {(each.trace, each.state) for each in collector.spans} == {(TRACE, state)}
    _of_a_manifest(collector, near, far, image)
    _of_a_blob(collector, near, far, image, upstream)
    for each in collector.spans:
        assert each.begun <= each.ended
        assert each.status in ("", "error")


def _of_a_manifest(collector: Collector, near: Site, far: Site, image: Image) -> None:
    served = collector.one(f"GET {MANIFEST_ROUTE}", "near")
    assert (served.kind, served.parent, served.status) == ("server", PARENT, "")
    port = near.app.url.port
    assert (
        served.attributes.items()
        >= {
            "http.request.method": "GET",
            "http.route": MANIFEST_ROUTE,
            "http.response.status_code": 200,
            "url.path": TAG,
            "url.scheme": "http",
            "server.address": "127.0.0.1",
            "server.port": port,
            "network.protocol.version": "1.1",
            "client.address": "127.0.0.1",
            "user_agent.original": "test",
            "entrepot.namespace": "docker.io",
            "entrepot.repository": "library/alpine",
            "entrepot.reference": "latest",
            "entrepot.result": "miss",
            "entrepot.sent": len(image.content),
        }.items()
    )
    asked, written = collector.children(served)
    assert (asked.name, asked.kind, asked["http.response.status_code"]) == ("GET", "client", 200)
    assert (asked["server.port"], asked["url.full"]) == (far.app.url.port, f"{far.url}{TAG}")
    assert (written.name, written.kind) == ("store.write", "internal")
    (beyond,) = collector.children(asked)
    assert (beyond.name, beyond.kind, beyond.service) == (f"GET {MANIFEST_ROUTE}", "server", "far")


def _of_a_blob(collector: Collector, near: Site, far: Site, image: Image, upstream: Upstream) -> None:
    layer = image.layers[0]
    served = collector.one(f"GET {BLOB_ROUTE}", "near", entrepot__reference=layer)
    (fill,) = collector.children(served)
    assert (fill.name, fill.kind, fill.links, fill.status) == ("fill", "internal", [], "")
    assert (fill["entrepot.fill.result"], fill["entrepot.fill.bytes"]) == ("committed", len(BODY))
    assert fill["entrepot.digest"] == layer
    asked, *written = collector.children(fill)
    assert [each.name for each in written] == ["store.write", "store.write"]
    (beyond,) = collector.children(asked)
    assert beyond.service == "far"
    (second,) = (each for each in collector.children(beyond) if each.name == "fill")
    to_registry, to_store, *_ = (each for each in collector.children(second) if each.kind == "client")
    assert to_registry["http.response.status_code"] == 307
    # A signed URL is a credential.
    assert to_store["url.full"].startswith(upstream.cdn_url) and "?" not in to_store["url.full"]
    assert to_store["http.response.status_code"] == 200
    # The first request of all was challenged, which is no failure.
    challenged, *_ = (
        each for each in collector.spans if each.attributes.get("http.response.status_code") == 401
    )
    assert (challenged.status, challenged.service) == ("", "far")
    token, *_ = collector.of("token", "far")
    assert token["entrepot.token.scope"] == "repository:library/alpine:pull"
    (fetched,) = collector.children(token)
    assert (fetched.kind, fetched["http.response.status_code"]) == ("client", 200)
    # What is not ours learns nothing of the trace.
    assert all("traceparent" not in each.headers for each in upstream.requests)


async def test_a_fill_and_who_follows_it(
    serve: Serve, upstream: Upstream, image: Image, collector: Collector, tracer: Make
) -> None:
    traced = tracer()
    site = await serve(upstream, tracer=traced)
    path, gate = f"/v2/library/alpine/blobs/{image.layers[0]}", asyncio.Event()
    hold = Hold(gate, after=1)
    upstream.next("GET", image.layers[0], hold)
    first = asyncio.create_task(site.get(path))
    await hold.reached.wait()
    async with site.request("GET", path, headers={"traceparent": SAMPLED}) as second:
        assert second.status == 200
        gate.set()
        assert await second.read() == BODY
    assert (await first)[2] == BODY
    await fills_ended()
    await traced.close()
    fill = collector.one("fill")
    cause = next(each for each in collector.spans if each.id == fill.parent)
    (follower,) = (each for each in collector.of(f"GET {BLOB_ROUTE}") if each is not cause)
    assert (follower.trace, follower.links, fill.links) == (TRACE, [fill.id], [follower.id])
    assert cause.links == []
    assert fill.trace == cause.trace != TRACE


async def test_who_follows_a_fill_of_another_process(
    serve: Serve, upstream: Upstream, image: Image, collector: Collector, tracer: Make, tmp_path: Path
) -> None:
    """Each request has the link, and one that begins when the writer has ended has none to it."""
    tracers = [tracer("one"), tracer("other"), tracer("none", traces_sampler="always_off")]
    options = {"progress_timeout": "60s"}
    one, other, silent = [
        await serve(upstream, directory=tmp_path / "shared", tracer=each, options=options) for each in tracers
    ]
    path, hold = f"/v2/library/alpine/blobs/{image.layers[0]}", Hold(asyncio.Event(), after=1)
    upstream.next("GET", image.layers[0], hold)
    first = asyncio.create_task(one.get(path))
    await hold.reached.wait()
    async with (
        other.request("GET", path) as second,
        other.request("GET", path, headers={"traceparent": SAMPLED}) as third,
        silent.request("GET", path) as fourth,
    ):
        assert [each.status for each in (second, third, fourth)] == [200] * 3
        hold.gate.set()
        assert [await each.read() for each in (second, third, fourth)] == [BODY] * 3
    assert (await first)[2] == BODY
    await fills_ended()
    assert (await other.get(path))[2] == BODY
    for each in tracers:
        await each.close()
    fill = collector.one("fill", "one")
    followed = collector.one("fill", "other")
    assert (fill["entrepot.fill.result"], followed["entrepot.fill.result"]) == ("committed", "followed")
    assert fill.id in followed.links
    requests = sorted(collector.of(f"GET {BLOB_ROUTE}", "other"), key=lambda each: each.begun)
    assert [fill.id in each.links for each in requests] == [True, True, False]
    assert requests[1].trace == TRACE and followed.id in requests[1].links
    assert list((tmp_path / "shared").rglob("*.writer")) == []


async def test_a_former_writer_is_not_linked(
    serve: Serve, upstream: Upstream, image: Image, collector: Collector, tracer: Make, tmp_path: Path
) -> None:
    """The note of one that was killed is gone when another process continues."""
    traced, silent = tracer("one"), tracer("none", traces_sampler="always_off")
    options = {"progress_timeout": "60s"}
    two, three = [
        await serve(upstream, directory=tmp_path / "shared", tracer=each, options=options)
        for each in (silent, traced)
    ]
    partial = next((tmp_path / "shared").rglob("partial")) / image.layers[0].replace(":", "-")
    partial.write_bytes(BODY[:10])
    partial.with_name(f"{partial.name}.{partial.stat().st_ino}.writer").write_text(
        json.dumps({"traceparent": SAMPLED})
    )
    path, hold = f"/v2/library/alpine/blobs/{image.layers[0]}", Hold(asyncio.Event(), after=1)
    upstream.next("GET", image.layers[0], hold)
    first = asyncio.create_task(two.get(path))
    await hold.reached.wait()
    async with three.request("GET", path) as second:
        hold.gate.set()
        assert await second.read() == BODY
    assert (await first)[2] == BODY
    await fills_ended()
    for each in (traced, silent):
        await each.close()
    assert all(PARENT not in each.links for each in collector.spans)
    assert collector.one("fill")["entrepot.fill.result"] == "followed"


NOTES = {
    "empty": "",
    "no object": "[]",
    "no texts": '{"traceparent": 1}',
    "malformed": '{"traceparent": "00-0-0-01"}',
    "no text": "\\xff",
    "of another process": json.dumps({"traceparent": SAMPLED, "tracestate": "a=b", "other": "c"}),
}


@pytest.mark.parametrize("note", NOTES.values(), ids=NOTES.keys())
async def test_what_a_note_may_say(collector: Collector, tracer: Make, tmp_path: Path, note: str) -> None:
    file = (tmp_path / "blob").open("wb")
    written = WriterNote(tmp_path / "blob", file.fileno())
    beside(tmp_path / "blob", file.fileno(), ".writer").write_text(note)
    traced = tracer()
    span = traced.request({})
    span.link_remote(written.read())
    span.end()
    await traced.close()
    file.close()
    assert collector.spans[0].links == ([PARENT] if SAMPLED in note else [])


async def test_a_fill_that_no_request_causes(
    serve: Serve, upstream: Upstream, image: Image, collector: Collector, tracer: Make
) -> None:
    traced = tracer()
    site = await serve(upstream, tracer=traced)
    token = tracing.current_span.set(traced.background)
    await site.app.composition.caches["docker.io"].fill_blob("library/alpine", Digest.parse(image.layers[0]))
    tracing.current_span.reset(token)
    await traced.close()
    fill = collector.one("fill")
    assert fill.parent == ""
    assert {each.name for each in collector.children(fill)} == {"GET", "store.write"}


# What clients send


@pytest.mark.parametrize("state", ["", "a=b"])
async def test_a_trace_that_is_not_sampled(
    serve: Serve,
    upstream: Upstream,
    image: Image,
    collector: Collector,
    tracer: Make,
    state: str,
) -> None:
    traced = tracer()
    site = await serve(upstream, options={"trace": True}, tracer=traced)
    ear = Ear()
    headers = {"tracestate": state} if state else {}
    assert (await site.get(TAG, traceparent=UNSAMPLED, **headers))[0] == 200
    assert (await ear.heard("request.served"))["trace"] == TRACE
    (asked,) = upstream.requests
    # It is passed on all the same, so that the lines of both logs say it.
    assert re.fullmatch(f"00-{TRACE}-[0-9a-f]{{16}}-00", asked.headers["traceparent"])
    assert asked.headers["traceparent"] != UNSAMPLED
    assert asked.headers.get("tracestate", "") == state
    await traced.close()
    assert collector.spans == []


MALFORMED = {
    "empty": [""],
    "no version": [f"{TRACE}-{PARENT}-01"],
    "zeros": [f"00-{'0' * 32}-{PARENT}-01"],
    "no parent": [f"00-{TRACE}-{'0' * 16}-01"],
    "upper case": [SAMPLED.upper()],
    "short": [SAMPLED[:-1]],
    "more than version 00 has": [f"{SAMPLED}-00"],
    "the version that is none": [f"ff{SAMPLED[2:]}"],
    "other digits": [f"{SAMPLED[:-1]}\N{SUPERSCRIPT ONE}"],
    "long": ["0" * 4000],
    "two": [SAMPLED, f"00-{'1' * 32}-{PARENT}-01"],
}


@pytest.mark.parametrize("lines", MALFORMED.values(), ids=MALFORMED.keys())
async def test_a_malformed_traceparent_begins_a_new_trace(
    serve: Serve, upstream: Upstream, image: Image, collector: Collector, tracer: Make, lines: list[str]
) -> None:
    traced = tracer()
    site = await serve(upstream, options={"trace": True}, tracer=traced)
    ear = Ear()
    async with connect(site.url) as wire:
        headers = [f"traceparent: {each}" for each in lines]
        reply = await wire.ask("GET", TAG, *headers, "tracestate: a=b")
    assert reply.status == 200
    trace = (await ear.heard("request.served"))["trace"]
    assert re.fullmatch("[0-9a-f]{32}", trace) and trace != TRACE
    await traced.close()
    served = collector.one(f"GET {MANIFEST_ROUTE}")
    assert (served.trace, served.parent, served.state) == (trace, "", "")


async def test_a_state_that_is_malformed_or_too_long_is_left_out(
    serve: Serve, upstream: Upstream, image: Image, collector: Collector, tracer: Make
) -> None:
    traced = tracer()
    site = await serve(upstream, tracer=traced)
    for state in ("=", "a=b," * 500, "\N{SNOWMAN}=1"):
        assert (await site.get(TAG, traceparent=SAMPLED, tracestate=state))[0] == 200
    await traced.close()
    assert [(each.trace, each.state) for each in collector.of(f"GET {MANIFEST_ROUTE}")] == [(TRACE, "")] * 3


async def test_the_sampler_decides_where_no_client_does(
    serve: Serve, upstream: Upstream, image: Image, collector: Collector, tracer: Make
) -> None:
    traced = tracer(traces_sampler="parentbased_always_off")
    site = await serve(upstream, tracer=traced)
    assert (await site.get(TAG))[0] == (await site.get(TAG, traceparent=SAMPLED))[0] == 200
    await traced.close()
    assert [each.trace for each in collector.spans] == [TRACE]


async def test_a_sampler_that_clients_cannot_change(
    serve: Serve, upstream: Upstream, image: Image, collector: Collector, tracer: Make
) -> None:
    traced = tracer(traces_sampler="traceidratio", traces_sampler_arg="0")
    site = await serve(upstream, tracer=traced)
    assert (await site.get(TAG, traceparent=SAMPLED))[0] == 200
    await traced.close()
    assert collector.spans == []


async def test_bytes_that_are_no_text_do_not_lose_the_spans_of_others(
    serve: Serve, upstream: Upstream, image: Image, collector: Collector, tracer: Make
) -> None:
    traced = tracer()
    site = await serve(upstream, tracer=traced)
    async with connect(site.url) as wire:
        await wire.send(
            f"GET {TAG}?ns=docker.io&password=hidden HTTP/1.1\r\nHost: [cache\r\n".encode()
            + b"User-Agent: \xff\xfe\r\nConnection: close\r\n\r\n"
        )
        assert (await wire.reader.read()).startswith(b"HTTP/1.1 200 ")
    assert (await site.get("/v2/"))[0] == 200
    await traced.close()
    assert collector.of("GET /v2/")
    served = collector.one(f"GET {MANIFEST_ROUTE}")
    assert served["user_agent.original"] == "??" and "server.address" not in served.attributes
    assert served["url.query"] == "ns=docker.io"  # what is not of the API may be a secret


ODD = {
    "asterisk": ("OPTIONS *", "cache.test"),
    "authority": ("CONNECT cache.test:443", "cache.test"),
    "absolute": ("GET http://other.test/v2/", "cache.test:99999"),
    "a host that is none": ("GET /v2/", "a:b:c"),
    "a host of bytes": ("GET /v2/", "\xff"),
    "no host": ("GET /v2/", ""),
    "an escape that is none": ("GET /v2/%ff/manifests/x", "[::1]:5000"),
}


@pytest.mark.parametrize(("line", "host"), ODD.values(), ids=ODD.keys())
async def test_odd_heads_are_answered_as_without_traces(
    serve: Serve, upstream: Upstream, collector: Collector, tracer: Make, line: str, host: str
) -> None:
    traced = tracer()
    sites = await serve(upstream, tracer=traced), await serve(upstream)
    statuses = []
    for site in sites:
        async with connect(site.url) as wire:
            await wire.send(f"{line} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode("latin-1"))
            statuses.append((await wire.reader.read())[9:12].decode())
    assert statuses[0] == statuses[1] in ("200", "404")
    await traced.close()
    (served,) = collector.spans
    assert str(served["http.response.status_code"]) == statuses[0]


# How requests end


async def test_statuses(
    serve: Serve, upstream: Upstream, image: Image, collector: Collector, tracer: Make
) -> None:
    traced = tracer()
    site = await serve(upstream, tracer=traced)
    absent = digest_of(b"absent")
    assert (await site.get(f"/v2/library/alpine/blobs/{absent}"))[0] == 404
    upstream.next("GET", "manifest", Status(500), times=9)
    assert (await site.get(TAG))[0] == 502
    assert (await site.get("/elsewhere"))[0] == 404
    async with site.request("PROPFIND", "/v2/") as response:
        assert response.status == 405
    await traced.close()
    unknown = collector.one(f"GET {BLOB_ROUTE}")
    assert (unknown["http.response.status_code"], unknown.status) == (404, "")
    assert unknown["entrepot.error.code"] == "BLOB_UNKNOWN"
    fill = collector.one("fill")
    assert (fill.status, fill["error.type"], fill["entrepot.fill.result"]) == (
        "error",
        "BlobUnknown",
        "failed",
    )
    failed = collector.one(f"GET {MANIFEST_ROUTE}")
    assert (failed.status, failed["error.type"], failed["http.response.status_code"]) == ("error", "502", 502)
    asked, *_ = collector.of("GET", http__response__status_code=500)
    assert (asked.kind, asked.status, asked["error.type"]) == ("client", "error", "500")
    elsewhere = collector.one("GET", url__path="/elsewhere")
    assert (elsewhere.kind, elsewhere["http.response.status_code"]) == ("server", 404)
    assert "http.route" not in elsewhere.attributes
    brewed = collector.one("HTTP /v2/")
    assert (brewed["http.request.method"], brewed["http.request.method_original"]) == ("_OTHER", "PROPFIND")


async def test_an_upstream_that_cannot_be_reached(
    serve: Serve, image: Image, collector: Collector, tracer: Make
) -> None:
    traced = tracer()
    site = await serve(f"http://127.0.0.1:{free_ports(1)[0]}", tracer=traced)
    assert (await site.get(TAG))[0] == 502
    await traced.close()
    attempts = collector.children(collector.one(f"GET {MANIFEST_ROUTE}"))
    assert {each.status for each in attempts} == {"error"}
    assert {each["error.type"] for each in attempts} == {"ClientConnectorError"}
    assert [each.attributes.get("http.request.resend_count") for each in attempts] == [None, 1, 2]


async def test_a_client_that_leaves(
    serve: Serve, upstream: Upstream, image: Image, collector: Collector, tracer: Make
) -> None:
    traced = tracer()
    site, ear, hold = await serve(upstream, tracer=traced), Ear(), Hold(asyncio.Event(), after=None)
    upstream.next("GET", image.layers[0], hold)
    async with connect(site.url) as wire:
        await wire.send(
            f"GET /v2/library/alpine/blobs/{image.layers[0]} HTTP/1.1\r\nHost: cache.test\r\n\r\n".encode()
        )
        await hold.reached.wait()
    await ear.heard("request.served", status=499)
    hold.gate.set()
    await fills_ended()
    await traced.close()
    left = collector.one(f"GET {BLOB_ROUTE}")
    assert (left.status, left["error.type"], left.message) == ("error", "abandoned", "client left")
    assert "http.response.status_code" not in left.attributes
    assert collector.one("fill")["entrepot.fill.result"] == "committed"  # nobody else has to wait again


def test_every_endpoint_has_a_route() -> None:
    assert request_span.ROUTES.keys() == {each.value for each in Endpoint}


# Hits


async def test_hits_that_are_not_parsed_again_are_traced(
    serve: Serve,
    upstream: Upstream,
    image: Image,
    collector: Collector,
    tracer: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answered: list[bool] = []
    answer = Hits.answer

    def counting(self: Hits, head: bytes, client: str, write: Callable[[bytes], None]) -> bool:
        answered.append(answer(self, head, client, write))
        return answered[-1]

    monkeypatch.setattr(Hits, "answer", counting)
    traced, ear = tracer(), Ear()
    site = await serve(upstream, tracer=traced)
    async with connect(site.url) as wire:
        for _ in range(6):
            assert (await wire.ask("GET", TAG, "User-Agent: test")).body == image.content
    assert answered.count(True) >= 2
    lines = [await ear.heard("request.served") for _ in range(6)]
    await traced.close()
    spans = sorted(collector.of(f"GET {MANIFEST_ROUTE}"), key=lambda each: each.begun)
    assert [each.trace for each in spans] == [each["trace"] for each in lines]
    assert [each["entrepot.request.id"] for each in spans] == [each["id"] for each in lines]
    assert len({each.trace for each in spans}) == 6
    last, parsed = spans[-1].attributes, spans[1].attributes
    assert (last["entrepot.result"], last["user_agent.original"]) == ("hit", "test")
    assert {**last, "entrepot.request.id": ""} == {**parsed, "entrepot.request.id": ""}


async def test_hits_in_the_trace_of_a_client(
    serve: Serve, upstream: Upstream, image: Image, collector: Collector, tracer: Make
) -> None:
    traced = tracer(traces_sampler="parentbased_always_off")
    site = await serve(upstream, tracer=traced)
    async with connect(site.url) as wire:
        for _ in range(5):
            assert (await wire.ask("GET", TAG, f"traceparent: {SAMPLED}")).status == 200
    await traced.close()
    assert [each.parent for each in collector.of(f"GET {MANIFEST_ROUTE}")] == [PARENT] * 5


async def test_exemplars_lead_from_the_metrics_to_traces(
    serve: Serve, upstream: Upstream, image: Image, collector: Collector, tracer: Make
) -> None:
    traced = tracer(traces_sampler="parentbased_always_off")
    site = await serve(upstream, tracer=traced)
    assert (await site.get(TAG))[0] == 200  # of no trace that can be looked at
    assert (await site.get(TAG, traceparent=SAMPLED))[0] == 200
    await traced.close()
    (served,) = collector.of(f"GET {MANIFEST_ROUTE}")
    assert site.app.admin_url is not None
    openmetrics = {"Accept": "application/openmetrics-text; version=1.0.0"}
    async with site.session.get(site.app.admin_url / "metrics", headers=openmetrics) as response:
        text = await response.text()
    labels = {
        tuple(sorted(sample.exemplar.labels.items()))
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.exemplar is not None
    }
    assert labels == {(("span_id", served.id), ("trace_id", TRACE))}
    assert TRACE not in await site.metrics()


# Administrators


async def test_requests_of_administrators(
    serve: Serve, upstream: Upstream, image: Image, collector: Collector, tracer: Make
) -> None:
    traced = tracer()
    site = await serve(upstream, top={"admin_ui": "on"}, tracer=traced)
    admin = site.app.admin_url
    assert admin is not None
    sent = {"traceparent": SAMPLED, "User-Agent": "test"}
    for path in ("metrics", "healthz", "readyz", "api/v1/stats", "ui/storage", "api/v1/nothing"):
        async with site.session.get(admin / path, headers=sent) as response:
            assert response.status == (404 if path.endswith("nothing") else 200)
    async with site.session.post(admin / "api/v1/warm", json={"reference": "alpine"}) as response:
        assert response.status == 200
    await traced.close()
    asked = [each for each in collector.spans if each.kind == "server"]
    assert [each.name for each in asked] == [
        "GET /api/v1/stats",
        "GET /ui/storage",
        "GET",
        "POST /api/v1/warm",
    ]
    assert [each["http.response.status_code"] for each in asked] == [200, 200, 404, 200]
    assert [(each.trace, each.parent) for each in asked[:3]] == [(TRACE, PARENT)] * 3
    assert (
        asked[0].attributes.items()
        >= {
            "http.request.method": "GET",
            "http.route": "/api/v1/stats",
            "url.path": "/api/v1/stats",
            "client.address": "127.0.0.1",
            "user_agent.original": "test",
            "server.port": admin.port,
        }.items()
    )
    # What an operation asks of upstreams belongs to it.
    warm = asked[-1]
    assert {each.trace for each in collector.of("GET")} - {TRACE} == {warm.trace} != {TRACE}
    assert warm.parent == ""


async def test_an_operation_that_fails(
    serve: Serve, upstream: Upstream, collector: Collector, tracer: Make
) -> None:
    traced = tracer()
    site = await serve(upstream, tracer=traced)
    admin = site.app.admin_url
    assert admin is not None
    upstream.next("GET", "latest", Status(500), times=9)
    async with site.session.post(admin / "api/v1/warm", json={"reference": "nowhere"}) as response:
        status = response.status
    await traced.close()
    warm = collector.one("POST /api/v1/warm")
    assert warm["http.response.status_code"] == status
    assert warm.status == ("error" if status >= 500 else "")


# Policy


async def test_what_the_policy_needs_is_a_part_of_the_request(
    serve: Serve, upstream: Upstream, image: Image, collector: Collector, tracer: Make, tmp_path: Path
) -> None:
    traced = tracer()
    rule = {"name": "signed", "action": "allow", "signed_by": ["nobody"]}
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    (tmp_path / "key.pub").write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    policy = {"signers": {"nobody": {"key": str(tmp_path / "key.pub")}}, "rules": [rule]}
    site = await serve(upstream, top={"policy": policy}, tracer=traced)
    assert (await site.get(TAG))[0] == 403
    await traced.close()
    served = collector.one(f"GET {MANIFEST_ROUTE}")
    judged = collector.one("policy.judge")
    assert judged.parent == served.id
    assert (judged["entrepot.policy.rule"], judged["entrepot.policy.result"]) == ("signed", "refused")
    (verified,) = collector.of("policy.verify")
    assert (verified.parent, verified["entrepot.digest"]) == (judged.id, image.digest)
    # The signatures are asked for because of it.
    assert collector.children(verified)


# Which upstreams get the traceparent


async def test_replicas_of_a_fleet_continue_the_trace(
    upstream: Upstream, image: Image, collector: Collector, tracer: Make, tmp_path: Any, clock: Clock
) -> None:
    ports, traced = free_ports(2), [tracer("one"), tracer("two")]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    tree = {"peers": {"urls": urls, "secret": SECRET}}
    tree["namespaces"] = {"docker.io": {"upstream": {"url": upstream.url}}}
    replicas = [
        await start(
            tmp_path / str(port), clock, {"listen": f"127.0.0.1:{port}", **tree}, tracer=traced[number]
        )
        for number, port in enumerate(ports)
    ]
    try:
        for each in replicas:
            await pull(each, image, traceparent=SAMPLED)
        await fills_ended()
    finally:
        for each in replicas:
            await each.stop()
    for made in traced:
        await made.close()
    # Of the three, one replica asks the other for at least one: each asks the upstream for what it owns.
    asked = [each for each in collector.spans if "entrepot.peer" in each.attributes]
    assert asked and all(each.kind == "server" for each in asked)
    by_id = {each.id: each for each in collector.spans}
    for each in asked:
        assert by_id[each.parent].kind == "client" and by_id[each.parent].service != each.service
    assert {each.trace for each in collector.spans} == {TRACE}
    assert all("traceparent" not in each.headers for each in upstream.requests)


async def test_neither_token_realm_nor_store_learn_the_trace(
    serve: Serve, upstream: Upstream, image: Image, collector: Collector, tracer: Make
) -> None:
    upstream.auth, upstream.cdn = Bearer(), True
    site = await serve(upstream, options={"trace": True}, tracer=tracer())
    await pull(site, image, traceparent=SAMPLED)
    told = {each.kind for each in upstream.requests if "traceparent" in each.headers}
    untold = {each.kind for each in upstream.requests if "traceparent" not in each.headers}
    assert told == {"manifest", "blob", "token"} or told == {"manifest", "blob"}
    assert "cdn" in untold


# Pushes


async def test_a_push_writes_to_the_store(
    serve: Serve, upstream: Upstream, collector: Collector, tracer: Make
) -> None:
    traced = tracer()
    site = await serve(upstream, more={"local": {"store": {}}}, tracer=traced)
    digest = digest_of(BODY)
    async with site.request("POST", f"/v2/local/app/blobs/uploads/?digest={digest}", data=BODY) as response:
        assert response.status == 201
    await traced.close()
    pushed = collector.one("POST /v2/{name}/blobs/uploads/")
    assert pushed["url.query"] == f"digest={digest}"
    (written,) = collector.children(pushed)
    assert (written.name, written["entrepot.digest"]) == ("store.write", digest)


# The collector


async def test_a_collector_that_is_down_changes_nothing_and_is_told_once(
    serve: Serve,
    upstream: Upstream,
    image: Image,
    collector: Collector,
    tracer: Make,
    events: LogCapture,
) -> None:
    ear, traced = Ear(), tracer(exporter_otlp_timeout="0.5")
    await collector.stop()
    site = await serve(upstream, tracer=traced)
    await pull(site, image)
    assert "Failed to export" in (await ear.heard("tracing.failed"))["error"]
    await pull(site, image)
    await collector.start()
    assert (await site.get(TAG))[0] == 200
    await ear.heard("tracing.restored")
    assert [each["event"] for each in events.entries if each["event"] == "tracing.failed"] == [
        "tracing.failed"
    ]


async def test_a_collector_that_does_not_answer_delays_no_pull_and_no_end(
    serve: Serve,
    upstream: Upstream,
    image: Image,
    collector: Collector,
    tracer: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(otel, "FLUSH", 0.01)
    traced = tracer(bsp_max_queue_size="8", bsp_max_export_batch_size="2")
    collector.gate.clear()
    site = await serve(upstream, tracer=traced)
    await pull(site, image)
    await collector.reached.wait()
    for _ in range(50):  # more than wait
        assert (await site.get(TAG))[0] == 200
    await traced.close()
    assert collector.spans == []


# Whether anything is traced


ASKED = [
    ({}, False),
    ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, True),
    ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, True),
    ({"OTEL_EXPORTER_OTLP_ENDPOINT": " "}, False),
    ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
    ({"OTEL_TRACES_EXPORTER": "console, OTLP"}, True),
    ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, False),
    ({"OTEL_SDK_DISABLED": "TRUE", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, False),
    ({"OTEL_SDK_DISABLED": "false", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, True),
    ({"OTEL_SERVICE_NAME": "cache"}, False),
]


@pytest.mark.parametrize(("variables", "expected"), ASKED, ids=[str(sorted(each)) for each, _ in ASKED])
def test_what_asks_for_traces(variables: dict[str, str], expected: bool) -> None:
    assert configured(variables) is expected


WRONG = {
    "OTEL_EXPORTER_OTLP_PROTOCOL": ("grpc", "http/protobuf"),
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": ("http/json", "http/protobuf"),
    "OTEL_BSP_MAX_QUEUE_SIZE": ("-1", "max_queue_size"),
}


@pytest.mark.parametrize("variable", WRONG)
def test_variables_that_do_not_work(
    variable: str, events: LogCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    value, told = WRONG[variable]
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv(variable, value)
    assert isinstance(make_tracer(), NoTracer)
    (event,) = events.entries
    assert event["event"] == "tracing.unavailable" and told in event["error"]
    assert isinstance(make_tracer(tell=False), NoTracer)
    assert len(events.entries) == 1


def test_without_the_library_the_log_says_what_to_install(
    events: LogCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "proxy.telemetry.otel", None)
    assert isinstance(make_tracer(), NoTracer)
    (event,) = events.entries
    assert "entrepot[tracing]" in event["error"]


async def test_a_sampler_that_is_not_known_is_told_once(tracer: Make, events: LogCapture) -> None:
    tracer(traces_sampler="sometimes")
    assert [(each["event"], "sometimes" in each["warning"]) for each in events.entries] == [
        ("tracing.warned", True)
    ]


@pytest.mark.clients
def test_the_server_imports_nothing_of_it() -> None:
    code = (
        "import sys, proxy.cli.main, proxy.server.process;"
        "print([name for name in sys.modules if 'opentelemetry' in name or name == 'requests'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


async def test_the_resource(collector: Collector, tracer: Make, serve: Serve, upstream: Upstream) -> None:
    traced = tracer("cache", resource_attributes="deployment.environment.name=test,host.name=elsewhere")
    site = await serve(upstream, tracer=traced)
    assert (await site.get("/v2/"))[0] == 200
    await traced.close()
    resource = collector.one("GET /v2/").resource
    assert resource["service.name"] == "cache"
    assert (resource["deployment.environment.name"], resource["host.name"]) == ("test", "elsewhere")
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", resource["service.version"])


# Processes


@pytest.mark.clients
async def test_several_workers_send_what_waits_when_they_end(place: Place, collector: Collector) -> None:
    place.environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_BSP_SCHEDULE_DELAY": "600000",  # milliseconds: nothing is sent before the end
        "no_proxy": "127.0.0.1",
    }
    server = await place.start()
    workers = await server.workers()
    for each in workers:
        await each.get("/v2/", traceparent=SAMPLED)
    await server.heard("request.served", 2, trace=TRACE)
    assert collector.spans == []
    await server.stop()
    asked = [each for each in collector.of("GET /v2/") if each.trace == TRACE]
    assert sorted(each.resource["process.pid"] for each in asked) == sorted(each.pid for each in workers)
    assert {each.service for each in asked} == {"entrepot"}
    traces = [each.trace for each in collector.spans if each.trace != TRACE]
    assert len(set(traces)) == len(traces)  # what was forked does not repeat itself

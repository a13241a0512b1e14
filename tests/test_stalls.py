"""What would hold up the event loop runs in threads: which call runs where, not how long it takes."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from structlog.testing import LogCapture

from proxy.telemetry.stalls import watched_callbacks
from storage import oci
from storage.concurrency import LARGE
from storage.disk.records import SQLiteRecords
from storage.oci import OCI_INDEX, Digest
from tests.conftest import Clock, Serve
from tests.processes import Place, place
from tests.upstream import Status, Upstream
from tests.wire import connect

__all__ = ["place"]  # the fixture

CALLS = ("_decode", "_decode_type")


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, bool]]]:
    """The calls that parse large JSON, and whether each ran in the thread of the event loop."""
    calls: list[tuple[str, bool]] = []

    def recording(name: str, real: Any) -> Any:
        def call(content: bytes, *args: Any, **keys: Any) -> Any:
            if len(content) > LARGE:
                calls.append((name, threading.current_thread() is threading.main_thread()))
            return real(content, *args, **keys)

        return call

    for name in CALLS:
        monkeypatch.setattr(oci, name, recording(name, getattr(oci, name)))
    monkeypatch.setattr(oci.json, "loads", recording("loads", json.loads))
    yield calls


def index(entries: int, **more: Any) -> bytes:
    """An index that lists so many images, and names none that a registry must have."""
    children = [
        {"mediaType": "application/vnd.example+json", "digest": str(Digest.of(b"%d" % each)), "size": 1}
        for each in range(entries)
    ]
    found = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": children, **more}
    return json.dumps(found).encode()


@pytest.mark.parametrize("media_type", [OCI_INDEX, "application/json"])
async def test_a_large_index_is_pulled_without_parsing_it_on_the_loop(
    serve: Serve, upstream: Upstream, parsed: list[tuple[str, bool]], media_type: str
) -> None:
    content = index(1000)
    assert len(content) > LARGE
    upstream.next("GET", "3", Status(200, {"Content-Type": media_type}, content))
    site = await serve(upstream, refuse_incomplete="always")
    status, headers, body = await site.get("/v2/library/alpine/manifests/3")
    assert (status, headers["Content-Type"], body) == (200, OCI_INDEX, content)
    assert not any(on_loop for _, on_loop in parsed), parsed


async def test_a_large_index_is_pushed_and_listed_without_parsing_it_on_the_loop(
    serve: Serve, upstream: Upstream, parsed: list[tuple[str, bool]]
) -> None:
    image = Digest.of(b"{}")
    site = await serve(upstream, more={"local": {"store": {"sparse": True}}})
    tag = str(image).replace(":", "-")
    for reference in ("big", tag):
        async with site.request(
            "PUT",
            f"/v2/local/app/manifests/{reference}",
            data=index(1000, subject={"mediaType": OCI_INDEX, "digest": str(image), "size": 2}),
            headers={"Content-Type": OCI_INDEX},
        ) as response:
            assert response.status == 201, await response.text()
            assert response.headers["OCI-Subject"] == image
    status, _, body = await site.get(f"/v2/local/app/referrers/{image}")
    assert status == 200
    assert json.loads(body)["manifests"]
    assert parsed
    assert not any(on_loop for _, on_loop in parsed), parsed


# What does hold it up is logged


async def work(clock: Clock, seconds: float) -> None:
    await asyncio.sleep(0)
    await deeper(clock, seconds)


async def deeper(clock: Clock, seconds: float) -> None:
    clock.advance(seconds)
    await asyncio.sleep(0)


def stalls(events: LogCapture) -> list[tuple[float, str]]:
    entries = [each for each in events.entries if each["event"] == "loop.stalled"]
    return [(each["seconds"], each["place"]) for each in entries]


async def test_what_holds_up_the_loop_is_logged_with_its_place(clock: Clock, events: LogCapture) -> None:
    line = deeper.__code__.co_firstlineno + 2
    with watched_callbacks(0.02, clock):
        for seconds in (0.02, 0.5, 0.001):
            await asyncio.create_task(work(clock, seconds))
        before = f"work > deeper (tests/test_stalls.py), before it waits in line {line}"
        assert stalls(events) == [(0.5, before)]
    await asyncio.create_task(work(clock, 0.5))
    assert len(stalls(events)) == 1


async def ending(clock: Clock) -> None:
    clock.advance(1)


def called(clock: Clock, done: asyncio.Event) -> None:
    clock.advance(1)
    done.set()


async def test_a_task_that_ends_and_a_function_are_named(clock: Clock, events: LogCapture) -> None:
    done = asyncio.Event()
    with watched_callbacks(0.02, clock):
        await asyncio.create_task(ending(clock))
        asyncio.get_running_loop().call_soon(partial(called, clock), done)
        await done.wait()
        await asyncio.sleep(0)
    assert stalls(events) == [
        (1, "ending (tests/test_stalls.py), to its end"),
        (1, "called (tests/test_stalls.py)"),
    ]


async def test_by_default_nothing_is_watched(clock: Clock) -> None:
    run = asyncio.Handle._run
    with watched_callbacks(None, clock):
        assert asyncio.Handle._run is run


@pytest.mark.clients
async def test_a_server_logs_what_takes_its_loop_longer(place: Place) -> None:
    place.tree["log"] = {"slow_callbacks": "1ms"}
    server = await place.start()
    async with connect(server.url) as wire:
        assert (await wire.ask("GET", "/v2/")).status == 200
    event = await server.heard("loop.stalled")  # its start takes more than that
    assert event["seconds"] >= 0.001
    assert event["place"]
    await server.stop()


# What reads many records


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """The scans of records, and whether each ran in the thread of the event loop."""
    scans: list[tuple[str, bool]] = []

    def recording(name: str, real: Any) -> Any:
        def scan(self: SQLiteRecords, prefix: str, after: str = "") -> Iterator[Any]:
            scans.append((name, threading.current_thread() is threading.main_thread()))
            yield from real(self, prefix, after)

        return scan

    for name in ("scan", "groups"):
        monkeypatch.setattr(SQLiteRecords, name, recording(name, getattr(SQLiteRecords, name)))
    return scans


@pytest.mark.parametrize("path", ["_catalog", "local/app/tags/list", "local/app/referrers/{digest}"])
async def test_lists_are_read_in_threads(
    serve: Serve, upstream: Upstream, scanned: list[tuple[str, bool]], path: str
) -> None:
    site = await serve(upstream, more={"local": {"store": {"sparse": True}}})
    digest = Digest.of(b"{}")
    content = index(3, subject={"mediaType": OCI_INDEX, "digest": str(digest), "size": 2})
    async with site.request(
        "PUT", "/v2/local/app/manifests/a", data=content, headers={"Content-Type": OCI_INDEX}
    ) as response:
        assert response.status == 201
    scanned.clear()
    status, _, body = await site.get(f"/v2/{path.format(digest=digest)}")
    assert (status, b"a" in body) == (200, True)
    assert scanned
    assert not any(on_loop for _, on_loop in scanned), scanned

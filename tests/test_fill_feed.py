"""The fills as they come: one look for all that watch, and none while nobody does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from typing import Any

import pytest
from aiohttp import ClientPayloadError, ClientSession, web
from aiohttp.test_utils import TestClient, TestServer

from proxy.admin import fill_feed
from proxy.admin.activity_reports import FillsNow
from proxy.admin.api.server_events import send_events
from proxy.admin.fill_feed import MOST, FillFeed
from proxy.processes.rows import EndedFillRow
from proxy.processes.server_processes import ended_of
from proxy.processes.state import ProcessReport
from storage.errors import Unavailable
from tests.conftest import Serve
from tests.upstream import Corrupt, Hold, Upstream


def ended(digest: str, result: Any = "committed", at: float = 2.0, error: str | None = None) -> EndedFillRow:
    return EndedFillRow(
        digest=digest, namespace="docker.io", repository="docker.io/library/alpine", bytes=5, started=1.0,
        ended=at, result=result, error=error,
    )  # fmt: skip


def now(at: float, *rows: EndedFillRow) -> FillsNow:
    return FillsNow(at=at, fills=[], ended=list(rows))


class Looked:
    """A feed of which a test says when it looks, and what it sees."""

    def __init__(self, first: FillsNow) -> None:
        self.found: FillsNow | Exception = first
        self.looks = 0
        self._turn = asyncio.Semaphore(0)
        self.feed = FillFeed(self._look, self._turn.acquire)

    async def _look(self) -> FillsNow:
        self.looks += 1
        if isinstance(self.found, Exception):
            raise self.found
        return self.found

    def again(self, found: FillsNow | Exception) -> None:
        self.found = found
        self._turn.release()


async def test_one_look_is_for_all_and_only_changes_are_told() -> None:
    rig = Looked(now(1.0))
    async with AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(aclosing(rig.feed.follow())) for _ in range(3)]
        assert [await anext(each) for each in streams] == [now(1.0)] * 3
        assert rig.looks == 1
        rig.again(now(2.0))  # nothing but the time has changed
        rig.again(now(3.0, ended("a")))
        assert [await anext(each) for each in streams] == [now(3.0, ended("a"))] * 3
        assert rig.looks == 3
        late = await stack.enter_async_context(aclosing(rig.feed.follow()))
        assert await anext(late) == now(3.0, ended("a"))
    rig.again(now(4.0, ended("b")))
    assert rig.looks == 3  # nobody watches
    async with aclosing(rig.feed.follow()) as stream:
        assert await anext(stream) == now(4.0, ended("b"))


async def test_who_is_slow_misses_what_is_outdated() -> None:
    rig = Looked(now(1.0))
    async with aclosing(rig.feed.follow()) as slow, aclosing(rig.feed.follow()) as quick:
        assert await anext(slow) == await anext(quick) == now(1.0)
        for number in range(5):
            rig.again(now(2.0, ended(str(number))))
            await anext(quick)
        assert await anext(slow) == now(2.0, ended("4"))


async def test_it_ends_for_all_when_it_is_closed() -> None:
    rig = Looked(now(1.0))
    async with aclosing(rig.feed.follow()) as one, aclosing(rig.feed.follow()) as other:
        assert await anext(one) == now(1.0)
        waiting = [asyncio.ensure_future(anext(each, None)) for each in (one, other)]
        assert await waiting[1] == now(1.0)
        await rig.feed.close()
        assert await waiting[0] is None
        assert await anext(other, None) is None
    assert [each async for each in rig.feed.follow()] == []


async def test_so_many_may_watch() -> None:
    rig = Looked(now(1.0))
    async with AsyncExitStack() as stack:
        for _ in range(MOST):
            await anext(await stack.enter_async_context(aclosing(rig.feed.follow())))
        with pytest.raises(Unavailable, match="others watch"):
            await anext(rig.feed.follow())
        assert [each async for each in rig.feed.follow(once=True)] == [now(1.0)]
    async with aclosing(rig.feed.follow()) as stream:
        assert await anext(stream) == now(1.0)


async def test_a_look_that_fails_ends_all_and_the_next_begins_again() -> None:
    rig = Looked(now(1.0))
    async with aclosing(rig.feed.follow()) as one, aclosing(rig.feed.follow()) as other:
        assert await anext(one) == await anext(other) == now(1.0)
        rig.again(ValueError("a fault"))
        for each in (one, other):
            with pytest.raises(ValueError, match="a fault"):
                await anext(each)
    rig.found = now(2.0)
    async with aclosing(rig.feed.follow()) as stream:
        assert await anext(stream) == now(2.0)


def test_what_several_processes_followed_is_one() -> None:
    def report(pid: int, *rows: EndedFillRow) -> ProcessReport:
        return ProcessReport(pid=pid, fills=[], upstreams=[], troubles=[], ended=list(rows))

    fetched, followed = ended("a", at=3.0), ended("a", "followed", at=3.1)
    alone, failed = ended("b", "followed", at=9.0), ended("c", "failed", at=1.0, error="it broke off")
    assert ended_of([report(1, failed, fetched), report(2, followed, alone)]) == [alone, fetched, failed]


# As server-sent events


async def answering(*results: object, silence: float = 9.0) -> tuple[TestServer, list[str]]:
    """A server that sends these; an exception is raised, None waits until the end of the client."""
    said: list[str] = []

    async def given() -> AsyncIterator[object]:
        try:
            for each in results:
                if isinstance(each, Exception):
                    raise each
                if each is None:
                    await asyncio.Event().wait()
                yield each
        finally:
            said.append("closed")

    async def handle(request: web.Request) -> web.StreamResponse:
        return await send_events(request, given(), silence)

    application = web.Application()
    application.router.add_get("/", handle)
    server = TestServer(application)
    await server.start_server()
    return server, said


async def test_each_result_is_an_event() -> None:
    server, said = await answering(now(1.0), {"a": "b\nc"})
    async with TestClient(server) as client, client.get("/") as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        assert response.headers["Cache-Control"] == "no-store"
        assert await response.text() == (
            'retry: 2000\n\ndata: {"at":1.0,"fills":[],"ended":[]}\n\ndata: {"a":"b\\nc"}\n\n'
        )
    assert said == ["closed"]


async def test_without_a_result_there_is_no_event() -> None:
    server, said = await answering()
    async with TestClient(server) as client, client.get("/") as response:
        assert (response.status, await response.text()) == (200, "")
    assert said == ["closed"]


async def test_silence_is_broken_by_comments() -> None:
    server, _ = await answering(now(1.0), None, silence=0.0)
    async with TestClient(server) as client, client.get("/") as response:
        assert await response.content.readuntil(b":\n\n:\n\n:\n\n")


async def test_a_client_that_left_is_not_waited_for() -> None:
    server, said = await answering(now(1.0), None, silence=0.0)
    async with TestClient(server) as client, client.get("/") as response:
        await response.content.readuntil(b"}\n\n")
        response.close()
    assert said == ["closed"]


# In a server


async def events(session: ClientSession, url: Any, **query: str) -> AsyncIterator[dict[str, Any]]:
    async with session.get((url / "api/v1/fills/events").with_query(query)) as response:
        assert response.status == 200
        async for line in response.content:
            if line.startswith(b"data: "):
                yield json.loads(line.removeprefix(b"data: "))


async def test_a_fill_is_seen_as_it_comes_and_ends(
    serve: Serve, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fill_feed, "INTERVAL", 0.0)
    site = await serve(upstream)
    digest = upstream.blob("library/alpine", bytes(50_000))
    hold = Hold(asyncio.Event(), after=20_000)
    upstream.next("GET", digest, hold)
    async with aclosing(events(site.session, site.app.admin_url)) as stream:
        assert (await anext(stream))["fills"] == []
        pulling = asyncio.create_task(site.get(f"/v2/library/alpine/blobs/{digest}"))
        coming = await anext(stream)
        while not coming["fills"] or coming["fills"][0]["bytes"] < 20_000:
            coming = await anext(stream)
        (row,) = coming["fills"]
        assert (row["digest"], row["size"], row["followers"]) == (digest, 50_000, 1)
        hold.gate.set()
        await pulling
        while coming["fills"]:
            coming = await anext(stream)
        assert [(each["digest"], each["bytes"], each["result"]) for each in coming["ended"]] == [
            (digest, 50_000, "committed")
        ]
        stopping = asyncio.create_task(site.app.stop())  # long before its drain of a second has passed
        assert [each async for each in stream] == []
        await stopping


@pytest.mark.errors("fill.failed")
async def test_a_fill_that_fails_says_why(serve: Serve, upstream: Upstream) -> None:
    site = await serve(upstream)
    digest = upstream.blob("library/alpine", bytes(5000))
    upstream.next("GET", digest, Corrupt(), times=99)
    with pytest.raises(ClientPayloadError):
        await site.get(f"/v2/library/alpine/blobs/{digest}")
    (now,) = [each async for each in events(site.session, site.app.admin_url, once="true")]
    (row,) = now["ended"]
    assert (row["digest"], row["result"]) == (digest, "failed")
    assert "sent wrong content" in row["error"]

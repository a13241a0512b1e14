"""Clients that hog, dawdle or get stuck."""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack
from typing import Any

import pytest

from proxy.web import backlog, listener
from tests.conftest import Serve, Site
from tests.distribution import code
from tests.events import Ear
from tests.upstream import Upstream
from tests.wire import connect


@pytest.fixture(params=["http", "https"])
def serve(request: pytest.FixtureRequest, serve: Serve, identity: dict[str, str]) -> Serve:
    """By TLS as in plain: it makes no difference to a client."""
    if request.param == "http":
        return serve

    async def encrypted(upstream: Upstream | str, *, top: dict[str, Any] | None = None, **more: Any) -> Site:
        return await serve(upstream, top={"tls": identity, **(top or {})}, **more)

    return encrypted


PING = b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n"


async def test_an_address_may_have_so_many_connections(serve: Serve, upstream: Upstream) -> None:
    site = await serve(upstream, top={"limits": {"connections_per_address": 3}})
    ear = Ear()
    async with AsyncExitStack() as stack:
        wires = [await stack.enter_async_context(connect(site.url)) for _ in range(3)]
        for wire in wires:
            assert (await wire.ask("GET", "/v2/")).status == 200
        try:
            async with connect(site.url) as fourth:
                assert await fourth.rest() == b""
        except ConnectionResetError:  # before it has shaken hands
            assert site.url.startswith("https:")
        assert (await ear.heard("client.refused"))["connections"] == 3
        for wire in wires:  # those that are in are left alone
            assert (await wire.ask("GET", "/v2/")).status == 200
    async with connect(site.url) as again:
        assert (await again.ask("GET", "/v2/")).status == 200


@pytest.mark.parametrize("sent", [b"", b"GET /v2/ HTT", PING[:-2]])
async def test_who_does_not_finish_a_request_in_time_is_let_go(
    serve: Serve, upstream: Upstream, sent: bytes
) -> None:
    site = await serve(upstream, top={"limits": {"request_timeout": "200ms", "idle_timeout": "1h"}})
    async with connect(site.url) as wire:
        await wire.send(sent)
        assert await wire.rest() == b""


async def test_a_drop_at_a_time_does_not_put_off_the_end(serve: Serve, upstream: Upstream) -> None:
    site = await serve(upstream, top={"limits": {"request_timeout": "200ms", "idle_timeout": "1h"}})
    async with connect(site.url) as wire:
        await wire.send(b"GET /v2/ HTTP/1.1\r\n")
        ended = asyncio.ensure_future(wire.rest())
        drops = 0
        while not ended.done():
            wire.writer.write(b"X-Drop: 1\r\n")
            drops += 1
            await asyncio.wait((ended,), timeout=0.02)
            assert drops < 500
        assert (await asyncio.gather(ended, return_exceptions=True))[0] in (b"",) or ended.exception()


async def test_between_requests_a_client_may_idle_but_not_for_ever(serve: Serve, upstream: Upstream) -> None:
    site = await serve(upstream, top={"limits": {"request_timeout": "500ms", "idle_timeout": "1s"}})
    async with connect(site.url) as wire:
        for _ in range(2):
            assert (await wire.ask("GET", "/v2/")).status == 200
        begun = asyncio.get_running_loop().time()
        assert await wire.rest() == b""
        assert asyncio.get_running_loop().time() - begun > 0.9  # the time it has, not that for a request


@pytest.mark.clients
async def test_a_client_that_takes_nothing_is_cut_off(serve: Serve, upstream: Upstream) -> None:
    content = os.urandom(32 << 20)
    digest = upstream.blob("library/alpine", content)
    site = await serve(upstream, top={"limits": {"client_timeout": "200ms"}})
    ear = Ear()
    assert (await site.get(f"/v2/alpine/blobs/{digest}"))[2] == content
    await ear.heard("request.served", kind="blob")
    async with connect(site.url, buffer=16 << 10) as wire:
        await wire.send(f"GET /v2/alpine/blobs/{digest} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert (await wire.head())[0] == 200
        served = await ear.heard("request.served", kind="blob")
        assert served["detail"] == "client took nothing"
        assert served["bytes"] < len(content)
        with pytest.raises(ConnectionResetError):
            await wire.rest()


async def test_slow_clients_that_take_something_are_not_cut_off(serve: Serve, upstream: Upstream) -> None:
    content = os.urandom(8 << 20)
    digest = upstream.blob("library/alpine", content)
    site = await serve(upstream, top={"limits": {"client_timeout": "2s"}})
    async with connect(site.url, buffer=64 << 10) as wire:
        await wire.send(f"GET /v2/alpine/blobs/{digest} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert (await wire.head())[0] == 200
        assert await wire.read(len(content)) == content


STORE = {"local": {"store": {}}}
LARGE = "/v2/local/app/manifests/large"


async def push(site: Site, content: bytes, path: str = LARGE) -> None:
    headers = {"Content-Type": "application/vnd.example.large"}
    async with site.request("PUT", path, data=content, headers=headers) as response:
        assert response.status == 201


@pytest.mark.parametrize("size", [300_000, 4_000_000])
async def test_a_client_that_takes_nothing_of_a_manifest_is_cut_off(
    serve: Serve, upstream: Upstream, size: int
) -> None:
    site = await serve(upstream, more=STORE, top={"limits": {"client_timeout": "200ms"}})
    await push(site, content := os.urandom(size))
    ear = Ear()
    async with connect(site.url, buffer=4 << 10) as wire:
        await wire.send(f"GET {LARGE} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert (await ear.heard("client.cut_off"))["reason"] == "it took nothing"
        with pytest.raises(ConnectionResetError):
            await wire.rest()
    assert (await site.get(LARGE))[2] == content


@pytest.mark.clients
async def test_a_client_that_takes_nothing_of_a_list_is_cut_off(serve: Serve, upstream: Upstream) -> None:
    names = [f"{number:0100}" for number in range(10_000)]
    for name in names:
        upstream.image("library/alpine", name)
    site = await serve(upstream, top={"limits": {"client_timeout": "200ms"}})
    path = "/v2/library/alpine/tags/list"
    assert (await site.get(path))[0] == 200
    ear = Ear()
    async with connect(site.url, buffer=4 << 10) as wire:
        await wire.send(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await ear.heard("client.cut_off")
        with pytest.raises(ConnectionResetError):
            await wire.rest()


@pytest.mark.clients
async def test_a_client_that_takes_nothing_of_many_small_responses_is_cut_off(
    serve: Serve, upstream: Upstream
) -> None:
    site = await serve(upstream, top={"limits": {"client_timeout": "200ms"}})
    ear = Ear()
    async with connect(site.url, buffer=4 << 10) as wire:
        asking = asyncio.create_task(wire.send(PING * 100_000))
        await ear.heard("client.cut_off")
        with pytest.raises(ConnectionError):
            await wire.rest()
        await asyncio.gather(asking, return_exceptions=True)


@pytest.mark.parametrize("lines", ["", "Range: bytes=0-9999,20000-40000\r\n", "Range: bytes=0-\r\n"])
async def test_a_client_that_takes_nothing_of_many_small_blobs_is_cut_off(
    serve: Serve, upstream: Upstream, lines: str
) -> None:
    digest = upstream.blob("library/alpine", bytes(60_000))
    site = await serve(upstream, top={"limits": {"client_timeout": "100ms"}})
    asked = f"GET /v2/library/alpine/blobs/{digest} HTTP/1.1\r\nHost: x\r\n{lines}\r\n".encode()
    async with connect(site.url, buffer=4 << 10) as wire:
        asking = asyncio.create_task(wire.send(asked * 1000))
        noticed = [
            asyncio.create_task(Ear().heard("client.cut_off")),  # by the listener
            asyncio.create_task(
                Ear().heard("request.served", detail="client took nothing")
            ),  # by send_blob()
        ]
        (first, *_), rest = await asyncio.wait(noticed, return_when=asyncio.FIRST_COMPLETED)
        await first
        for each in rest:
            each.cancel()
        with pytest.raises(ConnectionError):
            await wire.rest()
        await asyncio.gather(asking, *rest, return_exceptions=True)


async def test_a_slow_client_gets_all_of_a_large_body(serve: Serve, upstream: Upstream) -> None:
    site = await serve(upstream, more=STORE, top={"limits": {"client_timeout": "2s"}})
    contents = [os.urandom(size) for size in ((64 << 10) - 1, 64 << 10, (64 << 10) + 1, 3_000_000)]
    for number, content in enumerate(contents):
        await push(site, content, f"{LARGE}{number}")
    async with connect(site.url, buffer=16 << 10) as wire:
        for number, content in enumerate(contents):
            reply = await wire.ask("HEAD", f"{LARGE}{number}")
            assert reply.headers["Content-Length"] == str(len(content))
            reply = await wire.ask("GET", f"{LARGE}{number}")
            assert (reply.status, reply.body) == (200, content)
            assert "Docker-Content-Digest" in reply.headers
            assert "X-Request-Id" in reply.headers
        reply = await wire.ask("GET", f"{LARGE}3", "Connection: close")
        assert (reply.status, reply.body) == (200, contents[3])
        assert await wire.rest() == b""


async def test_what_waits_for_slow_clients_is_bounded(
    serve: Serve, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "MOST_WAITING", 9_000_000)
    monkeypatch.setattr(backlog, "PATIENT", 0.0)
    site = await serve(upstream, more=STORE)
    await push(site, content := os.urandom(4_000_000))
    asked = f"GET {LARGE} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    ear = Ear()
    async with AsyncExitStack() as stack:
        wires = [await stack.enter_async_context(connect(site.url, buffer=4 << 10)) for _ in range(2)]
        for wire in wires:
            await wire.send(asked)
            await ear.heard("request.served")
            assert (await wire.head())[0] == 200
        assert (await site.get(LARGE))[2] == content
        assert (await ear.heard("client.cut_off"))["reason"] == "too much waits for slow clients"
        monkeypatch.setattr(backlog, "PATIENT", 1000.0)
        third = await stack.enter_async_context(connect(site.url, buffer=4 << 10))
        await third.send(asked)
        assert (await third.head())[0] == 200
        status, headers, body = await site.get(LARGE)
        assert (status, headers["Retry-After"], code(body)) == (503, "1", "UNAVAILABLE")
        assert (await ear.heard("client.postponed"))["waiting"] == 8_000_000


async def test_oversized_and_endless_heads_are_refused(serve: Serve, upstream: Upstream) -> None:
    site = await serve(upstream)
    for head in (
        b"GET /v2/" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /v2/ HTTP/1.1\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
        b"GET /v2/ HTTP/1.1\r\n" + b"X: 1\r\n" * 1000 + b"\r\n",
    ):
        async with connect(site.url) as wire:
            await wire.send(head)
            reply = await wire.reply()
            assert reply.status == 400
            assert reply.headers["Content-Type"] == "application/json"
            assert await wire.rest() == b""


async def test_many_requests_at_once_on_one_connection_are_answered_in_order(
    serve: Serve, upstream: Upstream
) -> None:
    site = await serve(upstream)
    async with connect(site.url) as wire:
        await wire.send(PING * 500)
        for _ in range(500):
            assert (await wire.reply()).body == b"{}"

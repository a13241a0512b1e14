"""The admin listener treats clients as the clients' listener does: errors, limits on time and connections."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from aiohttp.test_utils import make_mocked_request
from aiohttp.web_protocol import RequestHandler
from structlog.testing import LogCapture

from proxy.admin.api.app import errors_in_json
from storage.concurrency import Cancelled
from tests.conftest import Serve, Site
from tests.events import Ear
from tests.upstream import Upstream
from tests.wire import connect

LIMITS = {"request_timeout": "200ms", "idle_timeout": "1s", "connections_per_address": 4}
HOST = b"Host: localhost\r\n"
SECRET = b"swordfish"


@pytest.fixture
async def site(serve: Serve, upstream: Upstream) -> AsyncIterator[Site]:
    yield await serve(upstream, top={"limits": LIMITS})


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"BREW /healthz HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"GET /api/v1/pins?\xfe HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"GET /api/v1/pins HTTP/1.1\r\n" + HOST + b"Authorization swordfish\r\n\r\n", 400),
        (b"GET /api/v1/pins HTTP/1.1\r\n" + HOST + b"Authorization: " + SECRET * 9000 + b"\r\n\r\n", 431),
        (b"GET /metrics HTTP/1.1\r\n" + HOST + b"Expect: swordfish\r\n\r\n", 417),
        (b"GET /swordfish HTTP/1.1\r\n" + HOST + b"\r\n", 404),
        (b"PUT /healthz HTTP/1.1\r\n" + HOST + b"\r\n", 405),
        (b"GET /api/v1/pins HTTP/1.1\r\nHost: swordfish.example\r\n\r\n", 403),
        (
            b"POST /api/v1/pins HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"
            b"Content-Encoding: gzip\r\nContent-Length: 9\r\n\r\n" + SECRET,
            415,
        ),
    ],
)
async def test_every_refusal_is_json_and_repeats_nothing(
    site: Site, events: LogCapture, request_: bytes, status: int
) -> None:
    async with connect(str(site.app.admin_url)) as wire:
        await wire.send(request_)
        reply = await wire.reply()
    assert (reply.status, reply.headers["Content-Type"]) == (status, "application/json")
    assert {"error", "code"} <= json.loads(reply.body).keys()
    assert SECRET not in reply.body
    assert SECRET.decode() not in str(events.entries)


async def test_continue_is_sent_where_it_is_expected(site: Site) -> None:
    async with connect(str(site.app.admin_url)) as wire:
        await wire.send(b"GET /healthz HTTP/1.1\r\n" + HOST + b"Expect: 100-continue\r\n\r\n")
        assert (await wire.head())[0] == 100
        assert (await wire.reply()).status == 200


@pytest.mark.parametrize("sent", [b"", b"GET /met", b"GET /metrics HTTP/1.1\r\nHost: x\r\nX-"])
async def test_the_head_of_a_request_has_to_come_in_time(site: Site, sent: bytes) -> None:
    async with connect(str(site.app.admin_url)) as wire:
        await wire.send(sent)
        assert await wire.rest() == b""


async def test_an_idle_connection_is_closed(site: Site) -> None:
    async with connect(str(site.app.admin_url)) as wire:
        assert (await wire.ask("GET", "/healthz")).status == 200
        begun = asyncio.get_running_loop().time()
        assert await wire.rest() == b""
        assert asyncio.get_running_loop().time() - begun > 0.9


async def test_an_address_has_so_many_connections(site: Site) -> None:
    ear = Ear()
    async with AsyncExitStack() as stack:
        for _ in range(LIMITS["connections_per_address"]):  # type: ignore[call-overload]
            wire = await stack.enter_async_context(connect(str(site.app.admin_url)))
            assert (await wire.ask("GET", "/healthz")).status == 200
        more = await stack.enter_async_context(connect(str(site.app.admin_url)))
        assert await more.rest() == b""
        assert (await ear.heard("client.refused"))["connections"] == 4
        async with site.request("GET", "/v2/") as response:  # clients are counted apart
            assert response.status == 200


async def test_a_client_may_leave_as_its_answer_ends(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    finish, ended = RequestHandler.finish_response, asyncio.Event()

    async def finish_late(handler: Any, *answer: Any) -> Any:
        result = await finish(handler, *answer)
        handler.transport.abort()
        await handler._lost.wait()
        ended.set()
        return result

    monkeypatch.setattr(RequestHandler, "finish_response", finish_late)
    async with connect(str(site.app.admin_url)) as wire:
        await wire.send(b"GET /healthz HTTP/1.1\r\n" + HOST + b"\r\n")
        await ended.wait()


async def test_large_answers_are_whole(site: Site) -> None:
    for _ in range(2):
        text = await site.metrics()
        assert "entrepot_" in text


async def test_an_operation_that_the_end_of_the_server_stops_is_no_error(events: LogCapture) -> None:
    async def stopped(request: Any) -> Any:
        raise Cancelled

    answer = await errors_in_json(make_mocked_request("POST", "/api/v1/scrub"), stopped)
    assert answer.status == 503
    assert [each for each in events.entries if each["log_level"] == "error"] == []


async def test_plain_http_on_an_encrypted_admin_port(
    serve: Serve, upstream: Upstream, identity: dict[str, str]
) -> None:
    top = {"tls": identity, "admin": "0.0.0.0:0", "admin_token": "t"}
    site = await serve(upstream, top=top)
    assert str(site.app.admin_url).startswith("https:")
    url = f"http://127.0.0.1:{site.app.admin_url.port}"  # type: ignore[union-attr]
    async with connect(url) as wire:
        reply = await wire.ask("GET", "/metrics")
        assert (reply.status, reply.headers["Content-Type"]) == (400, "application/json")
        assert b"https://" in reply.body
        assert b"entrepot_" not in reply.body

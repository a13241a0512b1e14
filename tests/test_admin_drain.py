"""SIGTERM during an operation of the admin API: it ends in time, is answered, and nothing is half done."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from tests.archives import REF_NAME, image, layout, tar
from tests.processes import Place, Server, place
from tests.upstream import Hold, Upstream

__all__ = ["place"]  # a fixture

pytestmark = pytest.mark.clients
NAME = "docker.io/library/alpine:3"
ARCHIVE = tar(layout([(image(b"layer" * 1000), {REF_NAME: NAME})]))
LARGE = tar(layout([(image(bytes(20 << 20)), {REF_NAME: NAME})]))
JSON, TAR = {"Content-Type": "application/json"}, {"Content-Type": "application/x-tar"}
STOPPED = {"error": "the server is shutting down: the operation was stopped", "code": "UNAVAILABLE"}


async def ask(server: Server, path: str, body: Any, headers: dict[str, str] = JSON) -> tuple[int, Any]:
    """The status, and the answer.  An archive is sent once the server asks for it."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(
            f"{server.admin_url}/api/v1/{path}", data=body, headers=headers, expect100=headers is TAR
        ) as response,
    ):
        return response.status, await response.json()


@pytest.fixture
def brief(place: Place) -> Place:
    place.tree["drain"] = "200ms"
    return place


async def stopped(server: Server) -> None:
    server.send(signal.SIGTERM)
    assert await server.ended() == 0


async def test_a_warm_that_waits_for_upstream(brief: Place, upstream: Upstream) -> None:
    found = upstream.image("library/alpine", "3", [b"layer" * 1000])
    hold = Hold(asyncio.Event())
    upstream.next("GET", found.layers[0], hold)
    server = await brief.start()
    warming = asyncio.create_task(ask(server, "warm", json.dumps({"reference": NAME})))
    await hold.reached.wait()
    await stopped(server)
    assert await warming == (503, STOPPED)
    hold.gate.set()
    again = await brief.start()
    status, answer = await ask(again, "warm", json.dumps({"reference": NAME}))
    assert (status, answer["here"]) == (200, True)


@pytest.mark.parametrize("sent", [0, len(ARCHIVE) - 1], ids=["nothing", "almost all"])
async def test_an_import_that_waits_for_its_archive(brief: Place, sent: int) -> None:
    server = await brief.start()
    begun, ended = asyncio.Event(), asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield ARCHIVE[:sent]
        begun.set()
        await ended.wait()

    importing = asyncio.create_task(ask(server, "import", body(), TAR))
    await begun.wait()
    await stopped(server)
    assert await importing == (503, STOPPED)
    ended.set()
    assert server.partial() == []
    again = await brief.start()
    status, answer = await ask(again, "ready", json.dumps({"references": [NAME]}))
    assert (status, answer[0]["state"]) == (200, "absent")
    assert (await ask(again, "import", ARCHIVE, TAR))[0] == 200


async def test_an_export_to_a_client_that_takes_nothing(brief: Place) -> None:
    server = await brief.start()
    assert (await ask(server, "import", LARGE, TAR))[0] == 200
    url, body = f"{server.admin_url}/api/v1/export", json.dumps({"names": [NAME]})
    async with aiohttp.ClientSession() as session, session.post(url, data=body, headers=JSON) as response:
        assert response.status == 200
        await stopped(server)
        with pytest.raises((aiohttp.ClientError, ConnectionError)):  # not a bundle that looks complete
            await response.read()

"""`entrepot health`: what it prints, and its exit status, for each state that a server can be in."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from click.testing import CliRunner, Result

from proxy.cli.main import main
from tests.clients.processes import free_port
from tests.conftest import Serve
from tests.upstream import Upstream

STORE = {"status": "degraded", "store": "/data: No space left on device"}
TWO = {
    "status": "ready",
    "drill": "upstreams are cut off for 60 s more",
    "credentials": "docker.io refuses ann's",
}


async def invoke(*words: str) -> Result:
    return await asyncio.to_thread(CliRunner().invoke, main, ["health", *words])


@pytest.fixture
async def answers() -> AsyncIterator[tuple[TestServer, list[web.Response]]]:
    """A server that answers /readyz with what it was given."""
    given: list[web.Response] = []
    app = web.Application()

    async def readyz(request: web.Request) -> web.Response:
        return given.pop()

    app.router.add_get("/readyz", readyz)
    async with TestServer(app) as server:
        yield server, given


@pytest.mark.parametrize(
    ("state", "answered", "status", "printed"),
    [
        ({"status": "ready"}, 200, 0, "ready\n"),
        (STORE, 200, 0, "degraded: /data: No space left on device\n"),
        (TWO, 200, 0, "ready: upstreams are cut off for 60 s more; docker.io refuses ann's\n"),
        ({"status": "draining"}, 503, 1, "draining\n"),
    ],
)
async def test_states(
    answers: tuple[TestServer, list[web.Response]],
    state: dict[str, str],
    answered: int,
    status: int,
    printed: str,
) -> None:
    server, given = answers
    for words in ((), ("--json",)):
        given.append(web.json_response(state, status=answered))
        result = await invoke("--server", str(server.make_url("/")), *words)
        assert result.exit_code == status, result.output
        if words:
            assert json.loads(result.stdout) == state
        else:
            assert result.stdout == printed


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (web.Response(status=404), "answers 404: is that the admin address of entrepot?"),
        (web.Response(status=302, headers={"Location": "/readyz"}), "answers 302"),
        (web.Response(text="ok"), "sent an answer that is not of entrepot"),
        (web.json_response({"status": 1}), "sent an answer that is not of entrepot"),
        (web.json_response({"state": "ready"}), "sent an answer that is not of entrepot"),
    ],
    ids=["404", "302", "text", "number", "other"],
)
async def test_answers_of_others(
    answers: tuple[TestServer, list[web.Response]], answer: web.Response, expected: str
) -> None:
    server, given = answers
    given.append(answer)
    result = await invoke("--server", str(server.make_url("/")))
    assert (result.exit_code, result.stdout) == (1, "")
    assert expected in result.stderr


async def test_a_server_is_ready(serve: Serve, upstream: Upstream, tmp_path: Path) -> None:
    """It asks the configured address, by its own loopback address if it listens on all."""
    site = await serve(upstream)
    port = site.app.admin_url.port
    config = tmp_path / "watched.yml"
    config.write_text(f"admin: 0.0.0.0:{port}\nadmin_token: a-token-that-the-server-has-not\n")
    result = await invoke("--config", str(config))
    assert (result.exit_code, result.stdout) == (0, "ready\n"), result.output


async def test_no_server(tmp_path: Path) -> None:
    config = tmp_path / "watched.yml"
    port = free_port()
    config.write_text(f"admin: 127.0.0.1:{port}\n")
    result = await invoke("--config", str(config))
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"nothing listens at http://127.0.0.1:{port}" in result.stderr
    config.write_text('admin: "off"\n')
    result = await invoke("--config", str(config))
    assert result.exit_code == 1
    assert "admin is off" in result.stderr
    result = await invoke("--config", str(config), "--server", f"http://127.0.0.1:{port}")
    assert result.exit_code == 1
    assert f"no server at http://127.0.0.1:{port}" in result.stderr


@pytest.mark.parametrize("by", ["--config", "--server"])
async def test_a_server_that_is_starting(by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --wait it is asked again until it listens: here it does once it was found absent."""
    port = free_port()
    runner = TestServer(app := web.Application(), port=port)
    app.router.add_get("/readyz", answer_ready)

    async def absent(seconds: float) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, asyncio.run_coroutine_threadsafe(start(), outside).result)

    async def start() -> None:
        if not runner.started:
            await runner.start_server()

    outside = asyncio.get_running_loop()
    monkeypatch.setattr("proxy.cli.health.asyncio.sleep", absent)
    config = tmp_path / "watched.yml"
    config.write_text(f"admin: 127.0.0.1:{port}\n")
    words = {"--config": str(config), "--server": f"http://127.0.0.1:{port}"}
    try:
        assert (await invoke(by, words[by])).exit_code == 1
        result = await invoke(by, words[by], "--wait", "1h")
        assert (result.exit_code, result.stdout) == (0, "ready\n"), result.output
    finally:
        await runner.close()


async def answer_ready(request: web.Request) -> web.Response:
    return web.json_response({"status": "ready"})


@pytest.mark.parametrize("wait", ["0s", "soon"])
async def test_a_wait_that_is_none(wait: str) -> None:
    result = await invoke("--wait", wait)
    assert result.exit_code == 2
    assert "--wait" in result.stderr


async def test_a_server_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.cli.health.PATIENCE", 0.01)
    connected = asyncio.Event()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.set()
        await reader.read()
        writer.close()

    server = await asyncio.start_server(listen, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        result = await invoke("--server", url)
    assert result.exit_code == 1
    assert f"no answer from {url} in" in result.stderr

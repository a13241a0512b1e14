"""What happens while a server starts: processes that are killed, signals, directories that do not do."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from structlog.testing import LogCapture

from proxy.cli import serve
from proxy.config.errors import StartError
from proxy.config.loader import load
from proxy.server import supervisor
from proxy.server.fork import ForkedProcess
from proxy.server.process import ServerProcess, run
from proxy.web.tls_listener import PlainSite
from tests.events import Ear
from tests.test_supervisor import CONFIG, Site

DIE = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.fixture
async def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Site]:
    monkeypatch.setattr(supervisor, "WAIT", 0.01)
    monkeypatch.setattr(supervisor, "LONGEST_WAIT", 0.02)
    site = Site(tmp_path)
    yield site
    for parent in site.parents:
        await parent.stop()


@pytest.mark.clients
@pytest.mark.errors("worker.died")
async def test_one_that_is_killed_at_start_is_replaced(
    site: Site, events: LogCapture, tmp_path: Path
) -> None:
    mark = str(tmp_path / "first")
    # Only one worker can make the directory, so only one dies.
    only_first = f"try: os.mkdir({mark!r})\n    except FileExistsError: pass\n    else: {DIE}"
    parent = site.parent(begin=only_first)
    await parent.start()
    assert await site.level(parent) == "info"
    [died] = [each for each in events.entries if each["event"] == "worker.died"]
    assert "killed by signal 9" in died["status"]
    assert [each["event"] for each in events.entries].count("worker.replaced") == 1


@pytest.mark.clients
@pytest.mark.errors("worker.died", "keeper.died")
async def test_one_that_is_always_killed_ends_the_start_if_no_other_serves(site: Site) -> None:
    parent = site.parent(begin=DIE)
    spawn = parent._spawn

    async def without_housekeeping(config: Any, role: str) -> ForkedProcess:
        return await spawn(config, "worker")

    parent._spawn = without_housekeeping  # type: ignore[method-assign]
    with pytest.raises(StartError, match="killed"):
        await parent.start()


@pytest.mark.clients
@pytest.mark.errors("worker.died")
async def test_one_that_is_always_killed_does_not_keep_the_others_from_serving(
    site: Site, events: LogCapture
) -> None:
    first = str(site.journal.with_name("first"))
    # Whoever creates the file serves, and no other.
    begin = f"""
    try:
        open({first!r}, 'x')
    except FileExistsError:
        {DIE}
"""
    parent = site.parent(begin=begin.strip("\n").removeprefix("    "))
    await parent.start()
    assert await site.level(parent) == "info"


@pytest.mark.clients
@pytest.mark.errors("worker.died")
async def test_sigterm_during_the_start_ends_it(site: Site, events: LogCapture) -> None:
    parent = site.parent(begin="os.kill(os.getppid(), signal.SIGTERM); signal.pause()")
    spawn, begun = parent._spawn, []

    async def noted(config: Any, role: str) -> ForkedProcess:
        begun.append(role)
        return await spawn(config, role)

    parent._spawn = noted  # type: ignore[method-assign]
    await asyncio.wait_for(serve._serve(parent, CONFIG, "a file"), 30)
    assert begun.count("worker") == 2  # none is started again
    assert [each["event"] for each in events.entries] == ["server.stopping"]


# Directories


def test_a_temporary_directory_with_a_long_path_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    path, lock = supervisor._run_directory()
    os.close(lock)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path / "4194304.sock"))
    (path / "4194304.sock").unlink()
    path.rmdir()
    assert path.parent == Path("/tmp")


@pytest.mark.parametrize("length", range(60, 75))
def test_every_length_of_the_path_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, length: int) -> None:
    found = Path("/tmp") / ("x" * length)
    found.mkdir()
    try:
        monkeypatch.setattr(tempfile, "tempdir", str(found))
        path, lock = supervisor._run_directory()
        os.close(lock)
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path / "4194304.sock"))
        (path / "4194304.sock").unlink()
        path.rmdir()
    finally:
        found.rmdir()


def test_a_temporary_directory_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null")
    with pytest.raises(StartError, match=r"/dev/null: Not a directory: set TMPDIR"):
        supervisor._run_directory()


# Descriptors


def fail_to_accept(monkeypatch: pytest.MonkeyPatch, number: int) -> threading.Event:
    """Let accept() fail with this error until the event is set."""
    accept, allowed = socket.socket.accept, threading.Event()

    def failed(listening: socket.socket) -> Any:
        if not allowed.is_set():
            raise OSError(number, os.strerror(number))
        return accept(listening)

    monkeypatch.setattr(socket.socket, "accept", failed)
    monkeypatch.setattr("proxy.web.sockets.PAUSE", 0.0)
    return allowed


@pytest.mark.errors("accept.failed")
@pytest.mark.parametrize("number", [23, 24, 105])
async def test_without_descriptors_one_event_is_logged_for_each_attempt(
    events: LogCapture, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    async def handle(request: web.BaseRequest) -> web.Response:
        return web.Response(body=b"{}")

    runner = web.ServerRunner(web.Server(handle))
    await runner.setup()
    listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
    ear = Ear()
    allow = fail_to_accept(monkeypatch, number)
    site = PlainSite(runner, listening)
    await site.start()
    reader, writer = await asyncio.open_connection(*listening.getsockname())
    assert (await ear.heard("accept.failed"))["error"] == os.strerror(number)
    allow.set()
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert (await reader.read()).startswith(b"HTTP/1.1 200")
    writer.close()
    await writer.wait_closed()
    await runner.cleanup()
    listening.close()
    assert {each["event"] for each in events.entries} == {"accept.failed"}


@pytest.mark.clients
async def test_an_unexpected_error_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    async def start(self: ServerProcess) -> None:
        raise ValueError("no sense")

    monkeypatch.setattr(ServerProcess, "start", start)
    path = tmp_path / "entrepot.yml"
    path.write_text(f"listen: 127.0.0.1:0\nadmin: off\nworkers: 3\ndisk: {{path: {tmp_path / 'disk'}}}\n")
    config = load(path, {})
    with pytest.raises(StartError, match=r"^an unexpected error: no sense \(set log\.level to debug"):
        await supervisor.Supervisor(config, lambda: config, run).start()
    assert capfd.readouterr() == ("", "")


@pytest.mark.clients
def test_a_server_loads_nothing_large_that_its_configuration_does_not_use(tmp_path: Path) -> None:
    namespaces = "{local: {store: {}}, docker.io: {upstream: 'https://a.example'}}"
    (tmp_path / "entrepot.yml").write_text(f"disk: {{path: {tmp_path}}}\nnamespaces: {namespaces}\n")
    unused = {"bcrypt", "cryptography", "jinja2", "joserfc", "obstore", "opentelemetry", "psycopg", "redis"}
    unused |= {"proxy.admin", "proxy.ui"}
    unused |= {"proxy.webhooks.delivery", "proxy.webhooks.outbox", "proxy.webhooks.publisher"}
    unused |= {"rich", "proxy.cli.content", "proxy.cli.context"}
    program = (
        "import sys; from pathlib import Path\n"
        "from proxy.cli.main import main\n"
        "main.commands['serve']\n"
        "import proxy.server.process\n"
        "from proxy.config.loader import load\n"
        "from proxy.namespaces import composition\n"
        f"parts = composition.compose(load(Path({str(tmp_path / 'entrepot.yml')!r}), {{}}))\n"
        "assert parts.private is not None\n"
        f"print({unused} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"

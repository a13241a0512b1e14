"""The parent and its workers, with workers that do what a test wants; the real ones: test_cli.py."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from structlog.testing import LogCapture
from yarl import URL

from proxy.config import schema
from proxy.config.errors import ConfigError, StartError
from proxy.config.hosts import Address
from proxy.config.schema import Config, Hosting, NamespaceConfig
from proxy.config.upstream import UpstreamConfig
from proxy.server import supervisor
from proxy.server.fork import ForkedProcess
from proxy.server.supervisor import Assignment, Supervisor
from proxy.web.activation import PassedSockets
from storage.limits import RateLimit

pytestmark = pytest.mark.clients

# A worker that writes one line a life, and answers every connection with its configuration's log level.
WORKER = """
import asyncio, os, signal, sys
keeps = given.role == "keeper"
journal = {journal!r}
def write(line):
    with open(journal, "a") as file:
        file.write(line + "\\n")
if not keeps:
    write(f"begun {{os.getpid()}}")
    {begin}
async def answer(reader, writer):
    writer.write(given.config.log.level.encode())
    writer.close()
async def main():
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    asyncio.get_running_loop().add_reader(given.parent.fileno(), ended.set)
    if keeps:
        given.parent.report("ready")
        await ended.wait()
        return
    server = await asyncio.start_server(answer, sock=given.sockets.listen[0])
    given.parent.report("ready")
    {serving}
    await ended.wait()
    write(f"ended {{os.getpid()}}")
asyncio.run(main())
"""

CONFIG = Config(listen=Address("127.0.0.1", 0), admin=None, workers=2, drain=1.0)


class Site:
    def __init__(self, directory: Path) -> None:
        self.journal = directory / "journal"
        self.next = CONFIG
        self.bad: Exception | None = None
        self.parents: list[Supervisor] = []

    def parent(
        self,
        begin: str = "",
        serving: str = "",
        config: Config = CONFIG,
        passed: PassedSockets | None = None,
    ) -> Supervisor:
        script = WORKER.format(journal=str(self.journal), begin=begin, serving=serving)

        def work(given: Assignment) -> int:
            exec(script, {"given": given})
            return 0

        parent = Supervisor(config, self.reload, work, passed)
        self.parents.append(parent)
        return parent

    def reload(self) -> Config:
        if self.bad is not None:
            raise self.bad
        return self.next

    def lines(self) -> list[str]:
        return self.journal.read_text().splitlines() if self.journal.exists() else []

    async def level(self, parent: Supervisor) -> str:
        (host, port), *_ = parent.addresses()
        reader, writer = await asyncio.open_connection(host, port)
        text = (await reader.read()).decode()
        writer.close()
        await writer.wait_closed()
        return text


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    site = Site(tmp_path)
    yield site
    for parent in site.parents:
        await parent.stop()


async def test_as_many_workers_as_are_configured_serve_behind_one_port(site: Site) -> None:
    parent = site.parent()
    await parent.start()
    assert len(site.lines()) == 2
    assert await site.level(parent) == "info"
    await parent.stop()
    assert sorted(line.split()[0] for line in site.lines()) == ["begun", "begun", "ended", "ended"]


async def test_auto_is_one_for_each_core(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "count_cores", lambda: 3)
    parent = site.parent(config=msgspec.structs.replace(CONFIG, workers=None))
    await parent.start()
    assert len(site.lines()) == 3


async def test_what_a_worker_says_it_cannot_start_for_is_the_parents_error(site: Site) -> None:
    parent = site.parent(begin='given.parent.report("no room on the disk"); sys.exit(1)')
    with pytest.raises(StartError, match=r"^no room on the disk$"):
        await parent.start()


async def test_a_worker_that_ends_before_it_serves_is_told_by_its_status(site: Site) -> None:
    parent = site.parent(begin="sys.exit(7)")
    with pytest.raises(StartError, match="status 7 before it served"):
        await parent.start()


async def test_a_port_in_use_is_named(site: Site) -> None:
    first = site.parent()
    await first.start()
    (host, port), *_ = first.addresses()
    second = site.parent(config=msgspec.structs.replace(CONFIG, listen=Address(host, port)))
    with pytest.raises(StartError, match=f"cannot listen on {host}:{port}.*in use"):
        await second.start()


@pytest.mark.errors("worker.died")
async def test_a_dead_worker_is_replaced(
    site: Site, events: LogCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "LIVED", 0.0)  # so that it counts as having lived for long
    respawned = asyncio.Event()
    parent = site.parent()
    await parent.start()
    spawn = parent._spawn

    async def noticed(config: Config, role: str) -> ForkedProcess:
        process = await spawn(config, role)
        respawned.set()
        return process

    monkeypatch.setattr(parent, "_spawn", noticed)
    os.kill(int(site.lines()[0].split()[1]), signal.SIGKILL)
    await asyncio.wait_for(respawned.wait(), 20)
    assert [line.split()[0] for line in site.lines()] == ["begun"] * 3
    died = next(each for each in events.entries if each["event"] == "worker.died")
    assert died["status"] == -signal.SIGKILL
    assert died["again_in"] == 0


@pytest.mark.errors("worker.died")
async def test_a_crash_loop_backs_off_and_says_so(
    site: Site, events: LogCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "WAIT", 0.01)
    monkeypatch.setattr(supervisor, "LONGEST_WAIT", 0.04)
    third = asyncio.Event()
    parent = site.parent(serving="os._exit(3)", config=msgspec.structs.replace(CONFIG, workers=1))
    spawn, count = parent._spawn, 0

    async def counted(config: Config, role: str) -> ForkedProcess:
        nonlocal count
        count += role == "worker"
        if count == 5:
            third.set()
        return await spawn(config, role)

    monkeypatch.setattr(parent, "_spawn", counted)
    await parent.start()
    await asyncio.wait_for(third.wait(), 30)
    waits = [each["again_in"] for each in events.entries if each["event"] == "worker.died"]
    assert waits[:4] == [0.01, 0.02, 0.04, 0.04]


async def test_a_reload_starts_new_workers_before_it_ends_the_old(site: Site, events: LogCapture) -> None:
    parent = site.parent()
    await parent.start()
    site.next = msgspec.structs.replace(CONFIG, log=msgspec.structs.replace(CONFIG.log, level="debug"))
    await parent._change()
    assert [line.split()[0] for line in site.lines()] == ["begun"] * 4 + ["ended"] * 2
    assert {line.split()[1] for line in site.lines()[:2]} == {line.split()[1] for line in site.lines()[4:]}
    assert await site.level(parent) == "debug"
    assert [each["event"] for each in events.entries] == ["config.reloaded"]


async def test_a_reload_changes_the_bandwidth_of_transfers_that_go_on(
    site: Site,
) -> None:
    def limited(bandwidth: float | None) -> Config:
        upstream = UpstreamConfig(url=(URL("http://127.0.0.1:9"),), bandwidth=bandwidth)
        return msgspec.structs.replace(CONFIG, namespaces={"a": NamespaceConfig(upstream=upstream)})

    parent = site.parent(config=limited(1))
    await parent.start()
    transfer = RateLimit(1, parent._shared.upstreams, "a")  # as a worker that drains has it
    waiting = asyncio.create_task(transfer.take(1_000_000))
    site.next = limited(None)
    await parent._change()
    await asyncio.wait_for(waiting, 20)


async def test_a_namespace_that_comes_back_has_the_bandwidth_of_its_configuration(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def limited(**bandwidths: float) -> Config:
        namespaces = {
            name: NamespaceConfig(upstream=UpstreamConfig(url=(URL("http://127.0.0.1:9"),), bandwidth=each))
            for name, each in bandwidths.items()
        }
        return msgspec.structs.replace(CONFIG, namespaces=namespaces)

    parent = site.parent(config=limited(a=1, b=1))
    await parent.start()
    for site.next in (limited(a=2, b=1), limited(b=1), limited(a=1000, b=1)):
        await parent._change()
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now + sum(slept))

    now = asyncio.get_running_loop().time()
    with monkeypatch.context() as patch:
        patch.setattr(asyncio, "sleep", sleep)
        await RateLimit(1000, parent._shared.upstreams, "a").take(2000)
    monkeypatch.undo()
    assert sum(slept) == pytest.approx(2, abs=0.1)


@pytest.mark.errors("config.refused")
async def test_a_bad_configuration_changes_nothing(site: Site, events: LogCapture) -> None:
    parent = site.parent()
    await parent.start()
    site.bad = ConfigError("entrepot.yml: nonsense: unknown key")
    await parent._change()
    assert [line.split()[0] for line in site.lines()] == ["begun"] * 2
    assert await site.level(parent) == "info"
    assert events.entries[0]["error"] == "entrepot.yml: nonsense: unknown key"


@pytest.mark.errors("config.refused")
async def test_a_configuration_that_workers_cannot_start_with_changes_nothing(site: Site) -> None:
    parent = site.parent(begin='if given.config.log.level == "debug": given.parent.report("no"); sys.exit(1)')
    await parent.start()
    site.next = msgspec.structs.replace(CONFIG, log=msgspec.structs.replace(CONFIG.log, level="debug"))
    await parent._change()
    assert await site.level(parent) == "info"


async def test_another_address_is_listened_on_after_a_reload_and_the_old_one_no_more(site: Site) -> None:
    parent = site.parent()
    await parent.start()
    (_, before), *_ = parent.addresses()
    site.next = msgspec.structs.replace(CONFIG, listen=Address("localhost", 0))
    await parent._change()
    assert await site.level(parent) == "info"
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", before)


async def test_a_listener_of_a_store_comes_and_goes_with_a_reload(site: Site) -> None:
    serves_the_store = """
    if given.sockets.stores:
        store = await asyncio.start_server(answer, sock=given.sockets.stores["local"][0])
"""
    parent = site.parent(serving=serves_the_store.strip("\n").replace("    if", "if", 1))
    await parent.start()
    assert parent.addresses().stores == {}
    local = NamespaceConfig(store=Hosting(), listen=Address("127.0.0.1", 0))
    site.next = msgspec.structs.replace(CONFIG, namespaces={"local": local})
    main = parent.addresses().listen
    await parent._change()
    assert parent.addresses().listen == main
    host, port = parent.addresses().stores["local"]
    reader, writer = await asyncio.open_connection(host, port)
    assert await reader.read() == b"info"
    writer.close()
    site.next = CONFIG
    await parent._change()
    assert parent.addresses().stores == {}
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(host, port)


@pytest.mark.errors("worker.killed")
async def test_a_worker_that_does_not_end_is_killed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "GRACE", 0.1)
    config = msgspec.structs.replace(CONFIG, workers=1, drain=0.0)
    parent = site.parent(serving="ended.wait = asyncio.Event().wait", config=config)
    await parent.start()
    pid = int(site.lines()[0].split()[1])
    await parent.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.errors("worker.died")
async def test_a_worker_whose_parent_is_gone_ends(site: Site) -> None:
    parent = site.parent(config=msgspec.structs.replace(CONFIG, workers=1))
    spawned: list[ForkedProcess] = []
    spawn = parent._spawn

    async def noted(config: Config, role: str) -> ForkedProcess:
        process = await spawn(config, role)
        if role == "worker":
            spawned.append(process)
        return process

    parent._spawn = noted  # type: ignore[method-assign]
    await parent.start()
    spawned[0].leave()  # what the kernel does for a parent that was killed
    assert await asyncio.wait_for(spawned[0].wait(), 20) == 0
    assert f"ended {spawned[0].pid}" in site.lines()

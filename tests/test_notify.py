"""What systemd hears from the server, and the unit for it."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from structlog.testing import LogCapture

from proxy.config.errors import ConfigError, StartError
from proxy.config.hosts import parse_address
from proxy.config.schema import Config
from proxy.server import notify
from tests.clients.processes import require
from tests.test_supervisor import CONFIG, Site, site

__all__ = ["site"]  # the fixture

UNITS = Path(__file__).parent.parent / "deploy" / "systemd"
UNIT = UNITS / "entrepot.service"

Hear = Callable[[], list[str]]


@pytest.fixture(params=["path", "abstract"])
def hear(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hear]:
    """All datagrams that have come since the last call."""
    name = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.setblocking(False)
        if request.param == "path":
            systemd.bind(name)
        else:
            systemd.bind("")  # the kernel chooses: autobind in unix(7)
            name = "@" + systemd.getsockname()[1:].decode()
        monkeypatch.setenv("NOTIFY_SOCKET", name)

        def heard() -> list[str]:
            found = []
            while True:
                try:
                    found.append(systemd.recv(4096).decode())
                except BlockingIOError:
                    return found

        yield heard


@pytest.mark.clients
async def test_systemd_hears_that_the_server_serves_and_that_it_stops(site: Site, hear: Hear) -> None:
    parent = site.parent()
    await parent.start()
    assert hear() == ["READY=1"]
    await parent.stop()
    assert hear() == ["STOPPING=1"]


@pytest.mark.clients
async def test_a_server_that_cannot_start_is_never_ready(site: Site, hear: Hear) -> None:
    parent = site.parent(begin='given.parent.report("the disk is full"); sys.exit(1)')
    with pytest.raises(StartError):
        await parent.start()
    assert hear() == ["STOPPING=1"]


@pytest.mark.clients
@pytest.mark.parametrize("valid", [True, False])
@pytest.mark.errors("config.refused")
async def test_a_reload_is_told_when_it_begins_and_when_it_has_ended(
    site: Site, hear: Hear, events: LogCapture, valid: bool
) -> None:
    parent = site.parent()
    await parent.start()
    site.next = msgspec.structs.replace(CONFIG, log=msgspec.structs.replace(CONFIG.log, level="debug"))
    site.bad = None if valid else ConfigError("entrepot.yml: listen: no such address")
    before = time.monotonic_ns() // 1000
    hear()
    parent._on_hangup()
    await asyncio.gather(*parent._changes)
    begun, ended = hear()
    state, stamp = begun.splitlines()
    assert (state, ended) == ("RELOADING=1", "READY=1")
    assert before <= int(stamp.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000
    assert [each["event"] for each in events.entries] == [
        "config.reloading",
        "config.reloaded" if valid else "config.refused",
    ]


@pytest.mark.parametrize("process", [pytest.param("", id="any"), pytest.param(str(os.getpid()), id="this")])
async def test_systemd_hears_twice_in_its_time_that_the_server_runs(
    hear: Hear, monkeypatch: pytest.MonkeyPatch, process: str
) -> None:
    waits: list[float] = []

    async def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            raise asyncio.CancelledError

    monkeypatch.setattr(asyncio, "sleep", wait)
    monkeypatch.setenv("WATCHDOG_USEC", "5000000")
    monkeypatch.setenv("WATCHDOG_PID", process)
    with pytest.raises(asyncio.CancelledError):
        await notify.keep_alive()
    assert (hear(), waits) == (["WATCHDOG=1"] * 3, [2.5] * 3)


@pytest.mark.parametrize("limit, process", [("", ""), ("soon", ""), ("5000000", "1")])
async def test_who_is_not_watched_sends_nothing(
    hear: Hear, monkeypatch: pytest.MonkeyPatch, limit: str, process: str
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", limit)
    monkeypatch.setenv("WATCHDOG_PID", process)
    await notify.keep_alive()
    assert hear() == []


def test_without_systemd_nothing_is_sent(monkeypatch: pytest.MonkeyPatch, events: LogCapture) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.setattr(socket, "socket", None)
    notify.ready()
    assert not events.entries


def test_a_socket_that_nobody_reads_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, events: LogCapture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    notify.stopping()
    (entry,) = events.entries
    assert (entry["event"], entry["socket"]) == ("systemd.unreachable", str(tmp_path / "gone"))
    assert entry["reason"] == "No such file or directory"


@pytest.mark.clients
def test_the_unit_is_confined() -> None:
    require("systemd-analyze", root=False)
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(UNIT)]
    output = subprocess.run(command, capture_output=True, text=True).stdout
    found = re.search(r"Overall exposure level for entrepot.service: ([\d.]+)", output)
    assert found and float(found[1]) < 2, output


@pytest.mark.clients
def test_systemd_understands_the_units(tmp_path: Path) -> None:
    """It reports unknown keys and values, and programs that are not there."""
    require("systemd-analyze", root=False)
    copies = [Path(shutil.copy(each, tmp_path)) for each in UNITS.glob("entrepot*.s[eo]*")]
    assert len(copies) == 3
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/entrepot/bin/entrepot", sys.executable))
    command = ["systemd-analyze", "verify", "--man=no", *map(str, copies)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_socket_units_fit_the_listeners_of_the_default_configuration() -> None:
    listeners = Config().listeners()
    found = {}
    for unit in UNITS.glob("*.socket"):
        keys = dict(line.split("=", 1) for line in unit.read_text().splitlines() if "=" in line)
        assert keys["Service"] == UNIT.name
        found[keys["FileDescriptorName"]] = parse_address(keys["ListenStream"])
    assert found == listeners


def test_the_unit_reloads_by_sighup_and_may_listen_on_low_ports() -> None:
    lines = UNIT.read_text().splitlines()
    assert {
        "Type=notify",
        "ExecReload=/bin/kill -HUP $MAINPID",
        "AmbientCapabilities=CAP_NET_BIND_SERVICE",
        "UMask=0077",
    } <= set(lines)

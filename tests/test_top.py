"""The command top: its screen, its tables, and its end."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from rich.cells import cell_len

from proxy.admin.activity_reports import Activity, SlowRow
from proxy.admin.models import FillRow, StatsRow
from proxy.admin.reports import UpstreamRow
from proxy.cli.top import ActivityScreen, Snapshot, summary_lines
from proxy.processes.rows import SpanRow
from tests.conftest import Serve, Site
from tests.processes import Place, place
from tests.test_cli_operations import Shop, served, shop
from tests.upstream import Upstream

__all__ = ["place", "served", "shop"]  # fixtures

NOW = 1_700_000_000.0
DIGEST = "sha256:" + "e206d7c3783b" + "0" * 52


def activity(at: float = NOW, **changes: Any) -> Activity:
    values: dict[str, Any] = {
        "at": at,
        "processes": 3,
        "requests": 1000,
        "served": 900,
        "misses": 50,
        "errors": 1,
        "sent_bytes": 5 << 30,
        "received_bytes": 1 << 30,
        "slowest": [slow(number) for number in range(20)],
        "stored_bytes": 350 << 30,
        "limit": 500 << 30,
        "disk_bytes": 1000 << 30,
        "free_bytes": 150 << 30,
        "troubles": [],
    }
    return Activity(**{**values, **changes})


def slow(number: int) -> SlowRow:
    return SlowRow(
        at=NOW - number,
        first=1.2 / (number + 1),
        seconds=3.4,
        id=f"5c0f2a91-{number:x}",
        trace="",
        client=f"10.0.0.{number}",
        method="GET",
        kind="manifest" if number % 2 else "blob",
        name=f"docker.io/some-organisation/with/a/long/name/of/a/repository-{number % 3}",
        reference=f"1.27.{number}" if number % 2 else DIGEST,
        status=200,
        result="miss",
        bytes=1234,
    )


def fill(number: int) -> FillRow:
    return FillRow(
        digest=DIGEST,
        namespace="docker.io",
        repository=f"docker.io/library/nginx-{number}",
        bytes=40 << 20,
        size=100 << 20,
        started=NOW - 5,
        followers=2,
        pid=1,
        own=True,
        extents=[SpanRow(start=0, stop=40 << 20)],
        coming=[],
        repeated=0,
        speed=8.0 * (1 << 20),
        eta=7.5,
    )


def upstream_row(namespace: str, *, open: bool = False) -> UpstreamRow:
    return UpstreamRow(
        namespace=namespace,
        url=f"https://{namespace}",
        host=namespace,
        open=open,
        until=NOW + 30 if open else None,
        error="it cannot be reached: nothing listens there, and this sentence is long" if open else None,
        ratelimit_limit=100,
        ratelimit_remaining=83,
        limited_until=None,
        refused=[],
    )


def hour(**changes: Any) -> StatsRow:
    values = dict.fromkeys(StatsRow.__struct_fields__, 0)
    given = {"namespace": "", "requests": 18233, "hit_ratio": 0.971, "bytes_saved": 120 << 30, "errors": 3}
    return StatsRow(**{**values, **given, **changes})


def snapshot(fills: int = 3, now: Activity | None = None) -> Snapshot:
    upstreams = [upstream_row(f"registry-{number}.example") for number in range(4)]
    upstreams.append(upstream_row("down.example", open=True))
    return Snapshot(now or activity(), [fill(number) for number in range(fills)], upstreams, hour())


# The screen


@pytest.mark.parametrize("width", [30, 80, 200])
@pytest.mark.parametrize("height", [5, 12, 24, 60])
def test_the_screen_fits_the_terminal(width: int, height: int) -> None:
    screen = ActivityScreen()
    for _ in range(2):
        screen.take(snapshot(now=activity(troubles=["the disk is full: " + "x" * 200])))
        lines = screen.lines(width, height, "no answer: the server is away " * 9)
        assert len(lines) <= height
        assert max(cell_len(each.plain) for each in lines) <= width


def test_all_parts_are_on_80_columns_and_24_lines() -> None:
    screen = ActivityScreen()
    screen.take(snapshot())
    screen.take(snapshot(now=activity(NOW + 2, requests=1200, served=1080, misses=70, sent_bytes=6 << 30)))
    text = "\n".join(each.plain for each in screen.lines(80, 24))
    assert re.search(r"now +100 requests/s, hit ratio 90\.0%, 512\.0 MiB/s sent, 0 B/s received", text)
    assert "last hour  18233 requests, hit ratio 97.1%, 120.0 GiB saved, 3 errors" in text
    assert "350.0 GiB of 500.0 GiB (70.0%)" in text
    # Of each part its head, its first row, and that there is more.
    for head, first in (
        ("REPOSITORY", "nginx-0"),
        ("UPSTREAM", "down.example"),
        ("SLOWEST", "GET blob docker.io"),
    ):
        at = text.index(head)
        assert first in text[at:]
    assert "1.2 s" in text and re.search(r"\d+ more lines", text)


def test_what_needs_little_room_leaves_it_to_the_rest() -> None:
    screen = ActivityScreen()
    screen.take(snapshot(fills=0))
    text = [each.plain for each in screen.lines(120, 40)]
    assert "nothing is being transferred" in text
    assert sum("GET " in each for each in text) == 20


def test_a_screen_before_the_first_answer() -> None:
    (head, trouble) = ActivityScreen().lines(80, 24, "no answer: nothing listens there")
    assert "q ends it" in head.plain and "nothing listens" in trouble.plain


def test_rates_after_a_process_was_replaced() -> None:
    before, after = snapshot(now=activity()), snapshot(now=activity(NOW + 1, requests=3, served=1, misses=0))
    now, *_ = summary_lines(after, before)
    assert now.startswith("now        0 requests/s, hit ratio -")


def test_disk_without_a_limit() -> None:
    *_, disk = summary_lines(snapshot(now=activity(limit=None)), None)
    assert disk == "disk       350.0 GiB cached, 150.0 GiB free"


# The command


async def test_top_without_a_terminal(served: Shop) -> None:
    lines = await served.lines("top")
    assert lines[0].startswith("last hour ") and "cached" in lines[1]
    heads = [each.split()[0] for each in lines if each]
    assert {"UPSTREAM", "SLOWEST"} < set(heads)
    assert "nothing is being transferred" in lines
    assert len([each for each in lines if each.startswith("GET ")]) == 5  # those of `stocked`
    assert await served.lines("top", "--once") != []


async def test_top_as_json(served: Shop) -> None:
    found = await served.told("top", "--once")
    assert found.keys() == {"activity", "fills", "upstreams", "hour"}
    now = found["activity"]
    assert (now["requests"], now["misses"], now["served"], now["errors"]) == (5, 5, 0, 0)
    assert now["received_bytes"] > 0 and now["sent_bytes"] > 0
    assert now["disk_bytes"] > now["free_bytes"] > 0
    waited = [each["first"] for each in now["slowest"]]
    assert waited == sorted(waited, reverse=True)
    assert all(each["seconds"] >= each["first"] > 0 for each in now["slowest"])
    assert {each["id"] for each in now["slowest"]} == {each["id"] for each in now["slowest"]} != set()


async def test_top_needs_a_server(shop: Shop) -> None:
    if not shop.running:
        assert "no server is running" in await shop.fails("top")
        assert json.loads(await shop.fails("top", "--json"))["code"] == "NOT_RUNNING"


async def test_requests_of_other_replicas_are_none_of_clients(serve: Serve, upstream: Upstream) -> None:
    site: Site = await serve(upstream)
    recent = site.app.composition.metrics.recent
    assert (await site.get("/v2/"))[0] == 200
    assert [each.kind for each in recent.slowest()] == ["base"]


@dataclass
class Terminal:
    """A terminal of 24 lines of 80 columns, on which a program runs."""

    pid: int
    file: int
    shown: bytes = b""
    _came: asyncio.Event = field(default_factory=asyncio.Event)
    _ended: bool = False

    def _read(self) -> None:
        try:
            self.shown += os.read(self.file, 1 << 16)
        except OSError:  # the program has ended
            self._ended = True
            asyncio.get_running_loop().remove_reader(self.file)
        self._came.set()

    async def until(self, text: str) -> None:
        while not re.search(text, self.text()) and not self._ended:
            self._came.clear()
            async with asyncio.timeout(60):
                await self._came.wait()
        assert re.search(text, self.text()), self.text()

    def text(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.shown.decode("utf-8", "replace"))

    async def status(self) -> int:
        while not self._ended:
            self._came.clear()
            async with asyncio.timeout(60):
                await self._came.wait()
        # At once: its terminal is closed.
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])  # noqa: ASYNC222


@contextmanager
def on_a_terminal(*words: str) -> Iterator[Terminal]:
    pid, file = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, "-m", "proxy", *words], {**os.environ, "TERM": "xterm"})
    fcntl.ioctl(file, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    terminal = Terminal(pid, file)
    asyncio.get_running_loop().add_reader(file, terminal._read)
    try:
        yield terminal
    finally:
        asyncio.get_running_loop().remove_reader(file)
        os.close(file)


ENDS = {"q": b"q", "ctrl-c": b"\x03"}
ALTERNATE, ORDINARY = b"\x1b[?1049h", b"\x1b[?1049l"


@pytest.mark.clients
@pytest.mark.parametrize("key", ENDS.values(), ids=ENDS.keys())
async def test_the_screen_of_a_terminal(place: Place, key: bytes) -> None:
    server = await place.start()
    worker = await server.worker(server.pids()[0])
    with on_a_terminal("top", "--config", str(place.configure()), "--server", server.admin_url) as terminal:
        await terminal.until(r"now +\d+ requests/s")  # the second look
        await worker.get("/v2/library/none/tags/list", status=404)
        await terminal.until(r"GET tags docker.io/library/none")
        if key == b"q":
            await server.stop()
            await terminal.until("no answer: ")
        before = termios.tcgetattr(terminal.file)[3]
        assert not before & termios.ECHO  # what is typed is not shown
        os.write(terminal.file, key)
        assert await terminal.status() == 0
    assert terminal.shown.count(ALTERNATE) == terminal.shown.count(ORDINARY) == 1
    assert b"Traceback" not in terminal.shown

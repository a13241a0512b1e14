"""The command top: a screen of what the server does now, or the same once as tables."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import termios
import tty
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import click
import msgspec

from proxy.admin import activity_reports, models, reports
from proxy.admin.api.client import OperationFailed
from proxy.admin.operations import Operations
from proxy.cli.bars import share_bar
from proxy.cli.console import legible, terminal
from proxy.cli.context import CommandContext, common
from proxy.cli.fills import fill_tables
from proxy.cli.help import command
from proxy.cli.replicas import by_replica
from proxy.cli.status import host_state
from proxy.cli.tables import Column, Table, clean, fitted, shortened, shortened_digest
from proxy.config.quantities import format_duration, format_past, format_share, format_size, plural
from storage.names import written

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

INTERVAL = 1.0  # seconds between two looks at the server
LEAST = 3  # lines of a table that are shown, however small the terminal is: its head, and one row
HOUR = "1h"
QUIT = ("q", "Q", "\x03", "\x04")  # also as Ctrl-C and Ctrl-D come from a terminal that sends no signals


class Snapshot(msgspec.Struct, frozen=True):
    """What is shown: the activity, the transfers, the upstreams, and what the last hour saved."""

    activity: activity_reports.Activity
    fills: list[models.FillRow]
    upstreams: list[reports.UpstreamRow]
    hour: models.StatsRow


@command()
@click.option("--once", is_flag=True, help="Print it once, as where there is no terminal.")
@common
def top(call: CommandContext, once: bool) -> None:
    """Watch what the server does.

    Shows requests, the disk, transfers, upstreams, and the requests of the last ten minutes whose responses
    took longest to begin. The key q ends it.
    """
    console = None if once or call.json else terminal(sys.stdout)

    async def work(operations: Operations) -> None:
        if not operations.remote:
            raise OperationFailed("no server is running: there is nothing to watch", "NOT_RUNNING")
        if console is None:
            call.print(await look(operations), tables)
        else:
            await watch(operations, console)

    with suppress(KeyboardInterrupt):
        call.run(work)


async def look(operations: Operations) -> Snapshot:
    activity, fills, upstreams, stats = await asyncio.gather(
        operations.activity(), operations.fills(), operations.upstreams(), operations.stats(HOUR)
    )
    return Snapshot(activity, [each for each in fills if not each.idle], upstreams, stats.total)


# The tables


def tables(found: Snapshot, _: float) -> Sequence[Table]:
    """All of it, without a screen."""
    summary = Table((), title="\n".join(summary_lines(found, None)), notes=found.activity.troubles)
    return [summary, *sections(found)]


def sections(found: Snapshot) -> Sequence[Table]:
    """The transfers, the upstreams and the slowest requests."""
    now = found.activity.at
    return [*fill_tables(found.fills, now), _upstreams(found.upstreams, now), _slowest(found, now)]


def summary_lines(found: Snapshot, before: Snapshot | None) -> list[str]:
    """Requests and disk; `before`, a former snapshot, tells what happens now."""
    now, hour = found.activity, found.hour
    lines = [f"last hour  {plural(hour.requests, 'request')}, hit ratio {format_share(hour.hit_ratio)}, "]
    lines[0] += f"{format_size(hour.bytes_saved)} saved, {plural(hour.errors, 'error')}"
    if before is not None:
        lines.insert(0, f"now        {_rates(now, before.activity)}")
    held = format_size(now.stored_bytes)
    if now.limit:
        bar = share_bar(now.stored_bytes, now.limit, 10)
        held = f"{bar} {held} of {format_size(now.limit)} ({format_share(now.stored_bytes / now.limit)})"
    return [*lines, f"disk       {held} cached, {format_size(now.free_bytes)} free"]


def _rates(now: activity_reports.Activity, before: activity_reports.Activity) -> str:
    seconds = max(now.at - before.at, 0.001)

    # A process that was replaced counts from 0.
    def gained(name: str) -> float:
        gain: int = getattr(now, name) - getattr(before, name)
        return max(0, gain) / seconds

    content = gained("served") + gained("misses")
    ratio = format_share(gained("served") / content if content else None)
    speeds = [f"{format_size(gained(name))}/s {verb}" for name, verb in _TRAFFIC]
    return f"{gained('requests'):,.0f} requests/s, hit ratio {ratio}, {', '.join(speeds)}"


_TRAFFIC = (("sent_bytes", "sent"), ("received_bytes", "received"))


def _upstreams(found: Sequence[reports.UpstreamRow], now: float) -> Table:
    columns = (Column("UPSTREAM", whole=True), Column("HOST", whole=True, drop=1), Column("STATE"))
    table = Table(columns, empty="no upstream was asked yet")
    rows = sorted(found, key=lambda row: (not _suffers(row), row.namespace))
    for each in rows:
        table.add(each.namespace, each.host, host_state(each, now) or "ok")
    return by_replica(table, rows)


def _suffers(host: reports.UpstreamRow) -> bool:
    return bool(host.open or host.limited_until or host.refused)


def _slowest(found: Snapshot, now: float) -> Table:
    columns = (
        Column("SLOWEST", whole=True),
        Column("WAITED", right=True),
        Column("TOTAL", right=True, drop=1),
        Column("STATUS", right=True, drop=2),
        Column("RESULT", state=True, drop=3),
        Column("CLIENT", right=True, drop=5),
        Column("WHEN", right=True, drop=4),
        Column("ID", right=True, drop=6),
    )
    table = Table(columns, empty="no request has ended in the last ten minutes")
    for each in found.activity.slowest:
        name = written(each.name, shortened_digest(each.reference)) if each.reference else each.name
        words = each.method, "" if each.kind == "manifest" else each.kind, name
        table.add(
            " ".join(filter(None, words)),
            _seconds(each.first),
            _seconds(each.seconds),
            str(each.status),
            each.result or "none",
            each.client,
            format_past(each.at, now),
            each.id,
        )
    return by_replica(table, found.activity.slowest)


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.{0 if seconds >= 0.01 else 1}f} ms"
    return f"{seconds:.1f} s" if seconds < 60 else format_duration(seconds)


# The screen


class ActivityScreen:
    """The lines of a screen: of several tables, as many rows as there is room for."""

    def __init__(self) -> None:
        self._before: Snapshot | None = None
        self._last: Snapshot | None = None

    def take(self, found: Snapshot) -> None:
        self._before, self._last = self._last, found

    def lines(self, width: int, height: int, trouble: str = "") -> list[Text]:
        """`trouble` is why the server does not answer; then what it said last is shown."""
        from rich.text import Text

        head = [Text(shortened("entrepot top: q ends it", width), "bold")]
        if self._last is not None:
            summary = summary_lines(self._last, self._before)
            head += [Text(shortened(each, width)) for each in summary]
        troubles = [*([trouble] if trouble else []), *(self._last.activity.troubles if self._last else [])]
        head += [Text(shortened(clean(each), width), "red") for each in troubles]
        if self._last is None:
            return head
        parts = [_lines(each, width) for each in sections(self._last)]
        for part, room in zip(parts, _rooms([len(each) for each in parts], height - len(head)), strict=True):
            if room > 0:
                head += [Text(""), *_cut(part, room)]
        return head[:height]


def _lines(table: Table, width: int) -> list[Text]:
    from rich.text import Text

    return fitted(table, width, told=False) if table.rows else [Text(table.empty, "dim")]


def _rooms(wanted: Sequence[int], height: int) -> list[int]:
    """How many lines each part gets, besides an empty one above it: as many as it wants, in fair shares."""
    left = height - len(wanted)
    rooms = [0] * len(wanted)
    for done, at in enumerate(sorted(range(len(wanted)), key=lambda at: wanted[at])):
        share = max(left, 0) // (len(wanted) - done)
        rooms[at] = min(wanted[at], max(share, LEAST if left >= LEAST else 0))
        left -= rooms[at]
    return rooms


def _cut(lines: list[Text], room: int) -> list[Text]:
    from rich.text import Text

    if len(lines) <= room:
        return lines
    return [*lines[: room - 1], Text(f"{len(lines) - room + 1} more lines", "dim")]


async def watch(operations: Operations, console: Console) -> None:
    """Show the screen until q is typed."""
    from rich.console import Group
    from rich.live import Live

    ended, screen, trouble = asyncio.Event(), ActivityScreen(), ""
    with typed(ended.set), Live(console=console, screen=True, auto_refresh=False) as live:
        while not ended.is_set():
            try:
                screen.take(await look(operations))
                trouble = ""
            except OperationFailed as error:  # the server may come back
                if error.code in ("UNAUTHORIZED", "DENIED"):
                    raise
                trouble = f"no answer: {error}"
            shown = screen.lines(console.width, console.height, trouble)
            for line in shown:
                line.plain = legible(line.plain, sys.stdout)
            live.update(Group(*shown), refresh=True)
            with suppress(TimeoutError):
                async with asyncio.timeout(INTERVAL):
                    await ended.wait()


@contextmanager
def typed(quit: Callable[[], None]) -> Iterator[None]:
    """Call `quit` when a key of QUIT is typed, or a signal asks for the end; the keys are not shown."""
    loop, keys = asyncio.get_running_loop(), sys.stdin
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, quit)
    if not keys.isatty():
        yield
        return
    file = keys.fileno()
    before = termios.tcgetattr(file)

    def read() -> None:
        text = os.read(file, 64).decode("utf-8", "replace")
        if not text or any(key in text for key in QUIT):
            quit()

    tty.setcbreak(file)
    loop.add_reader(file, read)
    try:
        yield
    finally:
        loop.remove_reader(file)
        termios.tcsetattr(file, termios.TCSADRAIN, before)


COMMANDS = (top,)

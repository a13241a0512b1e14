"""The access log: whole lines, in order, and soon."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest
import structlog

from proxy.telemetry import logs
from proxy.telemetry.request_log import LARGEST, BatchedLines, RequestLine, RequestLog


class Stream(io.StringIO):
    """Remembers each write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        return super().write(text)


def request(number: int = 0, **changed: Any) -> RequestLine:
    values: dict[str, Any] = {
        "id": str(number),
        "client": "10.0.0.7",
        "method": "GET",
        "kind": "manifest",
        "user": "",
        "namespace": "docker.io",
        "repository": "library/alpine",
        "reference": "3",
        "status": 200,
        "result": "hit",
        "detail": "",
        "reason": "",
        "upstream_requests": 0,
        "bytes": 1024,
        "received": 0,
        "seconds": 0.000021,
        "agent": "docker/27",
    }
    return RequestLine(**values | changed)


def configured(stream: Stream, format: str = "json", level: str = "info", access: str = "all") -> RequestLog:
    return logs.configure(format, level, stream, access)


async def test_a_batch_is_written_after_a_moment() -> None:
    stream = Stream()
    log = configured(stream)
    written = asyncio.Event()
    stream.flush = written.set  # type: ignore[method-assign]
    for number in range(3):
        log.write(request(number))
    assert stream.writes == []
    await written.wait()
    assert [json.loads(line)["id"] for line in stream.writes[0].splitlines()] == ["0", "1", "2"]
    assert len(stream.writes) == 1
    log.write(request(3))
    log.flush()
    assert json.loads(stream.writes[1])["id"] == "3"
    log.flush()
    assert len(stream.writes) == 2


async def test_a_batch_fits_into_a_pipe() -> None:
    stream = Stream()
    log = configured(stream)
    for number in range(100):
        log.write(request(number, agent="ä" * 100))
    log.write(request(100, agent="x" * 2 * LARGEST))
    log.write(request(101))
    log.flush()
    *batches, alone, last = stream.writes
    assert all(len(each.encode()) <= LARGEST and each.endswith("}\n") for each in batches)
    assert len(batches) < 30
    assert len(alone.splitlines()) == len(last.splitlines()) == 1
    ids = [json.loads(line)["id"] for line in "".join(stream.writes).splitlines()]
    assert ids == [str(number) for number in range(102)]


async def test_other_lines_do_not_overtake() -> None:
    stream = Stream()
    log = configured(stream)
    log.write(request(1))
    structlog.get_logger().warning("upstream.limited")
    log.write(request(2))
    log.flush()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [each["event"] for each in lines] == ["request.served", "upstream.limited", "request.served"]


@pytest.mark.parametrize("agent", ["docker/27", 'a "quote"', "ä\u2028\n", "\udcff"])
async def test_a_line_is_as_structlog_writes_it(agent: str) -> None:
    quick, usual = Stream(), Stream()
    log = configured(quick)
    log.write(line := request(agent=agent))
    log.flush()
    configured(usual)
    RequestLog().write(line)

    def pairs(text: str) -> list[tuple[str, Any]]:
        found = list(json.loads(text).items())
        assert found[-1][0] == "timestamp"
        assert found[-1][1].endswith("Z")
        return found[:-1]

    assert pairs(quick.getvalue()) == pairs(usual.getvalue())


@pytest.mark.parametrize(
    ("options", "statuses"),
    [
        ({}, [200, 404]),
        ({"access": "errors"}, [404]),
        ({"access": "off"}, []),
        ({"level": "warning"}, []),
        ({"level": "debug"}, [200, 404]),
        ({"format": "console"}, [200, 404]),
    ],
)
async def test_which_are_logged(options: dict[str, str], statuses: list[int]) -> None:
    stream = Stream()
    log = configured(stream, **options)
    for status in (200, 404):
        log.write(request(status=status))
    log.flush()
    lines = stream.getvalue().splitlines()
    assert [status for line in lines for status in (200, 404) if str(status) in line] == statuses


async def test_a_log_that_cannot_be_written_is_no_failure() -> None:
    class Full(Stream):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

        def flush(self) -> None:
            raise BrokenPipeError(32, "Broken pipe")

    lines = BatchedLines(Full())
    for _ in range(100):
        lines.add("a line" * 10)
    lines.flush()
    configured(Full(), access="errors").write(request(status=404))
    structlog.get_logger().info("upstream.limited")


WRITER = """
import asyncio, sys
from proxy.telemetry.request_log import BatchedLines

async def write():
    lines = BatchedLines(sys.stderr)
    number = 0
    while True:
        for _ in range(100):
            more = "x" * (number % 300)
            lines.add('{"of": "%s", "number": %d, "more": "%s"}' % (sys.argv[1], number, more))
            number += 1
        await asyncio.sleep(0)

asyncio.run(write())
"""


@pytest.mark.clients
def test_processes_that_are_killed_tear_no_line() -> None:
    reading, writing = os.pipe()
    command = [sys.executable, "-c", WRITER]
    processes = [subprocess.Popen([*command, name], stderr=writing) for name in ("a", "b")]
    os.close(writing)
    try:
        with open(reading, encoding="utf-8") as lines:
            seen = {"a": -1, "b": -1}
            while min(seen.values()) < 2000:
                check(next(lines), seen)
            processes[0].send_signal(signal.SIGKILL)
            processes[0].wait()
            more = seen["b"] + 5000
            while seen["b"] < more:
                check(next(lines), seen)
            processes[1].send_signal(signal.SIGKILL)
            processes[1].wait()
            for line in lines:
                check(line, seen)
    finally:
        for each in processes:
            each.kill()
            each.wait()


def check(line: str, seen: dict[str, int]) -> None:
    """Each line is whole, and comes after the one before it of its process."""
    assert line.endswith("\n")
    found = json.loads(line)
    assert found["number"] == seen[found["of"]] + 1
    seen[found["of"]] = found["number"]

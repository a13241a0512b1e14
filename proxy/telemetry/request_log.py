"""The access log: one line for each request that has ended.

Lines in JSON are written in batches: a line that waits is written after a moment, with the next line of
another kind, or when the process ends.  A batch is a sequence of whole lines in one write, short enough that
a pipe takes it as a whole: so the lines of several processes do not mix, and a process that is killed leaves
no part of a line.
"""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import suppress
from datetime import UTC, datetime
from typing import TextIO

import msgspec
import structlog

log = structlog.get_logger()

MOMENT = 0.05  # seconds that a line may wait
LARGEST = 4096  # bytes of a batch: PIPE_BUF of pipe(7)
_encode = msgspec.json.Encoder(enc_hook=str).encode


class BatchedLines:
    """A stream of lines: those that are added wait for a moment, and those that are written do not.

    What cannot be written is lost, without an error: that its reader has ended, or its disk is full, neither
    keeps a client from an answer nor the server from stopping.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()  # not only the event loop writes
        self._waiting: list[str] = []
        self._size = 0  # bytes that wait
        self._timer: asyncio.TimerHandle | None = None

    def add(self, line: str) -> None:
        """Add a line, without its end; called in an event loop."""
        size = 1 + (len(line) if line.isascii() else len(line.encode("utf-8", "backslashreplace")))
        with self._lock:
            if self._size + size > LARGEST:
                self._write_waiting()
            self._waiting.append(line)
            self._size += size
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(MOMENT, self._on_time)

    def write(self, text: str) -> None:
        """Write text that ends with the end of a line."""
        with self._lock:
            self._write_waiting()
            with suppress(OSError):
                self._stream.write(text)

    def flush(self) -> None:
        with self._lock:
            self._write_waiting()
            with suppress(OSError):
                self._stream.flush()

    def _on_time(self) -> None:
        self._timer = None
        with self._lock:
            self._write_waiting()

    def _write_waiting(self) -> None:
        if not self._waiting:
            return
        text = "\n".join([*self._waiting, ""])
        self._waiting, self._size = [], 0
        with suppress(OSError):
            self._stream.write(text)
            self._stream.flush()


class RequestLine(msgspec.Struct):
    """A request that has ended, as it is logged; docs/operations.md describes the keys."""

    id: str
    client: str
    method: str
    kind: str
    user: str
    namespace: str
    repository: str
    reference: str
    status: int
    result: str
    detail: str
    reason: str
    upstream_requests: int
    bytes: int
    received: int
    seconds: float
    agent: str
    trace: str | msgspec.UnsetType = msgspec.UNSET
    event: str = "request.served"
    level: str = "info"
    timestamp: str = ""


class RequestLog:
    """Logs requests: through structlog; in JSON by `lines`, which is faster; or not at all if it is `off`."""

    def __init__(self, lines: BatchedLines | None = None, *, off: bool = False) -> None:
        self._lines = lines
        self._off = off

    def write(self, line: RequestLine) -> None:
        """Log a request that has ended."""
        if self._off:
            return
        if self._lines is None:
            values = msgspec.structs.asdict(line)
            for name in ("event", "level", "timestamp"):
                del values[name]
            if line.trace is msgspec.UNSET:
                del values["trace"]
            log.info("request.served", **values)
            return
        line.timestamp = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        try:
            self._lines.add(_encode(line).decode())
        except UnicodeEncodeError:  # a client's header that is not UTF-8: json is slower, but escapes it
            values = {k: v for k, v in msgspec.structs.asdict(line).items() if v is not msgspec.UNSET}
            self._lines.add(json.dumps(values))

    def flush(self) -> None:
        """Write what waits."""
        if self._lines is not None:
            self._lines.flush()

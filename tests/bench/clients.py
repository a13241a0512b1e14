"""Load: wrk for many small requests, and a reader of large bodies that costs next to nothing.

The reader shares the machine with the server that it measures, so it must not spend the processor's time:
one thread, one epoll, and MSG_TRUNC, with which Linux drops received TCP bytes without copying them out
(tcp(7)).  It counts every byte against Content-Length; streams that are told to hash read them for real.
"""

from __future__ import annotations

import hashlib
import heapq
import re
import select
import socket
import subprocess
import time
from dataclasses import dataclass, field

CHUNK = 1 << 20
PATIENCE = 60  # seconds without a single byte for anyone
ACCEPT = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json"


class BenchError(Exception):
    """A peer did not do the work; its figures would be worth nothing."""


def get(port: int, path: str) -> tuple[int, bytes]:
    """One small GET: status and body.  Raises OSError."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        connection.sendall(_request(path, "close"))
        head, _, body = b"".join(iter(lambda: connection.recv(CHUNK), b"")).partition(b"\r\n\r\n")
        return int(head.split(b" ", 2)[1]) if head else 0, body


def requests_per_second(port: int, path: str, seconds: int, connections: int = 16) -> float:
    """wrk's figure.  Raises BenchError if any answer was not a 2xx or a connection failed."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-H", f"Accept: {ACCEPT}"]
    command.append(f"http://127.0.0.1:{port}{path}")
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in output or "Socket errors" in output:
        raise BenchError(f"{path} on port {port}: {' '.join(output.split())}")
    return float(re.search(r"Requests/sec:\s*([\d.]+)", output)[1])  # type: ignore[index]


@dataclass(eq=False)
class Stream:
    """One client: asks for `path` `repeat` times on one connection and reads each body to its end.

    `rate` is in bytes per second, None is as fast as they come; a hashed stream checks `digest`.
    """

    port: int
    path: str
    size: int
    repeat: int = 1
    rate: float | None = None
    digest: str | None = None
    first_byte: float | None = None  # seconds from the (last) request to its first body byte

    def open(self) -> None:
        self.socket = socket.socket()
        if self.rate:
            # A slow client with a large buffer would be a fast one as far as the server can see.
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(("127.0.0.1", self.port))
        self.socket.setblocking(False)
        self._buffer = memoryview(bytearray(CHUNK))
        self._ask()

    def _ask(self) -> None:
        self.repeat -= 1
        self.received = 0
        self._head = b""
        self._in_body = False
        self._hash = hashlib.sha256() if self.digest else None
        self.asked = time.perf_counter()
        self.socket.sendall(_request(self.path, "keep-alive"))

    def read(self) -> bool:
        """Take what has come; True when all is done.  Raises BenchError."""
        if not self._in_body:
            self._read_head()
        else:
            limit = min(CHUNK, self.size - self.received)
            if self.rate:
                limit = min(limit, 1 << 16)
            flags = 0 if self._hash else socket.MSG_TRUNC
            self._took(self.socket.recv_into(self._buffer, limit, flags))
        if not self._in_body or self.received < self.size:
            return False
        if self._hash and self.digest != f"sha256:{self._hash.hexdigest()}":
            raise BenchError(f"{self.path} on port {self.port}: wrong bytes")
        if self.repeat:
            self._ask()
            return False
        self.socket.close()
        return True

    def due(self) -> float:
        return self.asked + self.received / self.rate if self.rate else 0.0

    def _read_head(self) -> None:
        got = self.socket.recv(4096)
        self._head += got
        head, end, body = self._head.partition(b"\r\n\r\n")
        if not end:
            if not got:
                raise BenchError(f"{self.path} on port {self.port}: closed before the headers' end")
            return
        length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
        if b" 200 " not in head[:16] or not length or int(length[1]) != self.size:
            raise BenchError(f"{self.path} on port {self.port}: {head[:500]!r}")
        self._in_body = True
        if body:
            self._buffer[: len(body)] = body
            self._took(len(body))

    def _took(self, count: int) -> None:
        if not count:
            raise BenchError(f"{self.path} on port {self.port}: cut at {self.received} of {self.size} bytes")
        if not self.received:
            self.first_byte = time.perf_counter() - self.asked
        if self._hash:
            self._hash.update(self._buffer[:count])
        self.received += count


@dataclass
class _Loop:
    streams: dict[int, Stream]
    epoll: select.epoll = field(default_factory=select.epoll)
    paused: list[tuple[float, int]] = field(default_factory=list)  # slow streams, by when they may read on

    def turn(self) -> None:
        now = time.perf_counter()
        while self.paused and self.paused[0][0] <= now:
            self.epoll.register(heapq.heappop(self.paused)[1], select.EPOLLIN)
        ready = self.epoll.poll(max(self.paused[0][0] - now, 0) if self.paused else PATIENCE)
        if not ready and not self.paused:
            raise BenchError(f"{len(self.streams)} clients got nothing for {PATIENCE} seconds")
        for descriptor, _ in ready:
            stream = self.streams[descriptor]
            if stream.read():
                del self.streams[descriptor]  # closing it has taken it out of the epoll
            elif stream.due() > now:
                self.epoll.unregister(descriptor)
                heapq.heappush(self.paused, (stream.due(), descriptor))


def download(streams: list[Stream]) -> float:
    """Run all at once; seconds from the first request to the last byte.  Raises BenchError."""
    start = time.perf_counter()
    for stream in streams:
        stream.open()
    loop = _Loop({stream.socket.fileno(): stream for stream in streams})
    with loop.epoll:
        for descriptor in loop.streams:
            loop.epoll.register(descriptor, select.EPOLLIN)
        while loop.streams:
            loop.turn()
    return time.perf_counter() - start


def _request(path: str, connection: str) -> bytes:
    lines = f"GET {path} HTTP/1.1", "Host: 127.0.0.1", f"Accept: {ACCEPT}", f"Connection: {connection}"
    return ("\r\n".join(lines) + "\r\n\r\n").encode()

"""A warm manifest in a crowd: `python -m tests.bench.crowd [--seconds N]`.

2,000 connections are open.  500 read a large blob slowly, one fills the cache with one new blob after the
other, of which each evicts others, and over the rest come requests for a manifest, one each few milliseconds,
whether the former ones are answered or not.  The latency counts from the time at which a request was due.
Prints what it is without the others, and with them, for docs/benchmarks.md.
"""

from __future__ import annotations

import multiprocessing
import select
import socket
import tempfile
import time
from collections import deque
from contextlib import closing
from multiprocessing.synchronize import Event
from pathlib import Path
from statistics import quantiles
from typing import Any

import click
import yaml

from tests.bench.clients import ACCEPT, BenchError, Stream, download
from tests.bench.peers import Entrepot
from tests.bench.upstream import MIB, REPOSITORY, Content, Upstream

CONNECTIONS, SLOW = 2000, 500
SLOW_RATE = 64 << 10  # bytes per second of each
LARGE, NEW = 300 * MIB, 20 * MIB
ROOM = LARGE + 5 * NEW  # bytes that are kept
RATE = 500  # requests for a manifest per second


class Small(Entrepot):
    """With room for little more than the blob that the slow clients read."""

    def configure(self, directory: Path, upstream: str) -> list[str]:
        self.blobs = directory / "disk" / "cache" / "blobs"
        command = super().configure(directory, upstream)
        file = directory / "config.yml"
        configuration = yaml.safe_load(file.read_text())
        configuration["disk"]["cache_limit"] = f"{ROOM}B"
        configuration["limits"] = {"connections_per_address": 2 * CONNECTIONS}
        file.write_text(yaml.safe_dump(configuration))
        return command

    def close(self) -> None:
        self.stop()


def manifests(port: int, path: str, connections: int, seconds: float) -> list[float]:
    """The latencies of all requests, in seconds.  Raises BenchError."""
    request = f"GET {path} HTTP/1.1\r\nHost: x\r\nAccept: {ACCEPT}\r\n\r\n".encode()
    epoll, found = select.epoll(), []
    idle = deque(socket.create_connection(("127.0.0.1", port)) for _ in range(connections))
    asked: dict[int, tuple[socket.socket, float]] = {}
    for each in idle:
        epoll.register(each, select.EPOLLIN)
    due = begun = time.perf_counter()
    while due < begun + seconds or asked:
        wait = due - time.perf_counter()
        for number, _ in epoll.poll(max(0.0, wait) if idle and due < begun + seconds else 10):
            connection, at = asked.pop(number)
            if not connection.recv(1 << 16).startswith(b"HTTP/1.1 200 "):
                raise BenchError(f"{path} on port {port}: no manifest")
            found.append(time.perf_counter() - at)
            idle.append(connection)
        if due < begun + seconds and idle and time.perf_counter() >= due:
            connection = idle.popleft()
            connection.sendall(request)
            asked[connection.fileno()] = (connection, due)
            due += 1 / RATE
    for each in idle:
        each.close()
    return found


def crowd(upstream: Upstream, port: int, large: Content, ready: Event, end: Event, counted: Any) -> None:
    """The other clients; `counted` becomes the number of blobs that have been fetched."""
    slow = [Stream(port, large.path, large.size, rate=SLOW_RATE) for _ in range(SLOW)]
    for stream in slow:
        stream.open()
    by_number = {stream.socket.fileno(): stream for stream in slow}
    with select.epoll() as epoll:
        for number in by_number:
            epoll.register(number, select.EPOLLIN)
        while not end.is_set():
            content = upstream.add_blob(NEW)
            download([Stream(port, content.path, content.size)])
            content.file.unlink()
            counted.value += 1
            ready.set()
            now = time.perf_counter()
            for number, _ in epoll.poll(0):
                if by_number[number].due() <= now:
                    by_number[number].read()


def measure(port: int, path: str, connections: int, seconds: float) -> tuple[float, float, float]:
    """The median, the 99th percentile and the largest latency, in milliseconds."""
    found = manifests(port, path, connections, seconds)
    steps = quantiles(found, n=100)
    return 1000 * steps[49], 1000 * steps[98], 1000 * max(found)


@click.command()
@click.option("--seconds", default=20, show_default=True)
def main(seconds: int) -> None:
    """The latency of a warm manifest beside slow clients, cold fills and evictions."""
    with (
        tempfile.TemporaryDirectory(prefix="entrepot-bench-") as directory,
        closing(Upstream(Path(directory))) as upstream,
        closing(Small(Path(directory) / "peer", f"http://127.0.0.1:{upstream.port}")) as peer,
    ):
        _run(upstream, peer, seconds)


def _run(upstream: Upstream, peer: Small, seconds: int) -> None:
    path = f"/v2/{REPOSITORY}/manifests/{upstream.image.digest}"
    large = upstream.add_blob(LARGE)
    download([Stream(peer.port, large.path, large.size)])
    manifests(peer.port, path, 10, 1)
    print("| | median | p99 | p99 : median | longest |\n|---|--:|--:|--:|--:|")

    def row(what: str, found: tuple[float, float, float]) -> None:
        median, late, most = found
        print(
            f"| {what} | {median:.2f} ms | {late:.2f} ms | {late / median:.1f} | {most:.1f} ms |", flush=True
        )

    row("alone", measure(peer.port, path, CONNECTIONS - SLOW - 1, seconds))
    ready, end, counted = multiprocessing.Event(), multiprocessing.Event(), multiprocessing.Value("i", 0)
    others = multiprocessing.Process(target=crowd, args=(upstream, peer.port, large, ready, end, counted))
    others.start()
    ready.wait(60)
    try:
        before = counted.value
        row("in the crowd", measure(peer.port, path, CONNECTIONS - SLOW - 1, seconds))
        fetched = counted.value
    finally:
        end.set()
        others.join()
    kept = sum(each.is_file() for each in peer.blobs.rglob("*"))
    print(
        f"\n{fetched - before} new blobs of {NEW // MIB} MiB meanwhile; of {counted.value}, {kept} are kept."
    )


if __name__ == "__main__":
    main()

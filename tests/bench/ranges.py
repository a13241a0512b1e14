"""A big blob read in 16 parallel ranges, as Ollama does: from upstream directly, and through a cold Entrepôt.

Upstream limits the rate of each connection, or of all (upstream.py).  What a client reads is compared with
the digest.  Progress goes to standard error, the table to standard output.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import platform
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter

import click

from tests.bench.clients import BenchError
from tests.bench.peers import Entrepot, OneWorker
from tests.bench.upstream import MIB, Content, Upstream

PARTS = 16
PIECE = 1 << 20  # bytes


def read_range(port: int, blob: Content, start: int, stop: int, to: int) -> None:
    """Write [start, stop) of the blob to the file `to`.  Raises BenchError."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=300)) as connection:
        connection.request("GET", blob.path, headers={"Range": f"bytes={start}-{stop - 1}"})
        answer = connection.getresponse()
        if answer.status != 206:
            raise BenchError(f"port {port} answered a range with {answer.status}")
        while chunk := answer.read(PIECE):
            start += os.pwrite(to, chunk, start)
        if start != stop:
            raise BenchError(f"port {port} ended at byte {start} instead of {stop}")


@dataclass
class Figures:
    """Seconds until each client has all, and what that took.

    sent, requests: of upstream; the bytes as a multiple of the blob
    cpu: in seconds, of clients, upstream and cache
    """

    seconds: float
    sent: float = 0.0
    requests: int = 0
    cpu: tuple[float, float, float] = (0.0, 0.0, 0.0)


def pull(port: int, blob: Content, files: list[int]) -> float:
    """Seconds until each of the `files` has the whole blob, each for a client of its own."""
    step = -(-blob.size // PARTS)
    spans = [(start, min(start + step, blob.size)) for start in range(0, blob.size, step)]
    begun = perf_counter()
    with ThreadPoolExecutor(len(files) * PARTS) as pool:
        pulls = [pool.submit(read_range, port, blob, *span, file) for file in files for span in spans]
        for each in pulls:
            each.result()
    return perf_counter() - begun


def verify(blob: Content, file: int) -> None:
    """Raises BenchError if the file has other content.  Closes it."""
    with open(file, "rb") as content:
        if f"sha256:{hashlib.file_digest(content, 'sha256').hexdigest()}" != blob.digest:
            raise BenchError("a client has other content")


def sample(upstream: Upstream, port: int, size: int, peer: type[Entrepot] | None, clients: int) -> Figures:
    blob = upstream.add_blob(size)
    with tempfile.TemporaryDirectory(dir=upstream.directory.parent) as place:
        made = peer(Path(place) / "peer", f"http://127.0.0.1:{port}") if peer else None
        files = [os.open(Path(place) / str(each), os.O_RDWR | os.O_CREAT) for each in range(clients)]

        def cpu() -> tuple[float, float, float]:
            return sum(os.times()[:2]), upstream.cpu_seconds(), made.process.cpu_seconds() if made else 0.0

        try:
            upstream.take_log()
            before = cpu()
            figures = Figures(pull(made.port if made else port, blob, files))
            used = [after - each for after, each in zip(cpu(), before, strict=True)]
            log = upstream.take_log()
        finally:
            if made:
                made.stop()
        for file in files:
            verify(blob, file)
    blob.file.unlink()
    return replace(figures, sent=log.bytes / blob.size, requests=log.gets, cpu=(used[0], used[1], used[2]))


def measure(
    size: int, rounds: int, link: bool, rate: float, numbers: Sequence[int]
) -> dict[tuple[str, int], list[Figures]]:
    """The samples of each kind and number of clients."""
    os.environ["PATH"] += ":/usr/local/sbin:/usr/sbin:/sbin"  # where Debian keeps nginx
    kinds: list[tuple[str, type[Entrepot] | None]] = [
        ("directly", None),
        ("one worker", OneWorker),
        ("a worker for each core", Entrepot),
    ]
    found: dict[tuple[str, int], list[Figures]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="entrepot-bench-") as place,
        closing(Upstream(Path(place) / "upstream", int(rate * MIB))) as upstream,
    ):
        port = upstream.link_port if link else upstream.slow_port
        for _ in range(rounds):
            for clients in numbers:
                for name, peer in kinds:
                    figures = sample(upstream, port, size * MIB, peer, clients)
                    found.setdefault((name, clients), []).append(figures)
                    print(f"  {name}, {clients}: {figures}", file=sys.stderr)
    return found


def row(name: str, clients: int, all_figures: list[Figures]) -> str:
    seconds = [each.seconds for each in all_figures]
    cpu = [statistics.median(each.cpu[part] for each in all_figures) for part in range(3)]
    return (
        f"| {name} | {clients} | {statistics.median(seconds):.1f} ({min(seconds):.1f}–{max(seconds):.1f}) "
        f"| {max(each.sent for each in all_figures):.3f}× | {max(each.requests for each in all_figures)} | "
        + " | ".join(f"{each:.1f}" for each in cpu)
        + " |"
    )


@click.command()
@click.option("--size", default=4096, show_default=True, help="MiB of the blob.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--link", is_flag=True, help="A link that all connections share, instead of fast ones.")
@click.option("--rate", default=60.0, show_default=True, help="MiB per second of each connection otherwise.")
@click.option("--clients", "numbers", type=int, multiple=True, default=(1, 5), show_default=True)
def main(size: int, rounds: int, link: bool, rate: float, numbers: tuple[int, ...]) -> None:
    """Pulls by ranges, directly and through caches; prints a table."""
    print(f"- command: `{shlex.join(['python', '-m', 'tests.bench.ranges', *sys.argv[1:]])}`")
    print(
        f"- date: {datetime.now(UTC):%Y-%m-%d}; {os.cpu_count()} cores, Python {platform.python_version()}; "
        f"load before the start {os.getloadavg()[0]:.1f}\n"
    )
    found = measure(size, rounds, link, rate, numbers)
    print(
        "| | clients | seconds | bytes of upstream | requests "
        "| CPU of the clients, s | of upstream | of the cache |\n"
        "|---|--:|--:|--:|--:|--:|--:|--:|"
    )
    for (name, clients), all_figures in found.items():
        print(row(name, clients, all_figures))


if __name__ == "__main__":
    main(prog_name="python -m tests.bench.ranges")

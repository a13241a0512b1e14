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
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
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


def pull(port: int, blob: Content, directory: Path, clients: int) -> float:
    """Seconds until each of `clients` has the whole blob.  Raises BenchError if it is another one."""
    step = -(-blob.size // PARTS)
    spans = [(start, min(start + step, blob.size)) for start in range(0, blob.size, step)]
    targets = [directory / f"client-{number}" for number in range(clients)]
    files = [os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC) for target in targets]
    begun = perf_counter()
    with ThreadPoolExecutor(clients * PARTS) as pool:
        pulls = [pool.submit(read_range, port, blob, *span, file) for file in files for span in spans]
        for each in pulls:
            each.result()
    seconds = perf_counter() - begun
    for file, target in zip(files, targets, strict=True):
        os.close(file)
        with target.open("rb") as content:
            if f"sha256:{hashlib.file_digest(content, 'sha256').hexdigest()}" != blob.digest:
                raise BenchError(f"client {target.name} of port {port} has other content")
        target.unlink()
    return seconds


def sample(
    upstream: Upstream, port: int, size: int, peer: type[Entrepot] | None, clients: int
) -> tuple[float, float]:
    """Seconds, and the bytes that upstream sent by `port`, as a multiple of the blob."""
    blob = upstream.add_blob(size)
    with tempfile.TemporaryDirectory(dir=upstream.directory.parent) as place:
        made = peer(Path(place) / "peer", f"http://127.0.0.1:{port}") if peer else None
        try:
            upstream.take_log()
            seconds = pull(made.port if made else port, blob, Path(place), clients)
            sent = upstream.take_log().bytes
        finally:
            if made:
                made.stop()
    blob.file.unlink()
    return seconds, sent / blob.size


def measure(size: int, rounds: int, link: bool) -> dict[tuple[str, int], list[tuple[float, float]]]:
    """The samples of each kind and number of clients."""
    os.environ["PATH"] += ":/usr/local/sbin:/usr/sbin:/sbin"  # where Debian keeps nginx
    kinds: list[tuple[str, type[Entrepot] | None]] = [
        ("directly", None),
        ("one worker", OneWorker),
        ("a worker for each core", Entrepot),
    ]
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="entrepot-bench-") as place,
        closing(Upstream(Path(place) / "upstream")) as upstream,
    ):
        port = upstream.link_port if link else upstream.slow_port
        for _ in range(rounds):
            for clients in (1, 5):
                for name, peer in kinds:
                    figures = sample(upstream, port, size * MIB, peer, clients)
                    found.setdefault((name, clients), []).append(figures)
                    print(f"  {name}, {clients}: {figures}", file=sys.stderr)
    return found


@click.command()
@click.option("--size", default=4096, show_default=True, help="MiB of the blob.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--link", is_flag=True, help="A link that all connections share, instead of fast ones.")
def main(size: int, rounds: int, link: bool) -> None:
    """Pulls by ranges, directly and through caches; prints a table."""
    print(f"- command: `{shlex.join(['python', '-m', 'tests.bench.ranges', *sys.argv[1:]])}`")
    print(
        f"- date: {datetime.now(UTC):%Y-%m-%d}; {os.cpu_count()} cores, Python {platform.python_version()}; "
        f"load before the start {os.getloadavg()[0]:.1f}\n"
    )
    found = measure(size, rounds, link)
    print("| | clients | seconds | bytes of upstream |\n|---|--:|--:|--:|")
    for (name, clients), all_figures in found.items():
        seconds = [each[0] for each in all_figures]
        sent = max(each[1] for each in all_figures)
        times = f"{statistics.median(seconds):.1f} ({min(seconds):.1f}–{max(seconds):.1f})"
        print(f"| {name} | {clients} | {times} | {sent:.3f}× |")


if __name__ == "__main__":
    main(prog_name="python -m tests.bench.ranges")

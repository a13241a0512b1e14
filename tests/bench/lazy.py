"""A layer that two nodes read lazily, one after the other: what the upstream is asked for, and sends.

A node asks as stargz-snapshotter does: whether it is redirected, the size, the end of the layer, then chunks
of 50,000 bytes, several ranges in one header where they are not adjacent.  With the background it reads all
of the layer in the end.  `--reader` runs the snapshotter's own code instead of this model.
"""

from __future__ import annotations

import http.client
import os
import platform
import random
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from email import message_from_bytes
from functools import partial
from itertools import groupby
from pathlib import Path
from time import perf_counter
from types import MappingProxyType

import click

from tests.bench.clients import BenchError
from tests.bench.peers import Entrepot
from tests.bench.upstream import MIB, Content, Traffic, Upstream

CHUNK = 50_000  # bytes: the snapshotter's chunk_size
INDEX = 60_000  # bytes at the end that say where each file is
FIRST = 2_100_000  # bytes that are needed first, and stored first
READS = 20
LENGTH = 128 << 10  # bytes of a read
STEP = 1 << 20  # bytes of a read in the background

Node = Callable[[int, bool], None]  # of the port, and whether it reads all in the background


class LazyEntrepot(Entrepot):
    name = "entrepot-lazy"
    namespace = MappingProxyType({"lazy": True})


class Layer:
    """A layer as a node has it: the chunks that it has fetched, which are compared with the file."""

    def __init__(self, connection: http.client.HTTPConnection, blob: Content) -> None:
        self._connection = connection
        self._blob = blob
        self._content = blob.file.read_bytes()
        self._chunks: set[int] = set()

    def read(self, start: int, length: int) -> None:
        stop = min(start + length, self._blob.size)
        missing = [each for each in range(start // CHUNK, -(-stop // CHUNK)) if each not in self._chunks]
        self._chunks.update(missing)
        spans = []
        for _, group in groupby(enumerate(missing), lambda each: each[1] - each[0]):
            chunks = [chunk for _, chunk in group]
            spans.append((chunks[0] * CHUNK, min((chunks[-1] + 1) * CHUNK, self._blob.size)))
        if spans:
            self.fetch(spans)

    def fetch(self, spans: list[tuple[int, int]]) -> None:
        """Ask for these ranges in one header.  Raises BenchError unless they come, and are right."""
        asked = "bytes=" + ",".join(f"{start}-{stop - 1}" for start, stop in spans)
        self._connection.request("GET", self._blob.path, headers={"Range": asked})
        answer = self._connection.getresponse()
        body, kind = answer.read(), answer.headers["Content-Type"]
        bodies = [body]
        if len(spans) > 1 and answer.status == 206:
            message = message_from_bytes(b"Content-Type: " + kind.encode() + b"\r\n\r\n" + body)
            bodies = [each.get_payload(decode=True) for each in message.get_payload()]
        if answer.status != 206 or bodies != [self._content[start:stop] for start, stop in spans]:
            raise BenchError(f"{asked} was answered by {answer.status} and other bytes")

    def size(self) -> int:
        self._connection.request("HEAD", self._blob.path)
        answer = self._connection.getresponse()
        answer.read()
        return int(answer.headers["Content-Length"])


def model(blob: Content, port: int, background: bool) -> None:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=300)) as connection:
        layer = Layer(connection, blob)
        layer.fetch([(0, 2)])
        size = layer.size()
        layer.read(size - 51, 51)
        layer.read(size - INDEX, INDEX)
        layer.read(0, FIRST)
        places = random.Random(3)
        for _ in range(READS):
            layer.read(places.randrange(size - LENGTH), LENGTH)
        for start in range(0, size if background else 0, STEP):
            layer.read(start, STEP)


def program(command: str, blob: Content, port: int, background: bool) -> None:
    """Run `command` with the address, the path of the blob, its size, and "all" if it shall read all."""
    words = [*shlex.split(command), f"127.0.0.1:{port}", blob.path, str(blob.size)]
    subprocess.run(words + ["all"] * background, check=True, stdout=subprocess.DEVNULL)


def sample(
    upstream: Upstream, peer: type[Entrepot] | None, background: bool, node: Node
) -> list[tuple[Traffic, float]]:
    """What the upstream sent for each of two nodes, and the seconds that it took."""
    found = []
    with tempfile.TemporaryDirectory(dir=upstream.directory.parent) as place:
        made = peer(Path(place) / "peer", f"http://127.0.0.1:{upstream.slow_port}") if peer else None
        try:
            for _ in range(2):
                upstream.take_log()
                begun = perf_counter()
                node(made.port if made else upstream.slow_port, background)
                seconds = perf_counter() - begun
                found.append((upstream.take_log(), seconds))
        finally:
            if made:
                made.stop()
    return found


@click.command()
@click.option("--layer", type=click.Path(path_type=Path), help="A file to read instead of 42 MB at random.")
@click.option("--reader", help="A command to run instead of the model.")
def main(layer: Path | None, reader: str | None) -> None:
    """Reads a layer lazily, directly and through caches; prints a table."""
    print(f"- command: `{shlex.join(['python', '-m', 'tests.bench.lazy', *sys.argv[1:]])}`")
    print(
        f"- date: {datetime.now(UTC):%Y-%m-%d}; {os.cpu_count()} cores, Python {platform.python_version()}; "
        f"load before the start {os.getloadavg()[0]:.1f}\n"
    )
    os.environ["PATH"] += ":/usr/local/sbin:/usr/sbin:/sbin"  # where Debian keeps nginx
    print("| | upstream of the first node | of the second | seconds of each |\n|---|--:|--:|--:|")
    with (
        tempfile.TemporaryDirectory(prefix="entrepot-bench-") as place,
        closing(Upstream(Path(place) / "upstream")) as upstream,
    ):
        blob = upstream.add_file(layer) if layer else upstream.add_blob(40 * MIB)
        node = partial(program, reader, blob) if reader else partial(model, blob)
        for background in (False, True):
            for name, peer in (("directly", None), ("default", Entrepot), ("`lazy: true`", LazyEntrepot)):
                nodes = sample(upstream, peer, background, node)
                sent = [f"{each.gets + each.others}, {each.bytes / 1e6:.1f} MB" for each, _ in nodes]
                times = ", ".join(f"{seconds:.1f}" for _, seconds in nodes)
                rest = ", then all of it" if background else ""
                print(f"| {name}{rest} | {sent[0]} | {sent[1]} | {times} |", flush=True)


if __name__ == "__main__":
    main(prog_name="python -m tests.bench.lazy")

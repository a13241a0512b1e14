"""What tracing costs a hit: the server with tracing off, at 1 %, and at all requests, in turn.

    python -m tests.bench.tracing [--rounds N]

A client asks for one manifest again and again, over one connection; the server has one worker.  The
collector takes all and keeps nothing.  With ENTREPOT_FORMER another build is measured too, which has no
tracing.  Prints a table for docs/benchmarks.md.
"""

from __future__ import annotations

import os
import platform
import shlex
import socket
import sys
import tempfile
import threading
from contextlib import ExitStack
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median

import click

from tests.bench.clients import BenchError, get
from tests.bench.peers import Former, OneWorker, Peer
from tests.bench.upstream import REPOSITORY, TAG, Upstream

REQUESTS = 20_000
PATH = f"/v2/{REPOSITORY}/manifests/{TAG}"


class Collector(BaseHTTPRequestHandler):
    """Answers 200 to all that is sent."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


class Traced(OneWorker):
    """Sends a share of the traces of all requests."""

    share = ""

    def configure(self, directory: Path, upstream: str) -> list[str]:
        variables = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": os.environ["BENCH_COLLECTOR"],
            "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
            "OTEL_TRACES_SAMPLER_ARG": self.share,
        }
        words = [f"{name}={value}" for name, value in variables.items()]
        return ["env", *words, *super().configure(directory, upstream)]


class Hundredth(Traced):
    name, share = "traced-1%", "0.01"


class All(Traced):
    name, share = "traced-100%", "1"


class OneFormer(Former):
    workers = 1


def ask(port: int, number: int) -> None:
    """Send so many requests over one connection.  Raises BenchError."""
    request = f"GET {PATH} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUser-Agent: bench\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        for _ in range(number):
            connection.sendall(request)
            answer = connection.recv(1 << 16)
            if not answer.startswith(b"HTTP/1.1 200 "):
                raise BenchError(f"{answer[:200]!r}")


def sample(peer: Peer) -> float:
    """Microseconds of the server's processors for each request."""
    before = peer.process.cpu_seconds()
    ask(peer.port, REQUESTS)
    return (peer.process.cpu_seconds() - before) / REQUESTS * 1e6


@click.command()
@click.option("--rounds", default=9, show_default=True)
def main(rounds: int) -> None:
    """Asks all of them in turn; prints a table."""
    print(f"- command: `{shlex.join(['python', '-m', 'tests.bench.tracing', *sys.argv[1:]])}`")
    print(f"- date: {datetime.now(UTC):%Y-%m-%d}; {os.cpu_count()} cores, Python {platform.python_version()}")
    kinds: list[type[Peer]] = [OneWorker, Hundredth, All]
    if "ENTREPOT_FORMER" in os.environ:
        kinds.insert(0, OneFormer)
    with ExitStack() as stack:
        collector = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        stack.callback(collector.shutdown)
        os.environ["BENCH_COLLECTOR"] = f"http://127.0.0.1:{collector.server_port}"
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="entrepot-bench-")))
        upstream = Upstream(place)
        stack.callback(upstream.close)
        peers = [each(place / each.name, f"http://127.0.0.1:{upstream.port}") for each in kinds]
        for each in peers:
            stack.callback(each.stop)
            if get(each.port, PATH)[0] != 200:
                raise BenchError(f"{each.name} does not serve the manifest")
        report(peers, rounds)


def report(peers: list[Peer], rounds: int) -> None:
    figures: dict[str, list[float]] = {each.name: [] for each in peers}
    for number in range(rounds):
        for each in peers[number % len(peers) :] + peers[: number % len(peers)]:
            figures[each.name].append(sample(each))
    print("\n| server | CPU of a hit, µs | more than without tracing, µs |\n|---|--:|--:|")
    for name, found in figures.items():
        more = median(ours - off for ours, off in zip(found, figures["entrepot-1"], strict=True))
        print(f"| {name} | {median(found):.1f} ({min(found):.1f}–{max(found):.1f}) | {more:+.1f} |")


if __name__ == "__main__":
    main(prog_name="python -m tests.bench.tracing")

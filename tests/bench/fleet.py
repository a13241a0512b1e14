"""A big blob pulled by many clients of three caches at once, each with a disk of its own, over one slow link.

With `peers` the caches ask each other; without, each asks the upstream.  In the last row the owner of the
blob is killed when it has half of it.  Its clients go on at the other two, by Range.  What a client has
received is compared with the digest.  Progress goes to standard error, the table to standard output.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import platform
import shlex
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter

import click
import yaml

from proxy.upstream.rendezvous import ranked
from tests.bench.clients import BenchError
from tests.bench.peers import Process, free_port
from tests.bench.upstream import MIB, Content, Upstream

REPLICAS = 3
PIECE = 256 << 10  # bytes


class Replica:
    """A cache at `port`, whose processes can be killed all at once."""

    def __init__(self, directory: Path, upstream: str, port: int, urls: Sequence[str]) -> None:
        directory.mkdir()
        tree = {
            "listen": f"127.0.0.1:{port}",
            "admin": "off",
            "disk": {"path": str(directory / "disk")},
            "namespaces": {"docker.io": {"upstream": {"url": upstream}}},
            **({"peers": {"urls": list(urls), "secret": "a-secret-of-benchmarks"}} if urls else {}),
        }
        (directory / "config.yml").write_text(yaml.safe_dump(tree))
        command = [sys.executable, "-m", "proxy", "serve", "--config", str(directory / "config.yml")]
        self.process = Process("entrepot", command, directory)
        self.process.wait_ready(port)

    def kill(self) -> None:
        self.process.kill()


@contextmanager
def replicas(directory: Path, upstream: str, peers: bool) -> Iterator[dict[str, Replica]]:
    """By their URLs."""
    urls = [f"http://127.0.0.1:{free_port()}" for _ in range(REPLICAS)]
    made: dict[str, Replica] = {}
    try:
        for number, url in enumerate(urls):
            port = int(url.rpartition(":")[2])
            made[url] = Replica(directory / str(number), upstream, port, urls if peers else ())
        yield made
    finally:
        for each in made.values():
            each.process.stop()


class Pull:
    """One client, which asks `urls` in turn when a transfer breaks off."""

    def __init__(self, blob: Content, urls: Sequence[str], half: threading.Event) -> None:
        self.broken = 0
        self._blob = blob
        self._urls = urls
        self._half = half

    def run(self) -> None:
        """Raises BenchError if the content is wrong, or does not come."""
        received, hashed = 0, hashlib.sha256()
        while received < self._blob.size:
            address = self._urls[self.broken % len(self._urls)].removeprefix("http://")
            try:
                with closing(http.client.HTTPConnection(address, timeout=120)) as connection:
                    headers = {"Range": f"bytes={received}-"} if received else {}
                    connection.request("GET", self._blob.path, headers=headers)
                    answer = connection.getresponse()
                    if answer.status != (206 if received else 200):
                        raise BenchError(f"{address} answered {answer.status}")
                    while chunk := answer.read1(PIECE):
                        hashed.update(chunk)
                        received += len(chunk)
                        if 2 * received >= self._blob.size:
                            self._half.set()
            except (OSError, http.client.HTTPException):
                pass
            if received < self._blob.size:
                self.broken += 1
                if self.broken > 3 * len(self._urls):
                    raise BenchError(f"{address} broke off {self.broken} times")
        if f"sha256:{hashed.hexdigest()}" != self._blob.digest:
            raise BenchError("a client has other content")


def sample(upstream: Upstream, size: int, clients: int, peers: bool, kill: bool) -> tuple[float, float, int]:
    """Seconds, the bytes that the upstream sent as a multiple of the blob, and interrupted transfers."""
    blob = upstream.add_blob(size)
    with (
        tempfile.TemporaryDirectory(dir=upstream.directory.parent) as place,
        replicas(Path(place), f"http://127.0.0.1:{upstream.link_port}", peers) as made,
    ):
        upstream.take_log()
        order, half = ranked(blob.digest, made), threading.Event()
        pulls = []
        for number in range(clients):
            first = number % REPLICAS
            pulls.append(Pull(blob, order[first:] + order[:first], half))
        begun = perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            running = [pool.submit(each.run) for each in pulls]
            if kill:
                half.wait()
                made[order[0]].kill()
            for each in running:
                each.result()
        seconds = perf_counter() - begun
        sent = upstream.take_log().bytes
    blob.file.unlink()
    return seconds, sent / blob.size, sum(each.broken for each in pulls)


@click.command()
@click.option("--size", default=256, show_default=True, help="MiB of the blob.")
@click.option("--clients", default=60, show_default=True)
@click.option("--rounds", default=1, show_default=True)
def main(size: int, clients: int, rounds: int) -> None:
    """One cold blob by many clients of three caches; prints a table."""
    os.environ["PATH"] += ":/usr/local/sbin:/usr/sbin:/sbin"  # where Debian keeps nginx
    print(f"- command: `{shlex.join(['python', '-m', 'tests.bench.fleet', *sys.argv[1:]])}`")
    print(
        f"- date: {datetime.now(UTC):%Y-%m-%d}; {os.cpu_count()} cores, Python {platform.python_version()}; "
        f"load before the start {os.getloadavg()[0]:.1f}\n"
    )
    kinds = {
        "three caches alone": (False, False),
        "three replicas": (True, False),
        "three replicas, the owner killed half-way": (True, True),
    }
    print("| | seconds | bytes of upstream | interrupted transfers |\n|---|--:|--:|--:|", flush=True)
    with (
        tempfile.TemporaryDirectory(prefix="entrepot-bench-") as place,
        closing(Upstream(Path(place) / "upstream")) as upstream,
    ):
        for _ in range(rounds):
            for name, (peers, kill) in kinds.items():
                seconds, sent, broken = sample(upstream, size * MIB, clients, peers, kill)
                print(f"| {name} | {seconds:.1f} | {sent:.3f}× | {broken} |", flush=True)


if __name__ == "__main__":
    try:
        main(prog_name="python -m tests.bench.fleet")
    except BenchError as error:
        sys.exit(str(error))

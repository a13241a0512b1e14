"""Clients pull random blobs in random ways at once, and compare every byte: what is wrong, fails or waits.

Whole blobs, ranges, suffixes, heads, and connections that are closed in the middle; new blobs, those that
others pull just now, and those that may have been evicted.  Most requests of a run meet others in flight.
In some variants the upstream is disturbed (disturbance.py), yet every pull can succeed.
Progress goes to standard error, the table to standard output.
"""

from __future__ import annotations

import http.client
import os
import platform
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from time import perf_counter

import click

from tests.bench.clients import BenchError
from tests.bench.peers import Entrepot, Process, free_port
from tests.bench.upstream import MIB, Content, Upstream

SIZES = (100, 5000, 70_000, 200_000, MIB, MIB + 5, 2_000_000, 3 * MIB, 9_000_001)  # bytes of blobs
KNOWN = 400  # blobs that clients choose from
RECENT = 6  # of them are likely to be on their way
SLOW = 2.5  # seconds
PATIENCE = 120  # seconds
DISTURBED = 0.2  # of the requests to an upstream that is
STANDING = "2s"  # after which a transfer from it is taken to be stalled


@dataclass(frozen=True)
class Variant:
    """How the upstream is reached, and a namespace that caches it."""

    name: str
    tls: bool = False
    namespace: Mapping[str, object] = field(default_factory=dict)
    disk: Mapping[str, object] = field(default_factory=dict)
    disturbed: bool = False

    @contextmanager
    def start(self, place: Path, upstream: Upstream, seed: int) -> Iterator[Entrepot]:
        host = f"https://localhost:{upstream.tls_port}" if self.tls else f"http://127.0.0.1:{upstream.port}"
        namespace = dict(self.namespace)
        with ExitStack() as stack:
            if self.disturbed:
                port, script = free_port(), str(Path(__file__).with_name("disturbance.py"))
                words = [sys.executable, script, *map(str, (port, upstream.port, DISTURBED, seed))]
                stack.callback(Process("disturbance", words, place).stop)
                host = f"http://127.0.0.1:{port}"
                namespace["upstream"] = {"url": host, "progress_timeout": STANDING}
            kind = type("Entrepot", (Entrepot,), {"namespace": namespace, "disk": self.disk})
            peer = kind(place / "entrepot", host)
            stack.callback(peer.stop)
            yield peer


LAZY, LITTLE = {"lazy": True}, {"cache_limit": "60MiB"}  # what clients pull does not fit
VARIANTS = [
    Variant("default"),
    Variant("little room", disk=LITTLE),
    Variant("TLS, little room", tls=True, disk=LITTLE),
    Variant("lazy", namespace=LAZY),
    Variant("lazy, little room", namespace=LAZY, disk=LITTLE),
    Variant("lazy, TLS, little room", tls=True, namespace=LAZY, disk=LITTLE),
    Variant("disturbed", disturbed=True),
    Variant("disturbed, little room", disturbed=True, disk=LITTLE),
    Variant("disturbed, lazy, little room", disturbed=True, namespace=LAZY, disk=LITTLE),
]


class Blobs:
    """The blobs of the upstream, of which there are more and more."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._known: list[Content] = []
        self._lock = threading.Lock()

    def choose(self, random: Random) -> Content:
        with self._lock:
            if not self._known or random.random() < 0.5:
                self._known = [*self._known, self._upstream.add(random.randbytes(random.choice(SIZES)))]
                self._known = self._known[-KNOWN:]
            return random.choice(self._known[-RECENT:] if random.random() < 0.7 else self._known)


class Client:
    """One client, which counts its requests, by seconds, and what was wrong."""

    def __init__(self, port: int, blobs: Blobs, seed: int) -> None:
        self.seconds: list[float] = []
        self.wrong: list[str] = []
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        self._blobs = blobs
        self._random = Random(seed)

    def run(self, until: float) -> None:
        requests: list[Callable[[Content, bytes], bool]] = [self._whole] * 5 + [self._range] * 3
        requests += [self._suffix, self._rest, self._head, self._leave]
        while perf_counter() < until:
            blob, request = self._blobs.choose(self._random), self._random.choice(requests)
            begun = perf_counter()
            try:
                wrong = "" if request(blob, blob.file.read_bytes()) else "other bytes"
            except (OSError, http.client.HTTPException) as error:
                self._connection.close()
                wrong = repr(error)
            self.seconds.append(perf_counter() - begun)
            if wrong or self.seconds[-1] > SLOW:
                what = f"{request.__name__[1:]} of {blob.digest[:19]}, {blob.size} bytes: {wrong or 'slow'}"
                print(f"  {time.strftime('%X')} {what}, {self.seconds[-1]:.1f} s", file=sys.stderr)
            if wrong:
                self.wrong.append(what)
        self._connection.close()

    def _ask(self, blob: Content, span: str = "", method: str = "GET") -> http.client.HTTPResponse:
        headers = {"Range": f"bytes={span}"} if span else {}
        self._connection.request(method, blob.path, headers=headers)
        return self._connection.getresponse()

    def _whole(self, blob: Content, content: bytes) -> bool:
        return self._ask(blob).read() == content

    def _range(self, blob: Content, content: bytes) -> bool:
        start = self._random.randrange(blob.size)
        last = self._random.randrange(start, blob.size)
        return self._ask(blob, f"{start}-{last}").read() == content[start : last + 1]

    def _suffix(self, blob: Content, content: bytes) -> bool:
        length = self._random.randint(1, blob.size)
        return self._ask(blob, f"-{length}").read() == content[-length:]

    def _rest(self, blob: Content, content: bytes) -> bool:
        return self._ask(blob, "0-").read() == content

    def _head(self, blob: Content, content: bytes) -> bool:
        answer = self._ask(blob, method="HEAD")
        answer.read()
        return answer.headers["Content-Length"] == str(len(content))

    def _leave(self, blob: Content, content: bytes) -> bool:
        begun = self._ask(blob).read(self._random.randrange(blob.size) // 2)
        self._connection.close()
        return content.startswith(begun)


def run(variant: Variant, place: Path, seconds: float, clients: int, seed: int) -> list[Client]:
    (place / "upstream").mkdir()
    with (
        closing(Upstream(place / "upstream")) as upstream,
        variant.start(place, upstream, seed) as peer,
        ThreadPoolExecutor(clients) as pool,
    ):
        blobs = Blobs(upstream)
        made = [Client(peer.port, blobs, seed + number) for number in range(clients)]
        list(pool.map(lambda each: each.run(perf_counter() + seconds), made))
    return made


@click.command()
@click.option("--seconds", default=40.0, show_default=True, help="Of each variant.")
@click.option("--clients", default=24, show_default=True)
@click.option("--only", multiple=True, help="Part of a variant's name. Can be repeated.")
@click.option("--seed", default=0, show_default=True)
def main(seconds: float, clients: int, only: tuple[str, ...], seed: int) -> None:
    """Pull at random and compare; prints a table."""
    print(f"- command: `{shlex.join(['python', '-m', 'tests.bench.mixed', *sys.argv[1:]])}`")
    print(f"- {datetime.now(UTC):%Y-%m-%d}; {os.cpu_count()} cores, Python {platform.python_version()}\n")
    print("| variant | requests | wrong or failed | median s | 99 % below | slowest s |")
    print("|---|--:|--:|--:|--:|--:|")
    failed = 0
    for variant in VARIANTS:
        if only and not any(each in variant.name for each in only):
            continue
        with tempfile.TemporaryDirectory(prefix="entrepot-bench-") as place:
            made = run(variant, Path(place), seconds, clients, seed)
        times = sorted(second for each in made for second in each.seconds)
        wrong = sum(len(each.wrong) for each in made)
        cells = [times[len(times) // 2], times[len(times) * 99 // 100], times[-1]]
        print(f"| {variant.name} | {len(times):,} | {wrong} |" + "".join(f" {each:.2f} |" for each in cells))
        failed += wrong
    if failed:
        raise BenchError(f"{failed} requests were answered wrongly, or failed")


if __name__ == "__main__":
    main(prog_name="python -m tests.bench.mixed")

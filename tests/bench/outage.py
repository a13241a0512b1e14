"""A bucket that is killed for a minute while clients push and pull: how they are answered.

A server of several workers has its private registry and what its caches share in a database and a bucket of
SeaweedFS.  What a client has received is compared with the digest, and at the end every push that was
acknowledged is pulled.  Progress goes to standard error, the table to standard output.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import platform
import random
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from pathlib import Path

import click
import yaml

from tests.bench.clients import BenchError
from tests.bench.peers import Peer
from tests.bench.push import MIB
from tests.bench.upstream import Upstream
from tests.postgres import PostgresServer
from tests.seaweed import ACCESS_KEY, SECRET_KEY, Seaweed, seaweed_server

BLOBS = "/v2/local/outage/blobs"
EACH = 2  # clients of each kind
PAUSE = 0.05  # seconds between two requests of one client
KNOWN = 10  # blobs that are there before


class Shared(Peer):
    """Entrepôt with its defaults, and all that servers can share."""

    name = "entrepot"
    seaweed: Seaweed
    database = ""

    def configure(self, directory: Path, upstream: str) -> list[str]:
        keys = {"access_key": ACCESS_KEY, "secret_key": SECRET_KEY, "region": "us-east-1"}
        shared = {"bucket": "s3://tests/outage", "endpoint": self.seaweed.endpoint, **keys}
        configuration = {
            "listen": f"127.0.0.1:{self.port}",
            "admin": "off",
            "disk": {"path": str(directory / "disk")},
            "shared": {**shared, "records": self.database, "caches": {}},
            "default_namespace": "docker.io",
            "namespaces": {"local": {"store": {}}, "docker.io": {"upstream": {"url": upstream}}},
            "access": {"rules": [{"who": ["anonymous"], "may": ["pull", "push"]}]},
        }
        file = directory / "config.yml"
        file.write_text(yaml.safe_dump(configuration))
        return [sys.executable, "-m", "proxy", "serve", "--config", str(file)]


class Load:
    """Clients of each kind, which are answered in the present `phase`."""

    def __init__(self, port: int, upstream: Upstream) -> None:
        self.phase = "before"
        self.counts: dict[str, Counter[str]] = {}
        self.slowest: dict[str, float] = {}  # by kind and phase, seconds
        self._port = port
        self._upstream = upstream
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._pushed: list[str] = []  # and acknowledged
        self._local: list[str] = []
        self._cached: list[str] = []
        for _ in range(KNOWN):
            self._expect(self._push(), "201")
            path = self._pushed[-1]
            self._local.append(path)
            new = self._upstream.add_blob(MIB).path
            self._cached.append(new)
            self._expect(self._pull(path), "200")
            self._expect(self._pull(new), "200")

    def _expect(self, found: str, wanted: str) -> None:
        if found != wanted:
            raise BenchError(f"it answered {found} before the bucket was lost")

    def _ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        with closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)) as connection:
            connection.request(method, path, body)
            answer = connection.getresponse()
            if answer.status == 503 and "Retry-After" not in answer.headers:
                raise BenchError("503 without Retry-After")
            return answer.status, answer.read()

    def _pull(self, path: str) -> str:
        """How it ended: a status, `wrong` or `broken off`."""
        try:
            status, content = self._ask("GET", path)
        except (OSError, http.client.HTTPException):
            return "broken off"
        wrong = f"sha256:{hashlib.sha256(content).hexdigest()}" != path.rpartition("/")[2]
        return "wrong" if status == 200 and wrong else str(status)

    def _push(self) -> str:
        content = os.urandom(MIB)
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        try:
            status, _ = self._ask("POST", f"{BLOBS}/uploads/?digest={digest}", content)
        except (OSError, http.client.HTTPException):
            return "broken off"
        if status == 201:
            self._pushed.append(f"{BLOBS}/{digest}")
        return str(status)

    def _new(self) -> str:
        with self._lock:
            blob = self._upstream.add_blob(MIB)
        found = self._pull(blob.path)
        blob.file.unlink()
        return found

    def kinds(self) -> dict[str, Callable[[], str]]:
        return {
            "pull of a private blob": lambda: self._pull(random.choice(self._local)),
            "pull of a cached blob": lambda: self._pull(random.choice(self._cached)),
            "first pull of a blob of the upstream": self._new,
            "push": self._push,
        }

    def repeat(self, kind: str, work: Callable[[], str]) -> None:
        while not self._ended.wait(PAUSE):
            phase, begun = self.phase, time.monotonic()
            found, seconds = work(), time.monotonic() - begun
            with self._lock:
                self.counts.setdefault(f"{kind}|{phase}", Counter())[found] += 1
                self.slowest[f"{kind}|{phase}"] = max(seconds, self.slowest.get(f"{kind}|{phase}", 0))

    def end(self) -> None:
        self._ended.set()

    def lost(self) -> tuple[int, int]:
        """How many pushes were acknowledged, and how many of these cannot be pulled."""
        return len(self._pushed), sum(self._pull(each) != "200" for each in self._pushed)


def run(load: Load, seaweed: Seaweed, seconds: float, silent: bool) -> None:
    with ThreadPoolExecutor(EACH * len(load.kinds())) as pool:
        running = [pool.submit(load.repeat, *each) for each in load.kinds().items() for _ in range(EACH)]
        try:
            time.sleep(10)
            if silent:
                seaweed.process.send_signal(signal.SIGSTOP)
            else:
                seaweed.kill()
            load.phase = "without"
            time.sleep(seconds)
            if silent:
                seaweed.process.send_signal(signal.SIGCONT)
            else:
                seaweed.start()
            load.phase = "after"
            time.sleep(15)
        finally:
            load.end()
        for each in running:
            each.result()


@click.command()
@click.option("--seconds", default=60.0, show_default=True, help="How long the bucket is lost.")
@click.option("--silent", is_flag=True, help="It is there, and does not answer, instead.")
def main(seconds: float, silent: bool) -> None:
    """Kills a bucket under load, and starts it again; prints a table."""
    os.environ["PATH"] += ":/usr/local/sbin:/usr/sbin:/sbin"  # where Debian keeps nginx
    print(f"- command: `{shlex.join(['python', '-m', 'tests.bench.outage', *sys.argv[1:]])}`")
    print(f"- {datetime.now(UTC):%Y-%m-%d}; {os.cpu_count()} cores, Python {platform.python_version()}\n")
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="entrepot-bench-")))
        seaweed = stack.enter_context(seaweed_server(place / "seaweed"))
        database = PostgresServer()
        stack.callback(database.remove)
        database.start()
        stack.callback(database.stop)
        upstream = stack.enter_context(closing(Upstream(place / "upstream")))
        Shared.seaweed, Shared.database = seaweed, database.database()
        peer = Shared(place / "entrepot", f"http://127.0.0.1:{upstream.port}")
        stack.callback(peer.stop)
        load = Load(peer.port, upstream)
        run(load, seaweed, seconds, silent)
        pushed, lost = load.lost()
    print("| request | before | without the bucket | after |\n|---|---|---|---|")
    for kind in load.kinds():
        cells = []
        for phase in ("before", "without", "after"):
            found = load.counts.get(f"{kind}|{phase}", Counter())
            slowest = load.slowest.get(f"{kind}|{phase}", 0.0)
            cells.append(", ".join(f"{each}: {found[each]}" for each in sorted(found)) + f"; {slowest:.1f} s")
        print(f"| {kind} | {' | '.join(cells)} |")
    print(f"\n{pushed} pushes were acknowledged, of which {lost} are lost.")


if __name__ == "__main__":
    main(prog_name="python -m tests.bench.outage")

"""A private registry in a bucket beside Distribution with its S3 driver, over one SeaweedFS, in turn.

ENTREPOT_DISTRIBUTION names the command of Distribution.  Progress goes to standard error, the table to
standard output.  Rates are those of the machine and of SeaweedFS as well: compare the CPU of the servers.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import click
import yaml

from tests.bench.clients import BenchError
from tests.bench.peers import Peer
from tests.bench.push import MIB, REPOSITORY, Blobs, Client, Manifests
from tests.seaweed import ACCESS_KEY, SECRET_KEY, Seaweed, seaweed_server

BUCKET = "tests"  # which the server has
VOLUMES = 500  # of the server: what it has deleted, as a second copy, still takes room


class InBucket(Peer):
    """Entrepôt with its defaults, request log included, and its content in the bucket."""

    name = "entrepot"
    seaweed: Seaweed

    def forget(self) -> None:
        """Remove what it has of the bucket on its disk, so that the next pull is the first one."""
        partial = self.directory / "disk" / "cache" / "partial"
        while any(partial.iterdir()):  # what was pushed becomes a copy in the background
            time.sleep(0.01)
        for path in (self.directory / "disk" / "cache" / "blobs").glob("*/*/*"):
            path.unlink()

    def configure(self, directory: Path, upstream: str) -> list[str]:
        keys = {"access_key": ACCESS_KEY, "secret_key": SECRET_KEY, "region": "us-east-1"}
        configuration = {
            "listen": f"127.0.0.1:{self.port}",
            "admin": "off",
            "disk": {"path": str(directory / "disk")},
            "shared": {"bucket": f"s3://{BUCKET}/{self.name}", "endpoint": self.seaweed.endpoint, **keys},
            "namespaces": {"local": {"store": {}}},
            "access": {"rules": [{"who": ["anonymous"], "may": ["pull", "push"]}]},
        }
        file = directory / "config.yml"
        file.write_text(yaml.safe_dump(configuration))
        return [sys.executable, "-m", "proxy", "serve", "--config", str(file)]


class DistributionInBucket(Peer):
    """Without a request log, and without redirects."""

    name = "distribution"
    seaweed: Seaweed

    def forget(self) -> None:
        """It keeps no content."""

    def configure(self, directory: Path, upstream: str) -> list[str]:
        command = os.environ.get("ENTREPOT_DISTRIBUTION")
        if command is None:
            raise BenchError("ENTREPOT_DISTRIBUTION is not set: it names the command of that registry")
        s3 = {"accesskey": ACCESS_KEY, "secretkey": SECRET_KEY, "region": "us-east-1", "bucket": BUCKET}
        place = {"regionendpoint": self.seaweed.endpoint, "forcepathstyle": True, "secure": False}
        configuration = {
            "version": 0.1,
            "log": {"level": "error", "accesslog": {"disabled": True}},
            "storage": {
                "s3": {**s3, **place, "rootdirectory": f"/{directory.name}"},
                "redirect": {"disable": True},
                "cache": {"blobdescriptor": "inmemory"},
            },
            "http": {"addr": f"127.0.0.1:{self.port}"},
        }
        file = directory / "config.yml"
        file.write_text(yaml.safe_dump(configuration))
        return ["env", "OTEL_TRACES_EXPORTER=none", command, "serve", str(file)]


@dataclass(frozen=True)
class Pulls:
    """Each of `clients` pulls `count` times what `pushed` has put there."""

    key: str
    pushed: Blobs | Manifests
    clients: int
    count: int
    by: str = "blob"
    first: bool = False  # nobody has pulled it before

    @property
    def unit(self) -> str:
        return self.pushed.unit

    def prepare(self, directory: Path, port: int) -> list[list[str]]:
        given: Any = self.pushed.prepare(directory, port)
        client, paths = Client(port), []
        for each in given[0]:
            self.pushed.work(client, [each])
            blob = self.by == "blob"
            digest = each[1] if blob else f"sha256:{hashlib.sha256(each[1]).hexdigest()}"
            reference = each[0] if self.by == "tag" else digest
            paths.append(f"/v2/{REPOSITORY}/{'blobs' if blob else 'manifests'}/{reference}")
            hashed = hashlib.sha256()
            client.get(paths[-1], hashed)
            if f"sha256:{hashed.hexdigest()}" != digest:
                raise BenchError(f"{paths[-1]}: wrong bytes")
        client.close()
        return [(paths * self.count)[: self.count] for _ in range(self.clients)]

    def work(self, client: Client, given: list[str]) -> None:
        for path in given:
            client.get(path)

    def figure(self, seconds: float) -> float:
        size = self.pushed.size / MIB if isinstance(self.pushed, Blobs) else 1
        return size * self.count * self.clients / seconds


LARGE, SMALL = Blobs("", 300 * MIB, 1, 1), Blobs("", MIB, 1, 8)
SCENARIOS: list[Blobs | Pulls] = [
    Blobs("push 300 MiB, 1 client", 300 * MIB, 1, 1),
    Blobs("push 300 MiB, 8 at once", 300 * MIB, 8, 1),
    Blobs("push 1 MiB, 1 client", MIB, 1, 50),
    Blobs("push 1 MiB, 8 at once", MIB, 8, 25),
    Pulls("first pull 300 MiB, 1 client", LARGE, 1, 1, first=True),
    Pulls("first pull 300 MiB, 8 at once", LARGE, 8, 1, first=True),
    Pulls("first pull 1 MiB, 1 client", Blobs("", MIB, 1, 50), 1, 50, first=True),
    Pulls("first pull 1 MiB, 8 at once", Blobs("", MIB, 1, 50), 8, 50, first=True),
    Pulls("pull 300 MiB, 1 client", LARGE, 1, 3),
    Pulls("pull 300 MiB, 8 at once", LARGE, 8, 1),
    Pulls("pull 1 MiB, 1 client", SMALL, 1, 100),
    Pulls("pull 1 MiB, 8 at once", SMALL, 8, 50),
    Pulls("manifests by digest, 8 at once", Manifests("", 1, 8), 8, 1000, "digest"),
    Pulls("manifests by tag, 8 at once", Manifests("", 1, 8), 8, 1000, "tag"),
]


def sample(scenario: Any, peer: Any, directory: Path) -> tuple[float, float]:
    """The figure, and the processor's seconds of the server."""
    given = scenario.prepare(directory, peer.port)
    clients = [Client(peer.port) for _ in given]
    if isinstance(scenario, Pulls) and scenario.first:
        peer.forget()
    os.sync()
    before, begun = peer.process.cpu_seconds(), perf_counter()
    with ThreadPoolExecutor(len(clients)) as pool:
        list(pool.map(scenario.work, clients, given))
    seconds = perf_counter() - begun
    for client in clients:
        client.close()
    return scenario.figure(seconds), peer.process.cpu_seconds() - before


def _peers(place: Path, seaweed: Seaweed, names: list[str]) -> list[Peer]:
    found = []
    for kind in (InBucket, DistributionInBucket):
        if kind.name in names:
            kind.seaweed = seaweed
            found.append(kind(place / kind.name, ""))
    return found


@click.command()
@click.option("--rounds", default=3, show_default=True)
@click.option("--only", multiple=True, help="Part of a scenario's name. Can be repeated.")
@click.option("--peers", "names", default="entrepot,distribution", show_default=True)
def main(rounds: int, only: tuple[str, ...], names: str) -> None:
    """Pushes to both and pulls from both in turn; prints a table."""
    print(f"- command: `{shlex.join(['python', '-m', 'tests.bench.bucket', *sys.argv[1:]])}`")
    print(f"- {datetime.now(UTC):%Y-%m-%d}; {os.cpu_count()} cores, Python {platform.python_version()}\n")
    print("| work | unit | entrepot | distribution | ratio | CPU s | CPU s | ratio | peak MiB | peak MiB |")
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for scenario in SCENARIOS:
        if only and not any(each in scenario.key for each in only):
            continue
        with (
            tempfile.TemporaryDirectory(prefix="entrepot-bench-") as place,
            seaweed_server(Path(place) / "seaweed", VOLUMES) as seaweed,
        ):
            peers = _peers(Path(place), seaweed, names.split(","))
            try:
                figures = _rounds(scenario, peers, Path(place), rounds)
                peaks = {peer.name: peer.process.peak_bytes() / MIB for peer in peers}
            finally:
                for peer in peers:
                    peer.stop()
        _print(scenario, figures, peaks)


def _rounds(
    scenario: Blobs | Pulls, peers: list[Peer], place: Path, rounds: int
) -> dict[str, list[tuple[float, float]]]:
    figures: dict[str, list[tuple[float, float]]] = {peer.name: [] for peer in peers}
    for _ in range(rounds):
        for peer in peers:
            with tempfile.TemporaryDirectory(dir=place) as directory:
                figures[peer.name].append(sample(scenario, peer, Path(directory)))
            print(f"  {scenario.key} {peer.name}: {figures[peer.name][-1]}", file=sys.stderr)
        peers.reverse()
    return figures


def _print(
    scenario: Blobs | Pulls, figures: dict[str, list[tuple[float, float]]], peaks: dict[str, float]
) -> None:
    if len(figures) < 2:
        return
    ours, theirs = figures["entrepot"], figures["distribution"]
    rate = statistics.median(a[0] / b[0] for a, b in zip(ours, theirs, strict=True))
    cost = statistics.median(b[1] / a[1] for a, b in zip(ours, theirs, strict=True))
    cells = [_cell([each[0] for each in found]) for found in (ours, theirs)]
    costs = [f"{statistics.median(each[1] for each in found):.2f}" for found in (ours, theirs)]
    sizes = [f"{peaks[name]:.0f}" for name in ("entrepot", "distribution")]
    row = [scenario.key, scenario.unit, *cells, f"{rate:.2f}×", *costs, f"{cost:.2f}×", *sizes]
    print(f"| {' | '.join(row)} |", flush=True)


def _cell(values: list[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f}–{max(values):,.0f})"


if __name__ == "__main__":
    main(prog_name="python -m tests.bench.bucket")

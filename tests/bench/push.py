"""Pushes to Entrepôt's store and to Debian's docker-registry, in turn: blobs as docker sends them, manifests.

Both acknowledge what is on the disk.  Progress goes to standard error, the table to standard output.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import socket
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter

import click
import yaml

from storage.oci import Hash
from tests.bench.clients import BenchError
from tests.bench.peers import DockerRegistry, Peer

MIB = 1 << 20
REPOSITORY = "local/bench/app"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"


class Entrepot(Peer):
    """With its defaults, request log included."""

    name = "entrepot"

    def configure(self, directory: Path, upstream: str) -> list[str]:
        configuration = {
            "listen": f"127.0.0.1:{self.port}",
            "admin": "off",
            "disk": {"path": str(directory / "disk")},
            "namespaces": {"local": {"store": {}}},
            "access": {"rules": [{"who": ["anonymous"], "may": ["pull", "push"]}]},
        }
        file = directory / "config.yml"
        file.write_text(yaml.safe_dump(configuration))
        return [sys.executable, "-m", "proxy", "serve", "--config", str(file)]


class Client:
    """One connection.  Raises BenchError where an answer is not what it should be."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=120)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = self._socket.makefile("rb")

    def close(self) -> None:
        self._reader.close()
        self._socket.close()

    def ask(self, method: str, path: str, expected: int, body: bytes | Path = b"", *lines: str) -> str:
        """The Location of the answer."""
        size = len(body) if isinstance(body, bytes) else body.stat().st_size
        head = [
            f"{method} {path} HTTP/1.1",
            f"Host: 127.0.0.1:{self._port}",
            f"Content-Length: {size}",
            *lines,
        ]
        self._socket.sendall(("\r\n".join(head) + "\r\n\r\n").encode())
        if isinstance(body, bytes):
            self._socket.sendall(body)
        else:
            with body.open("rb") as file:
                self._socket.sendfile(file)
        status, headers = self._head()
        answer = self._reader.read(int(headers.get("content-length", 0)))
        if status != expected:
            raise BenchError(f"{method} {path}: {status} {answer[:300]!r}")
        return headers.get("location", "").removeprefix(f"http://127.0.0.1:{self._port}")

    def _head(self) -> tuple[int, dict[str, str]]:
        status, headers = int(self._reader.readline().split()[1]), {}
        while line := self._reader.readline().strip():
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        return status, headers

    def get(self, path: str, hashed: Hash | None = None) -> None:
        """Read an answer of 200 to its end, and hash it."""
        lines = [f"GET {path} HTTP/1.1", f"Host: 127.0.0.1:{self._port}", f"Accept: {MANIFEST}, */*"]
        self._socket.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        status, headers = self._head()
        left, buffer = int(headers["content-length"]), memoryview(bytearray(MIB))
        while left and (got := self._reader.readinto(buffer[: min(left, MIB)])):  # type: ignore[attr-defined]
            left -= got
            if hashed is not None:
                hashed.update(buffer[:got])
        if status != 200 or left:
            raise BenchError(f"GET {path}: {status}, {left} bytes are missing")

    def push_blob(self, repository: str, content: Path, digest: str) -> None:
        """POST, PATCH of all, PUT: as docker does."""
        place = self.ask("POST", f"/v2/{repository}/blobs/uploads/", 202)
        place = self.ask("PATCH", place, 202, content, "Content-Type: application/octet-stream")
        self.ask("PUT", f"{place}{'&' if '?' in place else '?'}digest={digest}", 201)

    def push_manifest(self, repository: str, tag: str, content: bytes) -> None:
        self.ask("PUT", f"/v2/{repository}/manifests/{tag}", 201, content, f"Content-Type: {MANIFEST}")


@dataclass(frozen=True)
class Blobs:
    """Each of `clients` pushes `count` blobs of `size` bytes, all new."""

    key: str
    size: int
    clients: int
    count: int
    unit: str = "MiB/s"

    def prepare(self, directory: Path, port: int) -> list[list[tuple[Path, str]]]:
        found = []
        for client in range(self.clients):
            given = []
            for number in range(self.count):
                path = directory / f"{client}-{number}"
                block = os.urandom(MIB)
                with path.open("wb") as file:
                    for _ in range(self.size // MIB):
                        file.write(block)
                with path.open("rb") as file:
                    given.append((path, f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"))
            found.append(given)
        return found

    def work(self, client: Client, given: list[tuple[Path, str]]) -> None:
        for content, digest in given:
            client.push_blob(REPOSITORY, content, digest)

    def figure(self, seconds: float) -> float:
        return self.size * self.count * self.clients / MIB / seconds


@dataclass(frozen=True)
class Manifests:
    """Each of `clients` pushes `count` manifests by tag, all new, of an image that is there."""

    key: str
    clients: int
    count: int
    unit: str = "1/s"

    def prepare(self, directory: Path, port: int) -> list[list[tuple[str, bytes]]]:
        config = directory / "config"
        config.write_bytes(os.urandom(1000))
        digest = f"sha256:{hashlib.sha256(config.read_bytes()).hexdigest()}"
        client = Client(port)
        client.push_blob(REPOSITORY, config, digest)
        client.close()
        described = {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest, "size": 1000}
        body = {"schemaVersion": 2, "mediaType": MANIFEST, "config": described, "layers": [described] * 8}
        return [
            [
                (
                    f"t{number}-{each}",
                    json.dumps({**body, "annotations": {"n": os.urandom(8).hex()}}).encode(),
                )
                for each in range(self.count)
            ]
            for number in range(self.clients)
        ]

    def work(self, client: Client, given: list[tuple[str, bytes]]) -> None:
        for tag, content in given:
            client.push_manifest(REPOSITORY, tag, content)

    def figure(self, seconds: float) -> float:
        return self.count * self.clients / seconds


SCENARIOS: list[Blobs | Manifests] = [
    Blobs("300 MiB, 1 client", 300 * MIB, 1, 1),
    Blobs("300 MiB, 8 at once", 300 * MIB, 8, 1),
    Blobs("1 MiB, 1 client", MIB, 1, 50),
    Blobs("1 MiB, 8 at once", MIB, 8, 25),
    Manifests("manifests, 1 client", 1, 100),
    Manifests("manifests, 8 at once", 8, 50),
]


def sample(scenario: Blobs | Manifests, peer: Peer, directory: Path) -> tuple[float, float]:
    """The figure, and the processor's seconds of the server."""
    given = scenario.prepare(directory, peer.port)
    clients = [Client(peer.port) for _ in given]
    os.sync()
    before, begun = peer.process.cpu_seconds(), perf_counter()
    with ThreadPoolExecutor(len(clients)) as pool:
        list(pool.map(scenario.work, clients, given))  # type: ignore[arg-type]
    seconds = perf_counter() - begun
    for client in clients:
        client.close()
    return scenario.figure(seconds), peer.process.cpu_seconds() - before


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--only", help="Part of a scenario's name.")
def main(rounds: int, only: str | None) -> None:
    """Pushes to both in turn; prints a table."""
    print(f"- command: `{shlex.join(['python', '-m', 'tests.bench.push', *sys.argv[1:]])}`")
    print(
        f"- date: {datetime.now(UTC):%Y-%m-%d}; {os.cpu_count()} cores, Python {platform.python_version()}\n"
    )
    print(
        "| work | unit | entrepot | docker-registry | ratio | CPU s | CPU s |\n|---|---|--:|--:|--:|--:|--:|"
    )
    for scenario in SCENARIOS:
        if only and only not in scenario.key:
            continue
        figures: dict[str, list[tuple[float, float]]] = {"entrepot": [], "docker-registry": []}
        with tempfile.TemporaryDirectory(prefix="entrepot-bench-") as place:
            peers = [each(Path(place) / each.name, "") for each in (Entrepot, DockerRegistry)]
            try:
                for _ in range(rounds):
                    for peer in peers:
                        with tempfile.TemporaryDirectory(dir=place) as directory:
                            figures[peer.name].append(sample(scenario, peer, Path(directory)))
                        print(f"  {scenario.key} {peer.name}: {figures[peer.name][-1]}", file=sys.stderr)
                    peers.reverse()
            finally:
                for peer in peers:
                    peer.stop()
        ours, theirs = figures["entrepot"], figures["docker-registry"]
        ratio = statistics.median(a[0] / b[0] for a, b in zip(ours, theirs, strict=True))
        cells = [_cell([each[0] for each in figure]) for figure in (ours, theirs)]
        costs = [f"{statistics.median(each[1] for each in figure):.2f}" for figure in (ours, theirs)]
        print(
            f"| {scenario.key} | {scenario.unit} | {' | '.join(cells)} | {ratio:.2f}× | {' | '.join(costs)} |"
        )


def _cell(values: list[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f}–{max(values):,.0f})"


if __name__ == "__main__":
    main(prog_name="python -m tests.bench.push")

"""A warm blob over TLS: Entrepôt, Debian's docker-registry and nginx, in turn.

    python -m tests.bench.tls [--rounds N]

The clients are curl, which decrypts and drops what comes: with them on the same machine, the servers'
processor time says more than the rate.  Prints a table for docs/benchmarks.md.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import click
import yaml

from tests.authority import Authority
from tests.bench.clients import BenchError
from tests.bench.peers import START_LIMIT, DockerRegistry, Entrepot, Peer
from tests.bench.upstream import MIB, Content, Upstream

SIZE = 300 * MIB
CLIENTS = (1, 8)
_NGINX = """
user root;
worker_processes auto;
daemon off;
pid {directory}/nginx.pid;
error_log {directory}/error.log;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {directory}/temporary;
    proxy_temp_path {directory}/temporary;
    fastcgi_temp_path {directory}/temporary;
    scgi_temp_path {directory}/temporary;
    uwsgi_temp_path {directory}/temporary;
    root {tree};
    server {{
        listen 127.0.0.1:{port} ssl;
        ssl_certificate {directory}/../server.crt;
        ssl_certificate_key {directory}/../server.key;
        location = /v2/ {{ return 200; }}
    }}
}}
"""


class Encrypted(Peer):
    """Any of them with the certificate that lies beside its directory."""

    def ready(self) -> None:
        deadline = time.monotonic() + START_LIMIT
        authority = self.process.log.parent.parent / "ca.pem"
        while ask(self.port, "/v2/", authority).wait() != 0:
            if time.monotonic() > deadline:
                self.process.stop()
                raise BenchError(f"{self.name} does not answer")
            time.sleep(0.02)


class OurTLS(Encrypted, Entrepot):
    def configure(self, directory: Path, upstream: str) -> list[str]:
        command = super().configure(directory, upstream)
        more(directory / "config.yml", tls=issued(directory))
        return command


class DockersTLS(Encrypted, DockerRegistry):
    def configure(self, directory: Path, upstream: str) -> list[str]:
        command = super().configure(directory, upstream)
        http = {"addr": f"127.0.0.1:{self.port}", "tls": issued(directory)}
        more(directory / "config.yml", http=http)
        return command


class Nginx(Encrypted):
    """Files from its disk: `upstream` is where they lie."""

    name = "nginx"

    def configure(self, directory: Path, upstream: str) -> list[str]:
        file = directory / "nginx.conf"
        file.write_text(_NGINX.format(directory=directory, tree=upstream, port=self.port))
        return ["nginx", "-c", str(file), "-e", str(directory / "error.log")]


def issued(directory: Path) -> dict[str, str]:
    place = directory.parent
    return {"certificate": str(place / "server.crt"), "key": str(place / "server.key")}


def more(file: Path, **keys: object) -> None:
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **keys}))


def ask(port: int, path: str, authority: Path) -> subprocess.Popen[bytes]:
    url = f"https://127.0.0.1:{port}{path}"
    return subprocess.Popen(["curl", "-sf", "--cacert", authority, "-o", "/dev/null", url])


@dataclass
class Figures:
    rates: list[float] = field(default_factory=list)  # GiB/s
    costs: list[float] = field(default_factory=list)  # seconds of the server's for a GiB


def measure(peer: Peer, content: Content, clients: int, authority: Path, figures: Figures) -> None:
    begun, spent = time.perf_counter(), peer.process.cpu_seconds()
    asking = [ask(peer.port, content.path, authority) for _ in range(clients)]
    if [each for each in asking if each.wait()]:
        raise BenchError(f"{peer.name} does not serve {content.path}")
    gib = clients * content.size / (1 << 30)
    figures.rates.append(gib / (time.perf_counter() - begun))
    figures.costs.append((peer.process.cpu_seconds() - spent) / gib)


def check(peer: Peer, content: Content, authority: Path) -> None:
    """Raises BenchError unless the bytes are right; also, it is warm from then on."""
    url = f"https://127.0.0.1:{peer.port}{content.path}"
    got = subprocess.run(["curl", "-sf", "--cacert", authority, url], capture_output=True, check=False).stdout
    if f"sha256:{hashlib.sha256(got).hexdigest()}" != content.digest:
        raise BenchError(f"{peer.name} serves other bytes than {content.digest}")


@contextmanager
def running(directory: Path, authority: Path) -> Iterator[tuple[Content, list[Peer]]]:
    with ExitStack() as closing:
        upstream = Upstream(directory / "upstream")
        closing.callback(upstream.close)
        content = upstream.add_blob(SIZE)
        origin = f"http://127.0.0.1:{upstream.port}"
        peers: list[Peer] = []
        for kind in (OurTLS, DockersTLS, Nginx):
            where = str(upstream.directory / "tree") if kind is Nginx else origin
            peers.append(kind(directory / kind.name, where))
            closing.callback(peers[-1].stop)
            check(peers[-1], content, authority)
        yield content, peers


def cell(values: list[float]) -> str:
    return f"{median(values):.3g} ({min(values):.3g}–{max(values):.3g})"


@click.command()
@click.option("--rounds", default=5, show_default=True)
def main(rounds: int) -> None:
    """A warm blob over TLS, from each in turn; prints a table."""
    os.environ["PATH"] += ":/usr/sbin"
    if missing := [each for each in ("curl", "docker-registry", "nginx") if not shutil.which(each)]:
        raise click.ClickException(f"not installed: {' '.join(missing)}")
    with tempfile.TemporaryDirectory(prefix="entrepot-bench-") as name:
        directory = Path(name)
        (directory / "upstream").mkdir()
        authority = Authority(directory)
        authority.issue("server")
        with running(directory, authority.ca) as (content, peers):
            print(f"| work | unit | {' | '.join(each.name for each in peers)} |")
            print(f"|---|---|{'--:|' * len(peers)}")
            for clients in CLIENTS:
                found = {each.name: Figures() for each in peers}
                for number in range(rounds):
                    for each in peers[number % 3 :] + peers[: number % 3]:
                        measure(each, content, clients, authority.ca, found[each.name])
                what = f"warm blob by TLS, {clients} client{'s' * (clients > 1)} ({SIZE // MIB} MiB)"
                print(f"| {what} | GiB/s | {' | '.join(cell(each.rates) for each in found.values())} |")
                costs = " | ".join(cell(each.costs) for each in found.values())
                print(f"| – server CPU | s/GiB | {costs} |", flush=True)


if __name__ == "__main__":
    main(prog_name="python -m tests.bench.tls")

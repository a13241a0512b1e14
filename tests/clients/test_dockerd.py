"""dockerd with the cache in `registry-mirrors` pulls what Docker Hub's short names mean."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.clients.conftest import Images
from tests.clients.images import Image
from tests.clients.processes import Process, environment, require, run
from tests.clients.setup import write
from tests.clients.site import Site, pull_cold_warm_offline


@dataclass(frozen=True)
class Held:
    """What dockerd holds under a name: `digests` as repository@digest, the digest being what was named."""

    digests: tuple[str, ...]
    config: str
    layers: tuple[str, ...]


class Docker:
    """dockerd and its own containerd in directories of their own, started anew for every pull."""

    def __init__(self, site: Site, home: Path):
        require("docker", "dockerd", "unshare")
        self._site = site
        self._home = home
        self._daemons = itertools.count()
        self._environment = environment(home)

    def pull(self, *names: str, own: Mapping[str, str] | None = None) -> list[Held]:
        """Pull, for linux/amd64, into a daemon that holds nothing; it may show a certificate of its `own`."""
        directory = self._home / f"dockerd-{next(self._daemons)}"
        directory.mkdir()
        write(directory, "docker", self._site)
        for kind, path in (own or {}).items():
            name = "client.cert" if kind == "certificate" else "client.key"
            shutil.copyfile(path, directory / "etc/docker/certs.d" / self._site.address / name)
        with self.running(directory) as socket:
            return [self._pull(["docker", "--host", socket], name) for name in names]

    @contextmanager
    def running(self, directory: Path) -> Iterator[str]:
        """dockerd, with what is its configuration below `directory`; where it listens."""
        socket = f"unix://{directory}/docker.sock"
        # It looks for certificates there and nowhere else.
        inside = 'mkdir -p /etc/docker && mount --bind "$0" /etc/docker && exec "$@"'
        daemon = [
            *("unshare", "--mount"),  # its mounts end with it
            *("sh", "-c", inside, f"{directory}/etc/docker"),
            *("dockerd", f"--config-file={directory}/etc/docker/daemon.json", f"--host={socket}"),
            *(f"--data-root={directory}/data", f"--exec-root={directory}/run"),
            *(f"--pidfile={directory}/dockerd.pid", "--storage-driver=vfs"),
            *("--bridge=none", "--iptables=false", "--ip6tables=false"),
        ]
        process = Process(daemon, self._environment, ready="API listen on")
        try:
            yield socket
        finally:
            process.stop()

    def _pull(self, docker: list[str], name: str) -> Held:
        run([*docker, "pull", "--quiet", "--platform=linux/amd64", name], self._environment)
        image = json.loads(run([*docker, "image", "inspect", name], self._environment))[0]
        return Held(tuple(image["RepoDigests"]), image["Id"], tuple(image["RootFS"]["Layers"]))


@pytest.fixture
def docker(site: Site, home: Path) -> Docker:
    return Docker(site, home)


def held(repository: str, image: Image) -> Held:
    return Held((f"{repository}@{image.digest}",), image.amd64.config.digest, image.amd64.diff_ids)


def test_pull_through_registry_mirrors(site: Site, docker: Docker, pushed: Images) -> None:
    names = {
        "layers:1": held("layers", pushed.layers),
        "schema2:1": held("schema2", pushed.schema2),
        f"platforms@{pushed.platforms.digest}": held("platforms", pushed.platforms),
        "docker.io/library/platforms:1": held("platforms", pushed.platforms),
    }
    pull_cold_warm_offline(site, lambda: docker.pull(*names), list(names.values()))


def test_pull_by_https(encrypted: Site, home: Path, pushed: Images) -> None:
    docker = Docker(encrypted, home)
    name = f"{encrypted.address}/quay.example/team/app"
    names = {"layers:1": held("layers", pushed.layers), f"{name}:1": held(name, pushed.app)}
    pull_cold_warm_offline(encrypted, lambda: docker.pull(*names), list(names.values()))

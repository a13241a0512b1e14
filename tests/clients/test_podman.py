"""podman and buildah pull through the cache into a storage of their own."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.clients.conftest import Images
from tests.clients.images import Image
from tests.clients.processes import environment, require, run
from tests.clients.setup import write_mirrors
from tests.clients.site import Site, pull_cold_warm_offline


@dataclass(frozen=True)
class Held:
    """What the storage holds under a name.  `digest` is the manifest's or the index's, as was named."""

    digest: str
    config: str
    layers: tuple[str, ...]


class Containers:
    """`program` (podman or buildah), and podman to look into what it has pulled."""

    def __init__(self, program: str, site: Site, home: Path):
        require("podman", program)
        self._program = program
        self._home = home
        self._storages = itertools.count()
        write_mirrors(home, site)
        configuration = home / "containers.conf"
        configuration.write_text(
            "[engine]\n"
            'cgroup_manager = "cgroupfs"\n'
            'events_logger = "none"\n'
            'lock_type = "file"\n'  # the default lies in /dev/shm and stays there
            f'tmp_dir = "{home / "tmp"}"\n'
        )
        self.environment = environment(home, CONTAINERS_CONF=str(configuration))

    def pull(self, *names: str) -> list[Held]:
        """Pull, for linux/amd64, into a storage that holds nothing."""
        directory = self._home / f"storage-{next(self._storages)}"
        storage = [f"--root={directory}/root", f"--runroot={directory}/run", "--storage-driver=vfs"]
        found = []
        for name in names:
            run([self._program, *storage, "pull", "--quiet", "--arch=amd64", name], self.environment)
            image = json.loads(run(["podman", *storage, "image", "inspect", name], self.environment))[0]
            found.append(Held(image["Digest"], f"sha256:{image['Id']}", tuple(image["RootFS"]["Layers"])))
        return found


@pytest.fixture(params=["podman", "buildah"])
def containers(request: pytest.FixtureRequest, site: Site, home: Path) -> Containers:
    return Containers(request.param, site, home)


def held(image: Image) -> Held:
    return Held(image.digest, image.amd64.config.digest, image.amd64.diff_ids)


def test_pull_through_mirrors(site: Site, containers: Containers, pushed: Images) -> None:
    names = {
        "docker.io/library/layers:1": pushed.layers,
        "docker.io/library/schema2:1": pushed.schema2,
        "docker.io/library/platforms:1": pushed.platforms,
        "quay.example/team/app:1": pushed.app,
    }
    pull_cold_warm_offline(site, lambda: containers.pull(*names), [held(image) for image in names.values()])


def test_pull_by_prefixed_name(site: Site, containers: Containers, pushed: Images) -> None:
    names = {
        f"{site.address}/docker.io/library/layers:1": pushed.layers,
        f"{site.address}/docker.io/library/platforms@{pushed.platforms.digest}": pushed.platforms,
        f"{site.address}/quay.example/team/app:1": pushed.app,
    }
    pull_cold_warm_offline(site, lambda: containers.pull(*names), [held(image) for image in names.values()])


@pytest.mark.parametrize("program", ["podman", "buildah"])
def test_pull_by_https(encrypted: Site, home: Path, pushed: Images, program: str) -> None:
    containers = Containers(program, encrypted, home)
    names = {
        "docker.io/library/layers:1": pushed.layers,
        f"{encrypted.address}/quay.example/team/app:1": pushed.app,
    }
    expected = [held(image) for image in names.values()]
    pull_cold_warm_offline(encrypted, lambda: containers.pull(*names), expected)

"""`entrepot doctor --client` where clients are real: what it says of them is what they do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.clients.processes import PATIENCE, environment, require
from tests.clients.setup import write, write_mirrors
from tests.clients.site import Site
from tests.clients.test_containerd import Containerd
from tests.clients.test_dockerd import Docker

IMAGE = "docker.io/library/schema2:1"


def doctor(site: Site, home: Path, **more: str) -> dict[str, dict[str, Any]]:
    """The checks of the client here, by name."""
    command = [sys.executable, "-m", "proxy", "doctor", "--client", f"http://{site.address}", "--json"]
    words = ["--config", site.config, "--root", home, "--pull", IMAGE, "--server", site.admin]
    done = subprocess.run(
        [str(each) for each in (*command, *words)],
        env=environment(home, **more),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode in (0, 1), done.stderr
    return {each["name"]: each for each in json.loads(done.stdout)["checks"]}


@contextmanager
def only(home: Path, *programs: str) -> Iterator[str]:
    """A PATH with these alone, so that no other client of this machine is asked to pull."""
    directory = home / "bin"
    directory.mkdir()
    for each in programs:
        (directory / each).symlink_to(_where(each))
    yield str(directory)


def _where(program: str) -> str:
    return next(
        path for each in os.environ["PATH"].split(":") if os.access(path := f"{each}/{program}", os.X_OK)
    )


def came(found: dict[str, dict[str, Any]]) -> None:
    assert found["server"]["state"] == "ok"
    assert found["configuration"]["state"] == "ok"
    assert found["canary"]["state"] == "ok"
    assert found["pull"]["state"] == "ok", found["pull"]
    assert "through the server" in found["pull"]["message"]


@pytest.fixture(scope="module")
def site(shared: Site) -> Site:
    return shared


def test_podman(site: Site, home: Path) -> None:
    require("podman")
    write_mirrors(home, site)
    storage = home / "storage.conf"
    storage.write_text(f'[storage]\ndriver = "vfs"\ngraphroot = "{home}/graph"\nrunroot = "{home}/run"\n')
    engine = home / "containers.conf"
    engine.write_text(
        '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "none"\nlock_type = "file"\n'
        f'tmp_dir = "{home / "tmp"}"\n'
    )
    with only(home, "podman") as path:
        found = doctor(
            site, home, PATH=path, CONTAINERS_CONF=str(engine), CONTAINERS_STORAGE_CONF=str(storage)
        )
    came(found)


def test_containerd(site: Site, home: Path) -> None:
    containerd = Containerd(site, home)
    containerd.configure()
    (home / "etc" / "containerd" / "config.toml").write_text(
        '[plugins."io.containerd.grpc.v1.cri".registry]\nconfig_path = "/etc/containerd/certs.d"\n'
    )
    with containerd.running() as socket, only(home, "ctr") as path:
        more = {"CONTAINERD_ADDRESS": socket, "CONTAINERD_SNAPSHOTTER": "native"}
        came(doctor(site, home, PATH=path, **more))

        # What it warns of, containerd does: it goes past the server without a word.
        hosts = home / "etc" / "containerd" / "certs.d" / "_default" / "hosts.toml"
        hosts.write_text(f"[host.http://{site.address}\n")
        found = doctor(site, home, PATH=path, **more)
        assert found["configuration"]["state"] == "failed"
        assert found["pull"]["state"] == "failed"
        assert site.address not in found["pull"]["message"]


@pytest.mark.parametrize("configured", [True, False])
def test_dockerd(site: Site, home: Path, configured: bool) -> None:
    docker = Docker(site, home)
    if configured:
        write(home, "docker", site)
    else:
        (home / "etc" / "docker").mkdir(parents=True)
        (home / "etc" / "docker" / "daemon.json").write_text("{}")
    with docker.running(home) as socket, only(home, "docker") as path:
        found = doctor(site, home, PATH=path, DOCKER_HOST=socket)
    if configured:
        came(found)
    else:
        assert found["configuration"]["state"] == "failed"
        assert found["pull"]["state"] == "failed"

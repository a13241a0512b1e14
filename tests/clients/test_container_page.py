"""The image is built and started as its page says, on a machine with Docker, podman and buildah.

What it is built on is made of the Debian packages here, which are also on a server beside the package index.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.authority import Authority
from tests.clients.debian_image import closure, files, make_image, status
from tests.clients.image import ARCHITECTURE, PACKAGES
from tests.clients.machine import INTERNET, Machine
from tests.clients.processes import require
from tests.clients.surroundings import (
    CLONE,
    Page,
    provide_clone,
    provide_hub,
    provide_names,
    provide_packages,
    trust_in_image,
)
from tests.test_docs import ROOT

pytestmark = pytest.mark.timeout(900)
NAME = "docs/install/container.md"
INDEX = f"http://{INTERNET}/"
UV = f"UV_FIND_LINKS={INDEX} UV_DEFAULT_INDEX={INDEX}none UV_INSECURE_HOST={INTERNET}"


@pytest.fixture
def machine(home: Path) -> Iterator[Machine]:
    require("buildah", "docker", "docker-registry", "dnsmasq", "dpkg-scanpackages", "podman", "skopeo")
    machine = Machine(home)
    try:
        provide_names(machine, home)
        provide_hub(machine, home, Authority(home))
        provide_packages(machine, home, (PACKAGES / ARCHITECTURE / "debian").glob("*.deb"))
        index = subprocess.run(
            ["dpkg-scanpackages", "--multiversion", "."],
            cwd=PACKAGES / ARCHITECTURE / "debian",
            check=True,
            capture_output=True,
        )
        (home / "index" / "Packages").write_bytes(index.stdout)
        machine.path("/etc/apt/sources.list").write_text(f"deb [trusted=yes] {INDEX} ./\n")
        provide_clone(machine)
        yield machine
    finally:
        machine.stop()


def make_base(machine: Machine) -> None:
    """The image of the Dockerfile's first stage."""
    packages = closure("mawk", "apt", "ca-certificates", "python3-venv", "debian-archive-keyring")
    kept = machine.path("/var/lib/dpkg/status").read_text()
    machine.path("/var/lib/dpkg/status").write_text(status(packages))
    more = {
        "/etc/pip.conf",
        "/etc/apt/sources.list",
        "/var/lib/dpkg/status",
        "/etc/passwd",
        "/usr/bin/python3",
    }
    make_image(machine, "debian:12.12-slim", files(packages) | more, f"ENV {UV}")
    machine.path("/var/lib/dpkg/status").write_text(kept)


def test_it_is_built_and_started(machine: Machine) -> None:
    page = Page(NAME)

    def follow(words: str) -> str:
        return machine.run(page.script(words), directory=CLONE)

    machine.run("systemctl start docker.service")
    make_base(machine)
    follow("docker build")
    trust_in_image(machine, "entrepot")
    assert follow("docker run --detach").endswith("ready\n")
    machine.run("docker pull localhost:5000/docker.io/library/alpine:3")
    assert "docker.io/library/alpine " in machine.run("docker exec cache entrepot ls")
    [configuration] = re.findall(r"```yaml\n(.*?)```", (ROOT / NAME).read_text(), re.DOTALL)
    machine.path(f"{CLONE}/config.yml").write_text(configuration)
    assert "is valid" in follow("entrepot check")
    machine.run("docker rm --force cache; docker save entrepot | podman load")
    check_podman(machine)


def test_it_is_built_without_a_registry(machine: Machine) -> None:
    machine.run(f"export {UV}\n{Page(NAME).script('build.py fetch')}", directory=CLONE)
    assert "amd64" in machine.run("skopeo inspect --config oci:layout:0.1.0", directory=CLONE)


def check_podman(machine: Machine) -> None:
    """It takes the same words."""
    # Where control groups of version 2 do not count processes.
    machine.path("/etc/containers/containers.conf").write_text("[containers]\npids_limit = 0\n")
    start = Page(NAME).script("docker run --detach")
    assert machine.run(start.replace("docker ", "podman ")).endswith("ready\n")
    machine.run("podman pull --tls-verify=false localhost:5000/docker.io/library/alpine:3")
    assert "docker.io/library/alpine " in machine.run("podman exec cache entrepot ls")

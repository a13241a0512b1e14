"""The image is built and started as docs/install/container.md says: with Docker, with podman, by buildah.

What it is built on is made of the Debian packages here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.debian_image import closure, files, make_image, status
from tests.clients.image import ARCHITECTURE, Layout
from tests.clients.image_page import NAME, UV, builder
from tests.clients.machine import Machine
from tests.clients.surroundings import CLONE, Page, trust_in_image
from tests.test_docs import ROOT

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def machine(home: Path) -> Iterator[Machine]:
    with builder(home) as machine:
        yield machine


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


def test_it_is_built_without_a_registry(layout: Layout) -> None:
    """By the page's words; tests/clients/test_image.py looks into it."""
    assert layout.config["architecture"] == ARCHITECTURE


def check_podman(machine: Machine) -> None:
    """It takes the same words."""
    # Where control groups of version 2 do not count processes.
    machine.path("/etc/containers/containers.conf").write_text("[containers]\npids_limit = 0\n")
    start = Page(NAME).script("docker run --detach")
    assert machine.run(start.replace("docker ", "podman ")).endswith("ready\n")
    machine.run("podman pull --tls-verify=false localhost:5000/docker.io/library/alpine:3")
    assert "docker.io/library/alpine " in machine.run("podman exec cache entrepot ls")

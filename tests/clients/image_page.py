"""The machine on which docs/install/container.md is followed, and the image that it makes without a registry.

Debian's packages, which are those here, are on a server beside the package index.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.authority import Authority
from tests.clients.image import ARCHITECTURE, EPOCH, Layout, packages
from tests.clients.machine import INTERNET, Machine
from tests.clients.processes import require
from tests.clients.surroundings import (
    CLONE,
    Page,
    provide_clone,
    provide_hub,
    provide_names,
    provide_packages,
)
from tests.once import built_once

NAME = "docs/install/container.md"
INDEX = f"http://{INTERNET}/"
UV = f"UV_FIND_LINKS={INDEX} UV_DEFAULT_INDEX={INDEX}none UV_INSECURE_HOST={INTERNET}"


@contextmanager
def builder(home: Path) -> Iterator[Machine]:
    """A machine with Docker, podman and buildah; `home` is for what stands around it."""
    require("buildah", "docker", "docker-registry", "dnsmasq", "dpkg-scanpackages", "podman", "skopeo")
    debian = packages() / ARCHITECTURE / "debian"
    machine = Machine(home)
    try:
        provide_names(machine, home)
        provide_hub(machine, home, Authority(home))
        provide_packages(machine, home, debian.glob("*.deb"))
        listed = ["dpkg-scanpackages", "--multiversion", "."]
        index = subprocess.run(listed, cwd=debian, check=True, capture_output=True)
        (home / "index" / "Packages").write_bytes(index.stdout)
        machine.path("/etc/apt/sources.list").write_text(f"deb [trusted=yes] {INDEX} ./\n")
        provide_clone(machine)
        yield machine
    finally:
        machine.stop()


@pytest.fixture(scope="session")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """Built once for all processes of the tests."""
    return Layout(built_once(tmp_path_factory, "image", _build))


def _build(place: Path) -> None:
    home = Path(tempfile.mkdtemp(prefix="entrepot-"))  # short: it has sockets
    try:
        with builder(home) as machine:
            given = f"export SOURCE_DATE_EPOCH={EPOCH} REVISION=0123abc {UV}\n"
            machine.run(given + Page(NAME).script("build.py fetch"), directory=CLONE)
            shutil.copytree(machine.path(f"{CLONE}/layout"), place)
    finally:
        shutil.rmtree(home)

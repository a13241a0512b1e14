"""The image of deploy/image, and what it is made of."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.clients.containers import Podman
from tests.clients.processes import environment, require, run
from tests.test_docs import ROOT

DIRECTORY = ROOT / "deploy" / "image"
BUILD = DIRECTORY / "build.py"
ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
PACKAGES = ROOT / ".venv" / "image"  # as .ci/run downloads them
EPOCH = 1_760_000_000
PATIENCE = 800  # seconds for a build on a busy machine


class Layout:
    """The image as an OCI image layout; read with nothing of ours."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.index = json.loads((directory / "index.json").read_text())
        self.top = self.index["manifests"][0]
        self.manifest = self.read(self.top)
        self.config = self.read(self.manifest["config"])

    def path(self, descriptor: dict[str, Any]) -> Path:
        return self.directory / "blobs" / descriptor["digest"].replace(":", "/")

    def read(self, descriptor: dict[str, Any]) -> Any:
        return json.loads(self.path(descriptor).read_text())


def packages() -> Path:
    """The directory of what the image is made of; the test is skipped where nobody has downloaded it."""
    if not PACKAGES.exists():
        if os.environ.get("ENTREPOT_REQUIRE_CLIENTS") == "1":
            pytest.fail(f"{PACKAGES} has no packages: .ci/run downloads them")
        pytest.skip("the packages of the image are not downloaded: deploy/image/build.py fetch .venv/image")
    return PACKAGES


def build_trees(place: Path, umask: int, *options: str | Path) -> None:
    """Make the files of the image at `place`, by build.py."""
    require("dpkg-deb")
    given = {"SOURCE_DATE_EPOCH": str(EPOCH), "REVISION": "0123abc", "TMPDIR": str(place.parent)}
    done = subprocess.run(
        [sys.executable, BUILD, "trees", packages(), place, *options],
        env={**os.environ, **given},
        capture_output=True,
        text=True,
        umask=umask,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr


def running_podman(home: Path) -> Podman:
    """One that can run containers here, or the test is skipped."""
    podman = Podman(home)
    static = home / "static"
    (package,) = packages().glob(f"{ARCHITECTURE}/debian/tini_*.deb")
    run(["dpkg-deb", "--extract", package, static], environment(home))
    podman.choose_runtime(static / "usr/bin/tini-static")
    return podman

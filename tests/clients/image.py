"""The image of deploy/image, built once for all tests that want it."""

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
from tests.clients.processes import GO, environment, require, run
from tests.once import built_once
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


def build(command: str, place: Path, umask: int, *options: str | Path) -> None:
    """Run build.py: `image` makes a layout at `place`, and `trees` the files alone.

    Both places are relative, as on the page.
    """
    require("buildah", "dpkg-deb")
    if not PACKAGES.exists():
        if os.environ.get("ENTREPOT_REQUIRE_CLIENTS") == "1":
            pytest.fail(f"{PACKAGES} has no packages: .ci/run downloads them")
        pytest.skip("the packages of the image are not downloaded: deploy/image/build.py fetch .venv/image")
    given = {"SOURCE_DATE_EPOCH": str(EPOCH), "REVISION": "0123abc", "TMPDIR": str(place.parent)}
    words = [sys.executable, BUILD, command, os.path.relpath(PACKAGES, place.parent), place.name, *options]
    done = subprocess.run(
        words,
        cwd=place.parent,
        env={**os.environ, **GO, **given},
        capture_output=True,
        text=True,
        umask=umask,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """Built by the first process of the tests that wants it."""
    return Layout(built_once(tmp_path_factory, "image", lambda place: build("image", place, umask=0o022)))


def running_podman(home: Path) -> Podman:
    """One that can run containers here, or the test is skipped."""
    podman = Podman(home)
    static = home / "static"
    (package,) = PACKAGES.glob(f"{ARCHITECTURE}/debian/tini_*.deb")
    run(["dpkg-deb", "--extract", package, static], environment(home))
    podman.choose_runtime(static / "usr/bin/tini-static")
    return podman

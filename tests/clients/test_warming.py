"""What compose files and manifests name is warmed from real registries, proven, and pulled without them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.conftest import Images
from tests.clients.processes import environment, require
from tests.clients.site import Site
from tests.clients.test_skopeo import Skopeo, digests

COMPOSE = """
services:
  layers: {image: "layers:${TAG:-1}"}
  platforms: {image: docker.io/library/platforms:1}
"""
MANIFESTS = """
kind: Deployment
spec: {template: {spec: {containers: [{image: "quay.example/team/app:1"}]}}}
---
kind: Pod
spec: {initContainers: [{image: schema2:1}]}
"""


@pytest.fixture(params=["server", "directory"])
def warmed(request: pytest.FixtureRequest, site: Site, tmp_path: Path) -> Iterator[Site]:
    """A site whose admin API is asked, or one that has none: then its directory is worked on."""
    if request.param == "server":
        yield site
        return
    directory = tmp_path / "other"
    directory.mkdir()
    other = Site(site.upstreams, directory, admin=False)
    yield other
    other.stop()


def entrepot(site: Site, home: Path, *words: str, status: int = 0) -> str:
    require("docker-registry", root=False)
    command = [sys.executable, "-m", "proxy", *words, "--config", str(site.config)]
    done = subprocess.run(command, env=environment(home), capture_output=True, text=True, timeout=60)
    assert done.returncode == status, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def test_all_that_files_name_is_pulled_without_upstreams(warmed: Site, home: Path, pushed: Images) -> None:
    files = [home / "compose.yml", home / "manifests.yaml"]
    for file, text in zip(files, (COMPOSE, MANIFESTS), strict=True):
        file.write_text(text)
    names = [str(file) for file in files]
    entrepot(warmed, home, "ready", *names, status=1)
    entrepot(warmed, home, "warm", *(word for name in names for word in ("--from", name)))
    asked = warmed.requests()
    blobs = [
        each
        for requests in asked.values()
        for each in requests
        if each.startswith("GET") and "/blobs/" in each
    ]
    assert len(blobs) == len(set(blobs))
    judged = json.loads(entrepot(warmed, home, "ready", *names, "--json"))
    assert [each["state"] for each in judged] == ["complete"] * 4
    assert warmed.requests() == asked
    again = json.loads(entrepot(warmed, home, "warm", "layers:1", "--json"))
    assert [(each["here"], each["fetched"]) for each in again] == [(True, 0)]
    warmed.go_offline()
    skopeo = Skopeo(warmed, home)
    for name, image in (
        ("docker.io/library/layers:1", pushed.layers),
        ("docker.io/library/platforms:1", pushed.platforms),
        ("docker.io/library/schema2:1", pushed.schema2),
        ("quay.example/team/app:1", pushed.app),
    ):
        assert skopeo.copy(f"{warmed.address}/{name}") == digests(image)
    # What is here is here, though nobody can vouch for it; what is not is named.
    rows = json.loads(entrepot(warmed, home, "warm", "layers:1", "absent:1", "--json", status=1))
    assert [each["here"] for each in rows] == [True, False]

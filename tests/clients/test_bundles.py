"""Images are carried from a site with upstreams into one without, and real clients pull them by their names.

And the other way round: what skopeo and docker wrote is taken in, and what we wrote they read.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.clients import test_containerd, test_dockerd, test_podman
from tests.clients.conftest import Images
from tests.clients.images import Image
from tests.clients.processes import environment, require, run
from tests.clients.site import Gone, Site
from tests.clients.test_containerd import HOW, Containerd
from tests.clients.test_dockerd import Docker
from tests.clients.test_podman import Containers
from tests.clients.test_skopeo import Skopeo, digests

NAMES = {
    "docker.io/library/layers:1": "layers",
    "docker.io/library/schema2:1": "schema2",
    "docker.io/library/platforms:1": "platforms",
    "docker.io/team/artifact:1": "artifact",
    "quay.example/team/app:1": "app",
}


def entrepot(site: Site, home: Path, *words: str | Path, status: int = 0) -> str:
    command = [sys.executable, "-m", "proxy", *map(str, words), "--config", str(site.config)]
    done = subprocess.run(command, env=environment(home), capture_output=True, text=True, timeout=60)
    assert done.returncode == status, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def site(shared: Site) -> Site:
    """The one outside."""
    return shared


@contextmanager
def cut_off(outside: Site, directory: Path) -> Iterator[Site]:
    """A site that holds nothing, and whose upstreams nobody reaches; its server runs."""
    inside = Site({name: Gone() for name in outside.upstreams}, directory, offline=True)
    try:
        yield inside
    finally:
        inside.stop()


@pytest.fixture
def inside(site: Site, tmp_path: Path) -> Iterator[Site]:
    with cut_off(site, tmp_path) as inside:
        yield inside


@pytest.fixture(scope="module", params=["bundle.tar", "bundle"])
def bundle(request: pytest.FixtureRequest, site: Site, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that lies upstream."""
    home = tmp_path_factory.mktemp("bundle")
    entrepot(site, home, "warm", *NAMES)
    path = home / str(request.param)
    entrepot(site, home, "export", path, *NAMES)
    return path


@pytest.fixture(scope="module")
def carried(bundle: Path, site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site inside with all of the bundle, which its server did not know of when it began."""
    home = tmp_path_factory.mktemp("inside")
    with cut_off(site, home) as inside:
        entrepot(inside, home, "import", bundle)
        yield inside


def images(pushed: Images) -> dict[str, Image]:
    return {name: getattr(pushed, image) for name, image in NAMES.items()}


# There


def test_containerd_pulls_what_was_carried(carried: Site, home: Path, pushed: Images) -> None:
    containerd = Containerd(carried, home)
    containerd.configure()
    names = {name: image for name, image in images(pushed).items() if image is not pushed.artifact}
    assert containerd.pull(*names, how=HOW) == test_containerd.held(names)


def test_docker_pulls_what_was_carried(carried: Site, home: Path, pushed: Images) -> None:
    names = {"layers:1": "layers", "schema2:1": "schema2", "docker.io/library/platforms:1": "platforms"}
    expected = [test_dockerd.held(image, getattr(pushed, image)) for image in names.values()]
    assert Docker(carried, home).pull(*names) == expected


def test_podman_pulls_what_was_carried(carried: Site, home: Path, pushed: Images) -> None:
    names = {name: image for name, image in images(pushed).items() if image is not pushed.artifact}
    expected = [test_podman.held(image) for image in names.values()]
    assert Containers("podman", carried, home).pull(*names) == expected


def test_skopeo_pulls_what_was_carried(carried: Site, home: Path, pushed: Images) -> None:
    skopeo = Skopeo(carried, home)
    for name, image in images(pushed).items():
        assert skopeo.copy(name) == digests(image)


def test_what_was_not_carried_is_told(carried: Site, home: Path) -> None:
    with pytest.raises(
        pytest.fail.Exception, match=r"2 of docker\.io/library/layers is not cached"
    ) as raised:
        Skopeo(carried, home).copy(f"{carried.address}/docker.io/library/layers:2")
    assert "docker.io is set offline" in str(raised.value)


# Bundles, read by others


def test_skopeo_reads_bundles(bundle: Path, site: Site, home: Path, pushed: Images) -> None:
    """Of a layout it reads what is OCI's: of Docker's manifests it says that there are none."""
    skopeo = Skopeo(site, home)
    transport = "oci-archive" if bundle.suffix == ".tar" else "oci"
    for number, (name, image) in enumerate(images(pushed).items()):
        if image is pushed.schema2:
            continue
        raw = skopeo.run("inspect", "--raw", f"{transport}:{bundle}:{name}")
        assert raw == image.manifest.data.decode()
        copy = home / f"read-{number}"
        skopeo.run("copy", "--all", f"{transport}:{bundle}:{name}", f"dir:{copy}")
        assert len(list(copy.iterdir())) == len(digests(image)) + 1  # and its version


def test_containerd_reads_bundles(bundle: Path, site: Site, home: Path, pushed: Images) -> None:
    if bundle.is_dir():  # ctr takes tars only
        tar = home / "packed.tar"
        run(["tar", "--create", f"--file={tar}", f"--directory={bundle}", "."], environment(home))
        bundle = tar
    with Containerd(site, home).running() as socket:
        ctr = ["ctr", "--address", socket]
        run(
            [*ctr, "images", "import", "--no-unpack", "--all-platforms", bundle],
            environment(home),
        )
        rows = run([*ctr, "images", "ls"], environment(home)).splitlines()[1:]
    held = {name: digest for name, _type, digest, *_ in map(str.split, rows)}
    assert held == {name: image.digest for name, image in images(pushed).items()}


def test_podman_reads_bundles(bundle: Path, site: Site, home: Path, pushed: Images) -> None:
    transport = "oci-archive" if bundle.suffix == ".tar" else "oci"
    name = "docker.io/library/layers:1"
    containers = Containers("podman", site, home)
    storage = [f"--root={home}/read", f"--runroot={home}/run", "--storage-driver=vfs"]
    podman = ["podman", *storage]
    pulled = run([*podman, "pull", "--quiet", f"{transport}:{bundle}:{name}"], containers.environment)
    assert f"sha256:{pulled.split()[-1]}" == pushed.layers.config.digest
    [image] = json.loads(run([*podman, "image", "inspect", pulled.split()[-1]], containers.environment))
    assert tuple(image["RootFS"]["Layers"]) == pushed.layers.diff_ids


# Archives that others wrote


@pytest.mark.parametrize("transport", ["oci-archive", "oci"])
def test_layouts_that_skopeo_wrote(
    site: Site, inside: Site, home: Path, pushed: Images, transport: str
) -> None:
    skopeo, archive = Skopeo(site, home), home / "archive"
    name = "docker.io/library/platforms:1"
    skopeo.run("copy", "--all", f"docker://{name}", f"{transport}:{archive}:{name}")
    entrepot(inside, home, "import", archive)
    (there := home / "there").mkdir()
    assert Skopeo(inside, there).copy(name) == digests(pushed.platforms)


def test_an_archive_that_skopeo_wrote_as_docker(site: Site, inside: Site, home: Path, pushed: Images) -> None:
    skopeo, archive = Skopeo(site, home), home / "archive.tar"
    name = "docker.io/library/layers:1"
    skopeo.run("copy", f"docker://{name}", f"docker-archive:{archive}:{name}")
    entrepot(inside, home, "import", archive)
    [held] = Docker(inside, home).pull("layers:1")
    assert held.layers == pushed.layers.diff_ids


def test_what_docker_saved(site: Site, inside: Site, home: Path, pushed: Images) -> None:
    require("docker", "dockerd", "unshare")
    docker = Docker(site, home)
    (directory := home / "saves").mkdir()
    test_dockerd.write(directory, "docker", site)
    with docker.running(directory) as socket:
        command = ["docker", "--host", socket]
        for name in ("layers:1", "schema2:1"):
            run([*command, "pull", "--quiet", name], environment(home))
        archive = home / "saved.tar"
        run([*command, "save", "--output", archive, "layers:1", "schema2:1"], environment(home))
    entrepot(inside, home, "import", archive)
    there = Docker(inside, home)
    found = there.pull("layers:1", "schema2:1")
    assert [each.layers for each in found] == [pushed.layers.diff_ids, pushed.schema2.diff_ids]
    entrepot(inside, home, "import", archive)
    assert there.pull("layers:1", "schema2:1") == found

"""Coming from docker-registry: by its directory, by the network; and going back by the network."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients import images
from tests.clients.conftest import Filled
from tests.clients.images import Image
from tests.clients.processes import Process, environment, free_port, run
from tests.clients.site import OPEN, DockerRegistry, Site
from tests.clients.test_push import Skopeo, digests

ENTREPOT = (sys.executable, "-m", "proxy")
NAMES = {
    "library/layers": "layers",
    "library/schema2": "schema2",
    "library/platforms": "platforms",
    "team/artifact": "artifact",
}


@pytest.fixture
def skopeo(home: Path) -> Skopeo:
    return Skopeo(home)


@pytest.fixture
def old(filled: Filled, tmp_path: Path) -> Iterator[DockerRegistry]:
    """A docker-registry that runs, over a copy of what others only read."""
    root = tmp_path / "registry"
    shutil.copytree(filled.roots["docker.io"], root)
    registry = DockerRegistry(root, tmp_path)
    yield registry
    registry.stop()


def import_(config: Path, root: Path, *words: str, status: int = 0) -> dict[str, Any]:
    command = [*ENTREPOT, "import", "--config", config, "--from-registry-dir", root, "--json", *words]
    done = subprocess.run([str(each) for each in command], capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def copy(home: Path, *words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run([*ENTREPOT, "copy", *words, "--json"], environment(home)))
    return found


def test_its_directory_is_taken_over(
    site: Site, old: DockerRegistry, filled: Filled, tmp_path: Path, skopeo: Skopeo
) -> None:
    """While both run; once more, with what was pushed to the old one meanwhile."""
    root = tmp_path / "registry"
    found = import_(site.config, root)
    assert (found["repositories"], found["tags"], found["damaged"]) == (4, 4, [])
    assert found["linked"] == found["blobs"]
    for repository, name in NAMES.items():
        image: Image = getattr(filled.images, name)
        assert skopeo.held(f"{site.address}/local/{repository}:1") == digests(image)
    later = images.image("later")
    images.push(old.url, "library/layers", "2", later)
    found = import_(site.config, root)
    assert (found["tags"], found["manifests"], found["blobs"]) == (1, 1, len(later.blobs))
    assert skopeo.held(f"{site.address}/local/library/layers:2") == digests(later)
    found = import_(site.config, root)
    assert (found["tags"], found["manifests"], found["blobs"]) == (0, 0, 0)
    # The old one still serves what now has two names.
    assert skopeo.held(f"{old.url.removeprefix('http://')}/library/layers:2") == digests(later)


def test_its_place_is_taken(old: DockerRegistry, filled: Filled, tmp_path: Path, skopeo: Skopeo) -> None:
    """At its address, under the names that clients know; and they push as before."""
    old.stop()
    address = old.url.removeprefix("http://")
    config = tmp_path / "place.yml"
    tree = {
        "listen": address,
        "admin": "off",
        "disk": {"path": str(tmp_path / "disk")},
        "default_namespace": "local",
        "access": OPEN,
        "namespaces": {"local": {"store": {}}, "docker.io": {"upstream": "http://127.0.0.1:9"}},
    }
    config.write_text(json.dumps(tree))
    import_(config, tmp_path / "registry")
    shutil.rmtree(tmp_path / "registry")  # what was taken stays
    server = Process([*ENTREPOT, "serve", "--config", config], ready="listening")
    try:
        for repository, name in NAMES.items():
            assert skopeo.held(f"{address}/{repository}:1") == digests(getattr(filled.images, name))
        skopeo.copy(f"docker://{address}/library/layers:1", f"docker://{address}/library/layers:2")
        assert skopeo.held(f"{address}/library/layers:2") == digests(filled.images.layers)
    finally:
        server.stop()


def test_what_is_damaged_there_stays_there(
    site: Site, old: DockerRegistry, filled: Filled, tmp_path: Path, skopeo: Skopeo
) -> None:
    root = tmp_path / "registry"
    blob = filled.images.schema2.blobs[1].digest.removeprefix("sha256:")
    data = root / "docker" / "registry" / "v2" / "blobs" / "sha256" / blob[:2] / blob / "data"
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    found = import_(site.config, root, status=1)
    assert {each["repository"] for each in found["damaged"]} == {"library/schema2"}
    assert {each["what"] for each in found["damaged"]} == {
        f"sha256:{blob}", filled.images.schema2.digest, "1",
    }  # fmt: skip
    assert found["repositories"] == 3
    assert skopeo.held(f"{site.address}/local/library/layers:1") == digests(filled.images.layers)


def test_the_directory_of_a_cache(
    site: Site, old: DockerRegistry, filled: Filled, tmp_path: Path, skopeo: Skopeo
) -> None:
    """It holds of an index what was pulled: where the namespace allows it, that is taken."""
    first, second = filled.images.platforms.children
    root, address = tmp_path / "proxied", f"127.0.0.1:{free_port()}"
    settings = tmp_path / "proxied.yml"
    settings.write_text(
        json.dumps(
            {
                "version": "0.1",
                "log": {"level": "info", "formatter": "text"},
                "storage": {"filesystem": {"rootdirectory": str(root)}},
                "http": {"addr": address},
                "proxy": {"remoteurl": old.url},
            }
        )
    )
    cache = Process(["docker-registry", "serve", settings], ready="listening on")
    try:
        # Of the index the first image only, as one who pulls it for his machine has it.
        skopeo.copy(
            f"docker://{address}/library/platforms:1",
            f"dir:{tmp_path}/pulled",
            "--override-arch=amd64",
            "--override-os=linux",
        )
        skopeo.copy(f"docker://{address}/library/layers:1", f"dir:{tmp_path}/layers")
        # It stores a blob beside serving it, and then notes when the blob will be stale.
        for repository, image in (("library/platforms", first), ("library/layers", filled.images.layers)):
            for blob in image.blobs:
                cache.wait_for(f"scheduler entry for {repository}@{blob.digest} ")
    finally:
        cache.stop()
    found = import_(site.config, root, status=1)
    assert {each["what"] for each in found["damaged"]} == {filled.images.platforms.digest, "1"}
    assert second.digest in found["damaged"][0]["why"]
    settings = tmp_path / "sparse.yml"
    tree = json.loads(site.config.read_text())
    tree["namespaces"]["local"] = {"store": {"sparse": True}}
    settings.write_text(json.dumps(tree))
    assert import_(settings, root)["tags"] == 1
    assert skopeo.held(f"{site.address}/local/library/layers:1") == digests(filled.images.layers)
    assert skopeo.held(f"{site.address}/local/library/platforms@{first.digest}") == digests(first)


def test_copies_by_the_network(
    site: Site, old: DockerRegistry, filled: Filled, tmp_path: Path, home: Path, skopeo: Skopeo
) -> None:
    """All of a registry into ours, out of ours into another one, and from repository to repository there."""
    source = old.url.removeprefix("http://")
    found = copy(home, f"{source}/*:*", f"{site.address}/local/")
    assert {each["outcome"] for each in found["images"]} == {"copied"}
    assert len(found["images"]) == len(NAMES)
    for repository, name in NAMES.items():
        assert skopeo.held(f"{site.address}/local/{repository}:1") == digests(getattr(filled.images, name))
    other = DockerRegistry(tmp_path / "other", tmp_path)
    try:
        target = other.url.removeprefix("http://")
        found = copy(home, f"{site.address}/local/*:*", f"{target}/mirror/")
        assert {each["outcome"] for each in found["images"]} == {"copied"}
        for repository, name in NAMES.items():
            assert skopeo.held(f"{target}/mirror/{repository}:1") == digests(getattr(filled.images, name))
        found = copy(home, f"{target}/mirror/library/layers:1", f"{target}/elsewhere:1")
        assert (found["blobs"], found["mounted"]) == (0, len(filled.images.layers.blobs))
        again = copy(home, f"{site.address}/local/*:*", f"{target}/mirror/")
        assert {each["outcome"] for each in again["images"]} == {"present"}
        assert again["bytes"] == 0
    finally:
        other.stop()


def test_signatures_come_along_where_there_are_no_referrers(
    site: Site, old: DockerRegistry, filled: Filled, tmp_path: Path, home: Path, skopeo: Skopeo
) -> None:
    """docker-registry knows no referrers: there a tag lists them, and is kept by who pushes."""
    subject = filled.images.layers
    empty = images.Content(images.OCI_EMPTY, b"{}")
    document = {
        "schemaVersion": 2,
        "mediaType": images.OCI["manifest"],
        "artifactType": "application/vnd.example.signature",
        "config": empty.descriptor,
        "layers": [empty.descriptor],
        "subject": subject.manifest.descriptor,
    }
    content = images.Content(images.OCI["manifest"], json.dumps(document).encode())
    signature = Image(content, (empty,))
    source = f"{site.address}/local/app"
    copy(home, f"{old.url.removeprefix('http://')}/library/layers:1", f"{source}:1")
    images.push(f"http://{site.address}", "local/app", signature.digest, signature)
    target = old.url.removeprefix("http://")
    copy(home, f"{source}:1", f"{target}/signed:1")
    tag = subject.digest.replace(":", "-")
    # skopeo takes a list of referrers for what it is: an index, whose one child is the signature.
    assert signature.digest in skopeo.held(f"{target}/signed:{tag}")
    # And back, from the tag into the API, which ours has.
    copy(home, f"{target}/signed:1", f"{site.address}/local/back:1")
    listed = run(
        [
            "skopeo",
            "inspect",
            "--raw",
            "--tls-verify=false",
            f"docker://{site.address}/local/back@{signature.digest}",
        ],
        environment(home),
    )
    assert json.loads(listed)["subject"]["digest"] == subject.digest

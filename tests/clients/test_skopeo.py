"""skopeo copies and inspects through the cache: by prefixed name, and by a mirror in registries.conf."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.clients.conftest import Images
from tests.clients.images import Image, digest_of
from tests.clients.processes import environment, require, run
from tests.clients.setup import write_mirrors
from tests.clients.site import Site, pull_cold_warm_offline

_NAMES = {
    "layers": "library/layers:1",
    "schema2": "library/schema2:1",
    "platforms": "library/platforms:1",
    "artifact": "team/artifact:1",
}


class Skopeo:
    def __init__(self, site: Site, home: Path, *words: str | Path):
        """As `entrepot setup podman` configures it with `words`."""
        require("skopeo", root=False)
        self._home = home
        self._copies = 0
        write_mirrors(home, site, *words)
        self._environment = environment(home)

    def run(self, command: str, *words: str | Path) -> str:
        return run(["skopeo", "--insecure-policy", command, *words], self._environment)

    def copy(self, name: str) -> set[str]:
        """Copy into a new directory, whole indexes too.  Returns the digests of what came to lie there."""
        self._copies += 1
        directory = self._home / f"copy-{self._copies}"
        self.run("copy", "--all", f"docker://{name}", f"dir:{directory}")
        files = [path for path in directory.iterdir() if path.name != "version"]
        return {digest_of(path.read_bytes()) for path in files}


@pytest.fixture
def skopeo(site: Site, home: Path) -> Skopeo:
    return Skopeo(site, home)


def digests(image: Image) -> set[str]:
    return {part.digest for part in image.parts()}


@pytest.mark.parametrize("image", _NAMES)
def test_copy_by_prefixed_name(site: Site, skopeo: Skopeo, pushed: Images, image: str) -> None:
    name = f"{site.address}/docker.io/{_NAMES[image]}"
    pull_cold_warm_offline(site, lambda: skopeo.copy(name), digests(getattr(pushed, image)))


def test_copy_through_mirrors(site: Site, skopeo: Skopeo, pushed: Images) -> None:
    names = ["docker.io/library/platforms:1", "quay.example/team/app:1"]
    pull_cold_warm_offline(
        site,
        lambda: [skopeo.copy(name) for name in names],
        [digests(pushed.platforms), digests(pushed.app)],
    )


def test_copy_without_bypass(site: Site, home: Path, pushed: Images) -> None:
    skopeo = Skopeo(site, home, "--no-bypass")
    names = ["docker.io/library/platforms:1", "quay.example/team/app:1"]
    expected = [digests(pushed.platforms), digests(pushed.app)]
    pull_cold_warm_offline(site, lambda: [skopeo.copy(name) for name in names], expected)


@pytest.mark.parametrize("words", [(), ("--no-bypass",)])
def test_copy_by_https(encrypted: Site, home: Path, pushed: Images, words: tuple[str, ...]) -> None:
    skopeo = Skopeo(encrypted, home, *words)
    names = ["quay.example/team/app:1", f"{encrypted.address}/docker.io/library/schema2:1"]
    expected = [digests(pushed.app), digests(pushed.schema2)]
    pull_cold_warm_offline(encrypted, lambda: [skopeo.copy(name) for name in names], expected)


def test_copy_by_digest(site: Site, skopeo: Skopeo, pushed: Images) -> None:
    name = f"{site.address}/docker.io/library/platforms@{pushed.platforms.digest}"
    pull_cold_warm_offline(site, lambda: skopeo.copy(name), digests(pushed.platforms))


def test_inspect_shows_the_exact_manifest(site: Site, skopeo: Skopeo, pushed: Images) -> None:
    name = f"docker://{site.address}/docker.io/library/platforms:1"
    expected = pushed.platforms.manifest.data.decode()
    pull_cold_warm_offline(site, lambda: skopeo.run("inspect", "--raw", name), expected)


def test_inspect_and_list_tags(site: Site, skopeo: Skopeo, pushed: Images) -> None:
    name = f"docker://{site.address}/docker.io/library/layers"
    found = json.loads(skopeo.run("inspect", f"{name}:1"))
    assert found["Digest"] == pushed.layers.digest
    assert found["Layers"] == [layer.digest for layer in pushed.layers.blobs[1:]]
    assert found["RepoTags"] == ["1"]
    assert json.loads(skopeo.run("list-tags", name))["Tags"] == ["1"]


def test_unknown_tag_is_reported_as_unknown(site: Site, skopeo: Skopeo) -> None:
    with pytest.raises(pytest.fail.Exception, match=re.compile("manifest unknown", re.IGNORECASE)):
        skopeo.copy(f"{site.address}/docker.io/library/layers:absent")

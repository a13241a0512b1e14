"""Charliecloud pulls by prefixed name, and pushes to a store: by TLS, which it always uses."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.conftest import Images
from tests.clients.images import Image, digest_of
from tests.clients.processes import environment, require, run
from tests.clients.site import Site, pull_cold_warm_offline
from tests.test_docs import ROOT
from tests.test_shell_blocks import scripts

PAGE = ROOT / "docs" / "clients.md"
# By the system's Python, for which Debian has its libraries.
PROGRAM = ("/usr/bin/python3", "/usr/bin/ch-image", "--no-cache")


class Charliecloud:
    def __init__(self, site: Site, home: Path) -> None:
        require("ch-image", root=False)
        self._home = home
        self._storages = 0
        ca = {"REQUESTS_CA_BUNDLE": str(site.ca), "USER": "nobody"}
        self._environment = environment(home, **ca)

    def run(self, *words: str) -> str:
        storage = {"CH_IMAGE_STORAGE": f"{self._home}/storage-{self._storages}"}
        return run(words, {**self._environment, **storage})

    def pull(self, name: str) -> set[str]:
        """Pull into a new storage.  Returns the digests of what came to lie there."""
        self._storages += 1
        self.run(*PROGRAM, "pull", name)
        downloads = self._home / f"storage-{self._storages}" / "dlcache"
        return {digest_of(path.read_bytes()) for path in downloads.iterdir()}


@pytest.fixture
def charliecloud(encrypted: Site, home: Path) -> Charliecloud:
    return Charliecloud(encrypted, home)


def digests(image: Image) -> set[str]:
    """Of all that is pulled: an index, the manifest for this platform, and its blobs."""
    return {image.digest, *(part.digest for part in image.amd64.parts())}


def test_pull(encrypted: Site, charliecloud: Charliecloud, pushed: Images) -> None:
    name = f"{encrypted.address}/docker.io/library/platforms:1"
    pull_cold_warm_offline(encrypted, lambda: charliecloud.pull(name), digests(pushed.platforms))


def test_pull_and_push_as_the_page_says(encrypted: Site, charliecloud: Charliecloud, pushed: Images) -> None:
    [script] = [text for _, text in scripts(PAGE.read_text()) if "ch-image" in text]
    here = {
        "/etc/ssl/entrepot/ca.crt": str(encrypted.ca),
        "cache.example:5000": encrypted.address,
        "docker.io/library/alpine:3": "docker.io/library/layers:1",
        "ch-image": " ".join(PROGRAM),
    }
    for words, meant in here.items():
        assert words in script
        script = script.replace(words, meant)
    charliecloud.run("sh", "-ec", script)
    # One manifest, its configuration, and one layer.
    assert len(charliecloud.pull(f"{encrypted.address}/local/team/alpine:3")) == 3

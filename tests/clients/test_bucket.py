"""Real clients push to a registry whose content is in a real bucket, and pull from it."""

from __future__ import annotations

from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import obstore
import pytest

from storage.bucket.owner import MARKER
from tests.clients.conftest import Filled, Images, before
from tests.clients.images import Image
from tests.clients.site import Site
from tests.clients.test_podman import Containers, held
from tests.clients.test_push import Skopeo, digests
from tests.seaweed import Seaweed

PREFIX = "clients/registry"


@pytest.fixture(scope="module")
def site(filled: Filled, tmp_path_factory: pytest.TempPathFactory, seaweed: Seaweed) -> Iterator[Site]:
    settings = seaweed.settings("tests", PREFIX)
    keys = {"access_key": settings.access_key, "secret_key": settings.secret_key}
    shared = {"bucket": settings.url, "endpoint": settings.endpoint, **keys}
    redirect = {"above": "100B"}
    with before(filled, tmp_path_factory.mktemp("bucket"), shared=shared, redirect=redirect) as site:
        yield site


def blobs(image: Image) -> set[str]:
    return {each.digest for each in image.blobs}.union(*map(blobs, image.children))


def test_skopeo_pushes_and_podman_pulls(site: Site, home: Path, pushed: Images, seaweed: Seaweed) -> None:
    skopeo = Skopeo(home)
    images = {
        "library/layers": pushed.layers,
        "library/platforms": pushed.platforms,
        "team/artifact": pushed.artifact,
    }
    for repository, image in images.items():
        name = f"{site.address}/local/{repository}:1"
        skopeo.copy(f"docker://{site.address}/docker.io/{repository}:1", f"docker://{name}", "--all")
        assert skopeo.held(name) == digests(image)
    listed = obstore.list(seaweed.settings("tests", PREFIX).connect())
    names = {str(each["path"]).rpartition("/")[2] for portion in listed for each in portion} - {MARKER}
    assert {f"sha256:{each.partition('.')[0]}" for each in names} == set().union(*map(blobs, images.values()))
    layer = max(pushed.layers.blobs, key=lambda each: len(each.data))
    connection = HTTPConnection(site.address)
    connection.request("GET", f"/v2/local/library/layers/blobs/{layer.digest}")
    assert connection.getresponse().status == 307  # which skopeo has followed, and podman will
    connection.close()
    containers = Containers("podman", site, home)
    assert containers.pull(f"{site.address}/local/library/layers:1") == [held(pushed.layers)]

"""Upstreams that lead back to the server: each of its requests says so, and none of them waits for itself."""

from __future__ import annotations

import json

import pytest

from tests.conftest import Serve, Site
from tests.upstream import Image, Status, Upstream

TAG = "/v2/library/app/manifests/1"
OTHER = "entrepot; id=0123456789abcdef"


@pytest.fixture
def image(upstream: Upstream) -> Image:
    return upstream.image("library/app", "1")


def marks(upstream: Upstream) -> set[str]:
    return {each.headers["CDN-Loop"] for each in upstream.requests}


async def own(site: Site, upstream: Upstream) -> str:
    """The mark of the server."""
    assert (await site.get(TAG))[0] == 200
    (mark,) = marks(upstream)
    upstream.clear()
    return mark


async def test_own_requests_are_refused(serve: Serve, upstream: Upstream, image: Image) -> None:
    site = await serve(upstream)
    mark = await own(site, upstream)
    paths = ("blobs/" + image.layers[0], "manifests/other", "tags/list", f"referrers/{image.digest}")
    for path in [TAG, *(f"/v2/library/app/{each}" for each in paths)]:
        status, _, content = await site.get(path, CDN_Loop=f"{OTHER},{mark}, cdn.example; n=1")
        assert status == 508 and json.loads(content)["errors"][0]["code"] == "UNAVAILABLE"
    assert upstream.log == []
    assert (await site.get("/v2/", CDN_Loop=mark))[0] == 200


@pytest.mark.parametrize(
    ("sent", "before"),
    [
        (OTHER, f"{OTHER}, "),
        (f"cdn.example,{OTHER} , entrepot", f"{OTHER}, "),
        (f"{OTHER}0, entrepot; id=x, entrepot; id=0123456789ABCDEF", ""),
        (", ".join([OTHER] * 99), f"{OTHER}, " * 16),
    ],
)
async def test_marks_of_other_servers_are_passed_on(
    serve: Serve, upstream: Upstream, image: Image, sent: str, before: str
) -> None:
    """And nothing else, since others share what one client causes to be fetched."""
    site = await serve(upstream)
    mark = await own(site, upstream)
    assert (await site.get(f"/v2/library/app/blobs/{image.layers[0]}", CDN_Loop=sent))[0] == 200
    assert marks(upstream) == {before + mark}


async def test_two_servers_do_not_take_each_other_for_themselves(
    serve: Serve, upstream: Upstream, image: Image, tmp_path_factory: pytest.TempPathFactory
) -> None:
    first = await serve(upstream)
    second = await serve(first.url, directory=tmp_path_factory.mktemp("second"))
    assert (await second.get(TAG))[2] == image.content
    (mark,) = marks(upstream)
    assert len(set(mark.split(", "))) == 2


async def test_a_server_that_is_its_own_upstream(serve: Serve, upstream: Upstream) -> None:
    site = await serve(upstream)
    upstream.next("GET", "1", Status(508))
    status, _, content = await site.get(TAG)
    assert status == 502 and b"the URL of this upstream leads back to this server" in content
    assert site.app.composition.upstreams["docker.io"].healthy

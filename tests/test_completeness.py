"""Images whose layers cannot come are refused to clients that would not look elsewhere for the layers."""

from __future__ import annotations

import asyncio
import json

import pytest

from proxy.cache.drill import DrillOrder
from tests.conftest import Serve, Site
from tests.outages import FRESH, OTHER, TAG, blob_of, warm
from tests.upstream import OCI_INDEX, OCI_MANIFEST, Hold, Image, Upstream
from tests.upstream.content import describe

PODMAN = "containers/5.36.2 (github.com/containers/image)"
OTHERS = ["skopeo/1.22.0-dev", "Buildah/1.41", "libpod/5.6.0", "cri-o/1.34.0", "CRI-O/1.34.0"]
NOWHERE = "sha256:" + 64 * "0"
BUILDKIT = "buildkit/v0.34"
DOCKER = "docker/29.1.0 go/go1.25 containers/5"


async def ask(site: Site, path: str = TAG, agent: str = PODMAN, method: str = "GET") -> tuple[int, bytes]:
    async with site.request(method, path, headers={"User-Agent": agent}) as response:
        return response.status, await response.read()


async def fill(site: Site, *images: Image) -> None:
    for image in images:
        for digest in (image.config, *image.layers):
            assert (await site.get(blob_of(digest)))[0] == 200


@pytest.mark.parametrize("agent", [PODMAN, *OTHERS])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_an_image_without_its_layers_is_refused(
    serve: Serve, upstream: Upstream, agent: str, method: str
) -> None:
    site, image = await warm(serve, upstream)
    await upstream.stop()
    assert (await ask(site, agent=agent, method=method))[0] == 503
    assert (await ask(site, f"/v2/a/b/manifests/{image.digest}", agent, method))[0] == 503
    for other in (DOCKER, "containerd/2.4.2", ""):
        assert (await ask(site, agent=other, method=method))[0] == 200


async def test_the_refusal_names_what_is_missing(serve: Serve, upstream: Upstream) -> None:
    site, image = await warm(serve, upstream)
    assert (await site.get(blob_of(image.config)))[0] == 200
    await upstream.stop()
    status, body = await ask(site)
    [error] = json.loads(body)["errors"]
    assert (status, error["code"]) == (503, "UNAVAILABLE")
    assert image.layers[0] in error["message"]


async def test_a_complete_image_is_served(serve: Serve, upstream: Upstream) -> None:
    site, image = await warm(serve, upstream)
    await fill(site, image)
    await upstream.stop()
    assert await ask(site) == (200, image.content)
    assert (await ask(site, OTHER))[0] == 503, "another image, of which nothing is stored"


async def test_nothing_is_refused_while_upstream_serves(serve: Serve, upstream: Upstream) -> None:
    site, image = await warm(serve, upstream)
    assert await ask(site) == (200, image.content)
    assert await ask(site, f"/v2/a/b/manifests/{image.digest}") == (200, image.content)


@pytest.mark.parametrize("indexed", [False, True])
async def test_a_build_cache_without_its_layers_is_refused(
    serve: Serve, upstream: Upstream, indexed: bool
) -> None:
    """BuildKit goes on without it, and ends a build that wants a layer of it."""
    config = describe("application/vnd.buildkit.cacheconfig.v0", upstream.blob("a/b", b"{}"), 2)
    layer = describe("application/vnd.oci.image.layer.v1.tar", upstream.blob("a/b", b"a layer"), 7)
    parts = {"manifests": [layer, config]} if indexed else {"config": config, "layers": [layer]}
    kind = OCI_INDEX if indexed else OCI_MANIFEST
    upstream.manifest("a/b", {"schemaVersion": 2, "mediaType": kind, **parts}, tag="latest")
    site = await serve(upstream)
    for path in (TAG, TAG, blob_of(config["digest"])):
        assert (await ask(site, path, BUILDKIT))[0] == 200
    site.clock.advance(FRESH + 1)
    await upstream.stop()
    for _ in range(2):
        assert (await ask(site, agent=BUILDKIT))[0] == 503
    await upstream.start()
    site.clock.advance(60)
    for path in (TAG, blob_of(layer["digest"])):
        assert (await ask(site, path, BUILDKIT))[0] == 200
    site.clock.advance(FRESH + 1)
    await upstream.stop()
    assert (await ask(site, agent=BUILDKIT))[0] == 200, "all of it is stored"


@pytest.mark.parametrize(("setting", "podman", "docker"), [("always", 503, 503), ("never", 200, 200)])
async def test_the_setting(serve: Serve, upstream: Upstream, setting: str, podman: int, docker: int) -> None:
    site, _ = await warm(serve, upstream, refuse_incomplete=setting)
    await upstream.stop()
    assert (await ask(site))[0] == podman
    assert (await ask(site, agent=DOCKER))[0] == docker


@pytest.mark.parametrize(
    ("stored", "status"), [([], 503), ([0], 200), ([1], 200), ([2], 503), ([0, 1, 2], 200)], ids=str
)
async def test_an_index_needs_one_complete_image(
    serve: Serve, upstream: Upstream, stored: list[int], status: int
) -> None:
    platforms = ("linux/amd64", "linux/arm64", "unknown/unknown")
    images = [upstream.image("a/b", None, [each.encode(), b"shared"], platform=each) for each in platforms]
    upstream.index("a/b", "latest", images)
    site = await serve(upstream)
    assert (await site.get(TAG))[0] == 200
    for number in stored:
        assert (await site.get(f"/v2/a/b/manifests/{images[number].digest}"))[0] == 200
        await fill(site, images[number])
    site.clock.advance(FRESH + 1)
    await upstream.stop()
    assert (await ask(site, agent=DOCKER))[0] == 200  # and upstream is known to be down
    assert (await ask(site))[0] == status


async def test_the_answers_for_manifest_and_layer_agree_in_another_repository(
    serve: Serve, upstream: Upstream
) -> None:
    image = upstream.image("a/b", "latest")
    upstream.image("c/d", "latest")
    site = await serve(upstream)
    await fill(site, image)
    for name in ("a/b", "c/d"):
        assert (await site.get(f"/v2/{name}/manifests/latest"))[0] == 200
    site.clock.advance(FRESH + 1)
    await upstream.stop()
    manifest = (await ask(site, "/v2/c/d/manifests/latest"))[0]
    layer = (await ask(site, f"/v2/c/d/blobs/{image.layers[0]}"))[0]
    assert (manifest == 200) == (layer == 200)


async def test_an_upstream_that_is_well_again_is_found_out(serve: Serve, upstream: Upstream) -> None:
    site, image = await warm(serve, upstream)
    digest = f"/v2/a/b/manifests/{image.digest}"
    await upstream.stop()
    assert (await ask(site))[0] == 503
    await upstream.start()
    assert (await ask(site, digest))[0] == 503, "its next attempt is not due"
    site.clock.advance(2)
    upstream.clear()
    assert await ask(site, digest) == (200, image.content)
    assert [request.kind for request in upstream.requests] == ["base"]
    await fill(site, image)


async def test_one_of_several_upstreams_is_enough(serve: Serve, upstream: Upstream) -> None:
    async with Upstream() as mirror:
        mirror.image("a/b", "latest")
        site, _ = await warm(serve, upstream, options={"url": [mirror.url, upstream.url]})
        await mirror.stop()
        assert (await ask(site))[0] == 200
        await upstream.stop()
        site.clock.advance(FRESH + 1)
        assert (await ask(site))[0] == 503
        await mirror.start()
        site.clock.advance(60)
        assert (await ask(site))[0] == 200


async def test_offline(serve: Serve, upstream: Upstream) -> None:
    site, image = await warm(serve, upstream)
    await fill(site, image)
    await site.app.stop()
    upstream.clear()
    site = await serve(upstream, offline=True)
    assert (await ask(site))[0] == 200
    assert (await ask(site, OTHER))[0] == 503
    assert (await ask(site, OTHER, DOCKER))[0] == 200
    assert upstream.log == []


async def test_what_is_being_transferred_is_not_missing(serve: Serve, upstream: Upstream) -> None:
    site, image = await warm(serve, upstream)
    assert (await site.get(blob_of(image.config)))[0] == 200
    hold = Hold(asyncio.Event(), after=1)
    upstream.next("GET", image.layers[0], hold)
    transfer = asyncio.create_task(site.get(blob_of(image.layers[0])))
    await hold.reached.wait()
    site.app.composition.drill.begin(DrillOrder(begun=site.clock(), seconds=60))
    assert (await ask(site))[0] == 200
    hold.gate.set()
    assert (await transfer)[0] == 200


async def test_a_transfer_for_another_repository_does_not_help(serve: Serve, upstream: Upstream) -> None:
    site, image = await warm(serve, upstream)
    upstream.image("c/d", "latest")
    assert (await site.get("/v2/c/d/manifests/latest"))[0] == 200
    assert (await site.get(f"/v2/c/d/blobs/{image.config}"))[0] == 200
    hold = Hold(asyncio.Event(), after=1)
    upstream.next("GET", image.layers[0], hold)
    transfer = asyncio.create_task(site.get(blob_of(image.layers[0])))
    await hold.reached.wait()
    site.app.composition.drill.begin(DrillOrder(begun=site.clock(), seconds=60))
    assert (await ask(site, "/v2/c/d/manifests/latest"))[0] == 503
    hold.gate.set()
    assert (await transfer)[0] == 200


@pytest.mark.parametrize(
    "layer_type",
    [
        "application/vnd.oci.image.layer.nondistributable.v1.tar",
        "application/vnd.docker.image.rootfs.foreign.diff.tar",
    ],
)
async def test_a_layer_that_no_registry_has_is_not_missing(
    serve: Serve, upstream: Upstream, layer_type: str
) -> None:
    site, image = await warm(serve, upstream)
    body = json.loads(image.content)
    body["layers"][0] |= {
        "mediaType": layer_type,
        "urls": ["https://vendor.example/layer"],
        "digest": NOWHERE,
    }
    upstream.manifest("a/b", body, tag="foreign")
    assert (await site.get("/v2/a/b/manifests/foreign"))[0] == 200
    assert (await site.get(blob_of(image.config)))[0] == 200
    site.clock.advance(FRESH + 1)
    await upstream.stop()
    assert (await ask(site))[0] == 503
    assert (await ask(site, "/v2/a/b/manifests/foreign"))[0] == 200


async def test_a_manifest_that_names_nothing_is_served(serve: Serve, upstream: Upstream) -> None:
    site, _ = await warm(serve, upstream)
    upstream.index("a/b", "empty", [])
    assert (await site.get("/v2/a/b/manifests/empty"))[0] == 200
    site.clock.advance(FRESH + 1)
    await upstream.stop()
    assert (await ask(site))[0] == 503
    assert (await ask(site, "/v2/a/b/manifests/empty"))[0] == 200


async def test_a_drill_refuses_as_an_outage_does(serve: Serve, upstream: Upstream) -> None:
    site, image = await warm(serve, upstream)
    await fill(site, image)
    site.app.composition.drill.begin(DrillOrder(begun=site.clock(), seconds=60))
    assert (await ask(site))[0] == 200
    assert (await ask(site, OTHER))[0] == 503
    assert (await ask(site, OTHER, DOCKER))[0] == 200

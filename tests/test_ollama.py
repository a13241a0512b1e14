"""Ollama, and registries of models: what its code asks, and what their registries answer."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from typing import Any
from urllib.parse import urljoin, urlsplit

import pytest
from multidict import CIMultiDictProxy

from storage.oci import DOCKER_MANIFEST, Digest
from tests.conftest import Serve, Site
from tests.upstream import Status, Upstream, digest_of

AGENT = "ollama/0.33.0 (amd64 linux) Go/go1.26.0"
MODEL = "library/tiny"
TAG = "1b"
WEIGHTS = os.urandom(400_000)
PARTS = 16


class Ollama:
    """Its download and upload of one model, in the order of its requests."""

    def __init__(self, site: Site, name: str) -> None:
        self.site = site
        self.start = f"{site.url}/v2/{name}"

    async def ask(
        self, method: str, url: str, body: bytes = b"", **headers: str
    ) -> tuple[int, CIMultiDictProxy[str], bytes]:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.site.session.request(
            method, url, data=body or None, headers={"User-Agent": AGENT, **given}, allow_redirects=False
        ) as response:
            return response.status, response.headers, await response.read()

    async def manifest(self, tag: str = TAG) -> dict[str, Any]:
        status, _, body = await self.ask("GET", f"{self.start}/manifests/{tag}", Accept=DOCKER_MANIFEST)
        assert status == 200, body
        found = json.loads(body)
        assert isinstance(found, dict)
        return found

    async def pull(self, tag: str = TAG) -> list[bytes]:
        manifest = await self.manifest(tag)
        return [await self.blob(each["digest"]) for each in (*manifest["layers"], manifest["config"])]

    async def blob(self, digest: str) -> bytes:
        url = f"{self.start}/blobs/{digest}"
        size = int((await self.ask("HEAD", url))[1]["Content-Length"])
        status, headers, _ = await self.ask("GET", url)
        assert status in (200, 307)
        where = urljoin(url, headers["Location"])
        step = -(-size // PARTS)

        async def part(start: int) -> bytes:
            last = min(start + step, size) - 1
            return (await self.ask("GET", where, Range=f"bytes={start}-{last}"))[2]  # whatever its status

        content = b"".join(await asyncio.gather(*(part(each) for each in range(0, size, step))))
        assert digest_of(content) == digest
        return content

    async def push(self, tag: str, *blobs: bytes) -> None:
        layers = [await self.upload(each) for each in blobs]
        body = {
            "schemaVersion": 2,
            "mediaType": DOCKER_MANIFEST,
            "config": layers[-1],
            "layers": layers[:-1],
        }
        url = f"{self.start}/manifests/{tag}"
        content = json.dumps(body).encode()
        assert (await self.ask("PUT", url, content, Content_Type=DOCKER_MANIFEST))[0] == 201

    async def upload(self, blob: bytes) -> dict[str, Any]:
        digest = digest_of(blob)
        assert (await self.ask("HEAD", f"{self.start}/blobs/{digest}"))[0] == 404
        status, headers, _ = await self.ask("POST", f"{self.start}/blobs/uploads/")
        assert status == 202
        step = -(-len(blob) // 3)
        for start in range(0, len(blob), step):
            part = blob[start : start + step]
            status, headers, _ = await self.ask(
                "PATCH",
                self.told(headers),
                part,
                Content_Type="application/octet-stream",
                Content_Range=f"{start}-{start + len(part) - 1}",
                X_Redirect_Uploads="1",
            )
            assert status == 202
        where = f"{self.told(headers)}?digest={digest}&etag={hashlib.md5(blob).hexdigest()}-3"
        assert (await self.ask("PUT", where))[0] == 201
        return {"mediaType": "application/vnd.ollama.image.model", "digest": digest, "size": len(blob)}

    @staticmethod
    def told(headers: CIMultiDictProxy[str]) -> str:
        """Where an upload goes on: never resolved against the URL of the request."""
        where = headers.get("Docker-Upload-Location") or headers["Location"]
        assert urlsplit(where).netloc, where
        return where


def model(upstream: Upstream, name: str, weights: bytes = WEIGHTS, tag: str = TAG) -> str:
    """As the public registry has one: its manifest is text/plain."""
    config = b'{"model_format":"gguf"}'
    layers = [(weights, "model"), (b"be short", "system")]
    described = [
        {
            "mediaType": f"application/vnd.ollama.image.{kind}",
            "digest": upstream.blob(name, each),
            "size": len(each),
        }
        for each, kind in layers
    ]
    about = {
        "mediaType": "application/vnd.docker.container.image.v1+json",
        "digest": upstream.blob(name, config),
        "size": len(config),
    }
    body = {"schemaVersion": 2, "mediaType": DOCKER_MANIFEST, "config": about, "layers": described}
    return upstream.manifest(name, body, "text/plain", tag)


@pytest.fixture
def registry(upstream: Upstream) -> Upstream:
    """It says no digest, knows no HEAD of a manifest, and fails for one by digest."""
    upstream.digest_header = False
    upstream.next("HEAD", lambda request: request.kind == "manifest", Status(405), times=99)
    upstream.next(
        "GET",
        lambda request: request.kind == "manifest" and ":" in (request.reference or ""),
        Status(500),
        times=99,
    )
    return upstream


# Pulls


async def served(serve: Serve, upstream: Upstream, name: str = "registry.ollama.ai", **keys: Any) -> Site:
    return await serve(upstream, more={name: {"upstream": upstream.url, **keys}})


@pytest.mark.clients
async def test_a_model_is_pulled_cold_warm_and_offline(serve: Serve, registry: Upstream) -> None:
    model(registry, MODEL)
    ollama = Ollama(await served(serve, registry, aliases=["ollama"]), "ollama/tiny")
    cold = await ollama.pull()
    assert cold == [WEIGHTS, b"be short", b'{"model_format":"gguf"}']
    assert await ollama.pull() == cold
    await registry.stop()
    assert await ollama.pull() == cold


@pytest.mark.clients
async def test_a_model_that_moved_is_followed_without_its_digest(serve: Serve, registry: Upstream) -> None:
    model(registry, MODEL)
    site = await served(serve, registry, aliases=["ollama"])
    ollama = Ollama(site, "ollama/tiny")
    await ollama.pull()
    model(registry, MODEL, other := os.urandom(1000))
    site.clock.advance(601)
    registry.clear()
    assert (await ollama.manifest())["layers"][0]["digest"] == digest_of(other)
    assert [each.split()[0] for each in registry.log] == ["HEAD", "GET"]
    assert (await ollama.pull())[0] == other


@pytest.mark.clients
async def test_where_the_registry_redirects_the_ranges_come_to_us(serve: Serve, registry: Upstream) -> None:
    registry.cdn = True
    model(registry, MODEL)
    ollama = Ollama(await served(serve, registry), "registry.ollama.ai/library/tiny")
    assert (await ollama.pull())[0] == WEIGHTS


@pytest.mark.parametrize(
    "query", ["", "?ns=registry.ollama.ai", "?ns=registry.ollama.ai&other=1"], ids=["name", "ns", "more"]
)
async def test_the_location_leads_to_the_blob(serve: Serve, registry: Upstream, query: str) -> None:
    model(registry, MODEL)
    site = await served(serve, registry)
    name = "library/tiny" if query else "registry.ollama.ai/library/tiny"
    path = f"/v2/{name}/blobs/{digest_of(WEIGHTS)}"
    status, headers, body = await site.get(path + query, User_Agent=AGENT)
    assert (status, body) == (200, WEIGHTS)
    assert (await site.get(headers["Location"], Range="bytes=7-10"))[0] == 206


@pytest.mark.clients
async def test_only_the_whole_of_a_blob_has_a_location(serve: Serve, registry: Upstream) -> None:
    """And that only for Ollama: some clients follow the Location of a 200 until they give up."""
    model(registry, MODEL)
    site = await served(serve, registry)
    start = "/v2/registry.ollama.ai/library/tiny"
    for path, headers in (
        (f"{start}/blobs/{digest_of(WEIGHTS)}", {"Range": "bytes=0-9", "User_Agent": AGENT}),
        (f"{start}/manifests/{TAG}", {"User_Agent": AGENT}),
        (f"{start}/blobs/{digest_of(WEIGHTS)}", {}),
    ):
        status, found, _ = await site.get(path, **headers)
        assert status in (200, 206)
        assert "Location" not in found


# Names


@pytest.mark.clients
async def test_upper_case_where_a_registry_has_it(serve: Serve, upstream: Upstream) -> None:
    name = "Someone/Llama-3.2_1B--GGUF"
    model(upstream, name, tag="Q4_K_M")
    site = await served(serve, upstream, "hf.co")
    ollama = Ollama(site, f"hf.co/{name}")
    cold = await ollama.pull("Q4_K_M")
    await upstream.stop()
    assert await ollama.pull("Q4_K_M") == cold
    listed = json.loads((await site.get("/v2/_catalog"))[2])["repositories"]
    assert f"hf.co/{name}" in listed


@pytest.mark.parametrize("name", ["Someone/app", "team/App", "team/a__.b", "team/a-"])
async def test_elsewhere_the_grammar_is_the_specifications(
    serve: Serve, upstream: Upstream, name: str
) -> None:
    stores = {"local": {"store": {}}, "models": {"store": {}, "names": "any"}}
    site = await serve(upstream, more=stores)
    for namespace, status in (("docker.io", 400), ("local", 400), ("models", 404)):
        found, _, body = await site.get(f"/v2/{namespace}/{name}/manifests/latest")
        assert (found, upstream.log) == (status, [])
        assert json.loads(body)["errors"][0]["code"] == (
            "NAME_INVALID" if status == 400 else "MANIFEST_UNKNOWN"
        )


@pytest.mark.parametrize("name", ["team/-a", "team/_a", "a//b", "team/a%20b", "team/a%40b"])
async def test_not_any_text_is_a_name(serve: Serve, upstream: Upstream, name: str) -> None:
    site = await serve(upstream, more={"models": {"store": {}, "names": "any"}})
    assert (await site.get(f"/v2/models/{name}/manifests/latest"))[0] == 400


# Pushes


@pytest.mark.clients
@pytest.mark.parametrize("name", ["tiny", "Mine/Tiny"])
async def test_a_push_is_pulled_back(serve: Serve, upstream: Upstream, name: str) -> None:
    site = await serve(upstream, more={"models": {"store": {}, "names": "any"}})
    ollama = Ollama(site, f"models/{name}")
    blobs = [WEIGHTS, b"a template", b"{}"]
    await ollama.push("v1", *blobs)
    assert await ollama.pull("v1") == blobs


@pytest.mark.parametrize(
    ("headers", "start"),
    [
        ({}, None),
        ({"Host": "registry.example"}, "http://registry.example/v2/"),
        (
            {"Host": "registry.example:8443", "X-Forwarded-Proto": "https"},
            "https://registry.example:8443/v2/",
        ),
    ],
)
async def test_an_upload_has_an_address_as_the_client_reaches_us(
    serve: Serve, upstream: Upstream, headers: dict[str, str], start: str | None
) -> None:
    site = await serve(upstream, more={"models": {"store": {}}})
    headers = {"User-Agent": "ollama/0.33.0", **headers}
    async with site.request("POST", "/v2/models/tiny/blobs/uploads/", headers=headers) as response:
        where, relative = response.headers["Docker-Upload-Location"], response.headers["Location"]
    assert where.startswith(start or f"{site.url}/v2/")
    assert where.endswith(relative)
    assert relative.startswith("/v2/")
    async with site.request("DELETE", relative) as response:
        assert response.status == 204


async def test_a_post_with_a_digest_and_no_body_asks_whether_it_is_stored(
    serve: Serve, upstream: Upstream
) -> None:
    site = await serve(upstream, more={"models": {"store": {}}})
    ollama = Ollama(site, "models/tensors")
    uploads = f"{ollama.start}/blobs/uploads/"
    for algorithm in ("sha256", "sha512"):
        digest = Digest.of(WEIGHTS, algorithm)
        about = {"X_Redirect_Uploads": "2", "X_Content_Length": str(len(WEIGHTS))}
        status, headers, _ = await ollama.ask("POST", f"{uploads}?digest={digest}", **about)
        assert status == 202
        where = urljoin(uploads, headers["Location"])
        assert (await ollama.ask("PATCH", where, WEIGHTS))[0] == 202
        assert (await ollama.ask("PUT", f"{where}?digest={digest}"))[0] == 201
        status, headers, _ = await ollama.ask("POST", f"{uploads}?digest={digest}", **about)
        assert (status, headers["Location"]) == (201, f"/v2/models/tensors/blobs/{digest}")
        # Another repository has to be sent it, and so has one whose blob it is not.
        elsewhere = uploads.replace("tensors", "other")
        status, headers, _ = await ollama.ask("POST", f"{elsewhere}?digest={digest}")
        assert status == 202
        assert (await ollama.ask("DELETE", urljoin(uploads, headers["Location"])))[0] == 204


async def test_an_empty_blob_is_still_pushed_in_one_request(serve: Serve, upstream: Upstream) -> None:
    site = await serve(upstream, more={"models": {"store": {}}})
    ollama = Ollama(site, "models/tiny")
    empty = Digest.of(b"")
    assert (await ollama.ask("POST", f"{ollama.start}/blobs/uploads/?digest={empty}"))[0] == 201
    assert (await ollama.ask("HEAD", f"{ollama.start}/blobs/{empty}"))[0] == 200

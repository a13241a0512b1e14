"""A private registry over each object storage: SeaweedFS for S3, Azurite for Azure, a fake of Google's.

Clients are sent to the objects by signed URLs, which they fetch without any other credentials.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncIterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
from aiohttp import web
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from storage.bucket.owner import MARKER
from storage.bucket.settings import BucketSettings
from storage.oci import OCI_MANIFEST, Digest
from tests.azurite import Azurite, azurite_server
from tests.conftest import Serve, Site
from tests.objects import FakeBucket
from tests.test_push import image
from tests.upstream import Upstream

pytestmark = pytest.mark.clients

APP = "/v2/local/team/app"
SMALL, LARGE = b"{}", os.urandom(11 << 20)  # of one part, and of three


@cache
def _key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def service_account() -> str:
    """What Google gives to programs."""
    kind = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    found = {"client_email": "a@project.example", "private_key_id": "1", "type": "service_account"}
    return json.dumps({**found, "private_key": _key().private_bytes(*kind).decode()})


class FakeGoogle(FakeBucket):
    """Takes requests with a token of the account, and those with its signature of version 4."""

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        signed = "X-Goog-Signature" in request.query
        if not (signed or request.headers.get("Authorization", "").startswith("Bearer ey")):
            return web.Response(status=401)
        try:
            if signed:
                self._check(request)
        except InvalidSignature:
            return web.Response(status=403)
        return await super()._handle(request)

    def _check(self, request: web.Request) -> None:
        """Raises InvalidSignature.  obstore signs for Google's own host, whatever that of the URL is."""
        given = dict(request.query)
        signature = bytes.fromhex(given.pop("X-Goog-Signature"))
        canonical = "&".join(f"{quote(name, '')}={quote(value, '')}" for name, value in sorted(given.items()))
        lines = [
            request.method,
            request.rel_url.raw_path,
            canonical,
            "host:storage.googleapis.com",
            "",
            "host",
        ]
        hashed = hashlib.sha256("\n".join([*lines, "UNSIGNED-PAYLOAD"]).encode()).hexdigest()
        scope = given["X-Goog-Credential"].partition("/")[2]
        text = "\n".join([given["X-Goog-Algorithm"], given["X-Goog-Date"], scope, hashed])
        _key().public_key().verify(signature, text.encode(), padding.PKCS1v15(), hashes.SHA256())


@pytest.fixture(scope="module")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with azurite_server(tmp_path_factory.mktemp("azurite")) as server:
        yield server


@pytest.fixture(params=["seaweed", "azurite", "google"])
async def settings(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[BucketSettings]:
    if request.param == "google":
        async with FakeGoogle() as fake:
            url = f"http://127.0.0.1:{fake.port}"
            yield BucketSettings(url="gs://bucket/a/b", endpoint=url, secret_key=service_account())
        return
    engine = request.getfixturevalue(request.param)
    prefix = f"{tmp_path.name}/of/it"
    yield engine.settings(prefix) if isinstance(engine, Azurite) else engine.settings("tests", prefix)


@pytest.fixture
async def site(settings: BucketSettings, serve: Serve, upstream: Upstream) -> Site:
    given = asdict(settings)
    shared = {"bucket": given.pop("url"), **{name: value for name, value in given.items() if value}}
    top = {"shared": shared, "redirect": {"above": "1MiB"}}
    return await serve(upstream, top=top, more={"local": {"store": {}}})


async def push(site: Site) -> Digest:
    for content in (SMALL, LARGE):
        path = f"{APP}/blobs/uploads/?digest={Digest.of(content)}"
        async with site.request("POST", path, data=content) as response:
            assert response.status == 201, await response.text()
    digest = Digest.of(LARGE)
    headers = {"Content-Type": OCI_MANIFEST}
    async with site.request("PUT", f"{APP}/manifests/1", data=image(digest), headers=headers) as response:
        assert response.status == 201, await response.text()
    return digest


async def test_what_is_pushed_is_pulled_from_the_server(site: Site) -> None:
    path = f"{APP}/blobs/{await push(site)}"
    never = {"Entrepot_Redirect": "never"}
    assert (await site.get(path, **never))[::2] == (200, LARGE)
    part = await site.get(path, Range="bytes=7000000-7000009", **never)
    assert part[::2] == (206, LARGE[7000000:7000010])
    assert (await site.get(path, Range="bytes=-5", **never))[::2] == (206, LARGE[-5:])
    assert (await site.get(f"{APP}/blobs/{Digest.of(SMALL)}"))[::2] == (200, SMALL)
    async with site.request("HEAD", path) as response:  # is never sent there
        assert (response.status, response.headers["Content-Length"]) == (200, str(len(LARGE)))


async def test_clients_are_sent_to_signed_urls(site: Site) -> None:
    status, headers, body = await site.get(f"{APP}/blobs/{await push(site)}")
    assert (status, body) == (307, b"")
    async with aiohttp.ClientSession() as stranger:
        url = aiohttp.client.URL(headers["Location"], encoded=True)
        async with stranger.get(url) as response:
            assert (response.status, await response.read()) == (200, LARGE)
        async with stranger.get(url, headers={"Range": "bytes=5-9"}) as response:
            assert (response.status, await response.read()) == (206, LARGE[5:10])
        plain = url.with_query(None)
        async with stranger.get(plain) as response:
            assert response.status in (401, 403, 404)
        async with stranger.put(url, data=b"worse") as response:
            assert response.status >= 400
        async with stranger.get(url) as response:
            assert await response.read() == LARGE


def _blobs(store: Any) -> list[Any]:
    """What is in the bucket, but for the object that names its owner."""
    import obstore

    return [each for each in obstore.list(store).collect() if each["path"] != MARKER]


async def test_what_is_collected_is_deleted(site: Site, settings: BucketSettings) -> None:
    digest = await push(site)
    store = settings.connect()
    composition = site.app.composition
    assert composition.private is not None and composition.maintenance.collection is not None
    async with site.request("DELETE", f"{APP}/manifests/{Digest.of(image(digest))}") as response:
        assert response.status == 202
    if "gs://" not in settings.url:  # whose fake lists nothing
        assert sum(each["size"] for each in _blobs(store)) == len(LARGE) + len(SMALL)
    site.clock.advance(3 * 86400.0)
    report = await asyncio.to_thread(composition.maintenance.collection.run)
    assert report.blobs == 2
    await asyncio.to_thread(composition.private.files.reap, 86400.0)
    await asyncio.to_thread(composition.private.files.reap, 86400.0)  # what is gone is no failure
    if "gs://" not in settings.url:
        assert _blobs(store) == []
    status, _, _ = await site.get(f"{APP}/blobs/{digest}")
    assert status == 404

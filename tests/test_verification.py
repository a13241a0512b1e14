"""Clients that look for signatures find the same while the upstream cannot be asked, and offline.

The models ask as cosign 3, notation 1.3 and oras 1.3 do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tests.conftest import Clock, Serve, Site
from tests.pulls import FRESH, TAG, manifest_of, pull
from tests.upstream import OCI_INDEX, Image, Manifest, Upstream

Verify = Callable[["Client", str], Coroutine[Any, Any, list[str]]]
SIGNATURE, PARTS = "application/vnd.example.signature", "application/vnd.example.parts"


class ReferrersUnsupported(Exception):
    """An error of oras-go: a 404 for referrers after a list of others."""


class Client:
    """`api` is whether the registry has a referrers API, as far as is known; oras-go never revises that."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._api: bool | None = None

    async def get(self, path: str) -> tuple[int, dict[str, Any]]:
        status, body, _ = await pull(self._site, path)
        assert status in (200, 404), body
        return status, json.loads(body)

    async def referrers(self, digest: str, query: str = "") -> list[dict[str, Any]]:
        """As oras-go and go-containerregistry list them."""
        if self._api is not False:
            status, found = await self.get(f"/v2/a/b/referrers/{digest}{query}")
            if status == 200:
                self._api = True
                listed: list[dict[str, Any]] = found["manifests"]
                return listed
            if self._api:
                raise ReferrersUnsupported(digest)
            self._api = False
        status, found = await self.get(manifest_of(digest.replace(":", "-")))
        return found["manifests"] if status == 200 else []

    async def contents(self, digest: str) -> list[str]:
        """The digests of what a manifest names, all of which is pulled."""
        status, manifest = await self.get(manifest_of(digest))
        assert status == 200
        blobs = [each["digest"] for each in (manifest["config"], *manifest["layers"])]
        for each in blobs:
            assert (await pull(self._site, f"/v2/a/b/blobs/{each}"))[0] == 200
        return blobs


async def discover(client: Client, digest: str) -> list[str]:
    """oras discover: the whole tree."""
    listed = [each["digest"] for each in await client.referrers(digest)]
    return listed + [below for each in listed for below in await discover(client, each)]


async def notation(client: Client, digest: str) -> list[str]:
    """notation verify: the referrers of one type."""
    listed = await client.referrers(digest, f"?artifactType={SIGNATURE}")
    signatures = [each["digest"] for each in listed if each.get("artifactType") == SIGNATURE]
    return [digest for each in signatures for digest in (each, *await client.contents(each))]


async def cosign(client: Client, digest: str) -> list[str]:
    """cosign verify: all referrers, twice, and its tag if there are none."""
    listed = [each["digest"] for each in 2 * await client.referrers(digest)]
    found = [digest for each in listed for digest in (each, *await client.contents(each))]
    if not listed:
        status, manifest = await client.get(manifest_of(f"{digest.replace(':', '-')}.sig"))
        found += [each["digest"] for each in manifest["layers"]] if status == 200 else []
    return found


@pytest.fixture(params=[True, False], ids=["api", "no-api"])
def registry(request: pytest.FixtureRequest, upstream: Upstream) -> Upstream:
    upstream.referrers_api = request.param
    return upstream


def sign(registry: Upstream, image: Image) -> None:
    """A signature and a list of parts, which is signed itself."""
    parts = registry.artifact("a/b", image, PARTS)
    for subject, referrers in (
        (image, [registry.artifact("a/b", image, SIGNATURE), parts]),
        (parts, [registry.artifact("a/b", parts, SIGNATURE)]),
    ):
        if not registry.referrers_api:
            push_fallback_tag(registry, subject, referrers)


def push_fallback_tag(registry: Upstream, subject: Manifest, referrers: list[Manifest]) -> None:
    """distribution-spec, "Referrers Tag Schema"."""
    types = [json.loads(each.content)["artifactType"] for each in referrers]
    described = [
        {**each.descriptor, "artifactType": artifact_type}
        for each, artifact_type in zip(referrers, types, strict=True)
    ]
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": described}
    registry.manifest("a/b", index, tag=subject.digest.replace(":", "-"))


def sign_by_tag(registry: Upstream, image: Image) -> None:
    registry.image("a/b", f"{image.digest.replace(':', '-')}.sig", [b"a signature"])


def leave(registry: Upstream, image: Image) -> None:
    """Unsigned."""


@pytest.mark.parametrize("verify", [discover, notation, cosign])
@pytest.mark.parametrize(
    ("prepare", "finders"), [(sign, [discover, notation, cosign]), (sign_by_tag, [cosign]), (leave, [])]
)
async def test_what_was_found_is_found_again(
    serve: Serve,
    registry: Upstream,
    clock: Clock,
    prepare: Callable[[Upstream, Image], None],
    finders: list[Verify],
    verify: Verify,
) -> None:
    image = registry.image("a/b", "latest")
    prepare(registry, image)
    site = await serve(registry)

    async def found() -> list[str]:
        assert (await pull(site, TAG))[0] == 200
        return await verify(Client(site), image.digest)

    first = await found()
    assert bool(first) == (verify in finders)
    await registry.stop()
    clock.advance(FRESH + 1)
    assert await found() == first
    await site.app.stop()
    site = await serve(registry)  # nothing but what is on disk
    assert await found() == first
    await site.app.stop()
    site = await serve(registry, offline=True)
    assert await found() == first

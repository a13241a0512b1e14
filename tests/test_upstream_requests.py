"""Requests to upstreams: challenges, tokens and credentials."""

from __future__ import annotations

import asyncio

import pytest

from storage.errors import (
    OriginDenied,
)
from tests.conftest import Serve
from tests.upstream import (
    Basic,
    Bearer,
    ExpireToken,
    Upstream,
)
from tests.upstream_client import BODY, LATEST, USER, Ask, read


@pytest.mark.parametrize(
    "auth",
    [
        USER,
        Bearer(),
        Bearer(field="access_token", expires_in=None),
        Bearer(USER, anonymous=False),
        Bearer(USER, anonymous=False, also_basic="same header"),
        Bearer(USER, anonymous=False, also_basic="own header"),
        Bearer(USER, anonymous=False, actions="pull,push"),
        Bearer(USER, anonymous=False, service="else where"),
        Bearer(USER, anonymous=False, realm="{cdn_url}/token"),
    ],
    ids=str,
)
async def test_every_door_opens(ask: Ask, upstream: Upstream, auth: Basic | Bearer) -> None:
    image = upstream.image("a/b", "latest", [BODY])
    upstream.auth = auth
    user = USER if isinstance(auth, Basic) or auth.credentials else None
    origin = ask(upstream.url, user=user, realms=["localhost"])
    assert (await origin.get_manifest("a/b", LATEST)).content == image.content
    assert await read(origin, image.layers[0]) == BODY
    upstream.expire_tokens()
    assert await origin.tags("a/b") == ["latest"]


@pytest.mark.parametrize("auth", [USER, Bearer(USER, anonymous=False)], ids=["Basic", "Bearer"])
@pytest.mark.parametrize("user", [None, Basic("ci", "wrong")], ids=["none", "wrong"])
async def test_without_the_right_credentials_it_is_denied(
    ask: Ask, upstream: Upstream, auth: Basic | Bearer, user: Basic | None
) -> None:
    upstream.image("a/b", "latest")
    upstream.auth = auth
    with pytest.raises(OriginDenied):
        await ask(upstream.url, user=user).get_manifest("a/b", LATEST)
    assert len(upstream.log) <= 3  # nothing is tried over and over


async def test_credentials_go_to_no_other_domain(ask: Ask, upstream: Upstream) -> None:
    upstream.image("a/b", "latest")
    upstream.auth = Bearer(USER, realm="{cdn_url}/token")
    with pytest.raises(OriginDenied):
        await ask(upstream.url, user=USER).get_manifest("a/b", LATEST)
    assert [request.kind for request in upstream.requests] == ["manifest"]


async def test_a_token_that_has_expired_is_fetched_afresh(ask: Ask, upstream: Upstream) -> None:
    image = upstream.image("a/b", "latest", [BODY])
    upstream.auth = Bearer()
    origin = ask(upstream.url)
    await origin.get_manifest("a/b", LATEST)
    upstream.next("GET", "blob", ExpireToken())
    assert await read(origin, image.layers[0]) == BODY
    assert [request.kind for request in upstream.requests].count("token") == 2


async def test_a_token_that_is_forgotten_at_once_is_a_failure_and_no_refusal(
    serve: Serve, upstream: Upstream
) -> None:
    """It says nothing of the image: clients must not take it for absent."""
    image = upstream.image("a/b", "latest", [BODY])
    upstream.auth = Bearer()
    site = await serve(upstream)
    assert (await site.get(f"/v2/a/b/blobs/{image.config}"))[0] == 200  # there is a token
    upstream.next("GET", "latest", ExpireToken(), times=2)
    status, _, body = await site.get("/v2/a/b/manifests/latest")
    assert (status, b"does not accept the token" in body) == (502, True)
    assert (await site.get("/v2/a/b/manifests/latest"))[0] == 200


async def test_ten_layers_at_once_are_one_token(ask: Ask, upstream: Upstream) -> None:
    image = upstream.image("a/b", "latest", [bytes([number]) * 1000 for number in range(10)])
    upstream.auth = Bearer()
    origin = ask(upstream.url)
    await asyncio.gather(*(read(origin, layer) for layer in image.layers))
    assert [request.kind for request in upstream.requests].count("token") == 1


async def test_an_image_of_ten_layers_is_at_most_two_token_fetches(serve: Serve, upstream: Upstream) -> None:
    layers = [bytes([number]) * 1000 for number in range(10)]
    image = upstream.image("a/b", "latest", layers)
    upstream.auth = Bearer()
    site = await serve(upstream)
    assert (await site.get("/v2/a/b/manifests/latest"))[2] == image.content
    assert (await site.get(f"/v2/a/b/manifests/{image.digest}"))[2] == image.content
    found = await asyncio.gather(
        *(site.get(f"/v2/a/b/blobs/{each}") for each in (image.config, *image.layers))
    )
    assert [body for _, _, body in found][1:] == layers
    assert [request.kind for request in upstream.requests].count("token") <= 2

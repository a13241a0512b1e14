"""Registries to which an upstream redirects: the tokens that they get, and those that they do not."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from yarl import URL

from proxy.upstream.anonymous import HOSTS, AnonymousTokens
from proxy.upstream.tokens import TokenResponse
from storage.errors import OriginDenied, TooManyRequests, Unavailable
from storage.oci import Digest
from tests.conftest import Clock, Serve
from tests.upstream import Basic, Bearer, ExpireToken, Redirect, Status, Upstream
from tests.upstream.messages import Request
from tests.upstream_client import BODY, LATEST, USER, Ask, read

TOKEN = TokenResponse(200, b'{"token": "t"}')


@pytest.fixture
async def behind() -> AsyncIterator[Upstream]:
    """The registry to which the upstream redirects."""
    async with Upstream(auth=Bearer()) as registry:
        yield registry


def redirect(upstream: Upstream, behind: Upstream, name: str = "a/b", status: int = 307) -> None:
    """All requests that the upstream lets in lead to `name` of the other registry."""
    for method in ("GET", "HEAD"):
        for kind in ("manifest", "blob", "tags"):

            def matches(request: Request, kind: str = kind) -> bool:
                let_in = upstream.auth is None or "Authorization" in request.headers
                return request.kind == kind and let_in

            for path in ("manifests/latest", "tags/list"):
                upstream.next(
                    method,
                    lambda request, path=path, matches=matches: (
                        matches(request) and request.target.endswith(path)
                    ),
                    Redirect(f"{behind.url}/v2/{name}/{path}", status),
                    times=50,
                )


def authorizations(registry: Upstream) -> set[str]:
    return {request.headers.get("Authorization", "").partition(" ")[0] for request in registry.requests}


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.parametrize("door", [None, USER, Bearer(USER, anonymous=False), Bearer()], ids=str)
async def test_a_registry_behind_a_gateway_gets_an_anonymous_token(
    ask: Ask, upstream: Upstream, behind: Upstream, door: Basic | Bearer | None, status: int
) -> None:
    image = behind.image("a/b", "latest", [BODY])
    redirect(upstream, behind, status=status)
    upstream.auth = door
    origin = ask(upstream.url, user=None if door == Bearer() else USER)
    assert (await origin.get_manifest("a/b", LATEST)).content == image.content
    assert (await origin.resolve_manifest("a/b", LATEST)).digest == image.digest
    assert await origin.tags("a/b") == ["latest"]
    assert "Basic" not in authorizations(behind)
    assert [request.kind for request in behind.requests].count("token") == 1
    refused = [each for each in behind.requests if "Authorization" not in each.headers]
    assert [each.kind for each in refused] == ["manifest", "token"], "later requests have the token at once"


async def test_the_name_of_the_repository_may_change(ask: Ask, upstream: Upstream, behind: Upstream) -> None:
    image = behind.image("vendor/app", "latest", [BODY])
    redirect(upstream, behind, "vendor/app")
    assert (await ask(upstream.url).get_manifest("a/b", LATEST)).content == image.content
    assert behind.log[1] == "GET token repository:vendor/app:pull"


async def test_an_expired_token_is_fetched_again(ask: Ask, upstream: Upstream, behind: Upstream) -> None:
    image = behind.image("a/b", "latest", [BODY])
    redirect(upstream, behind)
    origin = ask(upstream.url)
    await origin.get_manifest("a/b", LATEST)
    behind.next("GET", "latest", ExpireToken())
    assert (await origin.get_manifest("a/b", LATEST)).content == image.content
    assert [request.kind for request in behind.requests].count("token") == 2


async def test_storage_of_the_other_registry_gets_no_token(
    ask: Ask, upstream: Upstream, behind: Upstream
) -> None:
    digest = behind.blob("a/b", BODY)
    behind.cdn = True
    upstream.next("GET", "blob", Redirect(f"{behind.url}/v2/a/b/blobs/{digest}"), times=3)
    assert await read(ask(upstream.url), digest) == BODY
    assert [request.kind for request in behind.requests] == ["blob", "token", "blob", "cdn"]
    assert "Authorization" not in behind.requests[-1].headers


@pytest.mark.parametrize(
    "door",
    [Bearer(USER, anonymous=False), Basic("other", "word"), Bearer(USER, realm="ftp://x/token")],
    ids=str,
)
async def test_a_registry_that_lets_nobody_in_is_not_asked_over_and_over(
    ask: Ask, upstream: Upstream, behind: Upstream, door: Basic | Bearer
) -> None:
    behind.image("a/b", "latest")
    behind.auth = door
    redirect(upstream, behind)
    with pytest.raises(OriginDenied):
        await ask(upstream.url, user=USER).get_manifest("a/b", LATEST)
    assert len(behind.log) <= 3
    assert authorizations(behind) == {""}


async def test_a_token_server_that_limits_anonymous_requests_does_not_block_our_credentials(
    ask: Ask, upstream: Upstream, behind: Upstream
) -> None:
    behind.image("a/b", "latest")
    redirect(upstream, behind)
    behind.next("GET", "token", Status(429))
    origin = ask(upstream.url, user=USER)
    with pytest.raises(Unavailable) as caught:
        await origin.get_manifest("a/b", LATEST)
    assert not isinstance(caught.value, TooManyRequests)
    assert (await origin.get_manifest("a/b", LATEST)).media_type


async def test_a_pull_through_a_gateway(serve: Serve, upstream: Upstream, behind: Upstream) -> None:
    image = behind.image("a/b", "latest", [BODY])
    redirect(upstream, behind)
    upstream.next("GET", "blob", Redirect(f"{behind.url}/v2/a/b/blobs/{image.layers[0]}"), times=3)
    site = await serve(upstream)
    assert (await site.get("/v2/a/b/manifests/latest"))[2] == image.content
    assert (await site.get(f"/v2/a/b/blobs/{image.layers[0]}"))[2] == BODY


# AnonymousTokens by itself


class Realm:
    def __init__(self) -> None:
        self.asked: list[URL] = []

    async def __call__(self, method: str, url: URL, *, headers: object, form: object = None) -> TokenResponse:
        self.asked.append(url)
        return TOKEN


@pytest.mark.parametrize(
    "challenges",
    [
        [],
        ['Basic realm="a registry"'],
        ["Bearer authorization_uri=https://login.example/common resource_id=https://storage.example"],
        ['Bearer realm=""'],
    ],
)
async def test_what_is_no_challenge_of_a_registry(clock: Clock, challenges: list[str]) -> None:
    realm = Realm()
    tokens = AnonymousTokens(realm, clock=clock)
    url = URL("https://storage.example/v2/a/b/blobs/" + Digest.of(b""))
    assert await tokens.renew(url, challenges, None) is None
    assert await tokens.authorization(url) is None
    assert realm.asked == []


async def test_a_path_that_is_not_of_the_specification(clock: Clock) -> None:
    realm = Realm()
    tokens = AnonymousTokens(realm, clock=clock)
    url = URL("https://other.example/artifacts/1")
    challenge = 'Bearer realm="https://other.example/token",scope="repository:x:pull"'
    assert await tokens.renew(url, [challenge], None) == "Bearer t"
    assert await tokens.authorization(url) == "Bearer t"
    assert await tokens.authorization(URL("https://third.example/artifacts/1")) is None
    assert realm.asked == [URL("https://other.example/token").with_query(scope="repository:x:pull")]


async def test_the_oldest_registries_are_forgotten(clock: Clock) -> None:
    tokens = AnonymousTokens(Realm(), clock=clock)
    urls = [URL(f"https://r{number}.example/v2/a/tags/list") for number in range(HOSTS + 1)]
    for url in urls:
        await tokens.renew(url, [f'Bearer realm="https://{url.host}/token"'], None)
    assert await tokens.authorization(urls[0]) is None
    assert await tokens.authorization(urls[1]) == "Bearer t"

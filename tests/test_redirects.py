"""Redirects of blobs that are kept: a range costs one request, and a target that lapses is renewed."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from multidict import CIMultiDict
from yarl import URL

from proxy.telemetry.metrics import Metrics
from proxy.upstream import redirects
from proxy.upstream.client import UpstreamRegistry
from proxy.upstream.credentials import Credentials, Inline
from proxy.upstream.redirects import KEPT, RedirectMemory, good_for
from proxy.upstream.requests import UpstreamSettings
from storage.errors import OriginDenied, RegistryError
from storage.oci import Digest, Span
from tests.conftest import Clock
from tests.upstream import Basic, Bearer, Status, Upstream
from tests.upstream_client import PLAIN

BODY = bytes(range(256)) * 40
USER = Basic("me", "secret")


@pytest.fixture
async def registry(upstream: Upstream, clock: Clock) -> AsyncIterator[UpstreamRegistry]:
    upstream.cdn = True
    made = UpstreamRegistry("up", UpstreamSettings(upstream.url, PLAIN), [Credentials()], Metrics(), clock)
    yield made
    await made.close()


async def read(registry: UpstreamRegistry, digest: str, start: int, stop: int | None = None) -> bytes:
    blob = await registry.get_blob("a/b", Digest.parse(digest), Span(start, stop))
    try:
        return b"".join([chunk async for chunk in blob.chunks(start, stop)])
    finally:
        await blob.close()


def kinds(upstream: Upstream) -> list[str]:
    found = [request.kind for request in upstream.requests]
    upstream.clear()
    return found


async def test_a_range_costs_one_request(registry: UpstreamRegistry, upstream: Upstream) -> None:
    digest, other = upstream.blob("a/b", BODY), upstream.blob("a/b", BODY[1:])
    assert await read(registry, digest, 5, 10) == BODY[5:10]
    assert kinds(upstream) == ["blob", "cdn"]
    for start in (0, 100, 9000):
        assert await read(registry, digest, start, start + 50) == BODY[start : start + 50]
    assert await read(registry, digest, 7) == BODY[7:]
    assert kinds(upstream) == ["cdn"] * 4
    assert await read(registry, other, 0, 9) == BODY[1:10]
    assert kinds(upstream) == ["blob", "cdn"]
    # A HEAD is another request, which a signature may not be for.
    assert (await registry.resolve_blob("a/b", Digest.parse(digest))).size == len(BODY)
    assert kinds(upstream) == ["blob", "cdn"]


async def test_it_is_asked_for_again_when_it_is_old(
    registry: UpstreamRegistry, upstream: Upstream, clock: Clock
) -> None:
    digest = upstream.blob("a/b", BODY)
    for seconds, expected in ((0, ["blob", "cdn"]), (KEPT - 1, ["cdn"]), (1, ["blob", "cdn"]), (1, ["cdn"])):
        clock.advance(seconds)
        await read(registry, digest, 0, 5)
        assert kinds(upstream) == expected


async def test_one_that_lapses_is_signed_anew(registry: UpstreamRegistry, upstream: Upstream) -> None:
    digest = upstream.blob("a/b", BODY)
    await read(registry, digest, 0, 5)
    upstream.lapse_signatures()
    upstream.clear()
    assert await read(registry, digest, 5, 10) == BODY[5:10]
    assert kinds(upstream) == ["cdn", "blob", "cdn"]
    assert await read(registry, digest, 10, 20) == BODY[10:20]
    assert kinds(upstream) == ["cdn"]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 429, 500, 503])
async def test_whatever_it_answers_but_content(
    registry: UpstreamRegistry, upstream: Upstream, status: int
) -> None:
    digest = upstream.blob("a/b", BODY)
    await read(registry, digest, 0, 5)
    upstream.next("GET", lambda request: request.kind == "cdn", Status(status, {"Retry-After": "0"}))
    assert await read(registry, digest, 5, 10) == BODY[5:10]


async def test_what_is_gone_from_the_registry_is_gone(registry: UpstreamRegistry, upstream: Upstream) -> None:
    digest = upstream.blob("a/b", BODY)
    await read(registry, digest, 0, 5)
    upstream.lapse_signatures()
    upstream.delete_blob("a/b", digest)
    with pytest.raises(RegistryError):
        await read(registry, digest, 5, 10)


async def test_a_caller_has_a_memory_of_its_own(upstream: Upstream, clock: Clock) -> None:
    """What one caller was shown is not shown to another."""
    upstream.cdn, upstream.auth = True, USER
    digest = upstream.blob("a/b", BODY)
    login = [Inline(USER.user, USER.password)]
    made = UpstreamRegistry("up", UpstreamSettings(upstream.url, PLAIN), login, Metrics(), clock)
    stranger = made.as_caller(Inline("you", "guess"))
    try:
        assert await read(made, digest, 0, 5) == BODY[:5]
        with pytest.raises(OriginDenied):
            await read(stranger, digest, 0, 5)
    finally:
        await stranger.close()
        await made.close()


async def test_the_target_gets_no_credentials(upstream: Upstream, clock: Clock) -> None:
    upstream.cdn, upstream.auth = True, Bearer(USER)
    digest = upstream.blob("a/b", BODY)
    login = [Inline(USER.user, USER.password)]
    made = UpstreamRegistry("up", UpstreamSettings(upstream.url, PLAIN), login, Metrics(), clock)
    try:
        for start in (0, 5):
            await read(made, digest, start, start + 5)
    finally:
        await made.close()
    sent = [request.headers.get("Authorization") for request in upstream.requests if request.kind == "cdn"]
    assert sent == [None, None]


@pytest.mark.parametrize(
    ("control", "seconds"),
    [
        (None, KEPT),
        ("private", KEPT),
        ("max-age=7", 7),
        ("public, Max-Age=86400", KEPT),
        ("max-age=0", 0),
        ('max-age="8"', 8),
        ("max-age=soon", 0),
        ("no-store", 0),
        ("private, No-Cache, max-age=9", 0),
        ("x-no-store-y", KEPT),
    ],
)
def test_how_long_a_redirect_is_good(control: str | None, seconds: float) -> None:
    headers = CIMultiDict({} if control is None else {"Cache-Control": control})
    assert good_for(headers) == seconds


def test_its_size_is_bound(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redirects, "MOST", 2)
    memory = RedirectMemory(clock)
    urls = [URL(f"https://a.test/{number}") for number in range(3)]
    for each in urls:
        memory.put(each, each / "target", 60)
    assert [memory.get(each) for each in urls] == [None, urls[1] / "target", urls[2] / "target"]
    memory.put(urls[1], urls[1], 0)
    assert memory.get(urls[1]) is None
    clock.advance(-1)  # set back
    assert memory.get(urls[2]) is None

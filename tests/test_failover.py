"""Several URLs of one upstream.  With real servers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing
from functools import partial
from typing import Any

import aiohttp
import pytest

from proxy.telemetry.metrics import Metrics
from proxy.upstream.client import UpstreamRegistry
from proxy.upstream.credentials import Credentials
from proxy.upstream.failover import Failover
from proxy.upstream.requests import UpstreamSettings
from storage.errors import OriginFailed
from storage.oci import Digest, Span
from tests.conftest import Clock, Serve, Site
from tests.events import Ear
from tests.outages import (
    CHUNK,
    QUICK,
    TAG,
    anything,
    blob_of,
    code_of,
    pull,
    silence,
)
from tests.test_policy import files_of_at_most
from tests.upstream import (
    Bearer,
    Corrupt,
    Fault,
    Hold,
    Image,
    Redirect,
    Refuse,
    Reset,
    RetryAfter,
    Status,
    Truncate,
    Upstream,
    WrongLength,
)
from tests.upstream_client import PLAIN


@pytest.fixture
async def mirrors() -> AsyncIterator[tuple[Upstream, Upstream, Upstream]]:
    """Three with the same content; the tests say which is listed first."""
    async with AsyncExitStack() as stack:
        yield tuple([await stack.enter_async_context(Upstream()) for _ in range(3)])  # type: ignore[misc]


Mirrors = tuple[Upstream, Upstream, Upstream]


def image_on(*mirrors: Upstream, layers: tuple[bytes, ...] = (b"a layer",)) -> Image:
    images = [each.image("a/b", "latest", layers) for each in mirrors]
    return images[0]


async def serve_all(serve: Serve, *mirrors: Upstream, **options: Any) -> Site:
    return await serve(mirrors[0], options={"url": [each.url for each in mirrors], **options})


async def test_urls_are_tried_in_order(serve: Serve, mirrors: Mirrors) -> None:
    first, second, _ = mirrors
    image = image_on(first, second)
    site = await serve_all(serve, first, second)
    for path, content in ((TAG, image.content), (blob_of(image.layers[0]), b"a layer")):
        assert (await pull(site, path))[:2] == (200, content)
    assert len(first.log) == 2
    assert second.log == []


@pytest.mark.parametrize("path", [TAG, "blob", "/v2/a/b/tags/list", "referrers"])
@pytest.mark.parametrize(
    "make",
    [
        *(partial(Status, each) for each in (401, 403, 404, 405, 429, 500, 503)),
        *(Refuse, silence, partial(Redirect, "http://[")),
    ],
    ids=["401", "403", "404", "405", "429", "500", "503", "refused", "silence", "a bad redirect"],
)
async def test_the_next_one_is_asked_where_one_does_not_serve(
    serve: Serve, mirrors: Mirrors, path: str, make: Callable[[], Fault]
) -> None:
    first, second, _ = mirrors
    image = image_on(first, second)
    path = {"blob": blob_of(image.layers[0]), "referrers": f"/v2/a/b/referrers/{image.digest}"}.get(
        path, path
    )
    site = await serve_all(serve, first, second, **QUICK)
    first.next("GET", anything, make(), times=100)
    assert (await pull(site, path))[0] == 200
    assert second.requests


@pytest.mark.parametrize(
    ("one", "other", "status", "code"),
    [
        (Status(404), None, 404, "MANIFEST_UNKNOWN"),
        (Status(403), None, 404, "MANIFEST_UNKNOWN"),
        (Refuse(), None, 404, "MANIFEST_UNKNOWN"),
        (None, Status(500), 502, "UNAVAILABLE"),
        (Status(403), Status(500), 502, "UNAVAILABLE"),
        (Status(500), RetryAfter(7), 503, "TOOMANYREQUESTS"),
        (Status(404), Status(508), 404, "MANIFEST_UNKNOWN"),  # it would ask this server
        (RetryAfter(7), Status(508), 503, "TOOMANYREQUESTS"),
        (Status(508), Status(508), 502, "UNAVAILABLE"),
    ],
    ids=str,
)
async def test_the_last_ones_answer_counts(
    serve: Serve, mirrors: Mirrors, one: Fault | None, other: Fault | None, status: int, code: str
) -> None:
    first, second, _ = mirrors
    image_on(first, second)
    site = await serve_all(serve, first, second)
    for mirror, fault in ((first, one), (second, other)):
        if fault:
            mirror.next("GET", anything, fault, times=100)
    found, _, body = await site.get("/v2/a/b/manifests/absent")
    assert (found, code_of(body)) == (status, code)


async def test_a_dead_one_is_not_waited_for_again(serve: Serve, mirrors: Mirrors) -> None:
    first, second, _ = mirrors
    image = image_on(first, second)
    site = await serve_all(serve, first, second, **QUICK)
    first.next("GET", anything, silence(), times=100)
    for path in (TAG, blob_of(image.layers[0]), blob_of(image.config)):
        assert (await pull(site, path))[0] == 200
    assert len(first.log) == 1
    assert len(second.log) == 3


async def test_whether_it_is_back_is_found_out_on_the_side(
    serve: Serve, mirrors: Mirrors, clock: Clock
) -> None:
    first, second, _ = mirrors
    image = image_on(first, second)
    site = await serve_all(serve, first, second)
    await first.stop()
    assert (await pull(site))[0] == 200
    await first.start()
    clock.advance(1)
    held = silence()
    first.next("GET", "base", held)
    ear = Ear()
    assert (await pull(site, blob_of(image.layers[0])))[0] == 200
    assert len(second.log) == 2, "the other one served"
    await held.reached.wait()
    held.gate.set()
    await ear.heard("upstream.closed")
    assert (await pull(site, blob_of(image.config)))[0] == 200
    assert [str(each) for each in first.requests] == ["GET base", f"GET blob a/b@{image.config[:19]}"]


async def test_when_all_have_failed_all_are_asked_again_in_order(
    serve: Serve, mirrors: Mirrors, clock: Clock
) -> None:
    first, second, _ = mirrors
    image = image_on(first, second)
    site = await serve_all(serve, first, second)
    for each in (first, second):
        await each.stop()
    assert (await pull(site))[0] == 502
    for each in (first, second):
        await each.start()
    assert (await pull(site))[0] == 502
    clock.advance(1)
    assert (await pull(site))[:2] == (200, image.content)
    assert first.log == ["GET manifest a/b:latest"]


async def test_a_probe_under_way_ends_with_the_server(serve: Serve, mirrors: Mirrors, clock: Clock) -> None:
    first, second, _ = mirrors
    image = image_on(first, second)
    site = await serve_all(serve, first, second)
    await first.stop()
    await pull(site)
    await first.start()
    clock.advance(1)
    held = silence()
    first.next("GET", "base", held)
    await pull(site, blob_of(image.layers[0]))
    await held.reached.wait()  # the fixtures see what is left


@pytest.mark.parametrize("make", [Reset, Truncate, silence])
async def test_a_transfer_that_breaks_off_goes_on_from_the_next_url(
    serve: Serve, mirrors: Mirrors, make: Callable[[int], Fault]
) -> None:
    first, second, third = mirrors
    content = bytes(range(256)) * (CHUNK // 32)
    image = image_on(first, second, third, layers=(content,))
    site = await serve_all(serve, first, second, third, progress_timeout="250ms")
    first.next("GET", image.layers[0], make(3 * CHUNK))
    second.next("GET", image.layers[0], Truncate(CHUNK))
    assert (await pull(site, blob_of(image.layers[0])))[:2] == (200, content)
    blob = f"GET blob a/b@{image.layers[0][:19]}"
    assert first.log == [blob]
    (after_one,) = second.requests
    assert after_one.range == f"bytes={3 * CHUNK}-"
    (after_two,) = third.requests
    assert after_two.range == f"bytes={4 * CHUNK}-"


@pytest.mark.errors("disk.failed")
async def test_a_full_disk_does_not_count_against_the_url(serve: Serve, mirrors: Mirrors) -> None:
    first, second, _ = mirrors
    content = os.urandom(3_000_000)
    image = image_on(first, second, layers=(content,))
    site = await serve_all(serve, first, second)
    hold = Hold(asyncio.Event(), after=500_000)
    first.next("GET", image.layers[0], hold)
    async with site.request("GET", blob_of(image.layers[0])) as response:
        with files_of_at_most(1_000_000):
            hold.gate.set()
            assert await response.read() == content
    assert len(first.requests) == 2
    assert second.requests == []


@pytest.mark.errors("fill.failed")
async def test_who_was_told_another_size_is_cut_off(serve: Serve, mirrors: Mirrors) -> None:
    """Else the client of one that told too little has a complete body of wrong bytes."""
    first, second, _ = mirrors
    image = image_on(first, second, layers=(bytes(100),))
    site = await serve_all(serve, first, second)
    first.next("GET", image.layers[0], WrongLength(-90), Truncate(5))
    with pytest.raises(aiohttp.ClientPayloadError):
        await pull(site, blob_of(image.layers[0]))
    assert (await pull(site, blob_of(image.layers[0])))[:2] == (200, bytes(100))


async def test_a_transfer_under_way_waits_as_long_as_it_is_told(
    serve: Serve, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else an open breaker, which refuses at once, uses up the fill's tries in no time."""
    digest = upstream.blob("a/b", bytes(1000))
    site = await serve(upstream)
    upstream.next("GET", digest, Truncate(500))
    upstream.next("GET", digest, RetryAfter(3, 503))
    slept: list[float] = []
    sleep = asyncio.sleep

    async def record(seconds: float) -> None:
        slept.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", record)
    status, body, _ = await pull(site, blob_of(digest))
    monkeypatch.undo()
    assert (status, body) == (200, bytes(1000))
    assert 3 in slept


async def test_after_the_last_url_comes_the_first(serve: Serve, mirrors: Mirrors) -> None:
    first, second, _ = mirrors
    content = bytes(4 * CHUNK)
    image = image_on(first, second, layers=(content,))
    site = await serve_all(serve, first, second)
    first.next("GET", image.layers[0], Truncate(CHUNK))
    second.next("GET", image.layers[0], Truncate(CHUNK))
    assert (await pull(site, blob_of(image.layers[0])))[:2] == (200, content)
    assert [each.range for each in first.requests] == [None, f"bytes={2 * CHUNK}-"]


@pytest.mark.errors("fill.failed")
async def test_one_that_gives_wrong_bytes_is_asked_last_the_next_time(
    serve: Serve, mirrors: Mirrors, clock: Clock
) -> None:
    first, second, _ = mirrors
    image = image_on(first, second)
    site = await serve_all(serve, first, second)
    first.next("GET", image.layers[0], Corrupt(), times=100)
    with pytest.raises(aiohttp.ClientPayloadError):
        await pull(site, blob_of(image.layers[0]))
    assert second.requests == []
    assert (await pull(site, blob_of(image.layers[0])))[:2] == (200, b"a layer")


async def test_one_that_gives_a_wrong_manifest_is_passed_by(
    serve: Serve, mirrors: Mirrors, request: pytest.FixtureRequest
) -> None:
    request.node.add_marker(pytest.mark.errors("upstream.wrong_digest"))
    first, second, _ = mirrors
    image = image_on(first, second)
    site = await serve_all(serve, first, second)
    first.next("GET", image.digest, Corrupt())
    assert (await pull(site, f"/v2/a/b/manifests/{image.digest}"))[:2] == (200, image.content)


class Chain:
    """The first two upstreams, with one blob; `read` says which of them has sent it."""

    def __init__(self, first: Upstream, second: Upstream) -> None:
        self.upstreams = {"first": first, "second": second}
        self.content = os.urandom(900_000)
        self.digest = Digest(first.blob("a/b", self.content))
        second.blob("a/b", self.content)
        settings = [UpstreamSettings(each.url, PLAIN) for each in (first, second)]
        self.failover = Failover(
            [UpstreamRegistry("up", each, [Credentials()], Metrics()) for each in settings]
        )

    async def read(self, span: Span | None, stop_after: int = 1 << 20) -> str:
        """Read so many bytes at least, then stop."""
        for each in self.upstreams.values():
            each.clear()
        blob, found = await self.failover.get_blob("a/b", self.digest, span), b""
        start, stop = (span.start, span.stop) if span else (0, None)
        try:
            async with aclosing(blob.chunks(start, stop)) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    found += chunk
                    if len(found) >= stop_after:
                        break
        finally:
            await blob.close()
        assert self.content[start:stop].startswith(found)
        (name,) = (name for name, each in self.upstreams.items() if each.requests)
        return name


@pytest.fixture
async def chain(mirrors: Mirrors) -> AsyncIterator[Chain]:
    chain = Chain(*mirrors[:2])
    yield chain
    await chain.failover.close()


PART, REST = Span(10, 20), Span(10)


async def test_spans_of_a_blob_do_not_change_the_order(chain: Chain) -> None:
    """What clients want ahead of a fill is no sign that it failed."""
    for _ in range(3):
        assert await chain.read(PART) == "first"


async def test_the_spans_of_a_blob_come_from_where_the_rest_comes(chain: Chain) -> None:
    """Else one of wrong bytes has a part in every transfer."""
    assert [await chain.read(each) for each in (None, PART, None)] == ["first", "second", "second"]
    blob = await chain.failover.get_blob("a/b", chain.digest)
    assert await chain.read(PART) == "first"
    await blob.close()
    blob = await chain.failover.get_blob("a/b", chain.digest)
    assert [await chain.read(PART) for _ in range(3)] == ["second"] * 3
    await blob.close()


async def test_a_transfer_of_which_the_rest_is_not_wanted_has_not_failed(chain: Chain) -> None:
    """Another transfer brings it."""
    for span in (None, REST, PART):
        assert await chain.read(span, 5) == "first"


async def test_a_span_that_breaks_off_goes_on_from_the_next_url(chain: Chain) -> None:
    chain.upstreams["first"].next("GET", chain.digest, Reset(after=5))
    with pytest.raises(OriginFailed):
        await chain.read(PART)
    assert [await chain.read(PART) for _ in range(3)] == ["second"] * 3


async def test_each_url_is_shown_the_tokens_it_issued_itself(serve: Serve, mirrors: Mirrors) -> None:
    first, second, _ = mirrors
    for each in (first, second):
        each.auth = Bearer()
    image = image_on(first, second)
    site = await serve_all(serve, first, second)
    assert (await pull(site))[:2] == (200, image.content)
    await first.stop()
    assert (await pull(site, blob_of(image.layers[0])))[0] == 200
    assert second.log[0] == f"GET blob a/b@{image.layers[0][:19]}"
    assert second.log[1].startswith("GET token")

"""What survives upstreams that fail: breakers, retries, several URLs, bounds.  With real servers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import aiohttp
import pytest
from yarl import URL

from proxy.cache import tags
from proxy.upstream import transport
from proxy.upstream.breaker import FAILURES
from proxy.upstream.transport import RETRIES, Connect, Transport, is_private
from storage.errors import OriginFailed, OriginTimeout
from tests.conftest import BACKOFF, Clock, Serve, Site
from tests.events import Ear
from tests.upstream import (
    Bearer,
    Corrupt,
    Fault,
    Hold,
    Image,
    Redirect,
    Refuse,
    Request,
    Reset,
    RetryAfter,
    Status,
    Truncate,
    Upstream,
    WrongLength,
)

FRESH = 600.0  # seconds, the default
STALE = "; ttl=-"  # in Cache-Status
PAUSE = 10.0  # seconds that a tag is not asked for after it could not be; the default
TAG = "/v2/a/b/manifests/latest"
OTHER = "/v2/a/b/manifests/other"
CHUNK = 1 << 18
QUICK = {"header_timeout": "250ms"}


def blob_of(digest: str) -> str:
    return f"/v2/a/b/blobs/{digest}"


def code_of(body: bytes) -> str:
    code = json.loads(body)["errors"][0]["code"]
    assert isinstance(code, str)
    return code


def anything(request: Request) -> bool:
    return True


def silence(after: int | None = None) -> Hold:
    """An upstream that says no more; the fake lets go of it when it stops."""
    return Hold(asyncio.Event(), after)


async def warm(serve: Serve, upstream: Upstream, **keys: Any) -> tuple[Site, Image]:
    """A site that has pulled two tags, both due by now."""
    image = upstream.image("a/b", "latest")
    upstream.image("a/b", "other", [b"another"])
    site = await serve(upstream, **keys)
    for path in (TAG, OTHER):
        assert (await site.get(path))[0] == 200
    site.clock.advance(FRESH + 1)
    upstream.clear()
    return site, image


async def pull(site: Site, path: str = TAG) -> tuple[int, bytes, str]:
    """Status, body, and what Cache-Status says."""
    status, headers, body = await site.get(path)
    return status, body, headers.get("Cache-Status", "")


async def metric(site: Site, name: str) -> dict[str, float]:
    """Its values, by the host they are of."""
    found = {}
    for line in (await site.metrics()).splitlines():
        if line.startswith(name + "{"):
            labels, _, value = line.partition("} ")
            found[labels.partition('host="')[2].partition('"')[0]] = float(value)
    return found


# A dead upstream costs a client milliseconds after the first time-out


async def test_of_an_upstream_that_hangs_a_cached_tag_costs_the_header_time_out_once(
    serve: Serve, upstream: Upstream
) -> None:
    site, image = await warm(serve, upstream, options=QUICK)
    upstream.next("HEAD", anything, silence(), times=100)
    assert (await pull(site))[:2] == (200, image.content)
    assert upstream.log == ["HEAD manifest a/b:latest"]
    for path in (TAG, OTHER):  # the other was not asked for before
        status, _, told = await pull(site, path)
        assert (status, STALE in told) == (200, True)
    assert len(upstream.log) == 1, "answered without a request, hence without waiting for one"


async def test_what_is_not_cached_is_refused_at_once_and_told_when_to_come_back(
    serve: Serve, upstream: Upstream
) -> None:
    image = upstream.image("a/b", "latest")
    site = await serve(upstream, options=QUICK)
    upstream.next("GET", anything, silence(), times=100)
    assert (await pull(site))[0] == 504
    for path in (TAG, OTHER, blob_of(image.layers[0]), "/v2/a/b/tags/list"):
        status, headers, body = await site.get(path)
        assert (status, code_of(body), headers["Retry-After"]) == (504, "UNAVAILABLE", "1")
    assert len(upstream.log) == 1


async def test_the_probe_is_one_request_and_its_answer_closes_the_breaker(
    serve: Serve, upstream: Upstream, clock: Clock
) -> None:
    image = upstream.image("a/b", "latest")
    site = await serve(upstream)
    ear = Ear()
    await upstream.stop()
    assert (await pull(site))[0] == 502
    await upstream.start()
    opened = await ear.heard("upstream.opened", namespace="docker.io")
    assert opened["host"] == URL(upstream.url).host_port_subcomponent
    assert await metric(site, "entrepot_upstream_open") == {opened["host"]: 1}
    clock.advance(1)
    held = silence()
    upstream.next("GET", "latest", held)
    probe = asyncio.create_task(pull(site))
    await held.reached.wait()
    assert (await pull(site, blob_of(image.layers[0])))[0] == 502
    held.gate.set()
    assert (await probe)[:2] == (200, image.content)
    assert len(upstream.log) == 1
    await ear.heard("upstream.closed", namespace="docker.io", host=opened["host"])
    assert await metric(site, "entrepot_upstream_open") == {opened["host"]: 0}
    assert (await pull(site, blob_of(image.layers[0])))[0] == 200


async def test_who_can_be_served_does_not_wait_for_one_that_has_failed(
    serve: Serve, upstream: Upstream, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tags, "PATIENCE", 0.0)
    site, old = await warm(serve, upstream)
    upstream.next("HEAD", "latest", Status(503), times=1 + RETRIES)
    assert STALE in (await pull(site))[2]
    clock.advance(PAUSE + 1)
    new = upstream.image("a/b", "latest", [b"moved"])
    held = silence()
    upstream.next("HEAD", "latest", held)
    upstream.clear()
    for _ in range(2):
        status, body, told = await pull(site)
        assert (status, body, STALE in told) == (200, old.content, True)
    await held.reached.wait()
    ear = Ear()
    held.gate.set()
    await ear.heard("tag.moved")
    assert upstream.log == ["HEAD manifest a/b:latest", f"GET manifest a/b@{new.digest[:19]}"]
    assert (await pull(site))[:2] == (200, new.content)
    assert len(upstream.log) == 2


async def test_a_refused_connection_opens_it_at_once(serve: Serve, upstream: Upstream, clock: Clock) -> None:
    site, image = await warm(serve, upstream)
    await upstream.stop()
    status, headers, _ = await site.get("/v2/a/b/manifests/absent")
    assert status == 502
    status, headers, _ = await site.get("/v2/a/b/manifests/absent")
    assert (status, headers["Retry-After"]) == (502, "1")
    assert (await pull(site))[:2] == (200, image.content)
    await upstream.start()
    assert (await pull(site, "/v2/a/b/manifests/absent"))[0] == 502
    clock.advance(1)
    assert (await pull(site, "/v2/a/b/manifests/absent"))[0] == 404


@pytest.mark.parametrize(
    ("status", "asked"), [(502, FAILURES), (503, FAILURES), (504, FAILURES), (500, FAILURES + 2)]
)
async def test_answers_of_a_gateway_open_it_when_they_are_several_and_those_about_one_request_do_not(
    serve: Serve, upstream: Upstream, status: int, asked: int
) -> None:
    site = await serve(upstream)
    upstream.next("GET", anything, RetryAfter(0, status), times=100)
    for number in range(FAILURES + 2):
        assert (await pull(site, f"/v2/a/b/manifests/{number}"))[0] == 502
    assert len(upstream.log) == asked


@pytest.mark.errors("fill.failed")
async def test_transfers_that_are_cut_open_it_when_they_are_several(serve: Serve, upstream: Upstream) -> None:
    image = upstream.image("a/b", None, [bytes([each]) * 100 for each in range(FAILURES)])
    site = await serve(upstream)
    ear = Ear()
    holds = [silence(50) for _ in image.layers]
    for layer, held in zip(image.layers, holds, strict=True):
        upstream.next("GET", layer, held, Truncate(50))
    pulls = [asyncio.create_task(pull(site, blob_of(layer))) for layer in image.layers]
    for held in holds:
        await held.reached.wait()
    for held in holds:
        held.gate.set()
    await ear.heard("upstream.opened")
    await asyncio.gather(*pulls, return_exceptions=True)


async def test_a_token_server_that_hangs_is_bounded_and_then_refused_at_once(
    serve: Serve, upstream: Upstream
) -> None:
    upstream.auth = Bearer(realm="{cdn_url}/token")
    options = {**QUICK, "token_realms": ["localhost"]}
    site, image = await warm(serve, upstream, options=options)
    upstream.expire_tokens()
    upstream.next("GET", "token", silence(), times=100)
    assert (await pull(site, blob_of(image.layers[0])))[0] == 504
    assert upstream.log.count("GET token repository:a/b:pull") == 1
    status, headers, _ = await site.get(blob_of(image.config))
    assert (status, headers["Retry-After"]) == (504, "1")
    assert (await pull(site))[:2] == (200, image.content)
    assert upstream.log.count("GET token repository:a/b:pull") == 1
    open_hosts = await metric(site, "entrepot_upstream_open")
    assert open_hosts[URL(upstream.url).host_port_subcomponent or ""] == 0, "the registry itself answers"
    assert open_hosts[URL(upstream.cdn_url).host_port_subcomponent or ""] == 1


async def test_a_cdn_that_hangs_is_no_reason_not_to_ask_for_tags(serve: Serve, upstream: Upstream) -> None:
    upstream.cdn = True
    site, image = await warm(serve, upstream, options=QUICK)
    upstream.next("GET", "cdn", silence(), times=100)
    for layer in (image.layers[0], image.config, image.layers[0]):
        assert (await pull(site, blob_of(layer)))[0] == 504
    assert [each.kind for each in upstream.requests] == ["blob", "cdn", "blob", "blob"]
    assert "revalidated" in (await pull(site))[2] or upstream.log[-1] == "HEAD manifest a/b:latest"


# Retries


Reach = Callable[..., Transport]


@pytest.fixture
async def reach(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Reach]:
    """A transport to the upstream whose retries follow at once, if no other jitter is given."""
    made = []
    monkeypatch.setattr(transport, "BACKOFF", BACKOFF)

    def reach(url: str = upstream.url, **keys: Any) -> Transport:
        keys = {"jitter": lambda: 0.0} | keys
        settings = {"plain_http": True, "header_timeout": 2.0, "progress_timeout": 2.0} | keys.pop(
            "connect", {}
        )
        made.append(Transport("up", Connect(**settings), URL(url), **keys))
        return made[-1]

    yield reach
    for each in made:
        await each.close()


@pytest.mark.parametrize("fault", [Refuse(), Reset(None), Status(502), Status(503), Status(504)], ids=str)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_safe_request_is_tried_twice_more(
    reach: Reach, upstream: Upstream, method: str, fault: Fault
) -> None:
    retries: list[None] = []
    up = reach(retried=lambda: retries.append(None))
    upstream.next(method, "base", fault, times=RETRIES)
    async with await up.send(method, URL(f"{upstream.url}/v2/"), {}) as response:
        assert response.status == 200
    assert upstream.log == [f"{method} base"] * (1 + RETRIES)
    assert len(retries) == RETRIES == 2


@pytest.mark.parametrize("fault", [Refuse(), Status(503)], ids=str)
async def test_and_no_more(reach: Reach, upstream: Upstream, fault: Fault) -> None:
    up = reach()
    upstream.next("GET", "base", fault, times=100)
    try:
        assert (await up.send("GET", URL(f"{upstream.url}/v2/"), {})).status == 503
    except OriginFailed:
        assert fault == Refuse()
    assert len(upstream.log) == 1 + RETRIES


@pytest.mark.parametrize(
    ("method", "fault"),
    [
        ("POST", Status(503)),
        ("GET", RetryAfter(7, 503)),
        ("GET", Status(500)),
        ("GET", Status(429)),
        ("GET", Status(404)),
    ],
    ids=str,
)
async def test_what_is_not_tried_again(reach: Reach, upstream: Upstream, method: str, fault: Fault) -> None:
    upstream.next(method, anything, fault, times=100)
    async with await reach().send(method, URL(f"{upstream.url}/token"), {}):
        assert len(upstream.log) == 1


async def test_a_time_out_is_not_tried_again(reach: Reach, upstream: Upstream) -> None:
    up = reach(connect={"header_timeout": 0.05})
    upstream.next("GET", "base", silence(), times=100)
    with pytest.raises(OriginTimeout):
        await up.send("GET", URL(f"{upstream.url}/v2/"), {})
    assert len(upstream.log) == 1


async def test_all_tries_share_one_header_time_out(reach: Reach, upstream: Upstream) -> None:
    up = reach(connect={"header_timeout": 0.05}, jitter=lambda: 1e6)
    upstream.next("GET", "base", Status(503), times=100)
    with pytest.raises(OriginTimeout):
        await up.send("GET", URL(f"{upstream.url}/v2/"), {})
    assert len(upstream.log) == 1


async def test_retries_back_off_with_full_jitter(
    reach: Reach, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    up = reach(jitter=lambda: 0.5)
    upstream.next("GET", "base", Status(503), times=RETRIES)
    monkeypatch.setattr(transport.asyncio, "sleep", sleep)
    response = await up.send("GET", URL(f"{upstream.url}/v2/"), {})
    monkeypatch.undo()
    response.close()
    assert slept == [0.05, 0.1], "half of 100 ms, then of 200 ms"


async def test_retries_are_counted(serve: Serve, upstream: Upstream) -> None:
    upstream.image("a/b", "latest")
    site = await serve(upstream)
    upstream.next("GET", "latest", Status(502), times=2)
    assert (await pull(site))[0] == 200
    assert 'entrepot_upstream_retries_total{namespace="docker.io"} 2.0' in await site.metrics()


# Bounds


async def test_a_small_document_has_to_come_within_the_progress_time_out_as_a_whole(
    reach: Reach, upstream: Upstream
) -> None:
    """However often a byte of it comes: else one of 4 MiB could take years."""

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        try:
            while True:
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.01)
        except ConnectionError:
            writer.close()

    async with await asyncio.start_server(drip, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        up = reach(url, connect={"progress_timeout": 0.1})
        response = await up.send("GET", URL(url), {})
        with pytest.raises(OriginTimeout):
            await up.read(response, 1 << 20)
        response.close()
        await up.close()
        await asyncio.gather(*(each for each in asyncio.all_tasks() if "drip" in repr(each)))


@pytest.mark.parametrize(
    ("host", "private"),
    [
        ("127.0.0.1", True),
        ("10.1.2.3", True),
        ("172.16.0.1", True),
        ("192.168.0.1", True),
        ("169.254.169.254", True),
        ("100.64.0.1", True),
        ("0.0.0.0", True),
        ("::1", True),
        ("fe80::1%eth0", True),
        ("fd00::1", True),
        ("::ffff:10.0.0.1", True),
        ("::ffff:8.8.8.8", False),
        ("8.8.8.8", False),
        ("2001:4860:4860::8888", False),
        ("localhost", False),  # a name: what it resolves to is looked at
        ("", False),
    ],
)
def test_private_addresses(host: str, private: bool) -> None:
    assert is_private(host) == private


INSIDE = "127.0.0.2"


@pytest.fixture
async def inside(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[str, list[str]]]:
    """A network where 127.0.0.1 counts as public and 127.0.0.2 as private; what listens there, and hears."""
    monkeypatch.setattr(transport, "is_private", lambda host: host == INSIDE)
    resolve = asyncio.BaseEventLoop.getaddrinfo

    async def getaddrinfo(loop: Any, host: str, *args: Any, **keys: Any) -> Any:
        return await resolve(loop, INSIDE if host == "rebinding.example" else host, *args, **keys)

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    heard: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append((await reader.readuntil(b"\r\n\r\n")).decode().split()[1])
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\nsecret")
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(answer, INSIDE, 0) as server:
        yield f"{server.sockets[0].getsockname()[1]}", heard


@pytest.mark.parametrize("host", [INSIDE, "rebinding.example"])
async def test_a_redirect_to_a_private_address_is_refused(
    serve: Serve, upstream: Upstream, inside: tuple[str, list[str]], host: str
) -> None:
    port, heard = inside
    image = upstream.image("a/b", "latest")
    site = await serve(upstream)
    upstream.next("GET", "blob", Redirect(f"http://{host}:{port}/latest/meta-data"))
    status, _, body = await site.get(blob_of(image.layers[0]))
    assert (status, code_of(body)) == (502, "UNAVAILABLE")
    assert b"private_redirects" in body
    assert heard == []


async def test_unless_it_is_allowed(serve: Serve, upstream: Upstream, inside: tuple[str, list[str]]) -> None:
    port, heard = inside
    digest = upstream.blob("a/b", b"secret")
    site = await serve(upstream, options={"private_redirects": True})
    upstream.next("GET", "blob", Redirect(f"http://{INSIDE}:{port}/stored"))
    assert (await pull(site, blob_of(digest)))[:2] == (200, b"secret")
    assert heard == ["/stored"]


async def test_or_the_upstream_is_at_such_an_address_itself(
    reach: Reach, upstream: Upstream, inside: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    port, heard = inside
    monkeypatch.setattr(transport, "is_private", lambda host: host.startswith("127."))
    upstream.next("GET", "base", Redirect(f"http://{INSIDE}:{port}/stored"))
    async with await reach().follow("GET", URL(f"{upstream.url}/v2/"), {}):
        assert heard == ["/stored"]


async def test_a_connection_for_the_upstream_is_not_used_for_a_redirect(
    reach: Reach, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pools are apart; else a redirect would ride on what was connected under another rule."""
    sockets: list[str] = []
    for name in ("_home_socket", "_redirect_socket"):
        made = getattr(Transport, name)

        def make(self: Transport, address: Any, made: Any = made, name: str = name) -> Any:
            sockets.append(name)
            return made(self, address)

        monkeypatch.setattr(Transport, name, make)
    upstream.cdn = True
    image = upstream.image("a/b", "latest")
    up = reach()
    for _ in range(2):
        async with await up.follow("GET", URL(upstream.url + blob_of(image.layers[0])), {}) as response:
            await response.read()
    assert sockets == ["_home_socket", "_redirect_socket"]


async def test_behind_a_proxy_an_address_in_the_url_is_refused(
    reach: Reach, upstream: Upstream, inside: tuple[str, list[str]]
) -> None:
    port, heard = inside
    up = reach("http://registry.example", connect={"proxy": upstream.url})
    upstream.next("GET", anything, Redirect(f"http://{INSIDE}:{port}/"))
    with pytest.raises(OriginFailed, match="private_redirects"):
        await up.follow("GET", URL("http://registry.example/v2/"), {})
    assert heard == []


async def test_breakers_of_many_hosts_are_bounded(reach: Reach, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "HOSTS", 3)
    up = reach("http://home.example")
    home = up.breaker(URL("http://home.example/v2/"))
    first = up.breaker(URL("http://cdn-0.example"))
    for number in range(5):
        up.breaker(URL(f"http://cdn-{number}.example"))
    assert up.breaker(URL("http://home.example")) is home
    assert up.breaker(URL("http://cdn-0.example")) is not first


# Several URLs


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


async def test_spans_of_a_blob_do_not_change_the_order(serve: Serve, mirrors: Mirrors) -> None:
    """A client's ranges ahead of a fill are no sign that it failed."""
    from proxy.telemetry.metrics import Metrics
    from proxy.upstream.client import UpstreamRegistry as Client
    from proxy.upstream.credentials import Credentials
    from proxy.upstream.failover import Failover
    from proxy.upstream.requests import UpstreamSettings
    from storage.oci import Digest, Span

    first, second, _ = mirrors
    digest = Digest(image_on(first, second).layers[0])
    connect = Connect(plain_http=True)
    metrics = Metrics()
    origins = [
        Client("up", UpstreamSettings(each.url, connect), [Credentials()], metrics)
        for each in (first, second)
    ]
    failover = Failover(origins)
    for _ in range(3):
        blob = await failover.get_blob("a/b", digest, Span(1, 3))
        assert b"".join([chunk async for chunk in blob.chunks(1, 3)]) == b" l"
        await blob.close()
    await failover.close()
    assert second.log == []
    assert len(first.log) == 3


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

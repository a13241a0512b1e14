"""What is tried again, and the bounds of that: time, hosts, addresses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from yarl import URL

from proxy.upstream import transport
from proxy.upstream.connect import Connect
from proxy.upstream.transport import RETRIES, Transport, is_private
from storage.errors import OriginFailed, OriginTimeout
from tests.conftest import BACKOFF, Serve
from tests.outages import (
    anything,
    blob_of,
    code_of,
    pull,
    silence,
)
from tests.upstream import Fault, Hold, Redirect, Refuse, Reset, RetryAfter, Status, Upstream

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


@pytest.mark.parametrize("fault", [Refuse(), Reset(None), *map(Status, (500, 502, 503, 504))], ids=str)
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
        ("GET", RetryAfter(7, 500)),
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
        ("64:ff9b::7f00:1", True),  # NAT64, RFC 6052
        ("64:ff9b::a9fe:a9fe", True),
        ("64:ff9b::8.8.8.8", False),
        ("64:ff9b:1::8.8.8.8", True),  # RFC 8215
        ("2002:7f00:1::1", True),  # 6to4
        ("::127.0.0.1", True),
        ("::ffff:0:127.0.0.1", True),  # SIIT
        ("fec0::1", True),
        ("224.0.0.1", True),
        ("ff02::1", True),
        ("192.0.0.192", True),  # metadata of clouds
        ("168.63.129.16", True),
        ("fd00:ec2::254", True),
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


async def test_after_it_is_closed(reach: Reach, upstream: Upstream) -> None:
    """Its place may be wanted while a request is under way."""
    hold = Hold(asyncio.Event(), None)
    upstream.next("GET", "base", hold)
    up, url = reach(), URL(f"{upstream.url}/v2/")
    under_way = asyncio.create_task(up.send("GET", url, {}))
    await hold.reached.wait()
    await up.close()
    with pytest.raises(OriginFailed, match="connections were closed"):
        await under_way
    with pytest.raises(OriginFailed, match="connections were closed"):
        await up.send("GET", url, {})
    hold.gate.set()
    assert len(upstream.log) == 1


@pytest.mark.parametrize("host", ["xn--0.test", "xn--a-.test:5", "a..test"])
async def test_a_host_that_is_no_name_is_the_fault_of_the_upstream(
    serve: Serve, upstream: Upstream, host: str
) -> None:
    image = upstream.image("a/b", "latest")
    site = await serve(upstream)
    upstream.next("GET", "blob", Redirect(f"http://{host}/there"))
    challenge = {"WWW-Authenticate": f'Bearer realm="http://{host}/token",service="x"'}
    upstream.next("GET", "manifest", Status(401, challenge))
    pages = Status(
        200, {"Link": f'<http://{host}/v2/a/b/tags/list>; rel="next"'}, b'{"name":"a/b","tags":[]}'
    )
    upstream.next("GET", "tags", pages)
    for path in (blob_of(image.layers[0]), "/v2/a/b/manifests/latest", "/v2/a/b/tags/list"):
        status, _, body = await site.get(path)
        assert (status, code_of(body)) == (502, "UNAVAILABLE")
    assert upstream.unmet == []

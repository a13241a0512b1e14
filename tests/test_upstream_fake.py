"""The fake upstream does what it says: other tests are worth what it is worth."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
from multidict import CIMultiDictProxy
from yarl import URL

from tests.upstream import (
    OCI_INDEX,
    OCI_MANIFEST,
    Basic,
    Bearer,
    ContentType,
    Corrupt,
    ExpireToken,
    Fault,
    Gzip,
    Hold,
    NoDigest,
    Redirect,
    Refuse,
    Reset,
    RetryAfter,
    Status,
    Truncate,
    Upstream,
    WrongDigest,
    WrongLength,
    digest_of,
)

BODY = bytes(range(256)) * 1000


class Reply(NamedTuple):
    status: int
    headers: CIMultiDictProxy[str]
    body: bytes
    error: type[BaseException] | None  # with which the body ended


Ask = Callable[..., Coroutine[Any, Any, Reply]]


@pytest.fixture
async def ask() -> AsyncIterator[Ask]:
    """One request on a connection of its own, redirects not followed; what came of the body is kept."""
    async with aiohttp.ClientSession(
        auto_decompress=False, connector=aiohttp.TCPConnector(force_close=True)
    ) as session:

        async def once(method: str, url: str, **headers: str) -> Reply:
            fields = {name.replace("_", "-"): value for name, value in headers.items()}
            target = URL(url, encoded=True)
            async with session.request(method, target, headers=fields, allow_redirects=False) as response:
                body, error = bytearray(), None
                try:
                    async for piece in response.content.iter_any():
                        body += piece
                except (aiohttp.ClientError, ConnectionError) as broken:
                    error = type(broken)
                return Reply(response.status, response.headers, bytes(body), error)

        yield once


def blob_url(upstream: Upstream, digest: str) -> str:
    return f"{upstream.url}/v2/a/b/blobs/{digest}"


async def test_an_image_by_tag_and_digest(ask: Ask) -> None:
    async with Upstream() as upstream:
        image = upstream.image("a/b", "latest", [b"one", b"two"], "linux/arm64/v8")
        index = upstream.index("a/b", "multi", [image])
        for reference in ("latest", image.digest):
            for method in ("GET", "HEAD"):
                reply = await ask(method, f"{upstream.url}/v2/a/b/manifests/{reference}")
                assert reply.status == 200
                assert reply.headers["Content-Type"] == OCI_MANIFEST
                assert reply.headers["Content-Length"] == str(len(image.content))
                assert reply.headers["Docker-Content-Digest"] == digest_of(image.content) == image.digest
                assert reply.body == (image.content if method == "GET" else b"")
        named = json.loads((await ask("GET", f"{upstream.url}/v2/a/b/manifests/multi")).body)["manifests"]
        assert named == [image.descriptor]
        assert named[0]["platform"] == {"os": "linux", "architecture": "arm64", "variant": "v8"}
        assert [(await ask("GET", blob_url(upstream, each))).body for each in image.layers] == [
            b"one",
            b"two",
        ]
        assert upstream.bytes_sent == 6
        assert upstream.log == [
            "GET manifest a/b:latest",
            "HEAD manifest a/b:latest",
            f"GET manifest a/b@{image.digest[:19]}",
            f"HEAD manifest a/b@{image.digest[:19]}",
            "GET manifest a/b:multi",
            *(f"GET blob a/b@{each[:19]}" for each in image.layers),
        ]
        upstream.clear()
        assert (upstream.log, upstream.bytes_sent) == ([], 0)
        upstream.delete_manifest("a/b", index.digest)
        upstream.delete_tag("a/b", "latest")
        upstream.delete_blob("a/b", image.config)
        for gone in ("manifests/multi", "manifests/latest", f"blobs/{image.config}"):
            assert (await ask("GET", f"{upstream.url}/v2/a/b/{gone}")).status == 404


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("a/b/manifests/absent", 404, "MANIFEST_UNKNOWN"),
        (f"a/b/blobs/{digest_of(b'absent')}", 404, "BLOB_UNKNOWN"),
        ("a/b/blobs/sha256:short", 400, "DIGEST_INVALID"),
        ("no/such/tags/list", 404, "NAME_UNKNOWN"),
        ("a/b/tags/list?n=many", 400, "PAGINATION_NUMBER_INVALID"),
    ],
)
async def test_errors_are_the_specifications(ask: Ask, path: str, status: int, code: str) -> None:
    async with Upstream() as upstream:
        upstream.image("a/b", "latest")
        reply = await ask("GET", f"{upstream.url}/v2/{path}")
        assert (reply.status, json.loads(reply.body)["errors"][0]["code"]) == (status, code)


async def test_accept_and_validators(ask: Ask) -> None:
    async with Upstream() as upstream:
        image = upstream.image("a/b", "latest")
        url = f"{upstream.url}/v2/a/b/manifests/latest"
        assert (await ask("GET", url, Accept=f"text/html, {OCI_MANIFEST};q=0.5")).status == 200
        assert (await ask("GET", url, Accept=OCI_INDEX)).status == 404
        reply = await ask("GET", url, If_None_Match=f'"{image.digest}"')
        assert (reply.status, reply.body) == (304, b"")
        upstream.digest_header = False
        reply = await ask("HEAD", url)
        assert "Docker-Content-Digest" not in reply.headers and "ETag" not in reply.headers


@pytest.mark.parametrize(
    ("asked", "status", "content_range", "span"),
    [
        ("bytes=0-1", 206, "bytes 0-1/256000", slice(0, 2)),
        ("bytes=255990-", 206, "bytes 255990-255999/256000", slice(255990, None)),
        ("bytes=-10", 206, "bytes 255990-255999/256000", slice(255990, None)),
        ("bytes=10-999999", 206, "bytes 10-255999/256000", slice(10, None)),
        ("bytes=256000-", 416, "bytes */256000", None),
        ("bytes=0-1,4-5", 200, None, slice(None)),
        ("bytes=5-1", 200, None, slice(None)),
    ],
)
@pytest.mark.parametrize("content_length", [True, False])
async def test_ranges(
    ask: Ask, asked: str, status: int, content_range: str | None, span: slice | None, content_length: bool
) -> None:
    async with Upstream(content_length=content_length) as upstream:
        digest = upstream.blob("a/b", BODY, "sha512")
        reply = await ask("GET", blob_url(upstream, digest), Range=asked)
        assert (reply.status, reply.headers.get("Content-Range")) == (status, content_range)
        if span is not None:
            assert reply.body == BODY[span]
            assert upstream.bytes_sent == len(reply.body)
            assert ("Content-Length" in reply.headers) is content_length
        assert upstream.log == [f"GET blob a/b@{digest[:19]} {asked}"]
        assert (await ask("HEAD", blob_url(upstream, digest), Range=asked)).status == 200
        upstream.ranges = False
        assert (await ask("GET", blob_url(upstream, digest), Range=asked)).body == BODY


async def test_names_come_in_pages(ask: Ask) -> None:
    async with Upstream() as upstream:
        for tag in ("c", "a", "b"):
            upstream.image("a/b", tag)

        async def tags(query: str) -> tuple[list[str], str | None]:
            reply = await ask("GET", f"{upstream.url}/v2/a/b/tags/list{query}")
            return json.loads(reply.body)["tags"], reply.headers.get("Link")

        assert await tags("") == (["a", "b", "c"], None)
        assert await tags("?n=2") == (["a", "b"], '</v2/a/b/tags/list?n=2&last=b>; rel="next"')
        assert await tags("?n=2&last=b") == (["c"], None)
        assert await tags("?n=0") == ([], None)
        upstream.ignores_n = True
        assert await tags("?n=1") == (["a", "b", "c"], None)
        upstream.page_size = 1
        assert await tags("") == (["a"], '</v2/a/b/tags/list?n=1&last=a>; rel="next"')
        reply = await ask("GET", f"{upstream.url}/v2/_catalog")
        assert json.loads(reply.body) == {"repositories": ["a/b"]}
        assert upstream.log[1] == "GET tags a/b?n=2"


async def test_referrers(ask: Ask) -> None:
    async with Upstream() as upstream:
        image = upstream.image("a/b", "latest")
        one = upstream.artifact("a/b", image, "application/one", {"made": "here"})
        two = upstream.artifact("a/b", image, "application/two")
        url = f"{upstream.url}/v2/a/b/referrers/{image.digest}"
        reply = await ask("GET", url)
        assert reply.headers["Content-Type"] == OCI_INDEX
        first, second = json.loads(reply.body)["manifests"]
        assert first == {**one.descriptor, "artifactType": "application/one", "annotations": {"made": "here"}}
        assert second == {**two.descriptor, "artifactType": "application/two"}
        reply = await ask("GET", f"{url}?artifactType=application/two")
        assert (reply.headers["OCI-Filters-Applied"], json.loads(reply.body)["manifests"]) == (
            "artifactType",
            [second],
        )
        upstream.referrers_page_size = 1
        reply = await ask("GET", url)
        link = reply.headers["Link"].removeprefix("<").partition(">")[0]
        assert json.loads((await ask("GET", upstream.url + link)).body)["manifests"] == [second]
        assert json.loads((await ask("GET", url.replace(image.digest, one.digest))).body)["manifests"] == []
        upstream.referrers_api = False
        assert (await ask("GET", url)).status == 404


async def test_blobs_from_another_origin(ask: Ask) -> None:
    async with Upstream(cdn=True) as upstream:
        digest = upstream.blob("a/b", BODY)
        reply = await ask("GET", blob_url(upstream, digest))
        location = reply.headers["Location"]
        assert reply.status == 307 and upstream.bytes_sent == 0
        assert location.startswith(upstream.cdn_url) and "%2F" in location
        assert (await ask("GET", location, Range="bytes=5-")).body == BODY[5:]
        assert (await ask("HEAD", location)).headers["Content-Length"] == str(len(BODY))
        assert (await ask("GET", location, Authorization="Bearer mine")).status == 400
        for changed in (location.replace("%2F", "/"), location.replace("%2f", "%2F")):
            assert (await ask("GET", changed)).status == 403
        upstream.next("GET", digest, Reset(after=7))
        again = (await ask("GET", blob_url(upstream, digest))).headers["Location"]
        assert (await ask("GET", again)).body == BODY[:7]
        upstream.lapse_signatures()
        assert (await ask("GET", again)).status == 403
        assert upstream.log[:2] == [f"GET blob a/b@{digest[:19]}", f"GET cdn {digest[:19]} bytes=5-"]


async def test_rate_limit_counts_manifests_fetched(ask: Ask) -> None:
    async with Upstream(ratelimit=(100, 21600, 1)) as upstream:
        upstream.image("a/b", "latest")
        url = f"{upstream.url}/v2/a/b/manifests/latest"
        assert (await ask("HEAD", url)).headers["RateLimit-Remaining"] == "1;w=21600"
        reply = await ask("GET", url)
        assert (reply.headers["RateLimit-Limit"], reply.headers["RateLimit-Remaining"]) == (
            "100;w=21600",
            "0;w=21600",
        )
        assert (await ask("GET", url)).status == 429


async def test_basic(ask: Ask) -> None:
    async with Upstream(auth=Basic("me", "secret")) as upstream:
        reply = await ask("GET", f"{upstream.url}/v2/")
        assert (reply.status, reply.headers["WWW-Authenticate"]) == (401, 'Basic realm="fake"')
        assert (
            await ask("GET", f"{upstream.url}/v2/", Authorization=Basic("me", "secret").header)
        ).status == 200
        assert (
            await ask("GET", f"{upstream.url}/v2/", Authorization=Basic("me", "wrong").header)
        ).status == 401


async def test_bearer(ask: Ask) -> None:
    async with Upstream(auth=Bearer(field="access_token", expires_in=None)) as upstream:
        upstream.image("a/b", "latest")
        upstream.image("other", "latest")
        url = f"{upstream.url}/v2/a/b/manifests/latest"
        upstream.next("GET", "latest", ExpireToken())  # not met by requests without a token
        challenge = f'Bearer realm="{upstream.url}/token",service="registry.fake",scope="repository:a/b:pull"'
        assert (await ask("GET", url)).headers["WWW-Authenticate"] == challenge
        token_url = f"{upstream.url}/token?service=registry.fake&scope=repository:a/b:pull"

        async def token() -> str:
            body = json.loads((await ask("GET", token_url)).body)
            assert list(body) == ["access_token"]
            return f"Bearer {body['access_token']}"

        invalid = challenge + ',error="invalid_token"'
        mine = await token()
        assert (await ask("GET", url, Authorization=mine)).headers["WWW-Authenticate"] == invalid
        assert upstream.unmet == []
        mine = await token()
        assert (await ask("GET", url, Authorization=mine)).status == 200
        assert (await ask("GET", f"{upstream.url}/v2/", Authorization=mine)).status == 200
        reply = await ask("GET", url.replace("a/b", "other"), Authorization=mine)
        assert 'error="insufficient_scope"' in reply.headers["WWW-Authenticate"]
        upstream.expire_tokens()
        assert (await ask("GET", url, Authorization=mine)).headers["WWW-Authenticate"] == invalid
        upstream.next("GET", "token", Status(503))
        assert (await ask("GET", token_url)).status == 503
        assert upstream.log[1] == "GET token repository:a/b:pull"


async def test_bearer_with_credentials_and_two_challenges(ask: Ask) -> None:
    me = Basic("me", "secret")
    auth = Bearer(me, anonymous=False, actions="pull,push", realm="{cdn_url}/token", also_basic="same header")
    async with Upstream(auth=auth) as upstream:
        upstream.image("a/b", "latest")
        url = f"{upstream.url}/v2/a/b/manifests/latest"
        bearer = f'Bearer realm="{upstream.cdn_url}/token",service="registry.fake"'
        bearer += ',scope="repository:a/b:pull,push"'
        basic = 'Basic realm="fake"'
        assert (await ask("GET", url)).headers.getall("WWW-Authenticate") == [f"{basic}, {bearer}"]
        upstream.auth = Bearer(
            me, False, actions="pull,push", realm="{cdn_url}/token", also_basic="own header"
        )
        assert (await ask("GET", url)).headers.getall("WWW-Authenticate") == [basic, bearer]
        token_url = f"{upstream.cdn_url}/token?service=registry.fake&scope=repository:a/b:pull,push"
        assert (await ask("GET", token_url)).status == 401
        body = json.loads((await ask("GET", token_url, Authorization=me.header)).body)
        assert body["expires_in"] == 300
        assert (await ask("GET", url, Authorization=f"Bearer {body['token']}")).status == 200
        assert (await ask("GET", url, Authorization=me.header)).status == 200


async def test_faults_of_headers(ask: Ask) -> None:
    async with Upstream() as upstream:
        digest = upstream.blob("a/b", BODY)
        for method in ("HEAD", "GET"):

            async def met(*faults: Fault, method: str = method) -> Reply:
                upstream.next(method, digest, *faults)
                return await ask(method, blob_url(upstream, digest), Range="bytes=1000-")

            reply = await met(Status(403, {"X-Why": "so"}))
            assert (reply.status, reply.headers["X-Why"]) == (403, "so")
            assert "Docker-Content-Digest" not in reply.headers
            reply = await met(RetryAfter(7))
            assert (reply.status, reply.headers["Retry-After"]) == (429, "7")
            reply = await met(Redirect("http://elsewhere.example/", 302))
            assert (reply.status, reply.headers["Location"]) == (302, "http://elsewhere.example/")
            assert "Docker-Content-Digest" not in (await met(NoDigest())).headers
            lie = (await met(WrongDigest())).headers["Docker-Content-Digest"]
            assert lie != digest and len(lie) == len(digest)
            reply = await met(ContentType("text/html"), Gzip())
            assert (reply.headers["Content-Type"], reply.headers["Content-Encoding"]) == ("text/html", "gzip")
            assert method == "HEAD" or gzip.decompress(reply.body) == BODY[1000:]
        upstream.next("GET", digest, Status(500, body=b"<html>"), times=2)
        assert [(await ask("GET", blob_url(upstream, digest))).status for _ in range(3)] == [500, 500, 200]


@pytest.mark.parametrize("content_length", [True, False])
@pytest.mark.parametrize("after", [0, 3, 100_000])
@pytest.mark.parametrize("fault", [Reset, Truncate])
async def test_a_body_cut_short(
    ask: Ask, fault: type[Reset | Truncate], after: int, content_length: bool
) -> None:
    """Exactly `after` bytes arrive, whatever part of the blob is asked for."""
    async with Upstream(content_length=content_length) as upstream:
        digest = upstream.blob("a/b", BODY)
        upstream.next("GET", digest, fault(after))
        reply = await ask("GET", blob_url(upstream, digest), Range="bytes=5-")
        assert (reply.status, reply.body) == (206, BODY[5 : 5 + after])
        assert reply.error is not None
        assert upstream.bytes_sent == after


async def test_a_reset_is_one_and_loses_nothing() -> None:
    """Read with a bare socket, and late: all bytes before the reset are there, and then it is a reset."""
    async with Upstream() as upstream:
        digest, loop = upstream.blob("a/b", BODY * 8), asyncio.get_running_loop()
        upstream.next("GET", digest, Reset(after=2_000_000))
        url = URL(upstream.url)
        with socket.socket() as client:
            client.setblocking(False)
            await loop.sock_connect(client, (url.host, url.port))
            await loop.sock_sendall(client, f"GET /v2/a/b/blobs/{digest} HTTP/1.1\r\n\r\n".encode())
            received = bytearray()
            with pytest.raises(ConnectionResetError):
                while piece := await loop.sock_recv(client, 50_000):
                    received += piece
        assert received.partition(b"\r\n\r\n")[2] == (BODY * 8)[:2_000_000]


@pytest.mark.parametrize("fault", [Reset(5), Truncate(5), Refuse()])
async def test_head_has_no_body_to_be_cut(ask: Ask, fault: Reset | Truncate | Refuse) -> None:
    async with Upstream() as upstream:
        digest = upstream.blob("a/b", BODY)
        upstream.next("HEAD", digest, fault, times=2)  # the client asks twice when refused
        with pytest.raises((aiohttp.ClientError, ConnectionError)):
            await ask("HEAD", blob_url(upstream, digest))


async def test_faults_of_content(ask: Ask) -> None:
    async with Upstream() as upstream:
        digest = upstream.blob("a/b", BODY)
        upstream.next("GET", digest, Corrupt(at=1000), times=3)
        for asked, wrong in (("bytes=0-", [1000]), ("bytes=990-1009", [10]), ("bytes=1001-", [])):
            reply = await ask("GET", blob_url(upstream, digest), Range=asked)
            right = BODY[int(asked[6:].partition("-")[0]) :]
            assert [at for at, byte in enumerate(reply.body) if byte != right[at]] == wrong
        upstream.next("GET", digest, WrongLength(by=2))
        reply = await ask("GET", blob_url(upstream, digest))
        assert (reply.headers["Content-Length"], reply.body) == (str(len(BODY) + 2), BODY)
        assert reply.error is not None
        upstream.next("GET", digest, WrongLength(by=-2))
        reply = await ask("GET", blob_url(upstream, digest))
        assert (reply.headers["Content-Length"], reply.body) == (str(len(BODY) - 2), BODY[:-2])


async def test_hold_stops_at_the_byte_until_the_gate_opens() -> None:
    async with Upstream() as upstream, aiohttp.ClientSession() as session:
        digest, gate = upstream.blob("a/b", BODY), asyncio.Event()
        hold = Hold(gate, after=70_000)
        upstream.next("GET", digest, hold, Corrupt(at=70_001))
        async with session.get(blob_url(upstream, digest)) as response:
            await hold.reached.wait()
            assert upstream.bytes_sent == 70_000
            assert await response.content.readexactly(70_000) == BODY[:70_000]
            gate.set()
            rest = await response.content.read()
            assert rest[2:] == BODY[70_002:] and rest[1] != BODY[70_001]
        hold = Hold(asyncio.Event(), after=None)
        upstream.next("HEAD", lambda request: request.repository == "a/b", hold)
        waiting = asyncio.create_task(session.head(blob_url(upstream, digest)))
        await hold.reached.wait()
        assert not waiting.done()
        hold.gate.set()
        assert (await waiting).status == 200


async def test_stop_and_start_again(ask: Ask) -> None:
    before = asyncio.all_tasks()
    async with Upstream() as upstream, Upstream() as other:
        assert other.url != upstream.url
        digest, url = upstream.blob("a/b", BODY), upstream.url
        hold = Hold(asyncio.Event(), after=10)
        upstream.next("GET", digest, hold)
        held = asyncio.create_task(ask("GET", blob_url(upstream, digest)))
        await hold.reached.wait()
        await upstream.stop()
        assert (await held).error is not None
        with pytest.raises(aiohttp.ClientConnectorError):
            await ask("GET", f"{url}/v2/")
        await upstream.start()
        assert upstream.url == url
        assert (await ask("GET", blob_url(upstream, digest))).body == BODY
    assert asyncio.all_tasks() == before


@pytest.mark.parametrize("after", [None, 10])
async def test_the_end_of_the_context_leaves_no_task_and_no_socket(after: int | None) -> None:
    def left() -> tuple[set[asyncio.Task[Any]], int]:
        return asyncio.all_tasks(), len([*Path("/proc/self/fd").iterdir()])

    before, loop = left(), asyncio.get_running_loop()
    with socket.socket() as client:
        client.setblocking(False)
        async with Upstream() as upstream:
            digest, url = upstream.blob("a/b", BODY), URL(upstream.url)
            hold = Hold(asyncio.Event(), after)
            upstream.next("GET", digest, hold)
            await loop.sock_connect(client, (url.host, url.port))
            await loop.sock_sendall(client, f"GET /v2/a/b/blobs/{digest} HTTP/1.1\r\n\r\n".encode())
            await hold.reached.wait()
        received = b""
        while piece := await loop.sock_recv(client, 50_000):
            received += piece
    assert received.partition(b"\r\n\r\n")[2] == BODY[: after or 0]
    assert left() == before


async def test_a_script_that_fails_fails_the_test(ask: Ask) -> None:
    with pytest.raises(ExceptionGroup, match="fake upstream"):
        async with Upstream() as upstream:
            upstream.next("GET", lambda request: 1 / 0 == 1, Refuse())
            with pytest.raises(aiohttp.ClientError):
                await ask("GET", f"{upstream.url}/v2/")
    with pytest.raises(ValueError, match="Bearer"):
        Upstream().next("GET", "base", ExpireToken())

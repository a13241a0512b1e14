"""The distribution API over HTTP: statuses, headers and bodies as clients need them."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from email import message_from_bytes
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict

from proxy.telemetry import logs
from tests.conftest import Clock, Serve, Site
from tests.upstream import (
    OCI_INDEX,
    OCI_MANIFEST,
    Bearer,
    Fault,
    Hold,
    Image,
    Refuse,
    Request,
    RetryAfter,
    Status,
    Upstream,
    digest_of,
)
from tests.upstream.messages import Answer
from tests.wire import Reply, connect

BODY = bytes(range(250)) * 20
ABSENT = digest_of(b"absent")
JSON = "application/json"
IMMUTABLE = "public, max-age=31536000, immutable"
ALPINE = "/v2/library/alpine"


@pytest.fixture
def image(upstream: Upstream) -> Image:
    return upstream.image("library/alpine", "latest", layers=(BODY,))


@dataclass(frozen=True)
class Headers(Fault):
    """What a registry may send besides."""

    given: dict[str, str]

    def strike(self, answer: Answer, request: Request) -> Answer:
        answer.headers.update(self.given)
        return answer


async def head(site: Site, path: str, **headers: str) -> tuple[int, Any]:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    async with site.request("HEAD", path, headers=given) as response:
        assert await response.read() == b""
        return response.status, response.headers


def code(body: bytes) -> str:
    (error,) = json.loads(body)["errors"]
    assert error["message"]
    return str(error["code"])


def lasting(headers: CIMultiDict[str]) -> dict[str, str]:
    """All headers but those that differ from one answer to the next."""
    found = {name.lower(): value for name, value in headers.items()}
    return {name: value for name, value in found.items() if name not in ("date", "x-request-id")}


async def fills_ended() -> None:
    """Clients have all of a blob a moment before it is in its place."""
    tasks = asyncio.all_tasks()
    await asyncio.gather(*(task for task in tasks if "Fills._run" in str(task.get_coro())))


# /v2/


@pytest.mark.parametrize(
    "path",
    [
        "/v2/",
        "/v2",
        "/docker.io/v2/",
        "/docker.io/v2",
        "/v2/docker.io/",
        "/v2/docker.io/v2/",
        "/v2/?ns=docker.io",
    ],
)
async def test_ping_asks_nobody(serve: Serve, upstream: Upstream, path: str) -> None:
    site = await serve(upstream)
    status, headers, body = await site.get(path)
    assert (status, body) == (200, b"{}")
    assert headers["Docker-Distribution-Api-Version"] == "registry/2.0"
    assert headers["Content-Type"] == JSON
    status, headed = await head(site, path)
    assert (status, lasting(headed)) == (200, lasting(headers))
    assert upstream.log == []


# Headers


def endpoints(image: Image) -> list[str]:
    return [
        "/v2/",
        f"{ALPINE}/manifests/latest",
        f"{ALPINE}/manifests/{image.digest}",
        f"{ALPINE}/blobs/{image.layers[0]}",
        f"{ALPINE}/tags/list?n=5",
        f"{ALPINE}/referrers/{image.digest}",
        "/v2/_catalog",
        f"{ALPINE}/blobs/{ABSENT}",
        f"{ALPINE}/manifests/absent",
        "/nowhere",
        f"{ALPINE}/tags/list?n=x",
    ]


async def test_head_has_the_headers_of_get_and_no_body(
    serve: Serve, upstream: Upstream, image: Image
) -> None:
    site = await serve(upstream)
    for path in endpoints(image):
        await site.get(path)  # so that both find it in the cache
    async with connect(site.url) as wire:  # one connection: a body after HEAD would spoil what follows
        for path in endpoints(image):
            headed = await wire.ask("HEAD", path)
            got = await wire.ask("GET", path)
            assert headed.status == got.status, path
            assert lasting(headed.headers) == lasting(got.headers), path
            assert got.headers["Content-Length"] == str(len(got.body)), path


async def test_every_answer_has_an_id_and_says_who_speaks(
    serve: Serve, upstream: Upstream, image: Image
) -> None:
    site = await serve(upstream)
    ids = set()
    for path in endpoints(image):
        _, headers, _ = await site.get(path)
        assert headers["Docker-Distribution-Api-Version"] == "registry/2.0"
        assert headers["Server"] == "entrepot"
        assert "WWW-Authenticate" not in headers
        ids.add(headers["X-Request-Id"])
    assert len(ids) == len(endpoints(image))


async def test_headers_of_a_manifest(serve: Serve, upstream: Upstream, image: Image) -> None:
    site = await serve(upstream)
    for reference, control in (("latest", "public, max-age=600"), (image.digest, IMMUTABLE)):
        status, headers, body = await site.get(f"{ALPINE}/manifests/{reference}")
        assert (status, body) == (200, image.content)
        assert headers["Content-Type"] == OCI_MANIFEST
        assert headers["Content-Length"] == str(len(image.content))
        assert headers["Docker-Content-Digest"] == image.digest
        assert headers["ETag"] == f'"{image.digest}"'
        assert headers["Cache-Control"] == control


async def test_a_type_with_parameters_loses_them(serve: Serve, upstream: Upstream, image: Image) -> None:
    upstream.next("GET", "latest", Headers({"Content-Type": f"{OCI_MANIFEST}; charset=utf-8"}))
    site = await serve(upstream)
    for _ in range(2):
        assert (await site.get(f"{ALPINE}/manifests/latest"))[1]["Content-Type"] == OCI_MANIFEST


async def test_headers_of_a_blob(serve: Serve, upstream: Upstream, image: Image) -> None:
    site = await serve(upstream)
    for _ in ("cold", "warm"):
        status, headers, body = await site.get(
            f"{ALPINE}/blobs/{image.layers[0]}", Accept_Encoding="gzip, zstd"
        )
        assert (status, body) == (200, BODY)
        assert headers["Content-Type"] == "application/octet-stream"
        assert headers["Content-Length"] == str(len(BODY))
        assert headers["Docker-Content-Digest"] == image.layers[0]
        assert headers["ETag"] == f'"{image.layers[0]}"'
        assert headers["Accept-Ranges"] == "bytes"
        assert headers["Cache-Control"] == IMMUTABLE
        assert "Content-Encoding" not in headers
        assert "Transfer-Encoding" not in headers


async def test_a_blob_whose_size_nobody_tells_is_chunked_once(
    serve: Serve, upstream: Upstream, image: Image
) -> None:
    upstream.content_length = False
    site = await serve(upstream)
    path = f"{ALPINE}/blobs/{image.layers[0]}"
    status, headers = await head(site, path)
    assert status == 200
    assert headers.get("Content-Length") is None
    async with connect(site.url) as wire:
        cold = await wire.ask("GET", path)
        assert (cold.headers["Transfer-Encoding"], cold.body) == ("chunked", BODY)
        await fills_ended()
        warm = await wire.ask("GET", path)
        assert (warm.headers["Content-Length"], warm.body) == (str(len(BODY)), BODY)


async def test_an_old_client_gets_a_blob_of_untold_size_until_the_end_of_the_connection(
    serve: Serve, upstream: Upstream, image: Image
) -> None:
    upstream.content_length = False
    site = await serve(upstream)
    async with connect(site.url) as wire:
        await wire.send(f"GET {ALPINE}/blobs/{image.layers[0]} HTTP/1.0\r\n\r\n".encode())
        assert (await wire.reply()).body == BODY


@pytest.mark.parametrize("auth", [None, Bearer()])
async def test_what_concerns_others_is_not_passed_on(
    serve: Serve, upstream: Upstream, image: Image, auth: Bearer | None
) -> None:
    upstream.auth = auth
    foreign = {
        "Set-Cookie": "session=1",
        "WWW-Authenticate": 'Basic realm="upstream"',
        "X-Registry-Supports-Signatures": "1",
        "Link": "<https://elsewhere.example/>; rel=next",
        "X-Custom": "1",
        "Server": "upstream",
    }
    site = await serve(upstream)
    for method, kind, path in (
        ("GET", "manifest", "manifests/latest"),
        ("GET", "blob", f"blobs/{image.layers[0]}"),
        ("HEAD", "blob", f"blobs/{image.config}"),
        ("GET", "referrers", f"referrers/{image.digest}"),
    ):
        if kind == "referrers":
            del foreign["Link"]  # it would be followed
        upstream.next(method, kind, Headers(foreign))
        async with site.request(method, f"{ALPINE}/{path}") as response:
            assert response.status == 200
            assert not {
                "Set-Cookie",
                "WWW-Authenticate",
                "X-Registry-Supports-Signatures",
                "X-Custom",
                "Link",
            } & set(response.headers)
            assert response.headers["Server"] == "entrepot"
    assert upstream.unmet == []


# Cache-Status, Age, Cache-Control


async def test_what_became_of_a_tag_is_told(
    serve: Serve, upstream: Upstream, image: Image, clock: Clock
) -> None:
    site = await serve(upstream, fresh_for="10m")

    async def told() -> tuple[str, str | None, str]:
        _, headers, _ = await site.get(f"{ALPINE}/manifests/latest")
        return headers["Cache-Status"], headers.get("Age"), headers["Cache-Control"]

    assert await told() == ("entrepot; fwd=miss; ttl=600", None, "public, max-age=600")
    clock.advance(100)
    assert await told() == ("entrepot; hit; ttl=500", "100", "public, max-age=600")
    clock.advance(600)
    assert await told() == ("entrepot; fwd=stale; ttl=600; detail=revalidated", None, "public, max-age=600")
    clock.advance(700)
    upstream.next("HEAD", "latest", Status(500))
    assert await told() == ("entrepot; fwd=stale; ttl=-100; detail=UNAVAILABLE", "700", "no-cache")
    # Upstream is left alone for a moment: this one was not forwarded.
    assert await told() == ("entrepot; hit; ttl=-100; detail=UNAVAILABLE", "700", "no-cache")
    assert upstream.log == [
        "GET manifest library/alpine:latest",
        "HEAD manifest library/alpine:latest",
        "HEAD manifest library/alpine:latest",
    ]


async def test_what_became_of_content_by_digest_is_told(
    serve: Serve, upstream: Upstream, image: Image, clock: Clock
) -> None:
    site = await serve(upstream)
    for path in (f"manifests/{image.digest}", f"blobs/{image.layers[0]}"):
        _, headers, _ = await site.get(f"{ALPINE}/{path}")
        assert (headers["Cache-Status"], headers.get("Age")) == ("entrepot; fwd=miss", None)
        await fills_ended()
        clock.advance(1e6)
        _, headers, _ = await site.get(f"{ALPINE}/{path}")
        assert (headers["Cache-Status"], headers["Age"]) == ("entrepot; hit", "1000000")
        assert headers["Cache-Control"] == IMMUTABLE


async def test_what_became_of_the_unknown_is_told(
    serve: Serve, upstream: Upstream, image: Image, clock: Clock
) -> None:
    site = await serve(upstream, negative_for="10s")
    for path, unknown in (
        ("manifests/absent", "MANIFEST_UNKNOWN"),
        (f"manifests/{ABSENT}", "MANIFEST_UNKNOWN"),
        (f"blobs/{ABSENT}", "BLOB_UNKNOWN"),
    ):
        upstream.clear()
        for forwarded in (True, False):
            status, headers, body = await site.get(f"{ALPINE}/{path}")
            assert (status, code(body)) == (404, unknown)
            told = f"fwd=miss; detail={unknown}" if forwarded else "hit; detail=negative"
            assert headers["Cache-Status"] == f"entrepot; {told}"
            assert headers["Cache-Control"] == "no-store"
            assert "Age" not in headers
        assert len(upstream.log) == 1
        clock.advance(10)
        await site.get(f"{ALPINE}/{path}")
        assert len(upstream.log) == 2


@pytest.mark.parametrize("path", ["/nowhere", f"{ALPINE}/manifests/.bad", "/v2/no.example/x/tags/list"])
async def test_what_no_cache_decided_has_no_cache_status(serve: Serve, upstream: Upstream, path: str) -> None:
    # RFC 9211 section 2: not on answers that an intermediary generates by itself.
    site = await serve(upstream)
    _, headers, _ = await site.get(path)
    assert "Cache-Status" not in headers
    assert "Age" not in headers


# If-None-Match


@pytest.mark.parametrize(
    ("given", "matches"),
    [
        ('"{}"', True),
        ('W/"{}"', True),
        ("*", True),
        ('"other", "{}"', True),
        ('"other",W/"{}" ,"third"', True),
        ("{}", True),
        ('"other"', False),
        ('"*"', False),
        ("", False),
        ('"sha256:{}"', False),
    ],
)
async def test_if_none_match(
    serve: Serve, upstream: Upstream, image: Image, given: str, matches: bool
) -> None:
    site = await serve(upstream)
    async with connect(site.url) as wire:
        for path, digest in (
            (f"{ALPINE}/manifests/latest", image.digest),
            (f"{ALPINE}/manifests/{image.digest}", image.digest),
            (f"{ALPINE}/blobs/{image.layers[0]}", image.layers[0]),
        ):
            for method in ("GET", "HEAD"):
                line = "If-None-Match: " + given.format(digest)
                reply = await wire.ask(method, path, line, "Range: bytes=0-1")
                ranged = method == "GET" and "blobs" in path
                assert reply.status == (304 if matches else 206 if ranged else 200)
                assert reply.headers["ETag"] == f'"{digest}"'
                assert reply.headers["Docker-Content-Digest"] == digest
                assert "Cache-Control" in reply.headers
                assert "Cache-Status" in reply.headers


async def test_if_none_match_in_two_lines(serve: Serve, upstream: Upstream, image: Image) -> None:
    site = await serve(upstream)
    async with connect(site.url) as wire:
        lines = ('If-None-Match: "other"', f'If-None-Match: "{image.digest}"')
        assert (await wire.ask("GET", f"{ALPINE}/manifests/latest", *lines)).status == 304


async def test_if_none_match_transfers_no_blob(serve: Serve, upstream: Upstream, image: Image) -> None:
    site = await serve(upstream)
    status, _, body = await site.get(f"{ALPINE}/blobs/{image.layers[0]}", If_None_Match="*")
    assert (status, body) == (304, b"")
    assert [line.split()[0] for line in upstream.log] == ["HEAD"]


async def test_if_none_match_of_what_is_not_there(serve: Serve, upstream: Upstream, image: Image) -> None:
    site = await serve(upstream)
    for path in (f"manifests/{ABSENT}", f"blobs/{ABSENT}", "manifests/absent"):
        status, _, body = await site.get(f"{ALPINE}/{path}", If_None_Match="*")
        assert status == 404
        assert code(body).endswith("_UNKNOWN")


# Ranges

SIZE = len(BODY)
RANGES: list[tuple[str, list[tuple[int, int]] | None]] = [
    # None: the whole, by 200; []: 416
    ("bytes=0-0", [(0, 1)]),
    ("bytes=0-", [(0, SIZE)]),
    ("bytes=10-19", [(10, 20)]),
    ("bytes=4990-", [(4990, SIZE)]),
    ("bytes=4990-99999", [(4990, SIZE)]),
    ("bytes=-10", [(SIZE - 10, SIZE)]),
    ("bytes=-99999", [(0, SIZE)]),
    ("Bytes=1-2", [(1, 3)]),
    ("bytes=0-1,4-5", [(0, 2), (4, 6)]),
    ("bytes= 4-5 , 0-1", [(4, 6), (0, 2)]),
    ("bytes=0-9,5-14", [(0, 10), (5, 15)]),
    ("bytes=0-9,-10", [(0, 10), (SIZE - 10, SIZE)]),
    ("bytes=0-0,9999-", [(0, 1)]),
    ("bytes=,0-1,,", [(0, 2)]),
    (
        "bytes=" + ",".join(f"{10 * n}-{10 * n + 1}" for n in range(200)),
        [(10 * n, 10 * n + 2) for n in range(200)],
    ),
    ("bytes=5000-", []),
    ("bytes=5000-6000,7000-", []),
    ("bytes=-0", []),
    ("bytes=0-,0-,0-", None),  # more than there is
    ("bytes=" + ",".join(["0-0"] * 300), None),  # too many
    ("bytes=2-1", []),
    ("bytes=0-1,2-1", None),
    ("bytes=-", None),
    ("bytes=a-b", None),
    ("bytes=0x1-2", None),
    ("bytes=", None),
    ("bytes 0-1", None),
    ("lines=0-1", None),
    ("bytes=0-1;2-3", None),
    ("bytes=+1-2", None),
    ("", None),
]


def check_ranges(reply: Reply, content: bytes, spans: list[tuple[int, int]] | None) -> None:
    size = len(content)
    if spans == []:
        assert reply.status == 416
        assert reply.headers["Content-Range"] == f"bytes */{size}"
        assert code(reply.body) == "RANGE_INVALID"
        return
    assert reply.headers["Content-Length"] == str(len(reply.body))
    if spans is None:
        assert (reply.status, reply.body) == (200, content)
        assert "Content-Range" not in reply.headers
        return
    assert reply.status == 206
    if len(spans) == 1:
        ((start, stop),) = spans
        assert reply.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{size}"
        assert reply.headers["Content-Type"] == "application/octet-stream"
        assert reply.body == content[start:stop]
        return
    assert "Content-Range" not in reply.headers
    check_parts(reply, content, spans)


def check_parts(reply: Reply, content: bytes, spans: list[tuple[int, int]]) -> None:
    # RFC 9110 section 14.6, by somebody else's parser
    media_type = reply.headers["Content-Type"]
    assert media_type.startswith("multipart/byteranges; boundary=")
    message = message_from_bytes(f"Content-Type: {media_type}\r\n\r\n".encode() + reply.body)
    parts = message.get_payload()
    assert [part["Content-Range"] for part in parts] == [
        f"bytes {start}-{stop - 1}/{len(content)}" for start, stop in spans
    ]
    assert {part["Content-Type"] for part in parts} == {"application/octet-stream"}
    # email takes line ends for its own, so the bytes are compared by hand.
    boundary = media_type.partition("boundary=")[2].encode()
    bodies = [part.partition(b"\r\n\r\n")[2] for part in reply.body.split(b"\r\n--" + boundary)[1:-1]]
    assert bodies == [content[start:stop] for start, stop in spans]


@pytest.mark.parametrize(("header", "spans"), RANGES, ids=[header[:30] for header, _ in RANGES])
async def test_ranges_of_a_blob_cold_and_warm(
    serve: Serve, upstream: Upstream, header: str, spans: list[tuple[int, int]] | None
) -> None:
    digest = upstream.blob("library/alpine", BODY)
    site = await serve(upstream)
    async with connect(site.url) as wire:
        for _ in ("cold", "warm"):
            reply = await wire.ask("GET", f"{ALPINE}/blobs/{digest}", f"Range: {header}")
            check_ranges(reply, BODY, spans)
    # A range never makes more than the one transfer of the whole.
    assert upstream.log == [f"GET blob library/alpine@{digest[:19]}"]


@pytest.mark.parametrize(
    ("given", "counts"),
    [('"{}"', True), ('W/"{}"', False), ('"other"', False), ("Wed, 21 Oct 2015 07:28:00 GMT", False)],
)
async def test_if_range(serve: Serve, upstream: Upstream, image: Image, given: str, counts: bool) -> None:
    site = await serve(upstream)
    digest = image.layers[0]
    status, _, body = await site.get(
        f"{ALPINE}/blobs/{digest}", Range="bytes=1-2", If_Range=given.format(digest)
    )
    assert (status, body) == ((206, BODY[1:3]) if counts else (200, BODY))


async def test_ranges_are_for_get_of_blobs_only(serve: Serve, upstream: Upstream, image: Image) -> None:
    site = await serve(upstream)
    status, headers = await head(site, f"{ALPINE}/blobs/{image.layers[0]}", Range="bytes=1-2")
    assert (status, headers["Content-Length"]) == (200, str(SIZE))
    status, headers, body = await site.get(f"{ALPINE}/manifests/latest", Range="bytes=1-2")
    assert (status, body) == (200, image.content)
    assert "Accept-Ranges" not in headers


@pytest.mark.parametrize("header", ["bytes=0-", "bytes=-5", "bytes=3-4", "bytes=0-1,2-3"])
async def test_ranges_of_an_empty_blob(serve: Serve, upstream: Upstream, header: str) -> None:
    digest = upstream.blob("library/alpine", b"")
    site = await serve(upstream)
    for _ in ("cold", "warm"):
        status, headers, body = await site.get(f"{ALPINE}/blobs/{digest}", Range=header)
        assert (status, headers["Content-Length"], body) == (200, "0", b"")


# Errors


@pytest.mark.parametrize(
    ("path", "status", "expected"),
    [
        ("/", 404, "UNSUPPORTED"),
        ("/index.html", 404, "UNSUPPORTED"),
        ("/v1/_ping", 404, "UNSUPPORTED"),
        ("/v2/library", 404, "UNSUPPORTED"),
        ("/v2/library/alpine", 404, "UNSUPPORTED"),
        (f"{ALPINE}/tags", 404, "UNSUPPORTED"),
        (f"{ALPINE}/tags/list/more", 404, "UNSUPPORTED"),
        ("/v2/../../etc/passwd", 404, "UNSUPPORTED"),
        ("/v2/%2e%2e/manifests/latest", 400, "NAME_INVALID"),
        ("/%00", 404, "UNSUPPORTED"),
        ("/v2/UPPER/manifests/latest", 400, "NAME_INVALID"),
        ("/v2/a..b/manifests/latest", 400, "NAME_INVALID"),
        ("/v2/a%20b/tags/list", 400, "NAME_INVALID"),
        (f"/v2/{'a' * 256}/tags/list", 400, "NAME_INVALID"),
        (f"{ALPINE}/blobs/sha256:short", 400, "DIGEST_INVALID"),
        (f"{ALPINE}/blobs/latest", 400, "DIGEST_INVALID"),
        (f"{ALPINE}/blobs/md5:{'0' * 32}", 400, "DIGEST_INVALID"),
        (f"{ALPINE}/manifests/sha256:{'A' * 64}", 400, "DIGEST_INVALID"),
        (f"{ALPINE}/referrers/latest", 400, "DIGEST_INVALID"),
        (f"{ALPINE}/manifests/.bad", 404, "MANIFEST_UNKNOWN"),
        (f"{ALPINE}/manifests/{'t' * 129}", 404, "MANIFEST_UNKNOWN"),
        (f"{ALPINE}/tags/list?n=-1", 400, "PAGINATION_NUMBER_INVALID"),
        (f"{ALPINE}/tags/list?n=1.5", 400, "PAGINATION_NUMBER_INVALID"),
        (f"{ALPINE}/tags/list?n=", 400, "PAGINATION_NUMBER_INVALID"),
        ("/v2/_catalog?n=x", 400, "PAGINATION_NUMBER_INVALID"),
        ("/v2/no.example/alpine/manifests/latest", 404, "NAME_UNKNOWN"),
        (f"{ALPINE}/manifests/latest?ns=no.example", 404, "NAME_UNKNOWN"),
        ("/no.example/v2/alpine/manifests/latest", 404, "NAME_UNKNOWN"),
        ("/v2/<script>/tags/list", 400, "NAME_INVALID"),
    ],
)
async def test_bad_requests_are_refused_in_json_without_asking(
    serve: Serve, upstream: Upstream, path: str, status: int, expected: str
) -> None:
    site = await serve(upstream)
    async with connect(site.url) as wire:  # aiohttp's client would tidy up the path
        reply = await wire.ask("GET", path)
        assert (reply.status, code(reply.body)) == (status, expected)
        assert reply.headers["Content-Type"] == JSON
        headed = await wire.ask("HEAD", path)
        assert (headed.status, lasting(headed.headers)) == (status, lasting(reply.headers))
    assert upstream.log == []


MALFORMED = {
    "garbage": b"garbage\r\n\r\n",
    "method": b"G@T /v2/ HTTP/1.1\r\nHost: x\r\n\r\n",
    "version": b"GET /v2/ HTTP/9.1\r\nHost: x\r\n\r\n",
    "no host": b"GET /v2/ HTTP/1.1\r\n\r\n",
    "long header": b"GET /v2/ HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 9000 + b"\r\n\r\n",
    "long target": b"GET /v2/" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "markup in a header": b"GET /v2/ HTTP/1.1\r\nHost: x\r\n<b>: </html>\r\n\r\n",
    "negative length": b"GET /v2/ HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    "two lengths": b"GET /v2/ HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    "chunk": b"POST /v2/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "bytes in the target": b"GET /v2/\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED)
async def test_what_is_no_http_is_answered_in_json_and_cut(
    serve: Serve, upstream: Upstream, text: bytes
) -> None:
    site = await serve(upstream)
    async with connect(site.url) as wire:
        await wire.send(text)
        reply = await wire.reply()
        assert reply.status == 400
        assert reply.headers["Content-Type"] == JSON
        assert code(reply.body) == "UNSUPPORTED"
        assert await wire.rest() == b""
    assert (await site.get("/v2/"))[0] == 200


# Writes


# What a path may be asked for where there is no cache behind it: told to who asks for none of that.
OF_STORES = ("GET, HEAD, PUT, DELETE", "GET, HEAD, DELETE", "POST", "GET, HEAD, PATCH, PUT, DELETE")


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("body", [b"", b"x" * 100_000])
async def test_writes_are_refused(serve: Serve, upstream: Upstream, method: str, body: bytes) -> None:
    site = await serve(upstream)
    async with connect(site.url) as wire:  # the connection stays in step, whatever body came
        for path in (
            "/v2/",
            f"{ALPINE}/manifests/latest",
            f"{ALPINE}/manifests/{ABSENT}",
            f"{ALPINE}/blobs/{ABSENT}",
            f"{ALPINE}/blobs/uploads/",
            f"{ALPINE}/blobs/uploads",
            f"{ALPINE}/blobs/uploads/?mount={ABSENT}&from=library/busybox",
            f"{ALPINE}/blobs/uploads/0b3e4f",
            f"{ALPINE}/tags/list",
            f"{ALPINE}/referrers/{ABSENT}",
            "/v2/_catalog",
            "/docker.io/v2/library/alpine/manifests/latest",
            f"{ALPINE}/manifests/latest?ns=docker.io",
        ):
            reply = await wire.ask(method, path, body=body)
            assert (reply.status, code(reply.body)) == (405, "UNSUPPORTED"), path
            assert reply.headers["Allow"] in ("GET, HEAD", *OF_STORES)
            assert reply.headers["Content-Type"] == JSON
    assert upstream.log == []


@pytest.mark.parametrize("path", [f"{ALPINE}/blobs/uploads/", f"{ALPINE}/blobs/uploads/0b3e4f"])
async def test_there_are_no_uploads_to_look_at(serve: Serve, upstream: Upstream, path: str) -> None:
    site = await serve(upstream)
    status, _, body = await site.get(path)
    assert (status, code(body)) == (405, "UNSUPPORTED")


async def test_a_push_is_not_asked_for_its_body(serve: Serve, upstream: Upstream) -> None:
    site = await serve(upstream)
    async with connect(site.url) as wire:
        lines = ("Expect: 100-continue", "Content-Length: 1000000000")
        reply = await wire.ask("PUT", f"{ALPINE}/blobs/uploads/0b3e4f", *lines)
        assert (reply.status, code(reply.body)) == (405, "UNSUPPORTED")


# Listings


async def test_tags_page_by_page(serve: Serve, upstream: Upstream) -> None:
    names = [f"v{n}" for n in range(10)]
    for name in names:
        upstream.image("library/alpine", name)
    site = await serve(upstream, more={"edge.example": {"upstream": upstream.url}})
    for start in (
        "/v2/library/alpine/tags/list?n=3",
        "/v2/library/alpine/tags/list?n=3&ns=edge.example&x=%2F%20",
        "/v2/edge.example/library/alpine/tags/list?n=3",
        "/edge.example/v2/library/alpine/tags/list?n=3",
    ):
        pages, path = [], start
        while path:
            status, headers, body = await site.get(path)
            assert status == 200
            assert headers["Content-Type"] == JSON
            listed = json.loads(body)
            assert listed["name"] == start.partition("/tags")[0].rpartition("v2/")[2]
            pages.append(listed["tags"])
            link = headers.get("Link", "")
            if link:
                assert link.startswith("</")
                assert link.endswith('>; rel="next"')
                assert ("ns=edge.example" in link) == ("ns=" in start)
                assert ("x=%2F+" in link) == ("x=" in start)
            path = link.partition(">")[0][1:]
        assert pages == [names[:3], names[3:6], names[6:9], names[9:]]


@pytest.mark.parametrize(
    ("query", "expected", "more"),
    [
        ("", ["a", "b", "c"], False),
        ("?n=0", [], False),
        ("?n=2", ["a", "b"], True),
        ("?n=3", ["a", "b", "c"], False),
        ("?n=1000000000000000000", ["a", "b", "c"], False),
        ("?last=a", ["b", "c"], False),
        ("?last=a&n=1", ["b"], True),
        ("?last=aa&n=1", ["b"], True),
        ("?last=c&n=5", [], False),
        ("?last=%ff&n=1", [], False),
    ],
)
async def test_n_and_last(
    serve: Serve, upstream: Upstream, query: str, expected: list[str], more: bool
) -> None:
    for name in ("c", "a", "b"):
        upstream.image("library/alpine", name)
        upstream.image(f"library/{name}", "latest")
    site = await serve(upstream)
    status, headers, body = await site.get(f"{ALPINE}/tags/list{query}")
    assert (status, json.loads(body)) == (200, {"name": "library/alpine", "tags": expected})
    assert ("Link" in headers) == more
    for name in ("c", "a", "b"):
        await site.get(f"/v2/library/{name}/manifests/latest")
    last = "last=docker.io/library/"
    status, headers, body = await site.get(f"/v2/_catalog{query.replace('last=', last)}")
    assert status == 200
    if "%ff" not in query:
        assert json.loads(body) == {"repositories": [f"docker.io/library/{name}" for name in expected]}
        assert ("Link" in headers) == more


async def test_the_catalog_is_what_is_cached(serve: Serve, upstream: Upstream, image: Image) -> None:
    site = await serve(upstream)
    assert json.loads((await site.get("/v2/_catalog"))[2]) == {"repositories": []}
    await site.get(f"{ALPINE}/manifests/latest")
    upstream.clear()
    assert json.loads((await site.get("/v2/_catalog"))[2]) == {"repositories": ["docker.io/library/alpine"]}
    assert upstream.log == []


async def test_tags_are_cached_as_long_as_tags_are(
    serve: Serve, upstream: Upstream, image: Image, clock: Clock
) -> None:
    site = await serve(upstream, fresh_for="10m")
    await site.get(f"{ALPINE}/tags/list")
    clock.advance(100)
    _, headers, _ = await site.get(f"{ALPINE}/tags/list")
    assert headers["Cache-Status"] == "entrepot; hit; ttl=500"
    assert (headers["Cache-Control"], headers["Age"]) == ("public, max-age=600", "100")
    assert upstream.log == ["GET tags library/alpine"]


async def test_referrers(serve: Serve, upstream: Upstream, image: Image) -> None:
    signature = upstream.artifact("library/alpine", image, "application/vnd.example.signature", {"by": "me"})
    sbom = upstream.artifact("library/alpine", image, "application/vnd.example.sbom+json")
    site = await serve(upstream)
    path = f"{ALPINE}/referrers/{image.digest}"
    status, headers, body = await site.get(path)
    assert (status, headers["Content-Type"]) == (200, OCI_INDEX)
    assert "OCI-Filters-Applied" not in headers
    index = json.loads(body)
    assert (index["schemaVersion"], index["mediaType"]) == (2, OCI_INDEX)
    assert {each["digest"] for each in index["manifests"]} == {signature.digest, sbom.digest}
    status, headers, body = await site.get(f"{path}?artifactType=application%2Fvnd.example.signature")
    assert (status, headers["OCI-Filters-Applied"]) == (200, "artifactType")
    assert json.loads(body)["manifests"] == [
        {
            "mediaType": OCI_MANIFEST,
            "digest": signature.digest,
            "size": len(signature.content),
            "artifactType": "application/vnd.example.signature",
            "annotations": {"by": "me"},
        }
    ]
    status, _, body = await site.get(f"{path}?artifactType=none")
    assert (status, json.loads(body)["manifests"]) == (200, [])
    assert len(upstream.log) == 1


@pytest.mark.parametrize("path", [ALPINE, "/v2/library/absent"])
@pytest.mark.parametrize("api", [True, False])
async def test_no_referrers_is_404_but_never_name_unknown(
    serve: Serve, upstream: Upstream, image: Image, path: str, api: bool
) -> None:
    upstream.referrers_api = api
    site = await serve(upstream)
    status, headers, body = await site.get(f"{path}/referrers/{image.digest}")
    if api and path == ALPINE:
        assert (status, headers["Content-Type"]) == (200, OCI_INDEX)
    else:
        # oras takes NAME_UNKNOWN for a failure, any other 404 for: no such API, look for the tag.
        assert (status, code(body)) == (404, "MANIFEST_UNKNOWN")


async def test_the_fallback_tag_of_referrers_is_cached_like_tags(
    serve: Serve, upstream: Upstream, image: Image
) -> None:
    upstream.referrers_api = False
    tag = image.digest.replace(":", "-")
    index = upstream.index("library/alpine", tag, [image])
    site = await serve(upstream)
    for _ in range(2):
        status, headers, body = await site.get(f"{ALPINE}/manifests/{tag}")
        assert (status, headers["Content-Type"], body) == (200, OCI_INDEX, index.content)
    assert len(upstream.log) == 1
    assert headers["Cache-Status"] == "entrepot; hit; ttl=600"


# Which upstream


@pytest.fixture
async def other(image: Image) -> Any:
    async with Upstream() as registry:
        registry.image("team/app", "latest", layers=(b"other",))
        yield registry


@pytest.mark.parametrize(
    ("path", "host", "asked"),
    [
        ("/v2/library/alpine/manifests/latest", None, "hub library/alpine"),
        ("/v2/alpine/manifests/latest", None, "hub library/alpine"),
        ("/v2/alpine/manifests/latest?ns=docker.io", None, "hub library/alpine"),
        ("/v2/alpine/manifests/latest?ns=registry-1.docker.io", None, "hub library/alpine"),
        ("/v2/docker.io/alpine/manifests/latest?ns=docker.io", None, "hub library/alpine"),
        ("/v2/docker.io/library/alpine/manifests/latest", None, "hub library/alpine"),
        ("/docker.io/v2/library/alpine/manifests/latest", None, "hub library/alpine"),
        ("/v2/docker.io/v2/library/alpine/manifests/latest", None, "hub library/alpine"),
        ("/v2/team/app/manifests/latest?ns=edge.example:5000", None, "edge team/app"),
        ("/v2/team/app/manifests/latest?ns=EDGE.example:5000", None, "edge team/app"),
        ("/v2/team/app/manifests/latest?ns=edge.example:5000", "hub.test", "edge team/app"),
        ("/v2/edge.example:5000/team/app/manifests/latest", None, "edge team/app"),
        ("/v2/edge.example:5000/team/app/manifests/latest?ns=edge.example:5000", None, "edge team/app"),
        ("/edge.example:5000/v2/team/app/manifests/latest", None, "edge team/app"),
        ("/v2/edge.example:5000/v2/team/app/manifests/latest", None, "edge team/app"),
        ("/v2/edge/team/app/manifests/latest", None, "edge team/app"),
        ("/v2/team/app/manifests/latest", "edge.test", "edge team/app"),
        ("/v2/team/app/manifests/latest", "edge.test:5000", "edge team/app"),
    ],
)
async def test_the_upstream_is_found(
    serve: Serve, upstream: Upstream, other: Upstream, path: str, host: str | None, asked: str
) -> None:
    edge = {"upstream": other.url, "aliases": ["edge"], "hosts": ["edge.test"]}
    site = await serve(upstream, hosts=["hub.test"], more={"edge.example:5000": edge})
    status, _, _ = await site.get(path, **({"Host": host} if host else {}))
    assert status == 200
    found = [f"hub {each.repository}" for each in upstream.requests]
    found += [f"edge {each.repository}" for each in other.requests]
    assert found == [asked]


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254",
        "169.254.169.254:80",
        "127.0.0.1:{port}",
        "localhost:{port}",
        "[::1]",
        "[::1]:{port}",
        "[::ffff:127.0.0.1]:{port}",
        "0.0.0.0:{port}",
        "2130706433:{port}",
        "127.1:{port}",
        "10.0.0.1",
        "metadata.google.internal",
        "metadata",
        "http://127.0.0.1:{port}",
        "https://127.0.0.1:{port}/",
        "//127.0.0.1:{port}",
        "127.0.0.1:{port}/v2/",
        "docker.io@127.0.0.1:{port}",
        "127.0.0.1:{port}#docker.io",
        "docker.io\r\nHost: 127.0.0.1:{port}",
        "docker.io.",
        "docker.io/../127.0.0.1:{port}",
        "",
        "\x00",
        "unknown.example",
    ],
)
async def test_what_is_not_configured_is_never_dialled(
    serve: Serve, upstream: Upstream, image: Image, address: str
) -> None:
    address = address.format(port=upstream.url.rpartition(":")[2])
    site = await serve(upstream)
    async with site.session.get(f"{site.url}{ALPINE}/manifests/latest", params={"ns": address}) as response:
        assert (response.status, code(await response.read())) == (404, "NAME_UNKNOWN")
    for path in (
        f"/v2/{address}/library/alpine/manifests/latest",
        f"/{address}/v2/library/alpine/manifests/latest",
    ):
        if address.isprintable() and address not in (
            "",
            "metadata",
        ):  # a word is a name on the default registry
            async with connect(site.url) as wire:
                reply = await wire.ask("GET", path)
                assert reply.status in (400, 404)
                code(reply.body)
    assert upstream.log == []


async def test_a_host_that_is_not_ours_is_no_address(serve: Serve, upstream: Upstream, image: Image) -> None:
    site = await serve(upstream, top={"default_namespace": None})
    for host in ("169.254.169.254", "127.0.0.1:1", "[::1]", "metadata.google.internal"):
        status, _, body = await site.get(f"{ALPINE}/manifests/latest", Host=host)
        assert (status, code(body)) == (404, "NAME_UNKNOWN")
    assert upstream.log == []


# What an upstream's refusal becomes


def parts(image: Image) -> list[tuple[str, str, str]]:
    return [
        ("manifest", "manifests/latest", "MANIFEST_UNKNOWN"),
        ("manifest", f"manifests/{image.digest}", "MANIFEST_UNKNOWN"),
        ("blob", f"blobs/{image.layers[0]}", "BLOB_UNKNOWN"),
        ("tags", "tags/list", "NAME_UNKNOWN"),
        ("referrers", f"referrers/{image.digest}", "MANIFEST_UNKNOWN"),
    ]


@pytest.mark.parametrize("fallback", ["allow", "deny"])
@pytest.mark.parametrize("refusal", [401, 403])
async def test_a_refusal_is_shown_so_that_nobody_sends_us_a_password(
    serve: Serve, upstream: Upstream, image: Image, refusal: int, fallback: str
) -> None:
    site = await serve(upstream, top={"fallback": fallback})
    for kind, path, unknown in parts(image):
        challenge = {"WWW-Authenticate": 'Basic realm="upstream"'}
        upstream.next("GET", kind, Status(refusal, challenge), times=2)
        status, headers, body = await site.get(f"{ALPINE}/{path}")
        expected = (404, unknown) if fallback == "allow" else (403, "DENIED")
        assert (status, code(body)) == expected, path
        assert "WWW-Authenticate" not in headers
        assert headers["Cache-Status"] == f"entrepot; fwd=miss; detail={expected[1]}"


@pytest.mark.parametrize(
    ("fault", "status", "expected", "retry_after"),
    [
        (RetryAfter(30), 503, "TOOMANYREQUESTS", "30"),
        (Status(429), 503, "TOOMANYREQUESTS", "60"),
        (Status(500), 502, "UNAVAILABLE", None),
        (Status(503), 502, "UNAVAILABLE", None),
        (RetryAfter(7, 503), 502, "UNAVAILABLE", "7"),
        (Status(418), 502, "UNAVAILABLE", None),
        (Refuse(), 502, "UNAVAILABLE", None),
    ],
    ids=str,
)
async def test_failures_of_an_upstream(
    serve: Serve,
    upstream: Upstream,
    image: Image,
    fault: Fault,
    status: int,
    expected: str,
    retry_after: str | None,
) -> None:
    site = await serve(upstream)
    for kind, path, _ in parts(image)[:4]:
        upstream.next("GET", kind, fault, times=10)
        site.clock.advance(61)  # it may be let alone for so long
        found, headers, body = await site.get(f"{ALPINE}/{path}")
        assert (found, code(body)) == (status, expected), path
        assert headers.get("Retry-After") == retry_after
        assert headers["Content-Type"] == JSON


async def test_an_upstream_that_says_nothing(serve: Serve, upstream: Upstream, image: Image) -> None:
    site = await serve(upstream, options={"header_timeout": "50ms"})
    gate = asyncio.Event()
    for method, kind, path in (
        ("GET", "manifest", "manifests/latest"),
        ("GET", "blob", f"blobs/{image.layers[0]}"),
        ("HEAD", "blob", f"blobs/{image.layers[0]}"),
        ("GET", "tags", "tags/list"),
    ):
        upstream.next(method, kind, Hold(gate, after=None))
        async with site.request(method, f"{ALPINE}/{path}") as response:
            assert response.status == 504
    gate.set()


# The connection


async def test_requests_in_a_row_are_answered_in_order(
    serve: Serve, upstream: Upstream, image: Image
) -> None:
    site = await serve(upstream)
    paths = [
        ("GET", f"{ALPINE}/blobs/{image.layers[0]}"),
        ("HEAD", f"{ALPINE}/blobs/{image.layers[0]}"),
        ("GET", "/nowhere"),
        ("GET", f"{ALPINE}/manifests/latest"),
        ("HEAD", f"{ALPINE}/manifests/latest"),
        ("PUT", f"{ALPINE}/manifests/latest"),
        ("GET", f"{ALPINE}/blobs/{image.config}"),
    ]
    async with connect(site.url) as wire:
        await wire.send(
            "".join(f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n" for method, path in paths).encode()
        )
        replies = [await wire.reply(method) for method, _ in paths]
    assert [reply.status for reply in replies] == [200, 200, 404, 200, 200, 405, 200]
    assert replies[0].body == BODY
    assert replies[3].body == image.content
    assert digest_of(replies[6].body) == image.config


async def test_an_old_client_is_served(serve: Serve, upstream: Upstream, image: Image) -> None:
    site = await serve(upstream)
    async with connect(site.url) as wire:
        await wire.send(f"GET {ALPINE}/manifests/latest HTTP/1.0\r\n\r\n".encode())
        reply = await wire.reply()
        assert (reply.status, reply.body) == (200, image.content)
        assert await wire.rest() == b""


# Whatever comes

NAMES = st.sampled_from(
    ["library/alpine", "docker.io/library/alpine", "no.example/x", "UP", "a", "..", "é", "v2"]
)
LAST = st.one_of(
    st.sampled_from(
        ["latest", ABSENT, digest_of(BODY), "list", "sha256:", "uploads", "", "%zz", "%00", "%2F"]
    ),
    st.text(max_size=8),
)
PATHS = st.one_of(
    st.builds(
        "{}/{}/{}/{}".format,
        st.sampled_from(["/v2", "/docker.io/v2", "", "/v2/v2", "//"]),
        NAMES,
        st.sampled_from(["manifests", "blobs", "tags", "referrers", "blobs/uploads", "_catalog", ""]),
        LAST,
    ),
    st.text(max_size=20).map("/{}".format),
    st.sampled_from(["*", "x:1", "http://x/v2/", "/v2/_catalog"]),
)
QUERIES = st.lists(
    st.tuples(
        st.sampled_from(["ns", "n", "last", "artifactType", "x", ""]),
        st.one_of(st.sampled_from(["docker.io", "1", "0", "9" * 19, "%ff", "latest"]), st.text(max_size=8)),
    ),
    max_size=3,
).map(lambda pairs: "&".join(f"{name}={value}" for name, value in pairs))
FIELDS = st.lists(
    st.tuples(
        st.sampled_from(
            ["Range", "If-Range", "If-None-Match", "Accept", "Host", "User-Agent", "Authorization", "Expect"]
        ),
        st.one_of(
            st.sampled_from(
                ["bytes=0-1", "bytes=-1", "bytes=0-1,3-4", "*", f'"{digest_of(BODY)}"', "100-continue"]
            ),
            st.text(max_size=10),
        ),
    ),
    max_size=3,
)


def plain(text: str) -> bytes:
    """As bytes that do not end the line or the word they stand in."""
    return b"".join(bytes([each]) for each in text.encode() if each not in b" \r\n\x00?#" or each > 127)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["GET", "HEAD", "PUT", "DELETE", "BREW", "CONNECT", "TRACE"]), PATHS, QUERIES, FIELDS)
async def test_whatever_comes_is_answered(
    anything: Callable[[str, bytes], Awaitable[Reply]],
    method: str,
    path: str,
    query: str,
    fields: list[tuple[str, str]],
) -> None:
    lines = b"".join(name.encode() + b": " + plain(value) + b"\r\n" for name, value in fields)
    target = plain(path) + (b"?" + plain(query) if query else b"")
    text = (
        method.encode() + b" " + target + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + lines + b"\r\n"
    )
    reply = await anything(method, text)
    assert reply.status < 500 or reply.status in (502, 503, 504), reply
    if reply.status >= 400 and method != "HEAD":
        assert reply.headers["Content-Type"] == JSON
        code(reply.body)


@pytest.fixture
async def anything(serve: Serve, upstream: Upstream, image: Image, caplog: pytest.LogCaptureFixture) -> Any:
    """Send it; the log is written for real, as JSON, so that no text can spoil it."""
    site = await serve(upstream)
    logs.configure("json", "info", written := io.StringIO())

    async def send(method: str, text: bytes) -> Reply:
        async with connect(site.url) as wire:
            await wire.send(text)
            return await wire.reply(method)

    yield send
    events = [json.loads(line) for line in written.getvalue().splitlines()]
    assert {each["level"] for each in events} == {"info"}
    assert not [each for each in caplog.records if each.levelname in ("ERROR", "CRITICAL")]

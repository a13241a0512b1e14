"""What every answer of the distribution API has: headers, and errors in JSON."""

from __future__ import annotations

import asyncio

import pytest

from proxy.upstream.transport import RETRIES
from tests.conftest import Clock, Serve
from tests.distribution import (
    ABSENT,
    ALPINE,
    BODY,
    IMMUTABLE,
    JSON,
    Headers,
    code,
    fills_ended,
    head,
    lasting,
    push_alpine,
)
from tests.upstream import OCI_MANIFEST, Bearer, Fault, Hold, Image, Refuse, RetryAfter, Status, Upstream
from tests.wire import connect


@pytest.fixture
def image(upstream: Upstream) -> Image:
    return push_alpine(upstream)


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
    upstream.next("HEAD", "latest", Status(500), times=1 + RETRIES)
    assert await told() == ("entrepot; fwd=stale; ttl=-100; detail=UNAVAILABLE", "700", "no-cache")
    # Upstream is left alone for a moment: this one was not forwarded.
    assert await told() == ("entrepot; hit; ttl=-100; detail=UNAVAILABLE", "700", "no-cache")
    asked = ["HEAD manifest library/alpine:latest"] * (2 + RETRIES)
    assert upstream.log == ["GET manifest library/alpine:latest", *asked]


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
@pytest.mark.parametrize("fallback", ["allow", "deny"])
async def test_failures_of_an_upstream(
    serve: Serve,
    upstream: Upstream,
    image: Image,
    fallback: str,
    fault: Fault,
    status: int,
    expected: str,
    retry_after: str | None,
) -> None:
    site = await serve(upstream, top={"fallback": fallback})
    expected_retry = "1" if retry_after and fallback == "allow" else retry_after
    for kind, path, _ in parts(image)[:4]:
        upstream.next("GET", kind, fault, times=10)
        site.clock.advance(61)  # it may be let alone for so long
        found, headers, body = await site.get(f"{ALPINE}/{path}")
        assert (found, code(body)) == (status, expected), path
        assert headers.get("Retry-After") == expected_retry
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

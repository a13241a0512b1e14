"""The distribution API over HTTP: which requests are answered by whom, and that all are."""

from __future__ import annotations

import io
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.telemetry import logs
from tests.conftest import Serve
from tests.distribution import ABSENT, ALPINE, BODY, JSON, code, head, lasting, push_alpine
from tests.upstream import Image, Upstream, digest_of
from tests.wire import Reply, connect


@pytest.fixture
def image(upstream: Upstream) -> Image:
    return push_alpine(upstream)


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
        ("/v2/v2/docker.io/library/alpine/manifests/latest", None, "hub library/alpine"),  # kaniko
        ("/v2/v2/docker.io/library/alpine/manifests/latest", "edge.test", "hub library/alpine"),
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


# The connection


MALFORMED = {
    "garbage": b"garbage\r\n\r\n",
    "method": b"G@T /v2/ HTTP/1.1\r\nHost: x\r\n\r\n",
    "version": b"GET /v2/ HTTP/9.1\r\nHost: x\r\n\r\n",
    "no host": b"GET /v2/ HTTP/1.1\r\n\r\n",
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


SECRET = b"hunter2-Zm9v"
LEAKING = {
    "a long header": (b"Authorization: Basic " + SECRET * 6000, 431),
    "a long name": (SECRET * 6000 + b": x", 431),
    "a header of a megabyte": (b"Cookie: " + SECRET * 90_000, 431),
    "many long headers": (b"\r\n".join(b"X: " + SECRET * 5000 for _ in range(20)), 431),
    "many headers": (b"\r\n".join(b"X: " + SECRET for _ in range(200)), 400),
    "a name with a space": (b"X " + SECRET + b": x", 400),
    "no name": (SECRET, 400),
    "a control character": (b"Authorization: " + SECRET + b"\x00", 400),
    "a bare line feed in a name": (SECRET + b"\n: x", 400),
    "no length": (b"Content-Length: " + SECRET, 400),
    "no coding": (b"Transfer-Encoding: " + SECRET + b"\r\nContent-Length: 1", 400),
    "two hosts": (b"Host: " + SECRET, 400),
}


@pytest.mark.parametrize(("lines", "status"), LEAKING.values(), ids=LEAKING)
async def test_a_refused_head_is_neither_echoed_nor_logged(
    serve: Serve, upstream: Upstream, capfd: pytest.CaptureFixture[str], lines: bytes, status: int
) -> None:
    site = await serve(upstream)
    with structlog.testing.capture_logs() as events:
        async with connect(site.url) as wire:
            await wire.send(b"GET /v2/ HTTP/1.1\r\nHost: x\r\n" + lines + b"\r\n\r\n")
            reply = await wire.reply()
            assert await wire.rest() == b""
    assert (reply.status, reply.headers["Content-Type"]) == (status, JSON)
    assert code(reply.body) == "UNSUPPORTED"
    assert [each["event"] for each in events] == ["request.malformed"]
    assert b"hunter2" not in reply.body
    assert "hunter2" not in str(events) + "".join(capfd.readouterr())


@pytest.mark.parametrize("length", [9000, 60_000, (64 << 10) - len("Cookie")])
async def test_a_long_header_is_read(serve: Serve, upstream: Upstream, length: int) -> None:
    site = await serve(upstream)
    async with connect(site.url) as wire:
        for _ in range(2):
            assert (await wire.ask("GET", "/v2/", "Cookie: " + "a" * length)).status == 200


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
@pytest.mark.parametrize("path", ["/v2/", "/nowhere", f"{ALPINE}/manifests/latest"])
async def test_a_body_that_nobody_reads_may_be_broken(
    serve: Serve,
    upstream: Upstream,
    image: Image,
    capfd: pytest.CaptureFixture[str],
    method: str,
    path: str,
) -> None:
    site = await serve(upstream)
    for lines in (
        b"Content-Encoding: gzip\r\nContent-Length: 9\r\n\r\nno gzip  ",
        b"Content-Encoding: br\r\nContent-Length: 9\r\n\r\nno brotli",
        b"Content-Encoding: deflate\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nxy\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n2\r\nxy\r\nnot hexadecimal\r\n",
    ):
        async with connect(site.url) as wire:
            await wire.send(f"{method} {path} HTTP/1.1\r\nHost: x\r\n".encode() + lines)
            assert (await wire.reply()).status < 500
    said = "".join(capfd.readouterr())
    assert "Traceback" not in said
    assert "Unhandled" not in said


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


@pytest.mark.clients
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


async def test_a_registry_at_an_ipv6_address(serve: Serve, upstream: Upstream) -> None:
    image = upstream.image("a/b", "latest")
    six = {"upstream": upstream.url, "aliases": ["[fd00::2]"]}
    site = await serve(upstream, more={"[::1]:5000": six})
    for path in (
        "/v2/a/b/manifests/latest?ns=[::1]:5000",
        "/v2/a/b/manifests/latest?ns=%5B0:0::1%5D%3A5000",
        "/v2/a/b/manifests/latest?ns=[fd00::2]",
        "/v2/[::1]:5000/a/b/manifests/latest",
        "/v2/%5Bfd00::2%5D/a/b/manifests/latest",
        "/[::1]:5000/v2/a/b/manifests/latest",
    ):
        status, _, body = await site.get(path)
        assert (status, body) == (200, image.content), path
    assert upstream.log == ["GET manifest a/b:latest"]  # they are one namespace

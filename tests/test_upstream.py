"""Asking upstreams: challenges, redirects, time-outs, certificates, and answers that are wrong."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import ssl
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
import trustme

from proxy.telemetry.metrics import Metrics
from proxy.upstream import client, requests
from proxy.upstream.credentials import Credentials, Inline
from proxy.upstream.requests import UpstreamSettings
from proxy.upstream.transport import REDIRECTS, Connect
from storage.errors import (
    BlobUnknown,
    ManifestUnknown,
    NameUnknown,
    OriginDenied,
    OriginFailed,
    OriginTimeout,
    RangeInvalid,
    RegistryError,
    TooManyRequests,
    Unavailable,
    Unsupported,
)
from storage.oci import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    MANIFEST_LIMIT,
    OCI_INDEX,
    OCI_MANIFEST,
    Digest,
    Reference,
    Span,
    Tag,
)
from tests.conftest import Serve
from tests.upstream import (
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
    digest_of,
)

BODY = bytes(range(256)) * 100
LATEST = Tag("latest")
PLAIN = Connect(plain_http=True, header_timeout=2, progress_timeout=2)
USER = Basic("ci", "secret")

Ask = Callable[..., client.UpstreamRegistry]


@pytest.fixture
async def ask() -> AsyncIterator[Ask]:
    """A client of `url`."""
    async with AsyncExitStack() as stack:

        def to(
            url: str, connect: Connect = PLAIN, user: Basic | None = None, realms: Sequence[str] = ()
        ) -> client.UpstreamRegistry:
            credentials = Inline(user.user, user.password) if user else Credentials()
            made = client.UpstreamRegistry(
                "up", UpstreamSettings(url, connect, tuple(realms)), [credentials], Metrics()
            )
            stack.push_async_callback(made.close)
            return made

        yield to


async def read(origin: client.UpstreamRegistry, digest: str, span: Span | None = None) -> bytes:
    blob = await origin.get_blob("a/b", Digest(digest), span)
    start, stop = (span.start, span.stop) if span else (0, None)
    try:
        return b"".join([chunk async for chunk in blob.chunks(start, stop)])
    finally:
        await blob.close()


# What is asked, and how


async def test_every_request_says_what_it_takes(ask: Ask, upstream: Upstream) -> None:
    image = upstream.image("a/b", "latest")
    origin = ask(upstream.url)
    await origin.get_manifest("a/b", LATEST)
    await origin.resolve_manifest("a/b", Digest(image.digest))
    for request in upstream.requests:
        types = {each.partition(";")[0].strip() for each in request.headers["Accept"].split(",")}
        assert types >= {OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST}
        assert "application/vnd.docker.distribution.manifest.v1+prettyjws" in types
    await read(origin, image.layers[0])
    await origin.tags("a/b")
    for request in upstream.requests:
        assert request.headers["Accept-Encoding"] == "identity"
        assert "Cookie" not in request.headers


async def test_content_comes_as_it_is(ask: Ask, upstream: Upstream) -> None:
    image = upstream.image("a/b", "latest", [BODY])
    origin = ask(upstream.url + "/")
    references: list[Reference] = [LATEST, Digest(image.digest)]
    for reference in references:
        manifest = await origin.get_manifest("a/b", reference)
        assert (manifest.content, manifest.digest, manifest.media_type) == (
            image.content,
            image.digest,
            OCI_MANIFEST,
        )
        assert await origin.resolve_manifest("a/b", reference) == manifest.descriptor
    assert await read(origin, image.layers[0]) == BODY
    assert (await origin.resolve_blob("a/b", Digest(image.layers[0]))).size == len(BODY)


@pytest.mark.parametrize("span", [Span(0, 10), Span(5), Span(100, 200), Span(len(BODY) - 1)], ids=str)
@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
async def test_spans(ask: Ask, upstream: Upstream, span: Span, ranges: bool) -> None:
    digest = upstream.blob("a/b", BODY)
    upstream.ranges = ranges
    assert await read(ask(upstream.url), digest, span) == BODY[span.start : span.stop]
    last = "" if span.stop is None else span.stop - 1
    assert upstream.requests[0].range == f"bytes={span.start}-{last}"


# Challenges


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


# Redirects


async def test_a_cdn_sees_no_authorization_and_the_url_as_it_was(ask: Ask, upstream: Upstream) -> None:
    digest = upstream.blob("a/b", BODY)
    upstream.cdn, upstream.auth = True, Bearer()
    origin = ask(upstream.url)
    assert await read(origin, digest) == BODY
    assert await read(origin, digest, Span(1000)) == BODY[1000:]
    assert (await origin.resolve_blob("a/b", Digest(digest))).size == len(BODY)
    stored = [request for request in upstream.requests if request.kind == "cdn"]
    assert [request.method for request in stored] == ["GET", "GET", "HEAD"]
    assert stored[1].range == "bytes=1000-"
    # The fake answers 403 to a signature whose escapes have changed, 400 to an Authorization.
    assert all("Authorization" not in request.headers for request in stored)
    asked = [request for request in upstream.requests if request.kind == "blob"]
    assert "Authorization" in asked[-1].headers


async def test_a_signature_that_has_lapsed_is_asked_for_afresh(ask: Ask, upstream: Upstream) -> None:
    digest = upstream.blob("a/b", BODY)
    upstream.cdn = True
    upstream.next("GET", "cdn", Status(403))
    assert await read(ask(upstream.url), digest) == BODY
    assert [request.kind for request in upstream.requests] == ["blob", "cdn", "blob", "cdn"]
    assert upstream.requests[1].target != upstream.requests[3].target


async def test_a_signature_that_lapses_in_mid_transfer(serve: Serve, upstream: Upstream) -> None:
    digest = upstream.blob("a/b", BODY)
    upstream.cdn = True
    gate = asyncio.Event()
    hold = Hold(gate, after=1000)
    upstream.next("GET", digest, hold, Truncate(after=1000))
    site = await serve(upstream)
    async with site.request("GET", f"/v2/a/b/blobs/{digest}") as response:
        await hold.reached.wait()
        upstream.lapse_signatures()
        gate.set()
        assert await response.read() == BODY
    assert upstream.requests[-1].range == "bytes=1000-"
    assert upstream.requests[-1].target != upstream.requests[1].target


async def test_a_cdn_that_always_refuses(ask: Ask, upstream: Upstream) -> None:
    digest = upstream.blob("a/b", BODY)
    upstream.cdn = True
    upstream.next("GET", "cdn", Status(403), times=9)
    with pytest.raises(OriginDenied):
        await read(ask(upstream.url), digest)
    assert len(upstream.log) <= 6


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_within_the_upstream_keep_the_authorization(
    ask: Ask, upstream: Upstream, status: int
) -> None:
    image = upstream.image("a/b", "latest")
    upstream.auth = USER
    origin = ask(upstream.url, user=USER)
    await origin.tags("a/b")
    upstream.next("GET", "latest", Redirect(f"/v2/a/b/manifests/{image.digest}", status))
    assert (await origin.get_manifest("a/b", LATEST)).content == image.content


async def test_redirects_end(ask: Ask, upstream: Upstream) -> None:
    digest = upstream.blob("a/b", BODY)
    upstream.next("GET", "blob", Redirect("?again"), times=99)
    with pytest.raises(OriginFailed, match="more than 5 times"):
        await read(ask(upstream.url), digest)
    assert len(upstream.log) == REDIRECTS + 1


@pytest.mark.parametrize(
    "to",
    [
        "https:nowhere",
        "http://[::1",
        "http://h:99999/",
        "ftp://h/",
        "file:///etc/passwd",
        "http:",
        "//",
        "http://",
    ],
)
async def test_redirects_to_what_is_no_place(ask: Ask, upstream: Upstream, to: str) -> None:
    upstream.image("a/b", "latest")
    upstream.next("GET", "latest", Redirect(to), times=9)
    with pytest.raises(OriginFailed):
        await ask(upstream.url).get_manifest("a/b", LATEST)


async def test_a_redirect_to_where_nobody_is(ask: Ask, upstream: Upstream) -> None:
    upstream.image("a/b", "latest")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        upstream.next("GET", "latest", Redirect(f"http://127.0.0.1:{unused.getsockname()[1]}/"))
        with pytest.raises(OriginFailed, match="cannot be reached"):
            await ask(upstream.url).get_manifest("a/b", LATEST)


# TLS, client certificates, proxies


class Relay:
    """A door before the fake: with TLS, or as an HTTP proxy (CONNECT and absolute URLs)."""

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self.port = 0
        self.seen: list[str] = []  # first lines of requests to the proxy
        self.authorizations: list[str] = []
        self._to = port
        self._tls = tls
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Relay:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()
        await asyncio.sleep(0)  # transports close their sockets in the loop's next turn

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        there: asyncio.StreamWriter | None = None
        try:
            first = b"" if self._tls else await self._proxied(reader, writer)
            back, there = await asyncio.open_connection("127.0.0.1", self._to)
            there.write(first)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, there))
                group.create_task(self._pump(back, writer))
        except* (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            for each in (writer, there):
                if each is not None:
                    each.transport.abort()

    async def _proxied(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        """What to say first at the other end."""
        head = await reader.readuntil(b"\r\n\r\n")
        line = head.partition(b"\r\n")[0].decode()
        self.seen.append(line)
        for each in head.decode().split("\r\n"):
            if each.lower().startswith("proxy-authorization:"):
                self.authorizations.append(each.partition(":")[2].strip())
        if line.startswith("CONNECT "):
            self._to = int(line.split(" ")[1].rpartition(":")[2])
            writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")
            return b""
        method, url, version = line.split(" ")
        path = "/" + url.split("/", 3)[3]
        return f"{method} {path} {version}".encode() + head[len(line) :]

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError  # one end is enough: both are closed


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


def port_of(upstream: Upstream) -> int:
    return int(upstream.url.rpartition(":")[2])


def server_side(authority: trustme.CA, *, wants_client: bool = False) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost", "127.0.0.1").configure_cert(context)
    if wants_client:
        context.verify_mode = ssl.CERT_REQUIRED
        authority.configure_trust(context)
    return context


async def test_an_authority_of_ones_own(
    ask: Ask, upstream: Upstream, authority: trustme.CA, tmp_path: Path
) -> None:
    image = upstream.image("a/b", "latest")
    file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(file))
    async with Relay(port_of(upstream), server_side(authority)) as relay:
        url = f"https://localhost:{relay.port}"
        with pytest.raises(OriginFailed, match="cannot be reached"):
            await ask(url, Connect()).get_manifest("a/b", LATEST)
        assert upstream.log == []
        for connect in (Connect(ca_file=file), Connect(insecure_skip_verify=True)):
            assert (await ask(url, connect).get_manifest("a/b", LATEST)).content == image.content


async def test_a_certificate_for_another_host(
    ask: Ask, upstream: Upstream, authority: trustme.CA, tmp_path: Path
) -> None:
    upstream.image("a/b", "latest")
    file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(file))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("elsewhere.example").configure_cert(context)
    async with Relay(port_of(upstream), context) as relay:
        url = f"https://localhost:{relay.port}"
        with pytest.raises(OriginFailed):
            await ask(url, Connect(ca_file=file)).get_manifest("a/b", LATEST)
        await ask(url, Connect(insecure_skip_verify=True)).get_manifest("a/b", LATEST)


@pytest.mark.parametrize("together", [True, False], ids=["one file", "two files"])
async def test_a_client_certificate(
    ask: Ask, upstream: Upstream, authority: trustme.CA, tmp_path: Path, together: bool
) -> None:
    image = upstream.image("a/b", "latest")
    ca, certificate, key = (tmp_path / name for name in ("ca.pem", "client.pem", "client.key"))
    authority.cert_pem.write_to_path(str(ca))
    issued = authority.issue_cert("client@entrepot.example")
    if together:
        issued.private_key_and_cert_chain_pem.write_to_path(str(certificate))
    else:
        issued.cert_chain_pems[0].write_to_path(str(certificate))
        issued.private_key_pem.write_to_path(str(key))
    async with Relay(port_of(upstream), server_side(authority, wants_client=True)) as relay:
        url = f"https://localhost:{relay.port}"
        with pytest.raises(OriginFailed):
            await ask(url, Connect(ca_file=ca)).get_manifest("a/b", LATEST)
        connect = Connect(ca_file=ca, client_certificate=certificate, client_key=None if together else key)
        assert (await ask(url, connect).get_manifest("a/b", LATEST)).content == image.content


async def test_from_https_to_http_only_where_it_is_allowed(
    ask: Ask, upstream: Upstream, authority: trustme.CA, tmp_path: Path
) -> None:
    digest = upstream.blob("a/b", BODY)
    upstream.cdn = True
    file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(file))
    async with Relay(port_of(upstream), server_side(authority)) as relay:
        url = f"https://localhost:{relay.port}"
        with pytest.raises(OriginFailed, match="plain_http"):
            await read(ask(url, Connect(ca_file=file)), digest)
        assert [request.kind for request in upstream.requests] == ["blob"]
        assert await read(ask(url, Connect(ca_file=file, plain_http=True)), digest) == BODY


async def test_a_proxy(ask: Ask, upstream: Upstream) -> None:
    digest = upstream.blob("a/b", BODY)
    async with Relay(port_of(upstream)) as proxy:
        connect = replace(PLAIN, proxy=f"http://user:secret@127.0.0.1:{proxy.port}")
        assert await read(ask(upstream.url, connect), digest) == BODY
        assert proxy.seen == [f"GET {upstream.url}/v2/a/b/blobs/{digest} HTTP/1.1"]
        assert proxy.authorizations == ["Basic dXNlcjpzZWNyZXQ="]


async def test_a_proxy_before_tls(
    ask: Ask, upstream: Upstream, authority: trustme.CA, tmp_path: Path
) -> None:
    digest = upstream.blob("a/b", BODY)
    file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(file))
    async with Relay(port_of(upstream), server_side(authority)) as relay, Relay(0) as proxy:
        connect = Connect(ca_file=file, proxy=f"http://127.0.0.1:{proxy.port}")
        assert await read(ask(f"https://localhost:{relay.port}", connect), digest) == BODY
        assert proxy.seen == [f"CONNECT localhost:{relay.port} HTTP/1.1"]


async def test_a_proxy_that_is_not_there(ask: Ask, upstream: Upstream) -> None:
    upstream.image("a/b", "latest")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        connect = replace(PLAIN, proxy=f"http://user:secret@127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(OriginFailed, match="cannot be reached") as raised:
            await ask(upstream.url, connect).get_manifest("a/b", LATEST)
    assert "secret" not in str(raised.value)


def test_a_file_that_is_no_certificate(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    file.write_text("nothing")
    with pytest.raises(OSError):  # ssl.SSLError is one
        Connect(ca_file=file).ssl_context()
    with pytest.raises(OSError):
        Connect(client_certificate=tmp_path / "absent").ssl_context()


# Time


async def test_headers_that_do_not_come(ask: Ask, upstream: Upstream) -> None:
    upstream.image("a/b", "latest")
    upstream.next("GET", "latest", Hold(asyncio.Event(), after=None))
    origin = ask(upstream.url, replace(PLAIN, header_timeout=0.05))
    with pytest.raises(OriginTimeout):
        await origin.get_manifest("a/b", LATEST)


async def test_who_takes_the_connection_and_says_nothing(ask: Ask) -> None:
    # Accepted by the kernel, never by a program.
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        origin = ask(f"http://127.0.0.1:{silent.getsockname()[1]}", replace(PLAIN, header_timeout=0.05))
        with pytest.raises(OriginTimeout):
            await origin.get_manifest("a/b", LATEST)


@pytest.mark.parametrize("kind", ["blob", "manifest"])
async def test_a_body_without_progress(ask: Ask, upstream: Upstream, kind: str) -> None:
    image = upstream.image("a/b", "latest", [BODY])
    upstream.next("GET", kind, Hold(asyncio.Event(), after=10))
    origin = ask(upstream.url, replace(PLAIN, progress_timeout=0.05))
    with pytest.raises(OriginTimeout):
        if kind == "blob":
            await read(origin, image.layers[0])
        else:
            await origin.get_manifest("a/b", LATEST)


async def test_there_is_no_total_time_out(ask: Ask, upstream: Upstream) -> None:
    digest = upstream.blob("a/b", BODY)
    pieces = 12
    gates = [asyncio.Event() for _ in range(pieces)]
    upstream.next("GET", digest, *(Hold(gate, after=index * 2000) for index, gate in enumerate(gates, 1)))
    limit = 0.2
    origin = ask(upstream.url, replace(PLAIN, header_timeout=limit, progress_timeout=limit))
    loop, begun, found = asyncio.get_running_loop(), time.monotonic(), b""
    blob = await origin.get_blob("a/b", Digest(digest))
    async for chunk in blob.chunks():
        found += chunk
        if len(found) % 2000 == 0 and gates:  # the next piece only after a part of the time allowed
            loop.call_later(limit / 4, gates.pop(0).set)
    await blob.close()
    assert found == BODY
    assert time.monotonic() - begun > limit  # else it has shown nothing


# Answers that are not what they should be


STATUSES: list[tuple[int, type[RegistryError]]] = [
    (400, OriginFailed),
    (401, OriginDenied),
    (403, OriginDenied),
    (404, BlobUnknown),
    (405, OriginFailed),
    (408, OriginFailed),
    (410, BlobUnknown),
    (416, RangeInvalid),
    (429, TooManyRequests),
    (451, OriginFailed),
    (500, OriginFailed),
    (501, OriginFailed),
    (502, OriginFailed),
    (503, OriginFailed),
    (504, OriginFailed),
    (204, OriginFailed),
    (304, OriginFailed),
    (302, OriginFailed),
]


@pytest.mark.parametrize(("status", "error"), STATUSES)
async def test_what_a_status_means(
    ask: Ask, upstream: Upstream, status: int, error: type[RegistryError]
) -> None:
    image = upstream.image("a/b", "latest")
    origin = ask(upstream.url)
    upstream.next("GET", lambda request: True, Status(status), times=9)
    with pytest.raises(error) as raised:
        await read(origin, image.layers[0])
    assert type(raised.value) is error
    calls: list[Awaitable[Any]] = [origin.get_manifest("a/b", LATEST), origin.tags("a/b")]
    for call, unknown in zip(calls, (ManifestUnknown, NameUnknown), strict=True):
        with pytest.raises(unknown if error is BlobUnknown else error):
            await call


@pytest.mark.parametrize("after", ["7", "date", "soon", None])
async def test_retry_after(ask: Ask, upstream: Upstream, after: str | None) -> None:
    upstream.image("a/b", "latest")
    header = formatdate(time.time() + 3600, usegmt=True) if after == "date" else after
    upstream.next("GET", "latest", Status(429) if header is None else RetryAfter(header))
    with pytest.raises(TooManyRequests) as raised:
        await ask(upstream.url).get_manifest("a/b", LATEST)
    found = raised.value.retry_after
    if after == "date":
        assert found is not None
        assert 3500 < found <= 3600
    else:
        assert found == (7 if after == "7" else 60)


@pytest.mark.parametrize("fault", [Refuse(), Reset(None), Reset(5), Truncate(5)], ids=str)
async def test_a_connection_that_breaks(ask: Ask, upstream: Upstream, fault: Fault) -> None:
    upstream.image("a/b", "latest", [BODY])
    upstream.next("GET", lambda request: True, fault, times=9)
    with pytest.raises(OriginFailed):
        await ask(upstream.url).get_manifest("a/b", LATEST)


async def test_nobody_there(ask: Ask, upstream: Upstream) -> None:
    await upstream.stop()
    with pytest.raises(OriginFailed, match=r"^up cannot be reached: "):
        await ask(upstream.url).get_manifest("a/b", LATEST)


@pytest.mark.errors("upstream.wrong_digest")
@pytest.mark.parametrize("reference", ["tag", "digest"])
async def test_a_manifest_that_is_another(ask: Ask, upstream: Upstream, reference: str) -> None:
    image = upstream.image("a/b", "latest")
    asked: Reference = LATEST if reference == "tag" else Digest(image.digest)
    upstream.next("GET", asked, Corrupt())
    with pytest.raises(Unavailable):
        await ask(upstream.url).get_manifest("a/b", asked)


@pytest.mark.parametrize("header", ["", "sha256:short", "md5:" + "0" * 32])
async def test_a_digest_header_that_is_none(ask: Ask, upstream: Upstream, header: str) -> None:
    image = upstream.image("a/b", "latest")
    upstream.next("GET", "latest", WrongDigest(header))
    upstream.next("HEAD", "latest", WrongDigest(header))
    origin = ask(upstream.url)
    assert (await origin.get_manifest("a/b", LATEST)).digest == image.digest
    assert (await origin.resolve_manifest("a/b", LATEST)).digest == image.digest


@pytest.mark.errors("upstream.wrong_digest")
async def test_head_by_digest_that_answers_another(ask: Ask, upstream: Upstream) -> None:
    image = upstream.image("a/b")
    upstream.next("HEAD", image.digest, WrongDigest())
    descriptor = await ask(upstream.url).resolve_manifest("a/b", Digest(image.digest))
    assert (descriptor.digest, descriptor.size) == (image.digest, len(image.content))


async def test_sha512(ask: Ask, upstream: Upstream) -> None:
    body = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}
    digest = upstream.manifest("a/b", body, tag="latest", algorithm="sha512")
    origin = ask(upstream.url)
    references: list[Reference] = [LATEST, Digest(digest)]
    for reference in references:
        assert (await origin.get_manifest("a/b", reference)).digest == digest
        assert (await origin.resolve_manifest("a/b", reference)).digest == digest


@pytest.mark.parametrize(
    "text",
    [f"{OCI_MANIFEST}; charset=utf-8", "application/json", "text/plain; charset=utf-8", "", "text/html"],
)
async def test_content_types_that_say_too_much_or_nothing(ask: Ask, upstream: Upstream, text: str) -> None:
    image = upstream.image("a/b", "latest")
    for method in ("GET", "HEAD"):
        upstream.next(method, "latest", ContentType(text), times=2)
    origin = ask(upstream.url)
    assert (await origin.get_manifest("a/b", LATEST)).media_type == OCI_MANIFEST
    assert (
        await origin.resolve_manifest("a/b", LATEST) == (await origin.get_manifest("a/b", LATEST)).descriptor
    )
    assert (await origin.get_manifest("a/b", LATEST)).content == image.content


async def test_a_page_for_people_is_no_manifest(ask: Ask, upstream: Upstream) -> None:
    upstream.manifest("a/b", b"<html>log in</html>", "text/html", tag="latest")
    with pytest.raises(OriginFailed, match="no manifest"):
        await ask(upstream.url).get_manifest("a/b", LATEST)


@pytest.mark.parametrize("by", [0, 1])
async def test_manifests_are_bounded(ask: Ask, upstream: Upstream, by: int) -> None:
    content = b"{" + b" " * (MANIFEST_LIMIT - 2 + by) + b"}"
    upstream.manifest("a/b", content, OCI_MANIFEST, tag="latest")
    origin = ask(upstream.url)
    if by == 0:
        assert (await origin.get_manifest("a/b", LATEST)).content == content
    else:
        with pytest.raises(OriginFailed, match="more than 4194304 bytes"):
            await origin.get_manifest("a/b", LATEST)


class Encoded(Fault):
    """A body in `name`, whatever was asked for."""

    def __init__(self, name: str, content: bytes) -> None:
        self._name, self._content = name, content

    def strike(self, answer: Any, request: Any) -> Any:
        answer.headers["Content-Encoding"] = self._name
        return replace(answer, content=self._content)


async def test_an_encoded_manifest_is_decoded(ask: Ask, upstream: Upstream) -> None:
    image = upstream.image("a/b", "latest")
    origin = ask(upstream.url)
    for name, encode in (("gzip", gzip.compress), ("x-gzip", gzip.compress), ("deflate", zlib.compress)):
        upstream.next("GET", "latest", Encoded(name, encode(image.content)))
        assert (await origin.get_manifest("a/b", LATEST)).content == image.content
    upstream.next("GET", "tags", Encoded("GZIP", gzip.compress(b'{"tags": ["x"]}')))
    assert await origin.tags("a/b") == ["x"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("gzip", gzip.compress(b" " * (64 << 20))),
        ("gzip", gzip.compress(b"{}" * 1000)[:-9]),
        ("gzip", b"{}"),
        ("deflate", b"{}"),
        ("br", b"{}"),
        ("zstd", b"{}"),
        ("gzip, gzip", gzip.compress(gzip.compress(b"{}"))),
    ],
    ids=["bomb", "truncated", "not gzip", "not deflate", "br", "zstd", "twice"],
)
async def test_what_cannot_be_decoded(ask: Ask, upstream: Upstream, name: str, content: bytes) -> None:
    upstream.image("a/b", "latest")
    upstream.next("GET", "latest", Encoded(name, content))
    with pytest.raises(OriginFailed):
        await ask(upstream.url).get_manifest("a/b", LATEST)


async def test_an_encoded_blob_is_refused_and_its_length_is_not_the_blobs(
    ask: Ask, upstream: Upstream
) -> None:
    image = upstream.image("a/b", "latest", [BODY])
    origin = ask(upstream.url)
    for method in ("GET", "HEAD"):
        upstream.next(method, lambda request: True, Gzip(), times=2)
    with pytest.raises(OriginFailed, match="identity"):
        await read(origin, image.layers[0])
    assert (await origin.resolve_blob("a/b", Digest(image.layers[0]))).size == -1
    assert (await origin.resolve_manifest("a/b", LATEST)).size == len(image.content)


async def test_no_length(ask: Ask, upstream: Upstream) -> None:
    digest = upstream.blob("a/b", BODY)
    upstream.content_length = False
    origin = ask(upstream.url)
    blob = await origin.get_blob("a/b", Digest(digest))
    assert blob.descriptor.size == -1
    await blob.close()
    assert await read(origin, digest) == BODY
    assert (await origin.resolve_blob("a/b", Digest(digest))).size == -1


class Chunked(Fault):
    """No Content-Length."""

    def strike(self, answer: Any, request: Any) -> Any:
        return replace(answer, chunked=True)


async def test_a_length_that_only_head_tells(ask: Ask, upstream: Upstream) -> None:
    digest = upstream.blob("a/b", BODY)
    upstream.next("GET", "blob", Chunked(), times=2)
    origin = ask(upstream.url)
    blob = await origin.get_blob("a/b", Digest(digest))
    await blob.close()
    assert blob.descriptor.size == len(BODY)
    assert await read(origin, digest) == BODY


@pytest.mark.parametrize("status", [405, 501])
async def test_an_upstream_without_head(ask: Ask, upstream: Upstream, status: int) -> None:
    image = upstream.image("a/b", "latest", [BODY])
    origin = ask(upstream.url)
    upstream.next("HEAD", lambda request: True, Status(status), times=9)
    assert (await origin.resolve_blob("a/b", Digest(image.layers[0]))).size == len(BODY)
    assert (await origin.resolve_manifest("a/b", LATEST)).digest == image.digest
    with pytest.raises(BlobUnknown):
        await origin.resolve_blob("a/b", Digest(digest_of(b"absent")))
    with pytest.raises(Unsupported):
        await origin.push_manifest("a/b", LATEST, await origin.get_manifest("a/b", LATEST))


@pytest.mark.parametrize("said", ["bytes 0-9/100", "bytes 5-9/100", "pages 10-19/100", "nonsense", ""])
async def test_a_part_that_is_another(ask: Ask, upstream: Upstream, said: str) -> None:
    digest = upstream.blob("a/b", BODY)
    upstream.next("GET", digest, Status(206, {"Content-Range": said}, BODY[:10]))
    with pytest.raises(OriginFailed, match="range"):
        await read(ask(upstream.url), digest, Span(10))


async def test_a_part_that_nobody_asked_for(ask: Ask, upstream: Upstream) -> None:
    digest = upstream.blob("a/b", BODY)
    upstream.next("GET", digest, Status(206, {"Content-Range": "bytes 0-9/100"}, BODY[:10]))
    with pytest.raises(OriginFailed, match="range"):
        await read(ask(upstream.url), digest)


# Listings


@pytest.mark.parametrize("ignores_n", [True, False])
@pytest.mark.parametrize("page_size", [None, 1, 3, 100])
async def test_all_pages_of_tags(
    ask: Ask, upstream: Upstream, page_size: int | None, ignores_n: bool
) -> None:
    tags = [f"v{number}" for number in range(10)]
    for tag in tags:
        upstream.image("a/b", tag)
    upstream.page_size, upstream.ignores_n = page_size, ignores_n
    origin = ask(upstream.url)
    assert await origin.tags("a/b") == tags
    assert await origin.tags("a/b", last="v3", limit=2) == ["v4", "v5"]


class Answer(Fault):
    """200 with `body`, as JSON; `headers` as well."""

    def __init__(self, body: bytes, **headers: str) -> None:
        self._status = Status(200, headers, body)

    def strike(self, answer: Any, request: Any) -> Any:
        return self._status.strike(answer, request)


@pytest.mark.parametrize("body", [b'{"tags": null}', b'{"tags": []}', b'{"name": "a/b", "tags": [1, null]}'])
async def test_no_tags(ask: Ask, upstream: Upstream, body: bytes) -> None:
    upstream.image("a/b")
    upstream.next("GET", "tags", Answer(body))
    assert await ask(upstream.url).tags("a/b") == []


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'"tags"', b'{"tags": "abc"}', b"\xff", b""])
async def test_a_list_of_tags_that_is_none_is_no_empty_list(
    ask: Ask, upstream: Upstream, body: bytes
) -> None:
    upstream.image("a/b")
    upstream.next("GET", "tags", Answer(body))
    with pytest.raises(OriginFailed):
        await ask(upstream.url).tags("a/b")


async def test_a_list_does_not_go_on_elsewhere(ask: Ask, upstream: Upstream) -> None:
    upstream.image("a/b", "x")
    upstream.next("GET", "tags", Answer(b'{"tags": []}', Link=f'<{upstream.cdn_url}/>; rel="next"'))
    with pytest.raises(OriginFailed, match="another host"):
        await ask(upstream.url).tags("a/b")


async def test_a_list_without_end(ask: Ask, upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "PAGES", 5)
    upstream.image("a/b", "x")
    again = Answer(b'{"tags": []}', Link='</v2/a/b/tags/list?last=x>; rel="next"')
    upstream.next("GET", "tags", again, times=99)
    with pytest.raises(OriginFailed, match="more than 5 pages"):
        await ask(upstream.url).tags("a/b")


@pytest.mark.parametrize("page_size", [None, 1, 2])
async def test_all_pages_of_referrers(ask: Ask, upstream: Upstream, page_size: int | None) -> None:
    image = upstream.image("a/b")
    made = [upstream.artifact("a/b", image, f"application/x-{number}") for number in range(3)]
    upstream.referrers_page_size = page_size
    origin = ask(upstream.url)
    found = await origin.referrers("a/b", Digest(image.digest))
    assert [each.digest for each in found] == [each.digest for each in made]
    assert found[1].artifact_type == "application/x-1"
    [one] = await origin.referrers("a/b", Digest(image.digest), "application/x-2")
    assert one.digest == made[2].digest


async def test_no_referrers_api(ask: Ask, upstream: Upstream) -> None:
    image = upstream.image("a/b")
    upstream.referrers_api = False
    with pytest.raises(ManifestUnknown, match=image.digest.replace(":", "-")):
        await ask(upstream.url).referrers("a/b", Digest(image.digest))


@pytest.mark.parametrize(
    "fault",
    [
        Status(400),
        Status(404),
        Status(406),
        Answer(b"<html>"),
        Answer(b"{}"),
        Answer(b"[]"),
        Answer(json.dumps({"manifests": [{"digest": "x"}]}).encode()),
    ],
    ids=["400", "404", "406", "page", "no list", "list", "no descriptors"],
)
async def test_what_counts_as_no_referrers_api(ask: Ask, upstream: Upstream, fault: Fault) -> None:
    image = upstream.image("a/b")
    upstream.next("GET", "referrers", fault)
    with pytest.raises(ManifestUnknown):
        await ask(upstream.url).referrers("a/b", Digest(image.digest))


@pytest.mark.parametrize(
    ("status", "error"), [(429, TooManyRequests), (500, OriginFailed), (403, OriginDenied)]
)
async def test_what_does_not(ask: Ask, upstream: Upstream, status: int, error: type[RegistryError]) -> None:
    image = upstream.image("a/b")
    upstream.next("GET", "referrers", Status(status))
    with pytest.raises(error):
        await ask(upstream.url).referrers("a/b", Digest(image.digest))


async def test_no_digest_header(ask: Ask, upstream: Upstream) -> None:
    image = upstream.image("a/b", "latest")
    upstream.next("GET", "latest", NoDigest())
    upstream.next("HEAD", "latest", NoDigest())
    origin = ask(upstream.url)
    assert (await origin.resolve_manifest("a/b", LATEST)).digest == image.digest
    assert upstream.log == ["HEAD manifest a/b:latest", "GET manifest a/b:latest"]

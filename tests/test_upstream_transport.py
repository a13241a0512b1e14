"""HTTP to upstreams: redirects, certificates, proxies, timeouts, broken connections."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from dataclasses import replace
from pathlib import Path

import pytest
import trustme

from proxy.upstream.connect import Connect
from proxy.upstream.transport import REDIRECTS
from storage.errors import (
    OriginDenied,
    OriginFailed,
    OriginTimeout,
)
from storage.oci import (
    Digest,
    Span,
)
from tests.conftest import Serve
from tests.relay import Relay, server_side
from tests.upstream import (
    Bearer,
    Fault,
    Hold,
    Redirect,
    Refuse,
    Reset,
    Status,
    Truncate,
    Upstream,
)
from tests.upstream_client import BODY, LATEST, PLAIN, USER, Ask, read

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


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


def port_of(upstream: Upstream) -> int:
    return int(upstream.url.rpartition(":")[2])


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


@pytest.mark.parametrize("insecure", [False, True])
def test_a_file_that_is_no_certificate(tmp_path: Path, insecure: bool) -> None:
    file = tmp_path / "ca.pem"
    file.write_text("nothing")
    for wrong in (Connect(ca_file=file), Connect(client_certificate=tmp_path / "absent")):
        with pytest.raises(OSError):  # ssl.SSLError is one
            replace(wrong, insecure_skip_verify=insecure).ssl_context()


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
    limit = 0.5
    origin = ask(upstream.url, replace(PLAIN, header_timeout=limit, progress_timeout=limit))
    loop, begun, found = asyncio.get_running_loop(), time.monotonic(), b""
    blob = await origin.get_blob("a/b", Digest(digest))
    async for chunk in blob.chunks():
        found += chunk
        if len(found) % 2000 == 0 and gates:  # the next piece only after a small part of the time allowed
            loop.call_later(limit / 10, gates.pop(0).set)
    await blob.close()
    assert found == BODY
    assert time.monotonic() - begun > limit  # else it has shown nothing


# Broken connections


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

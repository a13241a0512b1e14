"""What is shown over TLS, and to whom: files that are bad, replaced, half replaced; clients and their own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import trustme
from aiohttp import web
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from structlog.testing import LogCapture
from yarl import URL

from proxy.config.errors import StartError
from proxy.config.schema import TLS
from proxy.web import kernel_tls
from proxy.web.listener import Connection, ConnectionLimits, Listener
from proxy.web.tls import SETTLING, Certificates, expiry, pinned
from proxy.web.tls_listener import TLSSite
from tests.authority import Authority, replace
from tests.conftest import Clock, Serve
from tests.events import Ear
from tests.processes import Place, Server, place
from tests.upstream import Upstream
from tests.wire import Wire, anybody, connect

__all__ = ["place"]  # the fixture

DAY = 86400.0
PING = b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def settings(files: dict[str, str], **more: Any) -> TLS:
    return TLS(certificate=Path(files["certificate"]), key=Path(files["key"]), **{"kernel": True, **more})


def told(events: LogCapture) -> list[str]:
    return [each["event"] for each in events.entries if each["event"].startswith("tls.")]


# Files that cannot be used


def without(which: str) -> Callable[[dict[str, str]], None]:
    return lambda files: Path(files[which]).unlink()


def holding(which: str, text: str) -> Callable[[dict[str, str]], None]:
    return lambda files: replace(Path(files[which]), text.encode())


def encrypted(files: dict[str, str]) -> None:
    path = Path(files["key"])
    key = load_pem_private_key(path.read_bytes(), None)
    locked = BestAvailableEncryption(b"secret")
    replace(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, locked))


def of_another(files: dict[str, str]) -> None:
    trustme.CA().issue_cert("localhost").private_key_pem.write_to_path(files["key"])


@pytest.mark.parametrize(
    ("spoil", "at", "cause"),
    [
        (without("certificate"), "certificate", "No such file or directory"),
        (without("key"), "key", "No such file or directory"),
        (holding("certificate", ""), "certificate", "it contains no certificate in PEM format"),
        (holding("key", "-----BEGIN CERTIFICATE-----"), "key", "it contains no private key in PEM format"),
        (
            holding("certificate", "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----"),
            "certificate",
            "its first certificate cannot be read",
        ),
        (
            holding("certificate", "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----"),
            "certificate",
            "its first certificate cannot be read",
        ),
        (encrypted, "key", "it is encrypted: a key without a password is needed"),
        (of_another, "key", "it is not the key of the first certificate in {certificate} (tls.certificate)"),
        (
            holding("key", "-----BEGIN PRIVATE KEY-----\nMAA=\n-----END PRIVATE KEY-----"),
            "key",
            "with {certificate} (tls.certificate): ",
        ),
    ],
)
def test_what_is_wrong_is_told_by_key_and_file(
    authority: Authority, spoil: Callable[[dict[str, str]], None], at: str, cause: str
) -> None:
    files = authority.issue("server")
    spoil(files)
    with pytest.raises(StartError) as caught:
        Certificates(settings(files))
    assert str(caught.value).startswith(f"tls.{at}: {files[at]}: {cause.format(**files)}")


@pytest.mark.parametrize("text", [None, "", "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----"])
def test_authorities_that_are_none(authority: Authority, tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "clients.pem"
    if text is not None:
        path.write_text(text)
    files = settings(authority.issue("server"), client_ca=path)
    with pytest.raises(StartError, match=rf"^tls\.client_ca: {path}: \S"):
        Certificates(files)
    Certificates(files, clients=False)


@pytest.mark.parametrize("offered", [False, True])
@pytest.mark.parametrize("kernel", [False, True])
def test_when_the_kernel_may_encrypt(
    authority: Authority, monkeypatch: pytest.MonkeyPatch, offered: bool, kernel: bool
) -> None:
    monkeypatch.setattr(kernel_tls, "is_offered", lambda: offered)
    context = Certificates(settings(authority.issue("server"), kernel=kernel)).context()
    assert bool(context.options & kernel_tls.OP_ENABLE_KTLS) is (offered and kernel)


def test_a_key_may_be_in_the_file_of_its_certificate(authority: Authority, tmp_path: Path) -> None:
    files = authority.issue("server")
    both = tmp_path / "both.pem"
    both.write_bytes(Path(files["key"]).read_bytes() + Path(files["certificate"]).read_bytes())
    Certificates(TLS(certificate=both))
    with pytest.raises(StartError, match=r"^tls\.certificate: .*server\.crt: it contains no private key"):
        Certificates(TLS(certificate=Path(files["certificate"])))


# How long a certificate is good


@pytest.mark.parametrize("when", ["2020-01-01", "2049-12-31T23:59:59", "2050-01-01", "2999-12-31"])
def test_when_a_certificate_expires(when: str) -> None:
    after = datetime.fromisoformat(when).replace(tzinfo=UTC)
    issued = trustme.CA().issue_cert("localhost", not_before=datetime(2000, 1, 1), not_after=after)
    der = ssl.PEM_cert_to_DER_cert(issued.cert_chain_pems[0].bytes().decode())
    assert expiry(der) == after.timestamp()


def test_what_has_expired_is_told_and_shown(authority: Authority, clock: Clock, events: LogCapture) -> None:
    files = authority.issue("server", expires=clock.now + DAY)
    certificates = Certificates(settings(files), clock=clock)
    certificates.warn()
    shown = certificates.context()
    assert told(events) == []
    clock.advance(2 * DAY)
    assert certificates.context() is certificates.context() is shown
    assert told(events) == ["tls.expired"]
    assert events.entries[-1]["certificate"] == files["certificate"]
    assert events.entries[-1]["expired"] == "2023-11-15T22:13:20Z"


def test_who_starts_tells_of_what_has_expired_for_all(
    authority: Authority, clock: Clock, events: LogCapture
) -> None:
    files = authority.issue("server", expires=clock.now - DAY)
    Certificates(settings(files), clock=clock).context()
    assert told(events) == []
    Certificates(settings(files), clock=clock).warn()
    assert told(events) == ["tls.expired"]
    # A new one that has expired as well is another matter.
    certificates = Certificates(settings(files), clock=clock)
    authority.issue("server", expires=clock.now - DAY)
    certificates.context()
    assert told(events) == ["tls.expired", "tls.reloaded", "tls.expired"]


# Files that change


def shake(
    server: ssl.SSLContext, client: ssl.SSLContext, session: ssl.SSLSession | None = None
) -> ssl.SSLObject:
    """Hands, in memory; the client's end.  Raises what either end says."""
    to, fro = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = client.wrap_bio(fro, to, server_hostname="localhost", session=session)
    answering = server.wrap_bio(to, fro, server_side=True)
    waiting = [asking, answering]
    while waiting:
        for side in list(waiting):
            with suppress(ssl.SSLWantReadError):
                side.do_handshake()
                waiting.remove(side)
    return asking


def subject(context: ssl.SSLContext) -> str:
    """The certificate that is shown."""
    der = shake(context, anybody()).getpeercert(binary_form=True)
    return ssl.DER_cert_to_PEM_cert(der or b"")


def shown(files: dict[str, str]) -> str:
    end = "-----END CERTIFICATE-----\n"
    return Path(files["certificate"]).read_text().partition(end)[0] + end


def test_what_was_replaced_is_shown_to_the_next(authority: Authority, events: LogCapture) -> None:
    files = authority.issue("server")
    certificates = Certificates(settings(files))
    before = certificates.context()
    assert subject(before) == shown(files)
    assert certificates.context() is before
    authority.issue("server")
    assert subject(certificates.context()) == shown(files)
    assert subject(before) != shown(files)  # whoever shakes hands meanwhile is not disturbed
    assert told(events) == ["tls.reloaded"]


def test_certificate_and_key_are_replaced_one_after_the_other(
    authority: Authority, clock: Clock, tmp_path: Path, events: LogCapture
) -> None:
    files = authority.issue("server")
    certificates = Certificates(settings(files), clock=clock)
    before = certificates.context()
    new = authority.issue("new")
    replace(Path(files["certificate"]), Path(new["certificate"]).read_bytes())
    assert certificates.context() is before
    clock.advance(SETTLING - 1)
    assert certificates.context() is before
    replace(Path(files["key"]), Path(new["key"]).read_bytes())
    assert subject(certificates.context()) == shown(new)
    assert told(events) == ["tls.reloaded"]


def test_what_stays_broken_is_told_once(authority: Authority, clock: Clock, events: LogCapture) -> None:
    files = authority.issue("server")
    certificates = Certificates(settings(files), clock=clock)
    before = certificates.context()
    Path(files["key"]).unlink()
    for _ in range(3):
        assert certificates.context() is before
        clock.advance(SETTLING + 1)
    (refused,) = events.entries
    assert (refused["event"], refused["log_level"]) == ("tls.refused", "warning")
    assert refused["error"] == f"tls.key: {files['key']}: No such file or directory"
    authority.issue("server")
    assert subject(certificates.context()) == shown(files)
    # And the next fault is told again.
    Path(files["certificate"]).unlink()
    certificates.context()
    clock.advance(SETTLING + 1)
    certificates.context()
    assert told(events) == ["tls.refused", "tls.reloaded", "tls.refused"]


def test_a_link_that_leads_elsewhere_is_followed(
    authority: Authority, tmp_path: Path, events: LogCapture
) -> None:
    """As Kubernetes does with secrets: each file is a link through ..data, and that is what changes."""
    for version in ("one", "two"):
        (tmp_path / version).mkdir()
        for kind, path in authority.issue("server").items():
            Path(path).rename(tmp_path / version / kind)
    (tmp_path / "..data").symlink_to("one")
    files = {kind: str(tmp_path / kind) for kind in ("certificate", "key")}
    for kind in files:
        (tmp_path / kind).symlink_to(f"..data/{kind}")
    certificates = Certificates(settings(files))
    before = shown(files)
    assert subject(certificates.context()) == before
    (tmp_path / "..next").symlink_to("two")
    (tmp_path / "..next").rename(tmp_path / "..data")
    assert subject(certificates.context()) == shown(files) != before
    assert told(events) == ["tls.reloaded"]


def test_a_file_that_was_written_in_place_with_its_old_times(authority: Authority, tmp_path: Path) -> None:
    files, new = authority.issue("server"), authority.issue("new")
    certificates = Certificates(settings(files))
    for kind, path in files.items():
        before = Path(path).stat()
        Path(path).write_bytes(Path(new[kind]).read_bytes())
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert subject(certificates.context()) == shown(new)


# Connections


Peers = list[Any]


class Gate:
    """A server behind a Door; `peers` are the certificates that clients have shown, request by request."""

    def __init__(self, runner: web.ServerRunner, site: TLSSite, url: str, peers: Peers) -> None:
        self.runner, self.site, self.url, self.peers = runner, site, url, peers


Open = Callable[..., Awaitable[Gate]]


@pytest.fixture(params=["asyncio", "socket"])
async def opened(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Open]:
    """With either transport.  On the socket, the kernel encrypts if it can."""
    monkeypatch.setattr(kernel_tls, "is_offered", lambda: request.param == "socket")
    runners = []

    async def start(tls: TLS, clock: Clock | None = None, **limits: Any) -> Gate:
        peers: Peers = []

        async def handle(request: web.BaseRequest) -> web.Response:
            peers.append(request.get_extra_info("peercert"))
            return web.Response(body=b"{}")

        times = ConnectionLimits(**limits)
        runner = web.ServerRunner(Listener(handle, times, encrypted=True), shutdown_timeout=1)
        runners.append(runner)
        await runner.setup()
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setblocking(False)
        sockets.append(listening)
        site = TLSSite(runner, listening, Certificates(tls), handshake=times.request_timeout, goodbye=5.0)
        await site.start()
        return Gate(runner, site, site.name, peers)

    sockets: list[socket.socket] = []
    yield start
    for runner in runners:
        await runner.cleanup()
    for each in sockets:
        each.close()
    await asyncio.sleep(0)  # their transports close their sockets in the next turn of the loop


async def asks(gate: Gate, client: ssl.SSLContext) -> bytes:
    """What is answered to a client; raises SSLError where it is not let in."""
    async with connect(gate.url, tls=client) as wire:
        return (await wire.ask("GET", "/v2/")).body


async def test_without_authorities_nobody_is_asked(authority: Authority, opened: Open) -> None:
    gate = await opened(settings(authority.issue("server")))
    own = authority.issue("client", "ci@example.com")
    assert await asks(gate, authority.client(own)) == b"{}"
    assert not gate.peers[0]


async def test_who_shows_a_certificate_is_known(authority: Authority, opened: Open) -> None:
    gate = await opened(settings(authority.issue("server"), client_ca=authority.ca))
    own = authority.issue("client", "ci@example.com", common_name="ci")
    assert await asks(gate, authority.client(own)) == b"{}"
    assert await asks(gate, authority.client()) == b"{}"
    known, unknown = gate.peers
    assert (("commonName", "ci"),) in known["subject"]
    assert ("email", "ci@example.com") in known["subjectAltName"]
    assert not unknown


async def test_who_shows_none_where_one_is_required(authority: Authority, opened: Open) -> None:
    tls = settings(authority.issue("server"), client_ca=authority.ca, client_certificate="required")
    gate = await opened(tls)
    ear = Ear()
    with pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"):  # it is told why, not just cut off
        await asks(gate, authority.client())
    event = await ear.heard("handshake.failed")
    assert (event["client"], event["error"]) == (
        "127.0.0.1",
        "the client has no certificate, and tls.client_certificate requires one",
    )
    assert await asks(gate, authority.client(authority.issue("client", "ci@example.com"))) == b"{}"
    assert len(gate.peers) == 1


@pytest.mark.parametrize("policy", ["optional", "required"])
async def test_who_shows_one_of_somebody_elses(
    authority: Authority, opened: Open, tmp_path: Path, policy: str
) -> None:
    tls = settings(authority.issue("server"), client_ca=authority.ca, client_certificate=policy)
    gate = await opened(tls)
    own = Authority(tmp_path, "other").issue("client", "ci@example.com", common_name="ci")
    ear = Ear()
    with pytest.raises(ssl.SSLError, match="UNKNOWN_CA"):
        await asks(gate, authority.client(own))
    told = (await ear.heard("handshake.failed"))["error"]
    assert told == "the client's certificate is from an authority that is not trusted here, in tls.client_ca"
    assert gate.peers == []


async def test_authorities_of_clients_are_replaced(
    authority: Authority, opened: Open, tmp_path: Path
) -> None:
    clients, others = Authority(tmp_path, "clients"), Authority(tmp_path, "others")
    one, two = (each.issue(name, name) for each, name in ((clients, "a.example"), (others, "b.example")))
    gate = await opened(settings(authority.issue("server"), client_ca=clients.ca))
    assert await asks(gate, authority.client(one)) == b"{}"
    with pytest.raises(ssl.SSLError):
        await asks(gate, authority.client(two))
    replace(clients.ca, others.ca.read_bytes())
    assert await asks(gate, authority.client(two)) == b"{}"
    with pytest.raises(ssl.SSLError):
        await asks(gate, authority.client(one))


def test_a_session_does_not_outlive_the_authority_of_its_client(authority: Authority, tmp_path: Path) -> None:
    clients = Authority(tmp_path, "clients")
    certificates = Certificates(settings(authority.issue("server"), client_ca=clients.ca))
    client = authority.client(clients.issue("client", "a.example"))
    client.maximum_version = ssl.TLSVersion.TLSv1_2  # whose session is there once hands are shaken
    session = shake(certificates.context(), client).session
    assert shake(certificates.context(), client, session).session_reused
    replace(clients.ca, authority.ca.read_bytes())
    with pytest.raises(ssl.SSLError, match="UNKNOWN_CA"):
        shake(certificates.context(), client, session)


async def test_what_was_replaced_is_shown_with_and_without_a_name(authority: Authority, opened: Open) -> None:
    files = authority.issue("server")
    gate = await opened(settings(files))
    assert await asks(gate, authority.client()) == b"{}"  # by an address, so without SNI
    authority.issue("server")
    for url in (gate.url, gate.url.replace("127.0.0.1", "localhost")):
        async with connect(url, tls=authority.client()) as wire:
            der = wire.writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            assert ssl.DER_cert_to_PEM_cert(der) == shown(files)


@pytest.mark.parametrize("minimum", ["1.2", "1.3"])
async def test_the_least_version(authority: Authority, opened: Open, minimum: str) -> None:
    gate = await opened(settings(authority.issue("server"), minimum=minimum))
    old = authority.client()
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    if minimum == "1.2":
        assert await asks(gate, old) == b"{}"
    else:
        with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
            await asks(gate, old)
    assert await asks(gate, authority.client()) == b"{}"


async def test_a_client_that_does_not_trust_us_is_told_of(authority: Authority, opened: Open) -> None:
    gate = await opened(settings(authority.issue("server")))
    ear = Ear()
    url = URL(gate.url)

    def distrust() -> None:  # not by asyncio, which would not say why it leaves
        context = ssl.create_default_context()
        with (
            socket.create_connection((url.host, url.port)) as client,
            pytest.raises(ssl.SSLCertVerificationError),
        ):
            context.wrap_socket(client, server_hostname=url.host)

    await asyncio.to_thread(distrust)
    assert "does not trust the server's certificate" in (await ear.heard("handshake.failed"))["error"]


@pytest.mark.parametrize("sent", [b"", b"\x16", b"\x16\x03\x01\x02\x00\x01"])
async def test_who_does_not_finish_a_handshake_in_time_is_let_go(
    authority: Authority, opened: Open, sent: bytes
) -> None:
    gate = await opened(settings(authority.issue("server")), request_timeout=0.1)
    ear = Ear()
    async with connect(gate.url.replace("https", "http")) as wire:
        await wire.send(sent)
        assert await wire.rest() == b""
    told = await ear.heard("handshake.failed")
    late = "the client did not complete the handshake in time (limits.request_timeout)"
    assert (told["client"], told["error"]) == ("127.0.0.1", late)


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01\x02\x00\x01"])
async def test_who_shakes_no_hands_is_counted_too(
    authority: Authority, opened: Open, sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone: asyncio.Queue[None] = asyncio.Queue()
    leave = Listener.leave

    def leaving(self: Listener, connection: Connection) -> None:
        leave(self, connection)
        gone.put_nowait(None)

    monkeypatch.setattr(Listener, "leave", leaving)
    gate = await opened(settings(authority.issue("server")), connections_per_address=1)
    ear = Ear()
    async with connect(gate.url.replace("https", "http")) as first:
        await first.send(sent)
        async with connect(gate.url.replace("https", "http")) as second:
            assert await second.rest() == b""
        assert (await ear.heard("client.refused"))["connections"] == 1
    async with asyncio.timeout(20):
        for _ in range(2):
            await gone.get()
    assert await asks(gate, authority.client()) == b"{}"


async def test_who_asks_by_http_is_told(authority: Authority, opened: Open) -> None:
    gate = await opened(settings(authority.issue("server")))
    async with connect(gate.url.replace("https", "http")) as wire:
        reply = await wire.ask("POST", "/v2/local/app/blobs/uploads/", body=b"x" * 100_000)
        assert (reply.status, reply.headers["Content-Type"]) == (400, "application/json")
        assert b"this port serves https" in reply.body
        assert reply.headers["Connection"] == "close"
        assert await wire.rest() == b""
    assert gate.peers == []


async def test_what_is_neither_is_answered_too(authority: Authority, opened: Open) -> None:
    gate = await opened(settings(authority.issue("server")))
    async with connect(gate.url.replace("https", "http")) as wire:
        await wire.send(b"\x80\x00 what is this\r\n\r\n")
        assert (await wire.reply()).status == 400
    assert gate.peers == []


async def test_who_shakes_hands_at_the_end_is_still_served(authority: Authority, opened: Open) -> None:
    gate = await opened(settings(authority.issue("server")))
    async with connect(gate.url.replace("https", "http")) as wire:
        # Accepted, as far as that can be seen: the one that came after it was served.
        assert await asks(gate, authority.client()) == b"{}"
        ending = asyncio.create_task(gate.runner.cleanup())
        await asyncio.sleep(0)
        await wire.writer.start_tls(authority.client(), server_hostname="127.0.0.1")
        assert (await Wire(wire.reader, wire.writer).ask("GET", "/v2/")).body == b"{}"
        await ending


async def test_who_never_shakes_hands_holds_up_the_end_but_for_a_moment(
    authority: Authority, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.web.tls_listener.ON_ITS_WAY", 0.01)
    gate = await opened(settings(authority.issue("server")))
    async with connect(gate.url.replace("https", "http")) as wire:
        await wire.send(b"\x16\x03\x01")
        assert await asks(gate, authority.client()) == b"{}"
        await gate.runner.cleanup()
        assert await wire.rest() == b""


async def test_a_connection_that_both_ends_have_closed_does_not_hold_up_the_end(
    authority: Authority, opened: Open
) -> None:
    """Its transport answers no question any more."""
    gate = await opened(settings(authority.issue("server")))
    async with connect(gate.url, tls=authority.client()) as wire:
        await wire.ask("GET", "/v2/")
        listener = gate.runner.server
        assert isinstance(listener, Listener)
        [connection] = listener.connections
        assert connection.transport is not None
        connection.transport.close()
        connection.transport.close()
        listener._sweep()
        await gate.runner.cleanup()
        assert await wire.rest() == b""


@pytest.mark.errors("accept.failed")
async def test_what_cannot_be_accepted_now_is_accepted_later(
    authority: Authority, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.web.sockets.PAUSE", 0.0)
    gate = await opened(settings(authority.issue("server")))
    failures = [OSError(24, "Too many open files"), ConnectionAbortedError(103, "aborted")]

    accept = socket.socket.accept

    def failing(listening: socket.socket) -> Any:
        if failures:
            raise failures.pop()
        return accept(listening)

    monkeypatch.setattr(socket.socket, "accept", failing)
    ear = Ear()
    assert await asks(gate, authority.client()) == b"{}"
    assert (await ear.heard("accept.failed"))["error"] == "Too many open files"


async def test_who_shakes_hands_at_a_port_without_tls_is_told_of_once(
    serve: Serve, upstream: Upstream, events: LogCapture
) -> None:
    site = await serve(upstream)
    url = site.url.replace("http://", "https://")
    for _ in range(3):
        with pytest.raises(ssl.SSLError, match=r"WRONG_VERSION_NUMBER|RECORD_LAYER"):  # an answer of HTTP
            async with connect(url, tls=anybody()):
                pass
    cause = "this port serves plain http, but the client speaks TLS: use http://, or set tls: here"
    failed = [each for each in events.entries if each["event"] == "handshake.failed"]
    assert [(each["client"], each["error"]) for each in failed] == [("127.0.0.1", cause)]
    hello = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        anybody().wrap_bio(ssl.MemoryBIO(), hello).do_handshake()
    async with connect(site.url) as wire:
        await wire.send(hello.read())
        reply = await wire.reply()
        assert (reply.status, json.loads(reply.body)["errors"][0]["message"]) == (400, cause)
        assert await wire.rest() == b""


# The whole server


async def test_the_distribution_api_by_tls(serve: Serve, upstream: Upstream, authority: Authority) -> None:
    image = upstream.image("library/alpine", "3", [b"layer" * 1000])
    site = await serve(upstream, top={"tls": authority.issue("server")})
    assert site.url.startswith("https://127.0.0.1:")
    async with connect(site.url, tls=authority.client()) as wire:
        reply = await wire.ask("GET", "/v2/library/alpine/manifests/3")
        assert reply.headers["Docker-Content-Digest"] == image.digest
    assert str(site.app.admin_url).startswith("http://127.0.0.1:")  # on this machine alone


async def test_the_administrator_is_reached_by_tls_from_elsewhere(
    serve: Serve, upstream: Upstream, authority: Authority
) -> None:
    tls = {
        **authority.issue("server"),
        "client_ca": str(authority.ca),
        "client_certificate": "required",
    }
    site = await serve(upstream, top={"tls": tls, "admin": "0.0.0.0:0", "admin_token": "t"})
    assert site.app.admin_url is not None
    url = f"https://127.0.0.1:{site.app.admin_url.port}"
    assert site.app.admin_url.scheme == "https"
    async with connect(url, tls=authority.client()) as wire:  # who has a token needs no certificate
        assert (await wire.ask("GET", "/healthz")).status == 200
        assert (await wire.ask("GET", "/api/v1/pins")).status == 401
        assert (await wire.ask("GET", "/api/v1/pins", "Authorization: Bearer t")).status == 200
    async with connect(url.replace("https", "http")) as wire:
        reply = await wire.ask("GET", "/healthz")
        assert (reply.status, json.loads(reply.body)["code"]) == (400, "UNSUPPORTED")
        assert await wire.rest() == b""


async def test_a_certificate_is_a_login(serve: Serve, upstream: Upstream, authority: Authority) -> None:
    site = await serve(
        upstream,
        top={
            "tls": {**authority.issue("server"), "client_ca": str(authority.ca)},
            "access": {"rules": [{"who": ["user:ci"], "may": ["pull", "push"], "where": ["local/team/*"]}]},
        },
        more={"local": {"store": {}}},
    )

    async def start(client: ssl.SSLContext, repository: str) -> int:
        async with connect(site.url, tls=client) as wire:
            return (await wire.ask("POST", f"/v2/local/{repository}/blobs/uploads/")).status

    known = authority.client(authority.issue("ci", "ci.example", common_name="ci"))
    other = authority.client(authority.issue("other", "other.example", common_name="other"))
    assert await start(known, "team/app") == 202
    assert await start(known, "app") == 403
    assert await start(other, "team/app") == 403
    assert await start(authority.client(), "team/app") == 403  # there is nothing else to log in with
    for file in (site.directory / "private" / "partial").iterdir():
        file.unlink()  # the upload that was begun


async def served_by(server: Server, pid: int, client: ssl.SSLContext) -> str:
    """What that worker shows."""
    with server.alone(pid):
        async with connect(server.url, tls=client) as wire:
            assert (await wire.ask("GET", "/v2/")).body == b"{}"
            der = wire.writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            return ssl.DER_cert_to_PEM_cert(der)


@pytest.mark.clients
async def test_every_worker_notices_what_was_replaced(place: Place, authority: Authority) -> None:
    place.tree["tls"] = files = authority.issue("server")
    server = await place.start()
    for _ in range(2):
        for pid in server.pids():
            assert await served_by(server, pid, authority.client()) == shown(files)
        authority.issue("server")
    await server.heard("tls.reloaded", nth=2)
    await server.stop()


@pytest.mark.clients
@pytest.mark.errors("config.refused")
async def test_a_configuration_with_a_bad_certificate_changes_nothing(
    place: Place, authority: Authority
) -> None:
    place.tree["tls"] = files = authority.issue("server")
    server = await place.start()
    before = server.pids()
    place.tree["tls"] = {**files, "key": str(authority.ca)}
    place.configure()
    server.send(signal.SIGHUP)
    refused = await server.heard("config.refused")
    assert refused["error"] == f"tls.key: {authority.ca}: it contains no private key in PEM format"
    assert server.pids() == before
    assert await served_by(server, before[0], authority.client()) == shown(files)
    await server.stop()


def test_a_client_on_the_same_machine_trusts_but_that_certificate(authority: Authority) -> None:
    files, other = authority.issue("server", "registry.example"), authority.issue("other", "registry.example")
    client = pinned(Path(files["certificate"]))
    shake(Certificates(settings(files)).context(), client)  # though it is not for localhost
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(Certificates(settings(other)).context(), client)

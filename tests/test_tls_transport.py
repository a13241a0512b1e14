"""TLS on a socket: bytes in order, bounded buffers, and an end that the other side can tell from a cut."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trustme

from proxy.web import kernel_tls, tls_transport
from proxy.web.tls_transport import HIGH, TLSTransport, shake_hands
from storage.tls import secure
from tests.clients.processes import require

MiB = 1 << 20
BIG = os.urandom(MiB) * 8 + b"the end"  # more than all the buffers between server and client hold
SLOW = 16 << 10  # bytes that the kernel holds for either end
PATIENCE = 20.0  # seconds; only a transport that hangs takes them
VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


class Noted(asyncio.Protocol):
    """Keeps a record of the calls of its transport."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.data = bytearray()
        self.error: BaseException | None = None
        self.changed = asyncio.Condition()
        self.fails = False

    def _note(self, what: str) -> None:
        self.told.append(what)
        self._wake()

    def _wake(self) -> None:
        async def wake() -> None:
            async with self.changed:
                self.changed.notify_all()

        self.waking = asyncio.ensure_future(wake())

    async def until(self, true: Callable[[], Any]) -> None:
        async with asyncio.timeout(PATIENCE), self.changed:
            await self.changed.wait_for(true)

    async def lost(self) -> list[str]:
        await self.until(lambda: "lost" in self.told)
        for _ in range(3):
            await asyncio.sleep(0)
        return self.told

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._note("made")

    def data_received(self, data: bytes) -> None:
        if self.fails:
            raise ValueError("this protocol fails")
        self.data += data
        self._wake()

    def eof_received(self) -> None:
        self._note("eof")

    def pause_writing(self) -> None:
        self._note("pause")

    def resume_writing(self) -> None:
        self._note("resume")

    def connection_lost(self, exc: BaseException | None) -> None:
        self.error = exc
        self._note("lost")


class Pair:
    """A transport and its client, whose calls block, and raise ssl.SSLError without close_notify."""

    def __init__(self, transport: TLSTransport, protocol: Noted, client: ssl.SSLSocket) -> None:
        self.transport, self.protocol, self.client = transport, protocol, client

    def write(self, data: bytes) -> None:
        """Piece by piece, as a server that heeds no pause."""
        for start in range(0, len(data), SLOW):
            self.transport.write(data[start : start + SLOW])

    async def rest(self) -> bytes:
        """What the client reads until the transport has closed, which it then does as well."""

        def read() -> bytes:
            found = b"".join(iter(lambda: self.client.recv(MiB), b""))
            self.client.unwrap()
            return found

        return await asyncio.to_thread(read)


Join = Callable[..., Awaitable[Pair]]


@pytest.fixture(scope="module")
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    authority = trustme.CA()
    server = secure(ssl.create_default_context(ssl.Purpose.CLIENT_AUTH))
    server.options |= kernel_tls.OP_ENABLE_KTLS | ssl.OP_NO_RENEGOTIATION
    authority.issue_cert("127.0.0.1").configure_cert(server)
    client = secure(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    authority.configure_trust(client)
    return server, client


@pytest.fixture
async def join(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> AsyncIterator[Join]:
    made: list[Pair] = []
    faults: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))

    async def start(
        version: str = "1.3", *, goodbye: float = PATIENCE, cipher: str = "", small: bool = True
    ) -> Pair:
        server, client = contexts
        client.maximum_version = VERSIONS[version]
        client.set_ciphers(cipher or "DEFAULT")
        with socket.create_server(("127.0.0.1", 0)) as listening:
            connecting = socket.socket()
            if small:
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SLOW)
                connecting.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW)
            connecting.connect(listening.getsockname())
            accepted, _ = listening.accept()
        accepted.setblocking(False)
        connecting.settimeout(PATIENCE)

        def shake() -> ssl.SSLSocket:
            return client.wrap_socket(connecting, server_hostname="127.0.0.1", suppress_ragged_eofs=False)

        shaken = asyncio.create_task(asyncio.to_thread(shake))
        tls = await shake_hands(accepted, server, lambda _, error: pytest.fail(str(error)))
        protocol = Noted()
        made.append(Pair(TLSTransport(tls, protocol, goodbye), protocol, await shaken))
        return made[-1]

    yield start
    for each in made:
        each.client.close()
        each.transport.abort()
        await each.protocol.lost()
        assert each.protocol.told.count("lost") == 1
    assert [each for each in faults if "this protocol fails" not in str(each.get("exception"))] == []


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def test_what_is_known_of_a_connection(join: Join, version: str) -> None:
    pair = await join(version)
    known = pair.transport.get_extra_info
    assert known("peername") == pair.client.getsockname()
    assert known("sockname") == pair.client.getpeername()
    assert known("cipher") == pair.client.cipher()
    assert known("sslcontext").options & kernel_tls.OP_ENABLE_KTLS
    assert known("peercert") is None
    assert known("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert known("kernel_tls") is kernel_tls.is_offered()
    assert not pair.transport.can_write_eof()


async def test_a_slow_client_gets_all_and_a_clean_end(join: Join, version: str) -> None:
    pair = await join(version)
    pair.write(BIG)
    assert pair.protocol.told == ["made", "pause"]
    assert pair.transport.get_write_buffer_size() > len(BIG) - MiB
    pair.transport.close()
    assert pair.transport.is_closing()
    pair.transport.write(b"too late")
    assert await pair.rest() == BIG
    assert await pair.protocol.lost() == ["made", "pause", "resume", "lost"]
    assert pair.protocol.error is None
    pair.transport.close()
    assert pair.client.fileno() >= 0


async def test_what_is_written_by_lines_keeps_its_order(join: Join) -> None:
    pair = await join()
    pair.transport.writelines([b"a", bytearray(b"b"), memoryview(b"c")])
    pair.transport.write(b"")
    pair.transport.close()
    assert await pair.rest() == b"abc"


async def test_writing_pauses_at_the_limits(join: Join) -> None:
    pair = await join()
    transport, told = pair.transport, pair.protocol.told
    assert transport.get_write_buffer_limits() == (HIGH // 4, HIGH)
    while not transport.get_write_buffer_size():
        transport.write(bytes(SLOW))
    assert told == ["made"]
    transport.set_write_buffer_limits(high=0)
    assert told == ["made", "pause"]
    reading = asyncio.create_task(asyncio.to_thread(pair.client.recv, MiB))
    while "resume" not in told:
        await reading
        reading = asyncio.create_task(asyncio.to_thread(pair.client.recv, MiB))
        if not transport.get_write_buffer_size():
            break
    await pair.protocol.until(lambda: "resume" in told)
    assert transport.get_write_buffer_size() == 0
    transport.write(b".")
    await reading


async def test_reading_pauses(join: Join, version: str) -> None:
    pair = await join(version, small=False)
    transport, data = pair.transport, pair.protocol.data
    transport.pause_reading()
    assert not transport.is_reading()
    await asyncio.to_thread(pair.client.sendall, b"x" * 40_000)
    for _ in range(3):
        await asyncio.sleep(0)
    assert data == b""
    transport.resume_reading()
    assert transport.is_reading()
    await pair.protocol.until(lambda: len(data) == 40_000)


async def test_both_ends_send_at_the_same_time(join: Join, version: str) -> None:
    pair = await join(version)
    pair.write(BIG)
    assert await asyncio.to_thread(_exchange, pair.client, BIG) == BIG
    await pair.protocol.until(lambda: len(pair.protocol.data) == len(BIG))
    assert pair.protocol.data == BIG


def _exchange(client: ssl.SSLSocket, data: bytes) -> bytes:
    """Send and receive as much, in one thread: Python 3.11 lets two of them spoil a TLS connection."""
    client.settimeout(0)
    found, sent = bytearray(), 0
    while len(found) < len(data) or sent < len(data):
        ready = select.select([client], [client] if sent < len(data) else [], [], PATIENCE)
        assert any(ready)
        with suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
            found += client.recv(MiB)
        with suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
            sent += client.send(data[sent : sent + SLOW])
    return bytes(found)


def _read(client: ssl.SSLSocket, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        found += client.recv(MiB)
    return bytes(found)


async def test_a_client_that_says_goodbye(join: Join, version: str) -> None:
    pair = await join(version)
    await asyncio.to_thread(pair.client.sendall, b"last words")
    await asyncio.to_thread(pair.client.unwrap)
    assert await pair.protocol.lost() == ["made", "eof", "lost"]
    assert (bytes(pair.protocol.data), pair.protocol.error) == (b"last words", None)


async def test_a_client_that_closes_without_a_word(join: Join, version: str) -> None:
    pair = await join(version)
    pair.client.shutdown(socket.SHUT_WR)  # a close() resets, if tickets of TLS 1.3 were not read
    assert await pair.protocol.lost() == ["made", "eof", "lost"]


async def test_a_client_that_resets(join: Join, version: str) -> None:
    pair = await join(version)
    pair.write(BIG)
    pair.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    pair.client.close()
    assert (await pair.protocol.lost())[-1] == "lost"
    pair.transport.write(b"to nobody")
    assert pair.transport.get_write_buffer_size() == 0


async def test_what_is_no_record_ends_the_connection(join: Join, version: str) -> None:
    pair = await join(version)
    with socket.socket(fileno=os.dup(pair.client.fileno())) as below:
        below.sendall(b"this is not a record of TLS")
    assert await pair.protocol.lost() == ["made", "lost"]
    assert isinstance(pair.protocol.error, ssl.SSLError)


@pytest.mark.parametrize("closed", [False, True])
async def test_an_abort_is_no_clean_end(join: Join, version: str, closed: bool) -> None:
    pair = await join(version)
    pair.write(BIG)
    if closed:
        pair.transport.close()
    pair.transport.abort()
    pair.transport.abort()
    assert (await pair.protocol.lost())[-1] == "lost"
    with pytest.raises((ssl.SSLError, ConnectionResetError), match=r"EOF|reset"):
        await pair.rest()


@pytest.mark.parametrize("sent", [0, len(BIG)])
async def test_a_client_that_never_says_goodbye(join: Join, sent: int) -> None:
    pair = await join(goodbye=0.01)
    pair.write(BIG[:sent])
    pair.transport.close()
    if sent:
        assert await asyncio.to_thread(_read, pair.client, sent) == BIG
    assert (await pair.protocol.lost())[-1] == "lost"


async def test_a_client_that_sends_after_goodbye(join: Join) -> None:
    pair = await join()
    pair.transport.close()
    pair.client.sendall(b"more")
    assert await pair.protocol.lost() == ["made", "lost"]


async def test_a_protocol_that_fails(join: Join) -> None:
    pair = await join()
    pair.protocol.fails = True
    pair.client.sendall(b"x")
    assert await pair.protocol.lost() == ["made", "lost"]


async def test_openssl_that_must_write_before_it_reads(join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = await join()
    recv, refusals = ssl.SSLSocket.recv, [ssl.SSLWantWriteError()]

    def reluctant(self: ssl.SSLSocket, *arguments: Any) -> bytes:
        if self.server_side and refusals:
            raise refusals.pop()
        return recv(self, *arguments)

    monkeypatch.setattr(ssl.SSLSocket, "recv", reluctant)
    pair.client.sendall(b"x")
    await pair.protocol.until(lambda: pair.protocol.data == b"x")
    assert refusals == []


@pytest.mark.parametrize(("version", "command"), [("1.3", b"k"), ("1.3", b"K"), ("1.2", b"R")])
async def test_new_keys(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext], version: str, command: bytes
) -> None:
    """TLS 1.3 has new keys at any time: k for those of the client, K for ours too.  TLS 1.2 refuses."""
    require("openssl", root=False)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        client = await asyncio.create_subprocess_exec(
            *("openssl", "s_client", "-connect", f"127.0.0.1:{listening.getsockname()[1]}"),
            f"-tls{version.replace('.', '_')}",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        accepted, _ = await asyncio.get_running_loop().sock_accept(listening)
    assert client.stdin is not None
    assert client.stdout is not None
    protocol = Noted()
    tls = await shake_hands(accepted, contexts[0], lambda _, error: pytest.fail(str(error)))
    transport = TLSTransport(tls, protocol, PATIENCE)
    transport.write(b"before the keys\n")
    async with asyncio.timeout(PATIENCE):
        await client.stdout.readuntil(b"before the keys\n")
        client.stdin.write(command + b"\n")
        if command == b"R":
            await client.stdout.readuntil(b"RENEGOTIATING\n")
        else:
            await client.stdout.readuntil(b"KEYUPDATE\n")
            client.stdin.write(b"after the keys\n")
            await protocol.until(lambda: protocol.data == b"after the keys\n")
            for _ in range(3):
                transport.write(b"and back\n" * 10_000)
            transport.close()
        printed = await client.stdout.read()
    client.stdin.close()
    await client.wait()
    assert (await protocol.lost())[-1] == "lost"
    assert printed.count(b"and back\n") == (0 if command == b"R" else 30_000)


# Handshakes


async def test_a_failed_handshake_is_told_to_the_client(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    """Although the client has sent what was not read."""
    failures: list[ssl.SSLError] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        connecting = socket.create_connection(listening.getsockname(), timeout=PATIENCE)
        accepted, _ = listening.accept()
    accepted.setblocking(False)
    with connecting:
        connecting.sendall(b"\x16\x03\x01\x00\x04nope" + b"more of it" * 1000)
        shaking = asyncio.create_task(
            shake_hands(accepted, contexts[0], lambda _, error: failures.append(error))
        )
        alert = await asyncio.to_thread(connecting.recv, 100)
        assert alert[:1] == b"\x15"  # RFC 8446 §6
    with pytest.raises(ssl.SSLError):
        await shaking
    assert len(failures) == 1


async def test_a_client_whose_handshake_failed_is_not_waited_for(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls_transport, "LINGER", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        connecting = socket.create_connection(listening.getsockname(), timeout=PATIENCE)
        accepted, _ = listening.accept()
    accepted.setblocking(False)
    with connecting:
        connecting.sendall(b"\x16\x03\x01\x00\x04nope")
        with pytest.raises(ssl.SSLError):
            await shake_hands(accepted, contexts[0], lambda *_: None)


# Where the kernel encrypts


@pytest.mark.parametrize(("text", "offered"), [(None, False), ("mptcp\n", False), ("mptcp tls\n", True)])
def test_whether_the_kernel_offers_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, offered: bool
) -> None:
    monkeypatch.setattr(kernel_tls, "_PROTOCOLS", tmp_path / "ulp")
    if text is not None:
        (tmp_path / "ulp").write_text(text)
    assert kernel_tls.is_offered() is offered


Statistics = Callable[[], dict[str, int]]


@pytest.fixture
def statistics() -> Statistics:
    """Skips the test where there is no kernel TLS; ENTREPOT_REQUIRE_CLIENTS asks for no kernel."""
    if not kernel_tls.is_offered():
        pytest.skip("the kernel offers no TLS: /proc/sys/net/ipv4/tcp_available_ulp does not list tls")

    def read() -> dict[str, int]:
        lines = Path("/proc/net/tls_stat").read_text().splitlines()
        return {name: int(number) for name, number in map(str.split, lines)}

    return read


async def test_the_kernel_encrypts(
    join: Join, version: str, statistics: Callable[[], dict[str, int]]
) -> None:
    before = statistics()["TlsTxSw"] + statistics()["TlsTxDevice"]
    pair = await join(version)
    assert pair.transport.get_extra_info("kernel_tls")
    assert statistics()["TlsTxSw"] + statistics()["TlsTxDevice"] > before


async def test_a_cipher_that_the_kernel_does_not_know(join: Join, statistics: Statistics) -> None:
    pair = await join("1.2", cipher="ECDHE-ECDSA-AES256-SHA384")
    assert not pair.transport.get_extra_info("kernel_tls")
    pair.write(BIG)
    pair.transport.close()
    assert await pair.rest() == BIG


async def test_a_file_is_sent_without_passing_through_the_process(
    join: Join, version: str, statistics: Statistics, tmp_path: Path
) -> None:
    """By sendfile, after what was written and before what is written then."""
    (tmp_path / "blob").write_bytes(BIG)
    pair = await join(version, small=False)
    pair.transport.write(b"head")
    reading = asyncio.create_task(pair.rest())
    with (tmp_path / "blob").open("rb") as file:
        position, client = 0, pair.transport.get_extra_info("socket").fileno()
        while position < len(BIG):
            try:
                position += os.sendfile(client, file.fileno(), position, len(BIG) - position)
            except BlockingIOError:
                await asyncio.sleep(0)
    pair.transport.close()
    assert await reading == b"head" + BIG

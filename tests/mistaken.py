"""Servers that a client cannot use: each makes one mistake of TLS, or of the network, by real handshakes."""

from __future__ import annotations

import socket
import ssl
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

import trustme
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

NOWHERE = "nowhere.invalid"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() sends a RST


class Mistaken:
    """A server in a thread, at `url`; `serve` is called with each connection."""

    def __init__(self, scheme: str, serve: Callable[[socket.socket], None], host: str = "127.0.0.1") -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        self.url = f"{scheme}://{host}:{self.port}"
        self._serve = serve
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self._open.append(connection)
            with suppress(OSError):
                self._serve(connection)

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for each in self._open:  # the event loop, which we block, may not close its end
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for each in self._open:
            each.close()


@dataclass(frozen=True)
class Trust:
    """Files of a client: the authority that it trusts, and its certificate, of one that nobody trusts."""

    ca: Path
    strange: dict[str, Path]


class Servers:
    """Makes the servers, and the files of their clients below `directory`."""

    def __init__(self, directory: Path) -> None:
        self._ca, self._other = trustme.CA(), trustme.CA(organization_name="Nobody")
        self.trust = Trust(directory / "ca.pem", {})
        self._ca.cert_pem.write_to_path(str(self.trust.ca))
        mine = self._other.issue_cert("client.example")
        for name, pems in (("certificate", mine.cert_chain_pems), ("key", [mine.private_key_pem])):
            self.trust.strange[name] = directory / f"strange.{name}"
            self.trust.strange[name].write_bytes(b"".join(each.bytes() for each in pems))

    def context(self, *names: str, by: trustme.CA | None = None, **dates: datetime) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        (by or self._ca).issue_cert(*(names or ("127.0.0.1",)), **dates).configure_cert(context)
        return context

    def self_signed(self) -> ssl.SSLContext:
        key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
        begin = datetime(2020, 1, 1)
        builder = x509.CertificateBuilder(
            name, name, key.public_key(), 1, begin, begin + timedelta(days=9999)
        )
        address = x509.IPAddress(IPv4Address("127.0.0.1"))
        builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=True)
        pem = builder.sign(key, SHA256()).public_bytes(Encoding.PEM)
        pem += key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with trustme.Blob(pem).tempfile() as file:
            context.load_cert_chain(file)
        return context

    def strangers(self) -> ssl.SSLContext:
        return self.context(by=self._other)

    def demanding(self, newest: ssl.TLSVersion) -> ssl.SSLContext:
        context = self.context()
        context.maximum_version = newest
        context.verify_mode = ssl.CERT_REQUIRED
        self._ca.configure_trust(context)
        return context

    def old(self) -> ssl.SSLContext:
        context = self.context()
        with warnings.catch_warnings(action="ignore"):
            context.options |= ssl.OP_NO_TLSv1_2 | ssl.OP_NO_TLSv1_3
            context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        context.set_ciphers("ALL:@SECLEVEL=0")
        return context


def by_tls(context: ssl.SSLContext) -> Callable[[socket.socket], None]:
    def serve(connection: socket.socket) -> None:
        try:
            with context.wrap_socket(connection.dup(), server_side=True) as tls:
                tls.recv(65536)
                tls.sendall(ANSWER)
        finally:  # the alert arrives, though more is sent meanwhile
            with suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass
            connection.close()

    return serve


def plain(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    connection.close()


def resetting(connection: socket.socket) -> None:
    connection.recv(1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    connection.close()


def closing(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.close()


def mute(connection: socket.socket) -> None:
    """It accepts, and says nothing."""


@dataclass(frozen=True)
class Mistake:
    """One mistake: how its server is made, and the message to the client, as regular expressions.

    `keys` are the client's: whether it trusts the authority (ca_file), and whether it has a certificate.
    """

    serve: Callable[[Servers], Callable[[socket.socket], None]] | None
    cause: str
    advice: str = ""
    scheme: str = "https"
    host: str = "127.0.0.1"
    trusting: bool = True
    strange: bool = False

    @contextmanager
    def server(self, servers: Servers) -> Iterator[str]:
        """The URL of a server that makes the mistake."""
        if self.serve is None:
            with socket.socket() as unused:  # nothing listens there
                unused.bind(("127.0.0.1", 0))
                yield f"{self.scheme}://{self.host}:{unused.getsockname()[1]}"
            return
        server = Mistaken(self.scheme, self.serve(servers), self.host)
        try:
            yield server.url
        finally:
            server.close()


_FETCH = r"ca_?-?file.*: openssl s_client -showcerts -connect 127\.0\.0\.1:\d+ </dev/null \| .* >ca\.pem"
_OWN = "client_certificate and client_key"
V2, V3 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
_PAST, _FUTURE = datetime(2020, 2, 3, 4, 5), datetime(2045, 6, 7)

MISTAKES = {
    "self-signed": Mistake(
        lambda on: by_tls(on.self_signed()), "its certificate is self-signed", _FETCH, trusting=False
    ),
    "unknown authority": Mistake(
        lambda on: by_tls(on.strangers()), r"is from an authority that is not trusted here \(Nobody\)", _FETCH
    ),
    "wrong name": Mistake(
        lambda on: by_tls(on.context("one.example", "*.two.example")),
        r"its certificate is for one\.example, \*\.two\.example, not for localhost",
        "use a name that it has",
        host="localhost",
    ),
    "wrong address": Mistake(
        lambda on: by_tls(on.context(*(f"{each}.example" for each in "abcdef"))),
        r"is for a\.example, b\.example, c\.example, d\.example and 2 more, not for 127\.0\.0\.1",
    ),
    "expired": Mistake(
        lambda on: by_tls(on.context(not_after=_PAST)), "expired on 2020-02-03 04:05 UTC", "have it renewed"
    ),
    "not yet valid": Mistake(
        lambda on: by_tls(on.context(not_before=_FUTURE)), "valid only from 2045-06-07 00:00 UTC", "the clock"
    ),
    "http for https": Mistake(lambda on: plain, "it does not speak TLS", r"write http:// in its URL"),
    "https for http": Mistake(
        lambda on: by_tls(on.context()),
        "it (speaks TLS|(reset|closed) the connection without an answer)",
        r"if it serves https, write https:// in its URL",
        scheme="http",
    ),
    "old TLS": Mistake(
        lambda on: by_tls(on.old()), r"shares no version of TLS with this machine, which speaks 1\.2 and 1\.3"
    ),
    "certificate demanded by TLS 1.3": Mistake(
        lambda on: by_tls(on.demanding(V3)), "demands a client certificate", f"set {_OWN}"
    ),
    "certificate demanded by TLS 1.2": Mistake(
        lambda on: by_tls(on.demanding(V2)), "demands a client certificate", f"set {_OWN}"
    ),
    "certificate refused by TLS 1.3": Mistake(
        lambda on: by_tls(on.demanding(V3)), "does not trust .* our client certificate", _OWN, strange=True
    ),
    "certificate refused by TLS 1.2": Mistake(
        lambda on: by_tls(on.demanding(V2)), "does not trust .* our client certificate", _OWN, strange=True
    ),
    "reset": Mistake(lambda on: resetting, "it reset the connection without an answer", scheme="http"),
    "reset of TLS": Mistake(lambda on: resetting, "it reset the connection without an answer"),
    "closed": Mistake(lambda on: closing, "it closed the connection without an answer", scheme="http"),
    "closed by TLS": Mistake(lambda on: closing, "it closed the connection without an answer"),
    "mute": Mistake(lambda on: mute, "(no TLS handshake|no answer|did not answer).* (in time|within)"),
    "mute by http": Mistake(lambda on: mute, "(no answer|did not answer) (in time|within)", scheme="http"),
    "refused": Mistake(None, r"nothing listens there \(connection refused\)", "check that it runs"),
    "unknown name": Mistake(
        None,
        r"nowhere\.invalid(, .* its name)? is unknown to the name servers",
        "check the name",
        host=NOWHERE,
    ),
}

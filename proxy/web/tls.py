"""The server's TLS context: its certificate, its key, and the authorities of client certificates.

Nothing watches the files.  Each handshake asks for the context, and that checks them; so a symbolic link that
points elsewhere is noticed like a file that was rewritten.  Rules:

- Files that cannot be read, or do not belong together, change nothing: the previous context stays in use.
- Certificate and key are replaced one after the other, so for SETTLING seconds a failure is not logged; after
  that it is logged once (`tls.refused`).
"""

from __future__ import annotations

import re
import ssl
import time
from collections.abc import Callable
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path

import structlog

from proxy.config.errors import StartError
from proxy.config.schema import TLS
from proxy.connections.failures import explain_client, file_fault
from proxy.connections.trust import ClientSSLObject, refused
from proxy.web import kernel_tls
from storage.tls import secure

log = structlog.get_logger()

SETTLING = 5.0  # seconds
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}

# The address of the client whose handshake runs in this context.
client_address: ContextVar[str] = ContextVar("client_address", default="")

Stamps = list[tuple[int, ...] | None]


class Certificates:
    """The certificate files of `settings`, and the TLS context made from them.  Raises StartError.

    Clients are asked for certificates only with `clients`.  `expires` is the time at which the server's
    certificate expires, in seconds since the epoch; `loaded` is called with it.
    """

    def __init__(
        self,
        settings: TLS,
        *,
        clients: bool = True,
        clock: Callable[[], float] = time.time,
        loaded: Callable[[float], None] = lambda expires: None,
    ) -> None:
        self._loaded = loaded
        self._settings = settings
        self._clients = clients
        self._clock = clock
        self._files = [each for each in (settings.certificate, settings.key, settings.client_ca) if each]
        self._stamps = self._current_stamps()
        self._context, self.expires = self._load()
        loaded(self.expires)
        self._warned = self._clock() > self.expires  # the process that starts the server logs that, once
        self._refused: Stamps | None = None  # the last files that could not be used
        self._since: float | None = None  # since when; None once it is logged

    def context(self) -> ssl.SSLContext:
        """Return the context for the next handshake."""
        stamps = self._current_stamps()
        if stamps == self._stamps:
            self._refused = None
        elif stamps != self._refused:
            self._change(stamps)
        elif self._since is not None and self._clock() - self._since > SETTLING:
            self._refuse()
        if not self._warned:
            self.warn()
        return self._context

    def warn(self) -> None:
        """Log a warning if the certificate has expired."""
        if self._clock() > self.expires:
            self._warned = True
            certificate = str(self._settings.certificate)
            log.warning("tls.expired", certificate=certificate, expired=_formatted(self.expires))

    def _change(self, stamps: Stamps) -> None:
        try:
            self._context, self.expires = self._load()
        except StartError:
            self._refused, self._since = stamps, self._clock()
            return
        self._stamps, self._refused, self._warned = stamps, None, False
        self._loaded(self.expires)
        certificate = str(self._settings.certificate)
        log.info("tls.reloaded", certificate=certificate, expires=_formatted(self.expires))

    def _refuse(self) -> None:
        self._since = None
        try:
            self._load()
        except StartError as error:
            log.warning("tls.refused", error=str(error))

    def _current_stamps(self) -> Stamps:
        return [_stamp(each) for each in self._files]

    def _load(self) -> tuple[ssl.SSLContext, float]:
        """Make a context; return it and the time at which its certificate expires."""
        settings = self._settings
        context = secure(ssl.create_default_context(ssl.Purpose.CLIENT_AUTH))
        context.minimum_version = _VERSIONS[settings.minimum]
        context.options |= ssl.OP_NO_RENEGOTIATION
        if settings.kernel and kernel_tls.is_offered():
            context.options |= kernel_tls.OP_ENABLE_KTLS
        context.sslobject_class = AlertingSSLObject
        context.set_alpn_protocols(["http/1.1"])
        expires = expiry(_first(settings.certificate))
        key, name = (settings.key, "key") if settings.key else (settings.certificate, "certificate")
        if "PRIVATE KEY-----" not in _read(name, key):
            raise _fault(name, key, "it contains no private key in PEM format")
        self._load_pair(context, name, key)
        if self._clients and settings.client_ca is not None:
            _read("client_ca", settings.client_ca)
            try:
                context.load_verify_locations(settings.client_ca)
            except OSError as error:
                raise _fault("client_ca", settings.client_ca, file_fault(error)) from error
            required = settings.client_certificate == "required"
            context.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL
        return context, expires

    def _load_pair(self, context: ssl.SSLContext, name: str, key: Path) -> None:
        certificate = self._settings.certificate

        def password() -> str:
            raise _fault(name, key, "it is encrypted: a key without a password is needed")

        try:
            context.load_cert_chain(certificate, key, password)
        except OSError as error:
            if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
                cause = f"it is not the key of the first certificate in {certificate} (tls.certificate)"
                raise _fault(name, key, cause) from error
            raise _fault(name, key, f"with {certificate} (tls.certificate): {file_fault(error)}") from error


class AlertingSSLObject(ssl.SSLObject):
    """An SSLObject that logs why a handshake fails, and sends the alert to the client.

    asyncio drops the alert of a failed handshake (RFC 8446 §6.2).  So the failure is first reported as data
    to be sent, and raised when the handshake continues.
    """

    failure: ssl.SSLError | None = None

    def do_handshake(self) -> None:
        if self.failure is not None:
            raise self.failure
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            self.failure = error
            log_failure(self, error)
            raise ssl.SSLWantReadError from error


def log_failure(handshake: ssl.SSLObject | ssl.SSLSocket, error: ssl.SSLError) -> None:
    """Log why the handshake with the client of this context fails."""
    cause = explain_client(refused(handshake, error))
    log.info("handshake.failed", client=client_address.get(), error=cause)


def pinned(certificate: Path) -> ssl.SSLContext:
    """A context for a client on the server's machine, which trusts just this `certificate`.

    Raises StartError.
    """
    context = secure(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    # The certificate rarely contains the address by which a local client reaches the server.
    context.check_hostname = False
    context.load_verify_locations(cadata=_first(certificate))
    context.sslobject_class = ClientSSLObject
    return context


def _first(file: Path) -> bytes:
    """The first certificate of a file, in DER: the others are those of its authorities."""
    found = _CERTIFICATE.search(_read("certificate", file))
    if found is None:
        raise _fault("certificate", file, "it contains no certificate in PEM format")
    try:
        certificate = ssl.PEM_cert_to_DER_cert(found[0])
        expiry(certificate)
    except (ValueError, IndexError) as error:
        raise _fault("certificate", file, "its first certificate cannot be read") from error
    return certificate


def expiry(certificate: bytes) -> float:
    """When a certificate in DER expires (RFC 5280 §4.1); the standard library has no function for this."""
    _, at, _ = _element(certificate, 0)
    _, at, _ = _element(certificate, at)  # into tbsCertificate
    tag, _, stop = _element(certificate, at)
    if tag == 0xA0:  # version, which may be left out
        at = stop
    for _ in ("serialNumber", "signature", "issuer"):
        at = _element(certificate, at)[2]
    _, at, _ = _element(certificate, at)  # into validity
    at = _element(certificate, at)[2]  # past notBefore
    tag, start, stop = _element(certificate, at)
    text = certificate[start:stop].decode("ascii")
    if tag == 0x17:  # UTCTime has two digits for the year (§4.1.2.5.1)
        text = f"{'20' if text < '50' else '19'}{text}"
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()


def _element(der: bytes, at: int) -> tuple[int, int, int]:
    """The tag of the element at `at`, and start and stop of its content (X.690 §8.1)."""
    tag, length, start = der[at], der[at + 1], at + 2
    if length & 0x80:
        start += length & 0x7F
        length = int.from_bytes(der[at + 2 : start], "big")
    return tag, start, start + length


def _stamp(file: Path) -> tuple[int, ...] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    # Not mtime: copying may keep it, and changed permissions do not change it.
    return found.st_dev, found.st_ino, found.st_size, found.st_ctime_ns


def _read(name: str, file: Path) -> str:
    try:
        return file.read_text("ascii", "replace")
    except OSError as error:
        raise _fault(name, file, file_fault(error)) from error


def _fault(name: str, file: Path, cause: str) -> StartError:
    return StartError(f"tls.{name}: {file}: {cause}")


def _formatted(when: float) -> str:
    return datetime.fromtimestamp(when, UTC).isoformat().replace("+00:00", "Z")

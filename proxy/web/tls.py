"""What the server shows of itself over TLS, and whom it wants to show something in turn.

Nothing watches the files.  Who begins a handshake asks for the context, and that is when they are looked at;
so a symbolic link that leads elsewhere is noticed like a file that was written anew.  Rules:

- What cannot be used, and what does not fit together, changes nothing: the context before it goes on.
- Certificate and key are replaced one after the other, so for SETTLING seconds nobody is told of that; after
  that once (`tls.refused`).
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

log = structlog.get_logger()

SETTLING = 5.0  # seconds
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}

# Whose handshake it is that goes on in this context.
client_address: ContextVar[str] = ContextVar("client_address", default="")

Stamps = list[tuple[int, ...] | None]


class Certificates:
    """Those of `settings`; without `clients` nobody is asked for one.  Raises StartError.

    `expires` is when the one that is shown does, in seconds since the epoch.
    """

    def __init__(
        self, settings: TLS, *, clients: bool = True, clock: Callable[[], float] = time.time
    ) -> None:
        self._settings = settings
        self._clients = clients
        self._clock = clock
        self._files = [each for each in (settings.certificate, settings.key, settings.client_ca) if each]
        self._stamps = self._look()
        self._context, self.expires = self._load()
        self._warned = self._clock() > self.expires  # who starts the server tells that, once for all
        self._doubtful: Stamps | None = None  # what was seen last, and could not be used
        self._since: float | None = None  # None once it was told

    def context(self) -> ssl.SSLContext:
        """For the next handshake."""
        stamps = self._look()
        if stamps == self._stamps:
            self._doubtful = None
        elif stamps != self._doubtful:
            self._change(stamps)
        elif self._since is not None and self._clock() - self._since > SETTLING:
            self._refuse()
        if not self._warned:
            self.warn()
        return self._context

    def warn(self) -> None:
        """Tell if the certificate has expired."""
        if self._clock() > self.expires:
            self._warned = True
            certificate = str(self._settings.certificate)
            log.warning("tls.expired", certificate=certificate, expired=_written(self.expires))

    def _change(self, stamps: Stamps) -> None:
        try:
            self._context, self.expires = self._load()
        except StartError:
            self._doubtful, self._since = stamps, self._clock()
            return
        self._stamps, self._doubtful, self._warned = stamps, None, False
        certificate = str(self._settings.certificate)
        log.info("tls.reloaded", certificate=certificate, expires=_written(self.expires))

    def _refuse(self) -> None:
        self._since = None
        try:
            self._load()
        except StartError as error:
            log.warning("tls.refused", error=str(error))

    def _look(self) -> Stamps:
        return [_stamp(each) for each in self._files]

    def _load(self) -> tuple[ssl.SSLContext, float]:
        """A context, and when its certificate expires."""
        settings = self._settings
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = _VERSIONS[settings.minimum]
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.sslobject_class = AlertingSSLObject
        context.set_alpn_protocols(["http/1.1"])
        expires = expiry(_first(settings.certificate))
        key, name = (settings.key, "key") if settings.key else (settings.certificate, "certificate")
        if "PRIVATE KEY-----" not in _read(name, key):
            raise _fault(name, key, "there is no PEM private key in it")
        self._load_pair(context, name, key)
        if self._clients and settings.client_ca is not None:
            _read("client_ca", settings.client_ca)
            try:
                context.load_verify_locations(settings.client_ca)
            except (OSError, ValueError) as error:
                raise _fault("client_ca", settings.client_ca, _cause(error)) from error
            required = settings.client_certificate == "required"
            context.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL
        return context, expires

    def _load_pair(self, context: ssl.SSLContext, name: str, key: Path) -> None:
        certificate = self._settings.certificate

        def password() -> str:
            raise _fault(name, key, "it is encrypted, and nobody is there to be asked for the password")

        try:
            context.load_cert_chain(certificate, key, password)
        except OSError as error:
            if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
                cause = f"it is not the key of the first certificate in {certificate} (tls.certificate)"
                raise _fault(name, key, cause) from error
            raise _fault(name, key, f"with {certificate} (tls.certificate): {_cause(error)}") from error


class AlertingSSLObject(ssl.SSLObject):
    """One that says why a handshake fails, to us and to the client.

    asyncio drops the alert that a failure has brought about (RFC 8446 §6.2): so it hears first that there is
    something to send, and of the failure when the client goes on.
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
            log.info("handshake.failed", client=client_address.get(), error=_cause(error))
            raise ssl.SSLWantReadError from error


def pinned(certificate: Path) -> ssl.SSLContext:
    """For a client on the machine of a server that shows `certificate`: that very one is trusted, no other.

    Raises StartError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # The address by which it is reached from here is hardly ever among its names.
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=_first(certificate))
    return context


def _first(file: Path) -> bytes:
    """The first certificate in it, in DER: the others are those of its authorities."""
    found = _CERTIFICATE.search(_read("certificate", file))
    if found is None:
        raise _fault("certificate", file, "there is no PEM certificate in it")
    try:
        certificate = ssl.PEM_cert_to_DER_cert(found[0])
        expiry(certificate)
    except (ValueError, IndexError) as error:
        raise _fault("certificate", file, "its first certificate cannot be read") from error
    return certificate


def expiry(certificate: bytes) -> float:
    """The end of the validity of one in DER (RFC 5280 §4.1); the standard library tells no server its own."""
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
    """Tag, start and stop of the content (X.690 §8.1)."""
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
    # Not the time of its content, which whoever copies it may keep, and which leaves out who may read it.
    return found.st_dev, found.st_ino, found.st_size, found.st_ctime_ns


def _read(name: str, file: Path) -> str:
    try:
        return file.read_text("ascii", "replace")
    except OSError as error:
        raise _fault(name, file, error.strerror or str(error)) from error


def _fault(name: str, file: Path, cause: str) -> StartError:
    return StartError(f"tls.{name}: {file}: {cause}")


def _cause(error: Exception) -> str:
    # The first is what is wrong with a client's certificate.
    found = (getattr(error, name, None) for name in ("verify_message", "reason", "strerror"))
    return str(next(filter(None, found), error)).lower().replace("_", " ")


def _written(when: float) -> str:
    return datetime.fromtimestamp(when, UTC).isoformat().replace("+00:00", "Z")

"""TLS contexts for connections to other servers."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any, Self, TypeAlias

from storage.tls import secure

Certificate: TypeAlias = Mapping[str, Any]  # as SSLSocket.getpeercert() returns it


# Called with the certificate that a server has shown, once it is accepted, in a handshake of this context.
certificate_shown: ContextVar[Callable[[Certificate], None] | None] = ContextVar(
    "certificate_shown", default=None
)


class CertificateRefused(ssl.SSLCertVerificationError):
    """A refused certificate of a server, with `chain`: all that the server has sent, its own first."""

    def __init__(self, error: ssl.SSLCertVerificationError, chain: Sequence[Certificate]) -> None:
        super().__init__(*error.args)
        self.reason, self.library = error.reason, error.library
        self.verify_code, self.verify_message = error.verify_code, error.verify_message
        self.chain = tuple(chain)


class ClientSSLObject(ssl.SSLObject):
    """An SSLObject that raises CertificateRefused: the error of OpenSSL does not say what was refused.

    `incoming` and `outgoing` have the records of TLS.
    """

    incoming: ssl.MemoryBIO
    outgoing: ssl.MemoryBIO

    @classmethod
    def _create(cls, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, *rest: Any, **more: Any) -> Self:
        made: Self = super()._create(incoming, outgoing, *rest, **more)  # type: ignore[misc]
        made.incoming, made.outgoing = incoming, outgoing
        return made

    def do_handshake(self) -> None:
        try:
            super().do_handshake()
        except ssl.SSLCertVerificationError as error:
            raise refused(self, error) from error
        tell, certificate = certificate_shown.get(), self.getpeercert()
        if tell is not None and certificate:  # there is none if any is accepted
            tell(certificate)


def refused(handshake: ssl.SSLObject | ssl.SSLSocket, error: ssl.SSLError) -> ssl.SSLError:
    """The error of a handshake; if it refuses a certificate, with what the peer has sent."""
    if not isinstance(error, ssl.SSLCertVerificationError):
        return error
    # The public method of Python 3.13 returns DER, which the standard library does not decode.
    sent = handshake._sslobj.get_unverified_chain()  # type: ignore[union-attr]
    return CertificateRefused(error, [each.get_info() for each in sent or ()])


def client_context(ca_file: Path | None = None) -> ssl.SSLContext:
    """A new context.  It accepts certificates of the system's authorities and, if given, those of `ca_file`.

    A certificate in the file need not be an authority's: a server's own is accepted too.
    Raises OSError if the file cannot be read, ssl.SSLError if it has no certificate.
    """
    context = secure(ssl.create_default_context(cafile=ca_file))
    if ca_file is not None:
        context.load_default_certs()  # CDNs and token servers may have certificates of public authorities
    context.sslobject_class = ClientSSLObject
    return context


def insecure_context(ca_file: Path | None = None) -> ssl.SSLContext:
    """A new context that accepts any certificate.  Raises the errors of client_context()."""
    # Without the system's authorities: they take 20 ms.
    context = secure(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if ca_file is not None:
        context.load_verify_locations(ca_file)
    context.sslobject_class = ClientSSLObject
    return context


def shared_context(ca_file: Path | None = None) -> ssl.SSLContext:
    """As client_context(), for those who do not change it: without `ca_file` it is public_context()."""
    return public_context() if ca_file is None else client_context(ca_file)


@cache
def public_context() -> ssl.SSLContext:
    """The context with the system's authorities, shared by all: loading the authorities takes time."""
    return client_context()

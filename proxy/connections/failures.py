"""Why a connection failed, in words.

No text of OpenSSL, Python or aiohttp is passed on: it names functions and classes, and aiohttp's has URLs,
which may be signed or hold a password.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass

from yarl import URL

from proxy.connections.trust import Certificate, CertificateRefused

MOST_NAMES = 4  # of a certificate that are told
FIREWALLS = "check its port, and the firewalls on the way"
HTTPS = "if it serves https, write https:// in its URL"
CLOSED = "if it serves plain http, write http:// in its URL"
_ERRNO = re.compile(r"\[Errno (\d+)\]")
_SPEAKS_PYTHON = re.compile(r"\[Errno|Connect call failed|_ssl\.c|\b[A-Z]\w+(?:Error|Exception)\b")
_ALERT = r"b'\x15\x03"  # how an error of aiohttp quotes the beginning of a TLS alert (RFC 8446 §6)
_DAY = "%Y-%m-%d %H:%M UTC"


@dataclass(frozen=True, slots=True)
class Failure:
    """What is wrong with the peer, which is `it`, and what to do; each is half a sentence."""

    cause: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.cause}; {self.advice}" if self.advice else self.cause


def explain(error: BaseException, url: URL | None = None, trust: str = "ca_file") -> Failure:
    """Why a request to `url` failed, or the transfer of its answer without `url`.

    `trust` is the setting that names the file of the trusted authorities.
    """
    from aiohttp import ClientProxyConnectionError  # its import takes time

    if isinstance(error, ClientProxyConnectionError):
        failure = explain(error.os_error)
        return Failure(f"its proxy cannot be reached: {failure.cause}", "check proxy in the configuration")
    for each in _chain(error):
        if isinstance(each, ssl.SSLCertVerificationError):
            return _certificate(each, url, trust)
        if isinstance(each, ssl.SSLError):
            return _handshake(each)
    return _connection(error, url)


def reason(error: BaseException) -> str:
    """Why something failed, a connection or an access to a file, in half a sentence."""
    return explain(error).cause


def file_fault(error: OSError) -> str:
    """Why a file of certificates or keys cannot be used."""
    if not isinstance(error, ssl.SSLError):
        return _system(error)
    known = {
        "KEY_VALUES_MISMATCH": "the key is not that of the certificate",
        "EE_KEY_TOO_SMALL": "the key of the certificate is too short",
        "CA_MD_TOO_WEAK": "the certificate is signed with a hash that is too weak",
    }
    return known.get(error.reason or "", "it has no certificate, or no key, in PEM format")


def explain_client(error: ssl.SSLError) -> str:
    """Why the handshake with a client failed."""
    if isinstance(error, ssl.SSLCertVerificationError):
        where = ", in tls.client_ca" if error.verify_code in _UNTRUSTED else ""
        return f"the client's certificate {_refused(error)}{where}"
    found = error.reason or ""
    for reasons, cause in _OF_CLIENTS:
        if any(each in found for each in reasons):
            return cause
    return _unknown(found)


# Certificates


def _certificate(error: ssl.SSLCertVerificationError, url: URL | None, trust: str) -> Failure:
    code = error.verify_code
    if code in (_HOST, _ADDRESS):
        host = url.raw_host if url else ""
        named = "another name" if not (names := _names(error)) else names
        advice = f"use a name that it has, or renew it with {host}" if host else "use a name that it has"
        return Failure(f"its certificate is for {named}" + (f", not for {host}" if host else ""), advice)
    if code in _UNTRUSTED:
        if url is None or url.raw_host is None:
            return Failure(f"its certificate {_refused(error)}", f"if you trust it, name it in {trust}")
        host = f"[{url.raw_host}]" if ":" in url.raw_host else url.raw_host
        fetch = f"openssl s_client -showcerts -connect {host}:{url.port} </dev/null"
        line = f"{fetch} | sed -n '/BEGIN CERT/,/END CERT/p' >ca.pem"
        return Failure(f"its certificate {_refused(error)}", f"if you trust it, name it in {trust}: {line}")
    dated = "have it renewed, and check the clock of this machine"
    return Failure(f"its certificate {_refused(error)}", dated if code in _DATED else "have it replaced")


# X509_V_ERR_… of OpenSSL, x509_vfy.h
_EARLY, _EXPIRED, _HOST, _ADDRESS = 9, 10, 62, 64
_DATED = (_EARLY, _EXPIRED)
_UNTRUSTED = (2, 18, 19, 20, 21)
_SELF_SIGNED = 18
_OTHERS = {
    23: "is revoked",
    26: "is not made for this purpose",
    66: "has a key that is too short",
    67: "is from an authority whose key is too short",
    68: "is signed with a hash that is too weak",
}


def _refused(error: ssl.SSLCertVerificationError) -> str:
    """What is wrong with a certificate; `it` precedes."""
    chain = error.chain if isinstance(error, CertificateRefused) else ()
    code, now = error.verify_code, time.time()
    if code == _EXPIRED:
        ended = [each["notAfter"] for each in chain if ssl.cert_time_to_seconds(each["notAfter"]) < now]
        return f"expired on {_day(ended[0])}" if ended else "has expired, or its authority's has"
    if code == _EARLY:
        begun = [each["notBefore"] for each in chain if ssl.cert_time_to_seconds(each["notBefore"]) > now]
        return f"is valid only from {_day(begun[0])}" if begun else "is not valid yet"
    if code == _SELF_SIGNED:
        return "is self-signed, and not trusted here"
    if code in _UNTRUSTED:
        issuer = _name(chain[-1], "issuer") if chain else ""
        return "is from an authority that is not trusted here" + (f" ({issuer})" if issuer else "")
    return _OTHERS.get(code, f"is not accepted: {error.verify_message.rstrip('.')}")


def _names(error: ssl.SSLCertVerificationError) -> str:
    """The names that a server's certificate has."""
    if not isinstance(error, CertificateRefused) or not error.chain:
        return ""
    own = error.chain[0]
    names = [_printable(name) for _, name in own.get("subjectAltName", ())] or [_name(own, "subject")]
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _name(certificate: Certificate, part: str) -> str:
    """The common name of a certificate's subject or issuer, else its organization."""
    found = {key: value for each in certificate.get(part, ()) for key, value in each}
    return _printable(found.get("commonName") or found.get("organizationName") or "")


def _printable(text: str) -> str:
    return "".join(each if each.isprintable() else "?" for each in text[:100])


def _day(text: str) -> str:
    return time.strftime(_DAY, time.gmtime(ssl.cert_time_to_seconds(text)))


# Handshakes

_VERSIONS = ("PROTOCOL_VERSION", "UNSUPPORTED_PROTOCOL", "VERSION_TOO", "NO_PROTOCOLS", "WRONG_SSL_VERSION")
_CIPHERS = ("NO_SHARED_CIPHER", "NO_CIPHERS", "INSUFFICIENT_SECURITY", "HANDSHAKE_FAILURE")
_NO_TLS = (
    "WRONG_VERSION_NUMBER",
    "HTTP_REQUEST",
    "PROXY_REQUEST",
    "UNKNOWN_PROTOCOL",
    "RECORD_LAYER",
    "TOO_LONG",
)
_ENDED = ("UNEXPECTED_EOF", "EOF occurred", "PROTOCOL_IS_SHUTDOWN", "CLOSE_NOTIFY")
_CLIENT_KEYS = "check client_certificate and client_key"
# Parts of OpenSSL's reasons; an alert is what the peer says (RFC 8446 §6.2).
_OF_SERVERS = (
    (_NO_TLS, "it does not speak TLS", "if it serves plain http, write http:// in its URL"),
    (_VERSIONS, "it shares no version of TLS with this machine, which speaks 1.2 and 1.3", "have it updated"),
    (("CERTIFICATE_REQUIRED",), "it demands a client certificate", "set client_certificate and client_key"),
    (("ALERT_UNKNOWN_CA",), "it does not trust the authority of our client certificate", _CLIENT_KEYS),
    (("ALERT_CERTIFICATE_EXPIRED",), "it says that our client certificate has expired", _CLIENT_KEYS),
    (("ALERT_CERTIFICATE_REVOKED",), "it says that our client certificate is revoked", _CLIENT_KEYS),
    (
        ("ALERT_BAD_CERTIFICATE", "ALERT_CERTIFICATE", "UNSUPPORTED_CERTIFICATE", "ACCESS_DENIED"),
        "it refuses our client certificate, or that we have none",
        _CLIENT_KEYS,
    ),
    (
        _CIPHERS,
        "it refuses the TLS handshake: it demands a client certificate, or shares no cipher with us",
        "if it demands one, set client_certificate and client_key",
    ),
    (("UNRECOGNIZED_NAME",), "it serves no host of this name", "check the host in its URL"),
    (("LEGACY_RENEGOTIATION",), "its TLS is too old to be safe", "have it updated"),
    (_ENDED, "it closed the connection during the TLS handshake", ""),
)
_OF_CLIENTS = (
    (("DID_NOT_RETURN",), "the client has no certificate, and tls.client_certificate requires one"),
    (_VERSIONS, "the client shares no version of TLS with this server: see tls.minimum"),
    (_NO_TLS, "the client does not speak TLS"),
    (
        ("ALERT_UNKNOWN_CA", "ALERT_BAD_CERTIFICATE", "ALERT_CERTIFICATE_UNKNOWN"),
        "the client does not trust the server's certificate: install its authority there (entrepot setup)",
    ),
    (("ALERT_CERTIFICATE_EXPIRED",), "the client says that the server's certificate has expired"),
    (("ALERT_",), "the client refused the handshake"),
    (_CIPHERS, "the client shares no cipher with this server"),
    (_ENDED, "the client closed the connection during the handshake"),
)


def _handshake(error: ssl.SSLError) -> Failure:
    found = error.reason or str(error)
    for reasons, cause, advice in _OF_SERVERS:
        if any(each in found for each in reasons):
            return Failure(cause, advice)
    return Failure(_unknown(error.reason or ""))


def _unknown(found: str) -> str:
    text = found.replace("_", " ").lower().replace("tlsv1", "TLS").replace("sslv3", "TLS")
    return f"TLS failed: {text}" if text else "TLS failed"


# Connections


def _connection(error: BaseException, url: URL | None) -> Failure:
    """The failure of a connection, but for its certificates and its handshake."""
    plain = url is not None and url.scheme == "http"
    if isinstance(error, TimeoutError):
        return _late(error, plain)
    causes = [each for each in _chain(error) if isinstance(each, OSError)]
    for each in causes:
        if isinstance(each, socket.gaierror):
            return _unresolved(each, url)
        if each.errno == errno.ECONNREFUSED:
            return Failure("nothing listens there (connection refused)", "check that it runs, and its port")
    if any(each.errno == errno.ECONNRESET for each in causes):
        return _ended("it reset the connection", url)
    if causes and not all(isinstance(each, ConnectionError) for each in causes):
        return Failure(_system(causes[-1]))
    return _ended("it closed the connection", url) if causes else _answer(error, url)


def _late(error: TimeoutError, plain: bool) -> Failure:
    from aiohttp import ConnectionTimeoutError

    if not isinstance(error, ConnectionTimeoutError):
        return Failure("no answer in time", FIREWALLS)
    what = "connection" if plain else "connection, or no TLS handshake,"
    return Failure(f"no {what} was made in time", FIREWALLS)


def _unresolved(error: socket.gaierror, url: URL | None) -> Failure:
    name = f"the name {url.raw_host}" if url and url.raw_host else "its name"
    if error.errno == socket.EAI_AGAIN:
        return Failure(f"{name} cannot be resolved: no name server answers", "check /etc/resolv.conf")
    return Failure(f"{name} is unknown to the name servers", "check the name, and /etc/resolv.conf")


def _ended(what: str, url: URL | None) -> Failure:
    if url is None:
        return Failure(what)
    if url.scheme == "http":
        return Failure(f"{what} without an answer", HTTPS)
    return Failure(f"{what} without an answer: it does not speak TLS, or refuses ours", CLOSED)


def _answer(error: BaseException, url: URL | None) -> Failure:
    """The failure of what a connection has carried."""
    from aiohttp import (
        ClientHttpProxyError,
        ClientPayloadError,
        ClientResponseError,
        InvalidURL,
        ServerConnectionError,
    )
    from aiohttp.http_exceptions import LineTooLong

    if isinstance(error, ServerConnectionError):
        return _ended("it closed the connection", url)
    if isinstance(error, ClientHttpProxyError):
        return Failure(f"its proxy answered {error.status}", "check proxy in the configuration")
    if isinstance(error, ClientResponseError):
        for each in _chain(error):
            if isinstance(each, LineTooLong):
                return Failure(f"it sent a header longer than {each.args[1] >> 10} KiB")
        return (
            Failure("it speaks TLS", HTTPS) if _ALERT in error.message else Failure("it sent malformed HTTP")
        )
    if isinstance(error, ClientPayloadError):
        return Failure("its answer ended early")
    if isinstance(error, InvalidURL):
        return Failure("the URL is not valid")
    text = str(error)
    return Failure(text if text and not _SPEAKS_PYTHON.search(text) else "an unexpected fault")


def _system(error: OSError) -> str:
    """The operating system's words."""
    text = error.strerror or str(error)
    if text and not _SPEAKS_PYTHON.search(text):
        return text
    numbers = [error.errno] if error.errno else [int(each) for each in _ERRNO.findall(text)]
    # Several addresses may have failed, each for its own reason.
    return ", ".join(dict.fromkeys(os.strerror(each) for each in numbers)) or "an unexpected fault"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what has caused it, without the errors in which aiohttp wraps others."""
    found: BaseException | None = error
    while found is not None:
        wrapped = getattr(found, "certificate_error", None) or getattr(found, "os_error", None)
        if wrapped is None:
            yield found
        found = wrapped or found.__cause__

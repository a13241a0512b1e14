"""For how long certificates hold.  The standard library tells it only of one that it has verified."""

from __future__ import annotations

import asyncio
import ssl
import time
from pathlib import Path

from proxy.console import plural
from proxy.doctor.checks import Check, ok, warning

SOON = 14  # days: less than the last third of ninety, in which they are renewed
DAY = 86400.0


async def of_host(host: str, port: int, context: ssl.SSLContext, seconds: float) -> float:
    """When the certificate of a host ends, in seconds since the epoch.

    Raises ssl.SSLError where it is not accepted, OSError and TimeoutError where nobody answers.
    """
    async with asyncio.timeout(seconds):
        _, writer = await asyncio.open_connection(host, port, ssl=context, server_hostname=host)
    try:
        return _end(writer.get_extra_info("ssl_object"))
    finally:
        writer.close()


def of_files(certificate: Path, key: Path | None) -> float:
    """When a certificate of our own ends.  Raises OSError, ssl.SSLError for files that are none, or no pair.

    We shake hands with ourselves, in memory, as one who trusts nothing but this certificate.
    """
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(certificate, key)
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    theirs.check_hostname = False
    theirs.load_verify_locations(certificate)
    theirs.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = theirs.wrap_bio(back, there, server_side=False)
    server = ours.wrap_bio(there, back, server_side=True)
    waiting = [client, server]
    while client in waiting:
        side = waiting.pop(0)
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            waiting.append(side)
    return _end(client)


def _end(tls: ssl.SSLObject) -> float:
    found = tls.getpeercert() or {}
    return ssl.cert_time_to_seconds(str(found["notAfter"]))


def judged(name: str, subject: str, end: float, advice: str, now: float | None = None) -> Check:
    """Of one that holds still; `advice` is how it is renewed."""
    days = int((end - (time.time() if now is None else now)) / DAY)
    message = f"the certificate holds for {plural(days, 'day')} more"
    return ok(name, subject, message) if days >= SOON else warning(name, subject, message, advice)


def refused(error: ssl.SSLError) -> str:
    """Why a certificate was not accepted."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate is not accepted: {error.verify_message.rstrip('.')}"
    return f"no TLS: {error.reason or 'what came is none'}".replace("_", " ").lower().replace("tls", "TLS")

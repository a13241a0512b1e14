"""For how long certificates hold."""

from __future__ import annotations

import asyncio
import ssl
import time

from proxy.config.quantities import plural
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
        found = writer.get_extra_info("peercert")
        return ssl.cert_time_to_seconds(str(found["notAfter"]))
    finally:
        writer.close()


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

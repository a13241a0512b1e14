"""The expiry of certificates."""

from __future__ import annotations

import asyncio
import ssl
import time

from proxy.config.quantities import plural
from proxy.doctor.checks import Check, ok, warning

MIN_DAYS = 14  # a 90-day certificate is usually renewed when 30 days are left
DAY = 86400.0


async def expiry_of(host: str, port: int, context: ssl.SSLContext, seconds: float) -> float:
    """The expiry of a host's certificate, in seconds since the epoch.

    Raises ssl.SSLError if the certificate is not accepted, OSError or TimeoutError if the host does not
    answer.
    """
    async with asyncio.timeout(seconds):
        _, writer = await asyncio.open_connection(host, port, ssl=context, server_hostname=host)
    try:
        found = writer.get_extra_info("peercert")
        return ssl.cert_time_to_seconds(str(found["notAfter"]))
    finally:
        writer.close()


def check_expiry(name: str, subject: str, end: float, advice: str, now: float | None = None) -> Check:
    """The check of a valid certificate by its expiry, `end`; `advice` says how to renew it."""
    days = int((end - (time.time() if now is None else now)) / DAY)
    message = f"the certificate is valid for {plural(days, 'day')} more"
    return ok(name, subject, message) if days >= MIN_DAYS else warning(name, subject, message, advice)

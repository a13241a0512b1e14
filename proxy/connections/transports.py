"""What transports of asyncio do otherwise in some releases of Python."""

from __future__ import annotations

from contextlib import suppress
from typing import Any


def abort(transport: Any) -> None:
    """Abort it.  With TLS that fails in Python 3.11.2, Debian's, once close() was called twice."""
    with suppress(AttributeError):
        transport.abort()

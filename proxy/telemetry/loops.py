"""Requests that lead back to where they come from: RFC 8586, CDN-Loop.

Each server adds its id to the requests that it sends to an upstream, after those of the servers that asked it
for the same.  A request that has its own id is refused: to answer it would need its own answer.

Only ids of this form are read and passed on: clients share what one of them causes to be fetched.
"""

from __future__ import annotations

import re

from proxy.telemetry.exchange import current

HEADER = "CDN-Loop"
MOST = 16  # servers that a request is known to have passed
_PASSED = re.compile(r"entrepot; id=([0-9a-f]{16})(?![^,\s])")


def passed_by(header: str) -> tuple[str, ...]:
    """The ids of the servers that a request has passed, by its header."""
    return tuple(_PASSED.findall(header)[-MOST:])


def mark(server: str) -> str:
    """The header of a request that the server sends for the exchange of this context."""
    return ", ".join(f"entrepot; id={each}" for each in (*current().passed, server))

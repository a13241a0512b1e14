"""Passing on a request of another replica to the process that does the operations, over a unix socket."""

from __future__ import annotations

from pathlib import Path

import aiohttp
import msgspec

from proxy.connections.failures import reason
from proxy.upstream.replicas import PATH, RefusedRequest

__all__ = ["PATH", "SOCKET", "forward"]

SOCKET = "operations"  # in the directory of the server's processes


async def forward(run: Path, body: bytes) -> tuple[int, bytes]:
    """The status and the body of the answer."""
    connector = aiohttp.UnixConnector(str(run / SOCKET))
    timeout = aiohttp.ClientTimeout(total=None)  # whoever asks has one
    try:
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
            session.post("http://live/", data=body) as response,
        ):
            return response.status, await response.read()
    except (aiohttp.ClientError, OSError) as error:
        refused = RefusedRequest(f"its housekeeping process cannot be asked: {reason(error)}", "UNAVAILABLE")
        return 503, msgspec.json.encode(refused)

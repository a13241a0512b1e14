#!/usr/bin/env bash
# Expected: reading a response of aiohttp's client affects that response alone. A body that nobody reads pauses its
#   connection when the buffer is full, until somebody reads it.
# Actual: a body that has come whole gives its connection back although its end still waits in the buffer. Whoever
#   reads that end afterwards resumes the connection, which by then belongs to another response: each such read,
#   of however few bytes, lets up to 256 KiB more of the other body into its buffer.
# Version: aiohttp 3.14.5 (PyPI), on the Python that runs this.
# Why a registry cache must care: responses with bodies smaller than the buffer (tokens, manifests, parts of blobs)
#   are read late when something else is waited for first. Memory for bodies that are not read has no bound then; and
#   who has paused reading to take the socket, for sendfile or splice, shares its bytes with aiohttp: what
#   it takes is missing from the body, or stands in its wrong place. Read a body to its end before anything
#   else is awaited, or hold the connection paused.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install --disable-pip-version-check aiohttp==3.14.5
timeout 60 "$work/venv/bin/python" - <<'PYTHON'
import asyncio
import platform
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import aiohttp

SMALL, LARGE, READS = 100_000, 100_000_000, 20


class Registry(BaseHTTPRequestHandler):
    """Sends bodies of the lengths that are in the paths, and keeps its connections."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", self.path[1:])
        self.end_headers()
        try:
            self.wfile.write(bytes(int(self.path[1:])))
        except ConnectionError:
            self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
threading.Thread(target=server.serve_forever, daemon=True).start()
origin = f"http://127.0.0.1:{server.server_port}"


async def settled(body: aiohttp.StreamReader) -> int:
    """How many bytes of it have come, once no more come for a while."""
    seen = -1
    while seen != (seen := body.total_bytes):
        await asyncio.sleep(0.5)
    return seen


async def unread(late: bool) -> tuple[int, int]:
    """What has come of a body that nobody reads, before and after the small one on its connection is read."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as session:
        small = await session.get(f"{origin}/{SMALL}")
        await settled(small.content)
        if not late:
            await small.read()
        large = await session.get(f"{origin}/{LARGE}")  # limit=1: by the same connection
        before = await settled(large.content)
        for _ in range(READS if late else 0):
            await small.content.readexactly(SMALL // READS)
            await asyncio.sleep(0.1)
        after = await settled(large.content)
        large.close()
    return before, after


print(f"aiohttp {aiohttp.__version__}, Python {platform.python_version()}")
found = {}
for when, late in {"before": False, "after": True}.items():
    found[late] = before, after = asyncio.run(unread(late))
    print(f"the small body is read {when} the large one is asked for: of that, unread, {before:,} and then {after:,} "
          "bytes have come")
holds = found[False][0] == found[False][1] < 2_000_000 and found[True][1] > found[True][0] + 2_000_000
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

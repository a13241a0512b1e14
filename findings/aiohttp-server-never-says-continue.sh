#!/usr/bin/env bash
# Expected: aiohttp's `web.Server`, on which `web.Application` is built, answers `Expect: 100-continue` with 100 when the
#   handler begins to read the body, as the Application does.
# Actual: only the Application's router answers so. `web.Server` sends nothing before the body, whatever the handler does. A
#   client has to send it after a while (RFC 9110, 10.1.1: it must not wait for an unlimited time): curl does after a second.
# Version: aiohttp 3.14.5 (PyPI), on the Python that runs this; the curl that is there.
# Why a registry cache must care: `web.Server` is right for the data path, and curl and others ask so for uploads above 1 MiB:
#   each takes a second longer, and one who has no permission sends all of it to learn that. The handler writes the 100
#   itself, after it has checked who asks.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install --disable-pip-version-check aiohttp==3.14.5
timeout 120 "$work/venv/bin/python" - <<'PYTHON'
import asyncio
import logging
import platform
import subprocess
import sys
import time

import aiohttp
from aiohttp import web

logging.disable()  # of clients that leave
BODY = bytes(1000)


async def put(request: web.BaseRequest) -> web.Response:
    return web.Response(text=f"{len(await request.read())} bytes")


async def first(port: int) -> str:
    """The first line that the server sends before the body is sent, within two seconds."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\nExpect: 100-continue\r\n\r\n" % len(BODY))
    try:
        line = (await asyncio.wait_for(reader.readline(), 2)).decode().strip()
    except TimeoutError:
        line = "nothing"
    writer.write(BODY)
    rest = await reader.readuntil(b" bytes")
    writer.close()
    assert rest.endswith(b"1000 bytes")
    return line


def curl(port: int) -> float:
    """The seconds that an upload by curl takes."""
    begun = time.monotonic()
    words = ["curl", "--silent", "--fail", "--noproxy", "*", "--header", "Expect: 100-continue"]
    subprocess.run([*words, "--upload-file", "-", f"http://127.0.0.1:{port}/"], input=BODY, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - begun


async def main() -> bool:
    application = web.Application()
    application.router.add_put("/", put)
    seen = []
    for name, runner in {
        "web.Application": web.AppRunner(application),
        "web.Server": web.ServerRunner(web.Server(put)),
    }.items():
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port = runner.addresses[0][1]
        line, took = await first(port), await asyncio.to_thread(curl, port)
        print(f"{name}: before the body it sends {line}; an upload by curl takes {took:.1f} s")
        seen.append((line, took > 0.9))
        await runner.cleanup()
    return seen == [("HTTP/1.1 100 Continue", False), ("nothing", True)]


print(f"aiohttp {aiohttp.__version__}, Python {platform.python_version()}")
holds = asyncio.run(main())
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

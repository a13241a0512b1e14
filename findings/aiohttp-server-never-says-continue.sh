#!/usr/bin/env bash
# Expected: aiohttp's `web.Server`, on which `web.Application` is built, answers `Expect: 100-continue` with 100 when the
#   handler begins to read the body, as the Application does. aiohttp's client, asked for `expect100=True`, sends the body
#   after a while if no 100 comes (RFC 9110, 10.1.1: it must not wait for an unlimited time), or fails by `sock_read`.
# Actual: only the Application's router answers so. With `web.Server`, `request.read()` waits for a body that the client
#   holds back. aiohttp's own client holds it back without a limit: `sock_read` does not count, only `total` ends it. The two
#   wait for each other until then; curl and Go's client send after a second, for each upload.
# Version: aiohttp 3.14.5 (PyPI), on the Python that runs this.
# Why a registry cache must care: `web.Server` is right for the data path, and curl asks so for uploads above 1 MiB: each takes
#   a second longer, and clients without a limit of their own never end. The handler writes the 100 itself, after it
#   has checked who asks. As a client, a cache whose transfers have no `total` must not use `expect100`.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install --disable-pip-version-check aiohttp==3.14.5
timeout 120 "$work/venv/bin/python" - <<'PYTHON'
import asyncio
import logging
import platform
import sys
import time

import aiohttp
from aiohttp import web

logging.disable()  # of clients that leave
BODY = bytes(1000)
READ, TOTAL = 1.0, 5.0


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


async def ask(port: int) -> tuple[str, float]:
    """What aiohttp's client gets, and when."""
    begun = time.monotonic()
    limits = aiohttp.ClientTimeout(sock_read=READ, total=TOTAL)
    async with aiohttp.ClientSession(timeout=limits) as session:
        try:
            async with session.put(f"http://127.0.0.1:{port}/", data=BODY, expect100=True) as response:
                result = await response.text()
        except TimeoutError as error:
            result = type(error).__name__
    return result, time.monotonic() - begun


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
        line, (result, took) = await first(port), await ask(port)
        print(f"{name}: before the body it sends {line}; aiohttp's client, sock_read={READ:g}, total={TOTAL:g}: "
              f"{result} after {took:.1f} s")
        seen.append((line, result, took > TOTAL - 0.5))
        await runner.cleanup()
    return seen == [("HTTP/1.1 100 Continue", "1000 bytes", False), ("nothing", "TimeoutError", True)]


print(f"aiohttp {aiohttp.__version__}, Python {platform.python_version()}")
holds = asyncio.run(main())
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

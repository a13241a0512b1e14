#!/usr/bin/env bash
# Expected: `ClientTimeout(sock_connect=1)` of aiohttp ends a request after a second, if no connection to the host can be made by then, however
#   many addresses the host has; they are tried side by side, a quarter of a second after one another (Happy Eyeballs).
# Actual: where all addresses are silent, each costs a second: three of them three. The attempts that began side by side end together,
#   and aiohttp then begins anew with one address less, with the whole limit. `ClientTimeout(connect=1)` does limit them together, the
#   resolution and the handshake of TLS included. Where one of the addresses answers, all is as expected.
# Version: aiohttp 3.14.5 (PyPI), on the Python that runs this.
# Why a registry cache must care: registries have many addresses, Docker Hub eight or more. In an outage that drops packets, a limit of
#   10 s for connections becomes more than a minute, in which pulls of what is stored already wait to learn that it may be
#   stale. Limit the whole wait for an answer beside it, or use `connect`.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install --disable-pip-version-check aiohttp==3.14.5
timeout 60 "$work/venv/bin/python" - <<'PYTHON'
import asyncio
import importlib.metadata
import socket
import sys
import time

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

LIMIT = 1  # second


class Resolver(AbstractResolver):
    """Resolves each name to these addresses."""

    def __init__(self, addresses: list[str]) -> None:
        self.addresses = addresses

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_INET) -> list[ResolveResult]:
        given = {"hostname": host, "port": port, "family": socket.AF_INET, "proto": 0, "flags": 0}
        return [ResolveResult(host=each, **given) for each in self.addresses]

    async def close(self) -> None:
        pass


def make_silent(address: str, port: int) -> list[socket.socket]:
    """Fill the queue of a listening socket, so that further connections wait."""
    listening = socket.create_server((address, port), backlog=0)
    waiting = [socket.socket() for _ in range(3)]
    for each in waiting:
        each.setblocking(False)
        each.connect_ex((address, port))
    return [listening, *waiting]


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")


async def get(addresses: list[str], port: int, timeout: aiohttp.ClientTimeout) -> tuple[object, float]:
    """The status or the error, and the seconds that it took."""
    began, connector = time.monotonic(), aiohttp.TCPConnector(resolver=Resolver(addresses))
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        try:
            async with session.get(f"http://registry.example:{port}/") as response:
                outcome: object = response.status
        except aiohttp.ServerTimeoutError as error:
            outcome = type(error).__name__
    return outcome, time.monotonic() - began


async def main() -> bool:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    silent = [f"127.0.0.{number}" for number in (2, 3, 4)]
    kept = [make_silent(each, port) for each in silent]
    await asyncio.start_server(answer, "127.0.0.5", port)
    sock_connect = aiohttp.ClientTimeout(total=None, sock_connect=LIMIT)
    connect = aiohttp.ClientTimeout(total=None, connect=LIMIT)
    cases = {
        "sock_connect, a silent address": (silent[:1], sock_connect, "ConnectionTimeoutError", 1),
        "sock_connect, three silent addresses": (silent, sock_connect, "ConnectionTimeoutError", 3),
        "sock_connect, two silent addresses and one that answers": ([*silent[:2], "127.0.0.5"], sock_connect, 200, 0.5),
        "connect, three silent addresses": (silent, connect, "ConnectionTimeoutError", 1),
    }
    holds = True
    for what, (addresses, timeout, expected, about) in cases.items():
        outcome, seconds = await get(addresses, port, timeout)
        print(f"{what}: {outcome} after {seconds:.1f} s")
        holds = holds and outcome == expected and about - 0.1 <= seconds < about + 0.9
    for each in sum(kept, []):
        each.close()
    return holds


print(f"aiohttp {importlib.metadata.version('aiohttp')}, limit {LIMIT} s")
holds = asyncio.run(main())
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

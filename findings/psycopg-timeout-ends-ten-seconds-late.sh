#!/usr/bin/env bash
# Expected: `asyncio.timeout(1)` around a query of psycopg's AsyncConnection ends after a second also where the database
#   is silent, as it ends any other task that is cancelled: the connection is given up then, or closed.
# Actual: it ends after eleven seconds. The cancelled task first asks the database over a second connection to cancel the
#   query, and waits 5 seconds for that; then it waits 5 seconds more for the query. A second `cancel()` ends this at once.
#   Where the database answers, a query that is cancelled ends as soon as the timeout does.
# Versions: psycopg 3.3.9 with psycopg-binary (PyPI), Python 3.11 or newer.
# Why a registry cache must care: an outage of its database, in which packets are lost or a machine hangs, makes requests
#   wait ten seconds longer than their limit says, longer than clients and load balancers do, and each of them holds two
#   connections meanwhile. Who needs the limit waits for the task without its end, or cancels it twice.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install --disable-pip-version-check psycopg[binary]==3.3.9
timeout 120 "$work/venv/bin/python" - <<'PYTHON'
import asyncio
import logging
import socket
import struct
import sys
import threading
import time

import psycopg

logging.getLogger("psycopg").setLevel(logging.ERROR)
CANCEL_REQUEST = 80877102
LIMIT = 1.0
asked: list[str] = []


def message(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack("!i", 4 + len(content)) + content


def packet(connection: socket.socket) -> int:
    """The code with which the first packet of a connection begins."""
    length = struct.unpack("!i", connection.recv(4, socket.MSG_WAITALL))[0]
    return int(struct.unpack("!i", connection.recv(length - 4, socket.MSG_WAITALL)[:4])[0])


class Database:
    """A PostgreSQL server that logs everybody in, and then answers a request to cancel if it is not silent."""

    def __init__(self, silent: bool) -> None:
        self._silent = silent
        self._server = socket.create_server(("127.0.0.1", 0))
        self._first: socket.socket | None = None
        self.url = f"host=127.0.0.1 port={self._server.getsockname()[1]} user=a dbname=b sslmode=disable gssencmode=disable"
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        kept = []
        while True:
            connection = self._server.accept()[0]
            kept.append(connection)
            if packet(connection) != CANCEL_REQUEST:
                asked.append("a connection")
                self._first = connection
                encoding = message(b"S", b"client_encoding\0UTF8\0")
                connection.sendall(message(b"R", bytes(4)) + encoding + message(b"K", bytes(8)) + message(b"Z", b"I"))
                continue
            asked.append("a request to cancel")
            if not self._silent:
                connection.close()
                error = b"SERROR\0VERROR\0C57014\0Mcanceling statement\0\0"
                self._first.sendall(message(b"E", error) + message(b"Z", b"I"))


async def query(silent: bool, cancels: int) -> float:
    """How long it is from the first `cancel()` to the end of a query."""
    database = Database(silent)
    connection = await psycopg.AsyncConnection.connect(database.url, autocommit=True)
    task = asyncio.create_task(connection.execute("SELECT 1"))
    await asyncio.sleep(LIMIT)
    begun = time.monotonic()
    for _ in range(cancels):
        task.cancel()
        await asyncio.sleep(0.5)
    await asyncio.wait([task])
    assert task.cancelled()
    took = time.monotonic() - begun
    await connection.close()
    return took


async def limited() -> float:
    database = Database(silent=True)
    connection = await psycopg.AsyncConnection.connect(database.url, autocommit=True)
    begun = time.monotonic()
    try:
        async with asyncio.timeout(LIMIT):
            await connection.execute("SELECT 1")
    except TimeoutError:
        return time.monotonic() - begun
    raise AssertionError("the query ended")


print(f"psycopg {psycopg.__version__} ({psycopg.pq.__impl__})")
late = asyncio.run(limited())
print(f"a silent database, a timeout of {LIMIT:g} s: it ends after {late:.1f} s; {', '.join(asked)}")
answered = asyncio.run(query(silent=False, cancels=1))
print(f"a database that answers: the query ends {answered:.1f} s after cancel()")
twice = asyncio.run(query(silent=True, cancels=2))
print(f"a silent database, cancel() twice in half a second: the query ends {twice:.1f} s after the first")
holds = 10 < late < 20 and answered < 3 and 0.5 <= twice < 4 and asked[:2] == ["a connection", "a request to cancel"]
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

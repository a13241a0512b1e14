"""Listening sockets, and accepting connections on them.

The first process of a server binds those for clients and administrators, or has them from systemd
(proxy.web.activation), and its other processes share them.
Each process binds unix sockets of its own, for the others.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from proxy.config.errors import StartError
from proxy.config.hosts import Address
from proxy.config.schema import Config

log = structlog.get_logger()

BACKLOG = 1024  # connections that may wait to be accepted
_ADVICE = {
    errno.EADDRINUSE: "stop what listens there (ss -ltnp shows it), or choose another port",
    errno.EADDRNOTAVAIL: "choose an address of this machine (ip address shows them)",
    errno.EACCES: "choose a port from 1024, or give the server CAP_NET_BIND_SERVICE",
}
PAUSE = 1.0  # seconds before accepting again after it failed, for example because no descriptor is free


@dataclass(frozen=True, slots=True)
class Sockets:
    """The sockets of a process.

    listen, admin: those for clients and for administrators
    stores: those for clients of a single private registry, by its namespace
    """

    listen: list[socket.socket] = field(default_factory=list)
    admin: list[socket.socket] = field(default_factory=list)
    stores: dict[str, list[socket.socket]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[socket.socket]:
        for each in (self.listen, self.admin, *self.stores.values()):
            yield from each


def bind(address: Address, key: str) -> list[socket.socket]:
    """Bind a socket for each address that `address` resolves to.

    Raises StartError, with the configuration's `key` of the address.
    """
    sockets: list[socket.socket] = []
    try:
        for family, where in _resolved(address):
            listening = socket.create_server(where, family=family, backlog=BACKLOG)
            listening.setblocking(False)
            sockets.append(listening)
    except OSError as error:
        for each in sockets:
            each.close()
        raise _refusal(address, key, error) from error
    return sockets


def resolve(address: Address, key: str) -> list[tuple[socket.AddressFamily, Any]]:
    """The families and socket addresses that a listener has.

    Raises StartError, with the configuration's `key` of the address.
    """
    try:
        return _resolved(address)
    except OSError as error:
        raise _refusal(address, key, error) from error


def _resolved(address: Address) -> list[tuple[socket.AddressFamily, Any]]:
    found = socket.getaddrinfo(
        address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    return list(dict.fromkeys((each[0], each[4]) for each in found))


def _refusal(address: Address, key: str, error: OSError) -> StartError:
    # create_server repeats the address in strerror; a name that does not resolve has a negative errno.
    number = error.errno or 0
    cause = os.strerror(number) if number > 0 else error.strerror or str(error)
    advice = f": {_ADVICE[number]}" if number in _ADVICE else ""
    return StartError(f"cannot listen on {address} ({key}): {cause}{advice}")


def bind_all(config: Config) -> Sockets:
    """Bind the sockets of a server that is one process.  Raises StartError."""
    bound: dict[str, list[socket.socket]] = {}
    try:
        for key, address in config.listeners().items():
            bound[key] = bind(address, key)
    except StartError:
        for each in bound.values():
            for one in each:
                one.close()
        raise
    return sockets_of(config, bound)


def sockets_of(config: Config, bound: dict[str, list[socket.socket]]) -> Sockets:
    """The sockets of a configuration, of those that are `bound` by the path of their key."""
    stores = {name: bound[f"namespaces.{name}.listen"] for name in config.store_listeners()}
    return Sockets(bound["listen"], bound.get("admin", []), stores)


def bind_unix(path: Path) -> socket.socket:
    """Listen on a unix socket to which only our user can connect.

    Raises OSError, also if the path is too long for a socket, at about 100 bytes.
    """
    path.unlink(missing_ok=True)  # left by a process that had our id and was killed
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(str(path))
        path.chmod(0o600)  # before it listens, and a connection is possible
        listening.listen(BACKLOG)
        listening.setblocking(False)
    except BaseException:
        listening.close()
        raise
    return listening


async def accept(listening: socket.socket) -> AsyncIterator[tuple[socket.socket, object]]:
    """Yield each connection as it comes, and the address of its client; failures are logged.

    Without free descriptors, asyncio's own servers log a traceback for each place in their backlog.
    """
    loop = asyncio.get_running_loop()
    while True:
        try:
            found = await loop.sock_accept(listening)
        except ConnectionError:
            continue  # the client has left already
        except OSError as error:
            log.error("accept.failed", error=error.strerror)
            await asyncio.sleep(PAUSE)
            continue
        yield found
        await asyncio.sleep(0)  # sock_accept() does not yield while more connections are queued


async def stop_accepting(sockets: list[socket.socket]) -> None:
    """Called before the servers on the sockets are closed."""
    # 1. a connection is accepted, and a task is to make its transport  2. the server is closed  3. the
    # transport cannot be made any more, and nothing closes the connection: its client would wait.
    for each in sockets:
        asyncio.get_running_loop().remove_reader(each.fileno())
    await asyncio.sleep(0)

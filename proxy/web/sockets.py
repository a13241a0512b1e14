"""Listening sockets: bound by whoever starts first, shared by all who serve."""

from __future__ import annotations

import os
import socket

from proxy.config.errors import StartError
from proxy.config.hosts import Address
from proxy.config.schema import Config

BACKLOG = 1024  # connections that may wait to be accepted


def bind(address: Address, key: str) -> list[socket.socket]:
    """Sockets for all that `address` stands for.  Raises StartError, which names the `key` it is of."""
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(
            address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, where in dict.fromkeys((each[0], each[4]) for each in found):
            listening = socket.create_server(where, family=family, backlog=BACKLOG)
            listening.setblocking(False)
            sockets.append(listening)
    except OSError as error:
        for each in sockets:
            each.close()
        # The text of create_server names the address once more; a name that does not resolve has a number
        # below 0.
        number = error.errno or 0
        cause = os.strerror(number) if number > 0 else error.strerror or str(error)
        raise StartError(f"cannot listen on {address} ({key}): {cause}") from error
    return sockets


def bind_all(config: Config) -> tuple[list[socket.socket], list[socket.socket]]:
    """For clients, and for the administrator.  Raises StartError."""
    listen = bind(config.listen, "listen")
    try:
        return listen, bind(config.admin, "admin") if config.admin else []
    except StartError:
        for each in listen:
            each.close()
        raise

"""Listening sockets, which the first process of a server binds and its other processes share."""

from __future__ import annotations

import os
import socket

from proxy.config.errors import StartError
from proxy.config.hosts import Address
from proxy.config.schema import Config

BACKLOG = 1024  # connections that may wait to be accepted


def bind(address: Address, key: str) -> list[socket.socket]:
    """Bind a socket for each address that `address` resolves to.

    Raises StartError, with the configuration's `key` of the address.
    """
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
        # create_server repeats the address in strerror; a name that does not resolve has a negative errno.
        number = error.errno or 0
        cause = os.strerror(number) if number > 0 else error.strerror or str(error)
        raise StartError(f"cannot listen on {address} ({key}): {cause}") from error
    return sockets


def bind_all(config: Config) -> tuple[list[socket.socket], list[socket.socket]]:
    """Bind the sockets for clients and those for administrators.  Raises StartError."""
    listen = bind(config.listen, "listen")
    try:
        return listen, bind(config.admin, "admin") if config.admin else []
    except StartError:
        for each in listen:
            each.close()
        raise

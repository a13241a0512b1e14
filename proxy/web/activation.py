"""Listening sockets that systemd has opened for this process: the protocol of sd_listen_fds(3).

They stay open while no server runs: connections that come then wait until the next one accepts them.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass

from proxy.config.errors import StartError
from proxy.config.hosts import Address
from proxy.config.schema import Config
from proxy.web.sockets import bind, resolve

FIRST = 3  # the lowest descriptor that is passed: SD_LISTEN_FDS_START
_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
# Names of the listener for clients, and whether it has TLS then; None for both.
_CLIENTS = {"listen": None, "http": False, "https": True}


@dataclass(frozen=True, slots=True)
class PassedSocket:
    """A listening TCP socket, and its FileDescriptorName=."""

    name: str
    socket: socket.socket

    def __str__(self) -> str:
        return f"the socket {self.name!r} of systemd (descriptor {self.socket.fileno()})"

    @property
    def key(self) -> str:
        """The path of the configuration's key of its listener."""
        return "listen" if self.name in _CLIENTS else self.name

    def check(self, config: Config) -> None:
        """Raise StartError unless `config` has a listener of this name, with this address."""
        listeners = config.listeners()
        if self.key not in listeners:
            names = ", ".join(sorted({*_CLIENTS, *listeners}))
            raise StartError(
                f"{self} is for no listener: set FileDescriptorName= of its unit to one of {names}, "
                "or stop the unit"
            )
        if (encrypted := _CLIENTS.get(self.name)) is not None and encrypted != (config.tls is not None):
            fault = "needs tls, which is not configured" if encrypted else "is for plain HTTP, and tls is set"
            raise StartError(f"{self} {fault}: change tls, or FileDescriptorName= of its unit to listen")
        address = listeners[self.key]
        host, port = self.socket.getsockname()[:2]
        if not any((host, port) == (each[0], each[1] or port) for _, each in resolve(address, self.key)):
            raise StartError(
                f"{self} is bound to {Address(host, port)}, and {self.key} is {address}: "
                f"change {self.key}, or ListenStream= of its unit"
            )


class PassedSockets:
    """All sockets that were passed to this process; they are open until close()."""

    def __init__(self, sockets: Sequence[PassedSocket] = ()) -> None:
        self._sockets = sockets

    def check(self, config: Config) -> None:
        """Raise StartError unless each socket is that of a listener of `config`."""
        for each in self._sockets:
            each.check(config)

    def bind(self, address: Address, key: str) -> list[socket.socket]:
        """Copies of those for the listener `key`; if none was passed, bind it.  Raises StartError."""
        copies = [each.socket.dup() for each in self._sockets if each.key == key]
        for copy in copies:
            copy.setblocking(False)
        return copies or bind(address, key)

    def close(self) -> None:
        for each in self._sockets:
            each.socket.close()


def passed_sockets(environ: MutableMapping[str, str]) -> PassedSockets:
    """Those that `environ` tells of, which is once: its variables are removed.  Raises StartError."""
    process, count, names = (environ.pop(each, "") for each in _VARIABLES)
    if process != str(os.getpid()):  # none, or for the process that has started this one
        return PassedSockets()
    if not count.isdecimal():
        raise StartError(f"LISTEN_FDS is {count!r} and not a number of sockets: start the server by its unit")
    files = range(FIRST, FIRST + int(count))
    listed = names.split(":") if names else []
    if len(listed) != len(files):
        raise StartError(
            f"{count} sockets of systemd have {len(listed)} names: set FileDescriptorName= of each unit"
        )
    return PassedSockets([_passed(name, file) for name, file in zip(listed, files, strict=True)])


def _passed(name: str, file: int) -> PassedSocket:
    """Raises StartError unless it is a TCP socket that listens."""
    subject = f"the socket {name!r} of systemd (descriptor {file})"
    try:
        if not stat.S_ISSOCK(os.fstat(file).st_mode):
            raise StartError(f"{subject} is no socket: use ListenStream= in its unit")
        os.set_inheritable(file, False)
        found = socket.socket(fileno=file)
    except OSError as error:
        raise StartError(
            f"{subject} cannot be used: {error.strerror}: start the server by its unit"
        ) from error
    if fault := _fault(found):
        found.close()
        raise StartError(f"{subject} {fault}")
    return PassedSocket(name, found)


def _fault(found: socket.socket) -> str:
    """Why the server cannot listen on it; empty if it can."""
    if found.family not in (socket.AF_INET, socket.AF_INET6) or found.type != socket.SOCK_STREAM:
        kind = f"{socket.AddressFamily(found.family).name} and {socket.SocketKind(found.type).name}"
        return f"is of {kind}: set ListenStream= of its unit to an IP address and a port"
    if not found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return "is a connection: set Accept=no in its unit"
    return ""

"""What waits to be sent to slow clients: how much it is, and whom to cut off if it becomes too much."""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

PATIENT = 1.0  # seconds in which no client is cut off for the sake of others


def taken(connection: Any) -> int:
    """Return how many bytes the client has acknowledged: tcpi_bytes_acked of struct tcp_info, tcp(7)."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128)
    (number,) = struct.unpack_from("=Q", info, 120)
    return int(number)


def waiting(connection: Any) -> int:
    """Return how many bytes the kernel holds that the client has not acknowledged: SIOCOUTQ, tcp(7)."""
    found = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4))
    return int.from_bytes(found, "little")


@contextmanager
def corked(connection: Any) -> Iterator[None]:
    """Meanwhile send only full segments (tcp(7)): sendfile sends others too, for a sixth of its time."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    try:
        yield
    finally:
        with suppress(OSError):  # it has been closed
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)


class ClientProgress:
    """Since when a client takes nothing, although bytes wait for it."""

    __slots__ = ("_since", "_taken")

    def __init__(self) -> None:
        self._taken = -1
        self._since = 0.0

    def idle(self, connection: Any, now: float) -> float:
        """The seconds for which the client has taken nothing, as far as calls of this method have seen it."""
        if connection is None or connection.fileno() < 0:
            return 0.0
        acknowledged = taken(connection)
        if acknowledged != self._taken or not waiting(connection):
            self._taken, self._since = acknowledged, now
        return now - self._since


@dataclass(slots=True)
class Body:
    """The body of a response, which is held in memory until the client has taken it.

    Nothing else holds `content`: a traceback, for example, would keep it long after the client was cut off.
    """

    content: bytes
    connection: Any
    since: float
    taken: int
    cut_off: Callable[[], None]

    def speed(self, now: float) -> float:
        """Bytes that the client has taken in each second."""
        if self.connection.fileno() < 0:
            return 0.0
        return (taken(self.connection) - self.taken) / (now - self.since)


class Backlog:
    """The bodies that are held in memory for clients, no more than `limit` bytes in sum."""

    def __init__(self, limit: int, clock: Callable[[], float]) -> None:
        self._limit = limit
        self._clock = clock
        self._bodies: list[Body] = []

    @property
    def size(self) -> int:
        return sum(len(each.content) for each in self._bodies)

    def add(self, content: bytes, connection: Any, cut_off: Callable[[], None]) -> Body | None:
        """Hold a body.  If there is no room, the slowest clients are cut off; None if that is not enough."""
        now = self._clock()
        while self._bodies and self.size + len(content) > self._limit:
            slow = [each for each in self._bodies if now - each.since >= PATIENT]
            if not slow:
                return None
            slowest = min(slow, key=lambda each: each.speed(now))
            self.remove(slowest)
            slowest.cut_off()
        body = Body(content, connection, now, taken(connection), cut_off)
        self._bodies.append(body)
        return body

    def remove(self, body: Body) -> None:
        body.content = b""
        self._bodies = [each for each in self._bodies if each is not body]

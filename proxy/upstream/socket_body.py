"""The body of a large response, read by threads from its socket, past the event loop.

The event loop has read the head.  It then takes no part but to wait until there are bytes; so they are not
copied from one object of Python to another, and are read while it does something else.
"""

from __future__ import annotations

import asyncio
import fcntl
import socket
import ssl
import sys
import termios
import threading
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any, cast

import aiohttp

from proxy.config.quantities import parse_number
from proxy.connections.transports import abort
from proxy.connections.trust import ClientSSLObject

LEAST = 1 << 20  # bytes, by default; for fewer it is not worth it
GATHER = 0.005  # seconds in which more may come, before the next look: each look costs as much as 100 KiB
LONGEST = 0.04  # seconds before the next look, doubling, after one that found
LITTLE = 256 << 10  # bytes, or fewer: a look at them costs more than to copy them
RECORDS = 256 << 10  # bytes of TLS read at a time

_memory = threading.local()


class SocketBodies:
    """The bodies that are read from their sockets, of the upstream behind `proxy`, if there is one.

    Each fails where a wait for more of it in `coming()` raises TimeoutError, and has `least` bytes or more.
    """

    def __init__(
        self,
        coming: Callable[[], AbstractAsyncContextManager[object]],
        proxy: str | None,
        least: int = LEAST,
    ) -> None:
        self.coming = coming
        self._least = least
        self.open: set[SocketBody] = set()
        self._nested = proxy is not None and proxy.startswith("https:")  # TLS within TLS

    def take(self, response: aiohttp.ClientResponse) -> SocketBody | None:
        """The body of a response whose head has come; None if it is small, or comes in another way."""
        connection, content, headers = response.connection, response.content, response.headers
        length = parse_number(headers.get("Content-Length", ""))
        if length is None or "Transfer-Encoding" in headers or length - content.total_bytes < self._least:
            return None
        if connection is None or connection.transport is None or content.exception() is not None:
            return None
        tls = connection.transport.get_extra_info("ssl_object")
        if self._nested or not isinstance(tls, ClientSSLObject | None):
            return None
        if not hasattr(connection.protocol, "_pause_reading_for_buffer"):  # which only this aiohttp has
            return None
        try:
            duplicate = connection.transport.get_extra_info("socket").dup()
        except OSError:  # no descriptors are left
            return None
        body = SocketBody(self, response, duplicate, length, tls)
        self.open.add(body)
        return body

    def cut(self, error: Exception) -> None:
        """End all of them."""
        for body in self.open:
            body.cut(error)


class SocketBody:
    """The rest of the body of a response.

    From the construction until close() the connection is ours: its transport neither reads nor writes, and
    `socket` is a duplicate of its own.  Only one thread may read at a time, and none while it is closed.
    """

    def __init__(
        self,
        bodies: SocketBodies,
        response: aiohttp.ClientResponse,
        socket: socket.socket,
        length: int,
        tls: ClientSSLObject | None,
    ) -> None:
        self._bodies = bodies
        self._response = response
        connection: Any = response.connection
        self._transport = connection.transport
        self._protocol = connection.protocol
        self._socket = socket
        self._tls = tls
        self._head = memoryview(response.content.read_nowait())
        self._rest = length - response.content.total_bytes
        self._error: Exception | None = None
        self._empty = False  # nothing has been there when it was last read
        self._found = LITTLE + 1  # bytes, since the last pause
        self._begun = False  # some have been read
        self._pause = GATHER
        self._lock = threading.Lock()
        self._protocol.pause_reading()
        # A former response of this connection may still be read from its buffer, which resumes reading.
        self._protocol._pause_reading_for_buffer()
        if tls is not None:  # pause_reading() lets the records come
            self._transport.set_read_buffer_limits(high=0, low=0)

    async def wait(self) -> bool:
        """Wait until there are bytes to read; False at the end.

        Raises what aiohttp raises: TimeoutError, ClientError, OSError.
        """
        if self._empty and self._error is None:
            if self._begun and self._rest > LEAST:
                self._pause = GATHER if self._found > LITTLE else min(2 * self._pause, LONGEST)
                self._found = 0
                await asyncio.sleep(self._pause)
            if not self._arrived:
                async with self._bodies.coming():
                    await self._readable()
            self._empty = False
        if self._error is not None:
            raise self._error
        return bool(self._rest or self._head)

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        file = self._socket.fileno()  # of the socket itself, asyncio would make a text
        loop.add_reader(file, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(file)

    @property
    def unread(self) -> int:
        """How many bytes have come that readinto() has not returned; by TLS with those that it adds."""
        number = self._arrived
        if self._tls is not None:
            number += self._tls.pending() + self._tls.incoming.pending
        return len(self._head) + number

    @property
    def _arrived(self) -> int:
        """How many bytes wait in the socket."""
        try:
            return int.from_bytes(fcntl.ioctl(self._socket, termios.FIONREAD, bytes(4)), sys.byteorder)
        except OSError:
            return 0

    def readinto(self, buffer: memoryview) -> int:
        """As ReadInto; an error is raised by the next wait()."""
        done = min(len(self._head), len(buffer))
        buffer[:done], self._head = self._head[:done], self._head[done:]
        stop = min(len(buffer), done + self._rest)
        receive = self._socket.recv_into if self._tls is None else self._decrypt
        self._empty = False  # one thread may read more than once between two waits
        with self._lock:
            while done < stop and self._error is None:
                try:
                    number = receive(buffer[done:stop])
                except (BlockingIOError, ssl.SSLWantReadError):
                    self._empty = True
                    break
                except OSError as error:  # of TLS, too
                    self._error = error
                    break
                if not number:
                    self._error = aiohttp.ClientPayloadError(f"the body ended {self._rest} bytes early")
                done, self._rest = done + number, self._rest - number
        self._found += done
        self._begun = self._begun or done > 0
        return done

    def _decrypt(self, buffer: memoryview) -> int:
        """As recv_into()."""
        assert self._tls is not None
        while True:
            try:
                # With a buffer it returns a number.
                return cast(int, self._tls.read(len(buffer), cast(bytearray, buffer)))
            except ssl.SSLWantReadError:
                if self._tls.outgoing.pending:  # the server has changed its keys
                    self._socket.sendall(self._tls.outgoing.read())
            records = _records()
            number = self._socket.recv_into(records)
            if not number:
                return 0
            self._tls.incoming.write(records[:number])

    def cut(self, error: Exception) -> None:
        """End it, although a thread may be reading; wait() raises the error."""
        with self._lock:
            self._error = error
        with suppress(OSError):  # it has ended already
            self._socket.shutdown(socket.SHUT_RD)  # wait() wakes up

    def close(self) -> None:
        """Release the connection if the body has come to its end, else close it."""
        self._bodies.open.discard(self)
        if self._rest or self._error is not None or self._has_more():
            abort(self._transport)  # close() would wait for an answer to the end of TLS, which nobody reads
            self._response.close()
        else:
            if self._tls is not None:
                self._transport.set_read_buffer_limits()
            self._protocol._resume_reading_for_buffer()
            self._protocol.resume_reading()
            self._response.content.feed_eof()  # aiohttp releases it then
        self._socket.close()

    def _has_more(self) -> bool:
        """Whether something came after the body.  It must not be taken for the next response."""
        if self._tls is not None and (self._tls.incoming.pending or self._tls.pending()):
            return True
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True


def _records() -> memoryview:
    if not hasattr(_memory, "records"):
        _memory.records = memoryview(bytearray(RECORDS))
    found: memoryview = _memory.records
    return found

"""TLS directly on a socket, which kernel TLS needs: asyncio's own transport puts two buffers between them.

OpenSSL makes the handshake and reads.  If the kernel encrypts, data are written as without TLS, and never by
OpenSSL: if the client asks for new keys, it would change its own, and not that of the kernel.  If the kernel
does not know the cipher, OpenSSL writes.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from proxy.web.kernel_tls import encrypts

RECORD = 16 << 10  # bytes of a record at most (RFC 8446 §5.1)
RECORDS = 16  # that are read in a turn of the event loop
LINGER = 2.0  # seconds in which a client whose handshake failed takes the alert
HIGH = 64 << 10  # bytes in the buffer from which the protocol is asked to pause

_Buffer = bytes | bytearray | memoryview


async def shake_hands(
    client: socket.socket, context: ssl.SSLContext, failed: Callable[[ssl.SSLSocket, ssl.SSLError], None]
) -> ssl.SSLSocket:
    """Make the handshake, and take over the socket of `client`.  Raises OSError.

    `failed` is called if the handshake fails because of what the client has sent; it is sent an alert.
    """
    tls = context.wrap_socket(client, server_side=True, do_handshake_on_connect=False)
    try:
        while True:
            try:
                tls.do_handshake()
                return tls
            except ssl.SSLWantReadError:
                await _until(tls, writable=False)
            except ssl.SSLWantWriteError:
                await _until(tls, writable=True)
    except BaseException as error:
        try:
            if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
                failed(tls, error)
                with suppress(OSError):
                    await _let_go(tls)
        finally:
            tls.close()
        raise


async def _let_go(tls: ssl.SSLSocket) -> None:
    """Wait until the client closes.  To close with unread data resets the connection, and drops the alert."""
    tls.shutdown(socket.SHUT_WR)
    data = b"."
    async with asyncio.timeout(LINGER):
        while data:
            await _until(tls, writable=False)
            data = socket.socket.recv(tls, RECORD)


async def _until(tls: ssl.SSLSocket, *, writable: bool) -> None:
    """Wait until the socket is readable or `writable`."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    add, remove = (loop.add_writer, loop.remove_writer) if writable else (loop.add_reader, loop.remove_reader)
    add(tls, ready.set)
    try:
        await ready.wait()
    finally:
        remove(tls)


class TLSTransport(asyncio.Transport):
    """A connection of `protocol` on `tls`, a non-blocking socket after its handshake.

    The end may take `goodbye` seconds from when all data are sent.  get_extra_info() knows what it knows of
    asyncio's own transport, and `kernel_tls`: whether the kernel encrypts.  write_eof() is not supported.
    Raises OSError if the client has left.
    """

    def __init__(self, tls: ssl.SSLSocket, protocol: asyncio.Protocol, goodbye: float) -> None:
        tls.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._kernel = encrypts(tls)
        super().__init__(
            {
                "socket": tls,
                "peername": tls.getpeername(),
                "sockname": tls.getsockname(),
                "sslcontext": tls.context,
                "ssl_object": tls,
                "peercert": tls.getpeercert(),
                "cipher": tls.cipher(),
                "compression": tls.compression(),
                "kernel_tls": self._kernel,
            }
        )
        self._loop = asyncio.get_running_loop()
        self._tls = tls
        self._protocol = protocol
        self._goodbye = goodbye
        self._buffer = bytearray()
        self._low, self._high = HIGH // 4, HIGH
        self._full = False  # the protocol has been asked to pause
        self._paused = False  # no reading
        self._behind = False  # OpenSSL must write before it reads
        self._closing = False
        self._lost = False
        self._reader: Callable[[], None] | None = None
        self._writer: Callable[[], None] | None = None
        self._last_moment: asyncio.TimerHandle | None = None
        protocol.connection_made(self)
        self._watch()

    # Reading

    def is_reading(self) -> bool:
        return not self._paused and not self._closing

    def pause_reading(self) -> None:
        self._paused = True
        self._watch()

    def resume_reading(self) -> None:
        self._paused = False
        self._watch()

    def _readable(self) -> None:
        data, end = self._receive()
        try:
            if data:
                self._protocol.data_received(data)
            if isinstance(end, OSError):
                self._lose(end)
            elif end:
                self._protocol.eof_received()
                self.close()
        except Exception:
            self.abort()
            raise
        self._watch()

    def _receive(self) -> tuple[bytes, OSError | bool]:
        """What has come, and whether it is the end, or how reading fails."""
        parts: list[bytes] = []
        try:
            for _ in range(RECORDS):
                part = self._tls.recv(RECORD)  # whole, so that OpenSSL holds nothing that no event tells of
                if not part:
                    return b"".join(parts), True
                parts.append(part)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLWantWriteError:
            self._behind = True
        except OSError as error:
            return b"".join(parts), error
        return b"".join(parts), False

    # Writing

    def write(self, data: _Buffer) -> None:
        if self._closing or not data:
            return
        if not self._buffer:
            try:
                sent = self._send(data)
            except OSError as error:
                self._lose(error)
                return
            if sent == len(data):
                return
            data = memoryview(data)[sent:]
        self._buffer += data
        self._watch()
        self._fill()

    def writelines(self, list_of_data: Iterable[_Buffer]) -> None:
        self.write(b"".join(list_of_data))

    def can_write_eof(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return len(self._buffer)

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._low, self._high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = high if high is not None else 4 * low if low is not None else HIGH
        self._low = low if low is not None else self._high // 4
        self._fill()

    def _fill(self) -> None:
        """Ask the protocol to pause if the buffer is full."""
        if len(self._buffer) > self._high and not self._full:
            self._full = True
            self._protocol.pause_writing()

    def _send(self, data: _Buffer) -> int:
        """Send what the socket takes, and return the number of bytes.  Raises OSError."""
        sent = 0
        try:
            if self._kernel:
                return socket.socket.send(self._tls, data)
            with memoryview(data) as view:
                while sent < len(view):
                    sent += self._tls.send(view[sent:])  # a record
        except (BlockingIOError, ssl.SSLWantWriteError):
            pass  # OpenSSL may hold a part of a record, and is given the same bytes next time
        return sent

    def _writable(self) -> None:
        try:
            if self._buffer:
                del self._buffer[: self._send(self._buffer)]
        except OSError as error:
            self._lose(error)
            return
        self._behind = False  # _readable() sets it again
        if self._full and len(self._buffer) <= self._low:
            self._full = False
            self._protocol.resume_writing()
        if self._closing and not self._buffer and not self._lost:
            self._part()
        else:
            self._watch()

    # The end

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        if self._buffer:
            self._watch()
        else:
            self._part()

    def abort(self) -> None:
        self._lose(None)

    def _part(self) -> None:
        """Say that there are no more data (close_notify, RFC 8446 §6.1), and wait for the client to."""
        if self._last_moment is None:
            self._last_moment = self._loop.call_later(self._goodbye, self.abort)
        try:
            self._tls.unwrap()
        except ssl.SSLWantReadError:
            self._register(self._part, None)
            return
        except ssl.SSLWantWriteError:
            self._register(None, self._part)
            return
        except OSError:
            pass  # the client has left, or still sends
        # Of what the kernel has not yet handed to TCP, it drops at the end what has no room there.
        self._register(None, self.abort)

    def _lose(self, error: OSError | None) -> None:
        if self._lost:
            return
        self._closing = self._lost = True
        self._register(None, None)
        self._buffer = bytearray()  # the traceback of `error` may hold a view of the other
        if self._last_moment is not None:
            self._last_moment.cancel()
        self._loop.call_soon(self._end, error)

    def _end(self, error: OSError | None) -> None:
        try:
            self._protocol.connection_lost(error)
        finally:
            self._tls.close()

    # Events

    def _watch(self) -> None:
        """Wait for what there is to do, before the end."""
        if self._lost or self._last_moment is not None:
            return
        reads = not (self._paused or self._closing or self._behind)
        writes = self._buffer or self._behind
        self._register(self._readable if reads else None, self._writable if writes else None)

    def _register(self, reader: Callable[[], None] | None, writer: Callable[[], None] | None) -> None:
        if reader != self._reader:
            self._reader = reader
            if reader is None:
                self._loop.remove_reader(self._tls)
            else:
                self._loop.add_reader(self._tls, reader)
        if writer != self._writer:
            self._writer = writer
            if writer is None:
                self._loop.remove_writer(self._tls)
            else:
                self._loop.add_writer(self._tls, writer)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def set_protocol(self, protocol: Any) -> None:
        self._protocol = protocol

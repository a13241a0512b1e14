"""Sends a blob, complete or growing, to a client: byte ranges, and sendfile from a descriptor of its own.

web.FileResponse does not fit: it answers an evicted file with an empty 404, several ranges with 416, and sets
its own ETag.  loop.sendfile would serve complete files, but does not report progress.  So the socket is
duplicated, and os.sendfile is called whenever the socket is writable, again and again while the client keeps
up: the event loop costs more than the call.  With TLS the bytes have to pass through this process, unless the
kernel encrypts: they are read and written piece by piece.
"""

from __future__ import annotations

import asyncio
import errno
import math
import os
import secrets
import socket
import struct
import time
from collections.abc import Coroutine, Sequence
from contextlib import nullcontext
from typing import Any

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from proxy.connections.transports import abort
from proxy.telemetry.exchange import Exchange
from proxy.web.backlog import corked
from proxy.web.backlog import taken as _taken
from storage.errors import RegistryError, StorageFailed
from storage.oci import Span
from storage.registry import Blob, OnDisk

LEFT = "client left"
STUCK = "client took nothing"
SMALL = 64 << 10  # bytes up to which copying is faster than setting up sendfile
CHUNK = 1 << 20  # bytes that one call sends: what a disk reads in a few milliseconds
QUICK_CHUNK = 2 << 20  # the same, as long as no call has waited for the disk
UNSENT = 1 << 20  # bytes of a client that the kernel takes before they are on their way
TURN = 0.002  # seconds in which all clients are sent to before others get their turn
SHARE = 0.0005  # seconds of a turn that one client gets at most, beyond its first chunk
PIECE = 256 << 10  # bytes encrypted at once; up to two pieces wait in memory for a slow client


async def send_blob(
    request: web.BaseRequest,
    blob: Blob,
    spans: Sequence[Span],
    headers: dict[str, str],
    exchange: Exchange,
    turns: Turns,
    patience: float = math.inf,
) -> web.StreamResponse:
    """Answer 200 with the blob, or 206 with its `spans`, beside others in the same `turns`.

    A failure after the headers resets the connection and is noted in `exchange`, so that no client takes a
    part for the whole.  A client that takes nothing for `patience` seconds is a failure too.
    """
    response = web.StreamResponse(status=206 if spans else 200, headers=headers)
    connection = request.get_extra_info("socket")
    transport = request.transport
    try:
        sender = _Sender(request, response, blob, exchange, turns, patience)
        if len(spans) > 1:
            await sender.send_ranges(spans)
        elif spans:
            await sender.send_range(spans[0])
        else:
            await sender.send_whole()
        await response.write_eof()
    except TimeoutError:
        reset(transport, connection)
        exchange.detail = STUCK
    except OSError:
        reset(transport, connection)
        exchange.detail = LEFT
    except (RegistryError, EOFError) as error:
        reset(transport, connection)
        exchange.result, exchange.detail = "error", str(error)
    except BaseException:
        reset(transport, connection)
        raise
    return response


class Turns:
    """Divides the time of a turn of the event loop among the clients that are sent to."""

    def __init__(self) -> None:
        self._sending = 0

    def __enter__(self) -> None:
        self._sending += 1

    def __exit__(self, *_: object) -> None:
        self._sending -= 1

    def end(self) -> float:
        """When the turn of one client that begins now is over, by time.perf_counter()."""
        return time.perf_counter() + min(SHARE, TURN / self._sending)


class _Sender:
    """Sends bytes of one blob as the body of one response, and counts them in the exchange.

    Every method raises OSError if the client has left, TimeoutError if it takes nothing for `patience`
    seconds, and what reading the blob raises.
    """

    def __init__(
        self,
        request: web.BaseRequest,
        response: web.StreamResponse,
        blob: Blob,
        exchange: Exchange,
        turns: Turns,
        patience: float,
    ) -> None:
        self._request = request
        self._response = response
        self._blob = blob
        self._exchange = exchange
        self._turns = turns
        self._patience = None if math.isinf(patience) else patience

    async def send_whole(self) -> None:
        size = self._blob.descriptor.size
        if size >= 0:
            self._response.content_length = size
        # Otherwise aiohttp sends chunks, or, to an HTTP/1.0 client, closes the connection at the end.
        writer = await self._prepare()
        await self._send(writer, Span(0, size if size >= 0 else None))

    async def send_range(self, span: Span) -> None:
        start, stop = span.start, span.stop or 0
        self._response.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{self._blob.descriptor.size}"
        self._response.content_length = stop - start
        await self._send(await self._prepare(), span)

    async def send_ranges(self, spans: Sequence[Span]) -> None:
        """Send multipart/byteranges (RFC 9110 §14.6)."""
        headers, size = self._response.headers, self._blob.descriptor.size
        boundary = secrets.token_hex(16)
        parts = [(_part(boundary, span, size, headers["Content-Type"]), span) for span in spans]
        closing = f"\r\n--{boundary}--\r\n".encode()
        headers["Content-Type"] = f"multipart/byteranges; boundary={boundary}"
        length = sum(len(head) + (span.stop or 0) - span.start for head, span in parts) + len(closing)
        self._response.content_length = length
        await self._send_parts(await self._prepare(), parts, closing)

    async def _send_parts(
        self, writer: AbstractStreamWriter, parts: Sequence[tuple[bytes, Span]], closing: bytes
    ) -> None:
        """Send parts with their heads; small parts are sent together, as there may be thousands."""
        # Asked once: the answer takes 50 µs.
        on_disk = self._blob if isinstance(self._blob, OnDisk) else None
        batch, content = bytearray(), 0
        first = ready = 0  # [first, ready) needs no waiting; what was asked for later may be before it
        for head, span in parts:
            start, stop = span.start, span.stop or 0
            small = on_disk is not None and stop - start <= SMALL
            here = first <= start and stop <= ready
            if batch and not (small and here and len(batch) <= SMALL):
                await self._put(writer, bytes(batch))
                self._exchange.bytes += content
                batch, content = bytearray(), 0
            batch += head
            if on_disk and small and not here:
                first, ready = start, await _ready(on_disk, start, stop)
            if on_disk and small and stop <= ready and on_disk.fileno() >= 0:
                batch += self._read(on_disk.fileno(), span)
                content += stop - start
                continue
            await self._put(writer, bytes(batch))
            batch = bytearray()
            await self._send(writer, span)
        await self._put(writer, bytes(batch) + closing)
        self._exchange.bytes += content

    async def _prepare(self) -> AbstractStreamWriter:
        writer = await self._response.prepare(self._request)
        assert writer is not None  # it is None only after the end of the response
        self._exchange.begun_at = time.perf_counter()
        return writer

    async def _send(self, writer: AbstractStreamWriter, span: Span) -> None:
        transport, blob = self._request.transport, self._blob
        if transport is None:
            raise ConnectionResetError("the client has left")
        # Without a file the disk has failed under a former range.
        if span.stop is None or not isinstance(blob, OnDisk) or blob.fileno() < 0:
            await self._write(writer, span)
            return
        # The last byte of a blob that is being received may come much later than those before it.
        if span.stop - span.start <= SMALL and await _next(blob, span.start, span.stop) >= span.stop:
            await writer.write(self._read(blob.fileno(), span))
            self._exchange.bytes += span.stop - span.start
            return
        encrypted = transport.get_extra_info("sslcontext") is not None
        encrypted = encrypted and not transport.get_extra_info("kernel_tls")
        # What the transport still buffers, such as the headers, must be sent before bytes bypass it.  With
        # TLS it should buffer little; with a limit of 0 bytes, asyncio's TLS considers an empty buffer full.
        transport.set_write_buffer_limits(high=1 if encrypted else 0)
        async with asyncio.timeout(self._patience):
            await writer.drain()
        before = self._exchange.bytes
        try:
            await self._follow(writer, blob, span, None if encrypted else transport.get_extra_info("socket"))
        except StorageFailed:
            # The disk failed under the growing file; the blob may get the rest from elsewhere.
            await self._write(writer, Span(span.start + self._exchange.bytes - before, span.stop))
        finally:
            if not transport.is_closing():
                transport.set_write_buffer_limits()

    def _read(self, file: int, span: Span) -> bytes:
        length = (span.stop or 0) - span.start
        try:
            chunk = os.pread(file, length, span.start)
        except OSError as error:
            raise _unreadable(span.start) from error
        if len(chunk) < length:
            raise StorageFailed(f"{self._blob.descriptor.digest}: its file was truncated")
        return chunk

    async def _follow(
        self, writer: AbstractStreamWriter, blob: OnDisk, span: Span, connection: socket.socket | None
    ) -> None:
        """Send `span` of the file as it grows: directly to `connection`, or encrypted if that is None."""
        position, stop = span.start, span.stop or 0
        client = -1 if connection is None else os.dup(connection.fileno())
        if connection is not None:
            # Otherwise a thousand slow clients fill the memory of TCP, and the kernel ends connections.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)
        try:
            while position < stop:
                end = min(await blob.readable(position, stop), stop)
                with self._turns:
                    if connection is None:
                        await self._encrypt(writer, blob.fileno(), Span(position, end))
                    else:
                        # A growing file is sent piece by piece, and each is to leave at once.
                        with corked(connection) if end == stop else nullcontext():
                            await self._pump(client, blob.fileno(), Span(position, end))
                position = end
        finally:
            if client >= 0:
                os.close(client)

    async def _write(self, writer: AbstractStreamWriter, span: Span) -> None:
        async for chunk in self._blob.chunks(span.start, span.stop):
            await self._put(writer, chunk)
            self._exchange.bytes += len(chunk)

    async def _put(self, writer: AbstractStreamWriter, chunk: bytes) -> None:
        await self._wait_for(writer, writer.write(chunk))

    async def _wait_for(self, writer: AbstractStreamWriter, work: Coroutine[Any, Any, None]) -> None:
        """Await `work` of `writer`, which waits for the client once it has written.

        The client is not cut off while it takes a little within `patience`.
        """
        connection = self._request.get_extra_info("socket")
        if connection is None:
            work.close()
            raise ConnectionResetError("the client has left")
        taken = _taken(connection)
        while True:
            try:
                async with asyncio.timeout(self._patience):
                    await work
                    await writer.drain()
                return
            except TimeoutError:
                before, taken = taken, _taken(connection)
                if taken == before:
                    raise TimeoutError("the client takes nothing") from None
                work = writer.drain()

    async def _pump(self, client: int, file: int, span: Span) -> None:
        """Send `span` of `file` as fast as `client`, a non-blocking socket, takes it."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        position, stop, most = span.start, span.stop or 0, CHUNK

        def pump() -> None:
            nonlocal position, most
            if done.done():
                return
            end, now = self._turns.end(), time.perf_counter()
            try:
                while sent := _sendfile(client, file, position, min(stop, position + most)):
                    position += sent
                    self._exchange.bytes += sent
                    whole, begun, now = sent == most, now, time.perf_counter()
                    most = QUICK_CHUNK if now - begun < SHARE else CHUNK
                    if not whole or position == stop or now >= end:
                        break
            except (OSError, EOFError, StorageFailed) as error:
                done.set_exception(error)
                return
            if position == stop:
                done.set_result(None)

        pump()
        if not done.done():
            done.get_loop().add_writer(client, pump)
            try:
                before = -1
                while position > before and not done.done():
                    before = position
                    await asyncio.wait((done,), timeout=self._patience)
            finally:
                done.get_loop().remove_writer(client)
                if done.done():
                    done.exception()  # mark it as retrieved: on cancellation nothing awaits it
        if not done.done():
            raise TimeoutError("the client takes nothing")
        await done

    async def _encrypt(self, writer: AbstractStreamWriter, file: int, span: Span) -> None:
        """Send `span` of `file` by TLS.  The last piece or two are counted before they leave the process."""
        position, stop = span.start, span.stop or 0
        end = self._turns.end()
        while position < stop:
            try:
                piece = os.pread(file, min(PIECE, stop - position), position)
            except OSError as error:
                raise _unreadable(position) from error
            if not piece:
                raise _truncated(position, stop)
            transport = self._request.transport
            if transport is None or transport.is_closing():
                raise ConnectionResetError("the client has left")
            transport.write(piece)
            position += len(piece)
            self._exchange.bytes += len(piece)
            if transport.get_write_buffer_size():
                await self._wait_for(writer, writer.drain())
            elif time.perf_counter() >= end:
                await asyncio.sleep(0)  # give others a turn while this client takes everything at once
            else:
                continue
            end = self._turns.end()


def _part(boundary: str, span: Span, size: int, media_type: str) -> bytes:
    return (
        f"\r\n--{boundary}\r\nContent-Type: {media_type}\r\n"
        f"Content-Range: bytes {span.start}-{(span.stop or 0) - 1}/{size}\r\n\r\n"
    ).encode()


async def _ready(blob: OnDisk, position: int, stop: int) -> int:
    """Wait for the bytes up to `stop`; return where those end that can be read, or 0 if the disk failed."""
    end = await _next(blob, position, stop)
    while 0 < end < stop:
        end = await _next(blob, end, stop)
    return end


async def _next(blob: OnDisk, position: int, stop: int) -> int:
    """Wait for the next of these bytes; return as `_ready` does."""
    try:
        return await blob.readable(position, stop)
    except StorageFailed:
        return 0


def _sendfile(client: int, file: int, position: int, stop: int) -> int:
    """Send what the socket accepts without blocking, and return the number of bytes."""
    try:
        sent = os.sendfile(client, file, position, stop - position)
    except (BlockingIOError, InterruptedError):
        return 0
    except OSError as error:
        # EIO can only come from the disk; any other error concerns the client's socket.
        if error.errno == errno.EIO:
            raise _unreadable(position) from error
        raise
    if sent == 0:
        raise _truncated(position, stop)
    return sent


def _unreadable(position: int) -> StorageFailed:
    return StorageFailed(f"reading failed at byte {position}")


def _truncated(position: int, stop: int) -> EOFError:
    return EOFError(f"file ends at byte {position} of {stop}")


def reset(transport: Any, connection: Any) -> None:
    """Reset the connection: an incomplete response never ends cleanly."""
    if connection is None or connection.fileno() < 0:  # already closed
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    abort(transport)

"""A blob, whole or growing, to a client: byte ranges, and sendfile from a descriptor of our own.

FileResponse will not do: it answers an evicted file with an empty 404, several ranges with 416, and puts
an ETag of its own.  loop.sendfile would do for whole files, but tells nothing of how far it came.  So the
socket is duplicated, and os.sendfile is called whenever it can take bytes: also 20 % faster for 8 clients.
By TLS the bytes have to pass through this process: they are read and written piece by piece.
"""

from __future__ import annotations

import asyncio
import errno
import math
import os
import secrets
import socket
import struct
from collections.abc import Sequence
from typing import Any

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from proxy.telemetry.exchange import Exchange
from storage.errors import RegistryError, StorageFailed
from storage.oci import Span
from storage.registry import Blob, OnDisk

LEFT = "client left"
STUCK = "client took nothing"
SMALL = 64 << 10  # bytes; so much is copied faster than a sendfile is set up
# Bytes a client gets before others have their turn.  With 4 MiB at once the kernel queues so much for a
# client with a small receive buffer that it goes at the pace of TCP's timers: 20 s for what takes a moment.
TURN = 1 << 20
PIECE = 256 << 10  # bytes that are encrypted at once; up to two of them wait here for a slow client


async def send_blob(
    request: web.BaseRequest,
    blob: Blob,
    spans: Sequence[Span],
    headers: dict[str, str],
    exchange: Exchange,
    patience: float = math.inf,
) -> web.StreamResponse:
    """Answer 200 or 206 with the blob or its `spans`; a client may take nothing for `patience` seconds.

    What fails after the headers breaks the connection, and is noted in `exchange`: no client may take a
    part for the whole.
    """
    size = blob.descriptor.size
    response = web.StreamResponse(status=206 if spans else 200, headers=headers)
    boundary = secrets.token_hex(16)
    parts: list[tuple[bytes, Span]] = []
    if len(spans) > 1:
        parts = [(_part(boundary, span, size, headers["Content-Type"]), span) for span in spans]
        closing = f"\r\n--{boundary}--\r\n".encode()
        response.headers["Content-Type"] = f"multipart/byteranges; boundary={boundary}"
        length = sum(len(head) + (span.stop or 0) - span.start for head, span in parts) + len(closing)
        response.content_length = length
    elif spans:
        start, stop = spans[0].start, spans[0].stop or 0
        response.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        response.content_length = stop - start
    elif size >= 0:
        response.content_length = size
    # Else it is sent in chunks, to an HTTP/1.0 client until the connection is closed.
    connection = request.get_extra_info("socket")
    transport = request.transport
    try:
        writer = await response.prepare(request)
        if writer is None:
            return response
        if parts:
            for head, span in parts:
                await response.write(head)
                await _write(request, writer, blob, span, exchange, patience)
            await response.write(closing)
        else:
            whole = Span(0, size if size >= 0 else None)
            span = spans[0] if spans else whole
            await _send(request, writer, blob, span, exchange, patience)
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


def _part(boundary: str, span: Span, size: int, media_type: str) -> bytes:
    # RFC 9110 §14.6
    return (
        f"\r\n--{boundary}\r\nContent-Type: {media_type}\r\n"
        f"Content-Range: bytes {span.start}-{(span.stop or 0) - 1}/{size}\r\n\r\n"
    ).encode()


async def _send(
    request: web.BaseRequest,
    writer: AbstractStreamWriter,
    blob: Blob,
    span: Span,
    exchange: Exchange,
    patience: float,
) -> None:
    transport = request.transport
    position, stop = span.start, span.stop
    if transport is None:
        raise ConnectionResetError("the client has left")
    if stop is None or not isinstance(blob, OnDisk):
        await _write(request, writer, blob, span, exchange, patience)
        return
    if stop - position <= SMALL and await _all_there(blob, position, stop):
        chunk = os.pread(blob.fileno(), stop - position, position)
        if len(chunk) < stop - position:
            raise StorageFailed(f"{blob.descriptor.digest}: its file was truncated")
        await writer.write(chunk)
        exchange.bytes += len(chunk)
        return
    encrypted = transport.get_extra_info("sslcontext") is not None
    # What the transport still holds, the headers for one, must have left before bytes pass it by, and by TLS
    # it is not to hold much.  Of 0 bytes asyncio's TLS says at once that it holds too many.
    transport.set_write_buffer_limits(high=1 if encrypted else 0)
    async with asyncio.timeout(_bounded(patience)):
        await writer.drain()
    before = exchange.bytes
    client = -1 if encrypted else os.dup(transport.get_extra_info("socket").fileno())
    try:
        while position < stop:
            end = min(await blob.readable(position), stop)
            if encrypted:
                await _encrypt(request, writer, blob.fileno(), Span(position, end), exchange, patience)
            else:
                await _sendfile(client, blob.fileno(), Span(position, end), exchange, patience)
            position = end
    except StorageFailed:
        # The disk failed under the growing file; its blob may know where else to get the rest.
        rest = Span(span.start + exchange.bytes - before, stop)
        await _write(request, writer, blob, rest, exchange, patience)
    finally:
        if not encrypted:
            os.close(client)
        if not transport.is_closing():
            transport.set_write_buffer_limits()


async def _all_there(blob: OnDisk, position: int, stop: int) -> bool:
    try:
        while position < stop:
            position = await blob.readable(position)
        return True
    except StorageFailed:
        return False


async def _write(
    request: web.BaseRequest,
    writer: AbstractStreamWriter,
    blob: Blob,
    span: Span,
    exchange: Exchange,
    patience: float,
) -> None:
    async for chunk in blob.chunks(span.start, span.stop):
        await _put(request, writer, chunk, patience)
        exchange.bytes += len(chunk)


async def _put(request: web.BaseRequest, writer: AbstractStreamWriter, chunk: bytes, patience: float) -> None:
    """Raises TimeoutError where the client takes nothing for `patience` seconds; a little is enough."""
    connection = request.get_extra_info("socket")
    if connection is None:
        raise ConnectionResetError("the client has left")
    taken = _taken(connection)
    putting = asyncio.ensure_future(_written(writer, chunk))
    try:
        while not (await asyncio.wait((putting,), timeout=_bounded(patience)))[0]:
            before, taken = taken, _taken(connection)
            if taken == before:
                raise TimeoutError("the client takes nothing")
        await putting
    finally:
        putting.cancel()
        await asyncio.gather(putting, return_exceptions=True)


async def _written(writer: AbstractStreamWriter, chunk: bytes) -> None:
    await writer.write(chunk)
    await writer.drain()


def _taken(connection: Any) -> int:
    """How many bytes the client's machine has acknowledged: tcpi_bytes_acked of struct tcp_info, tcp(7)."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128)
    (number,) = struct.unpack_from("=Q", info, 120)
    return int(number)


def _bounded(patience: float) -> float | None:
    return None if math.isinf(patience) else patience


async def _sendfile(client: int, file: int, span: Span, exchange: Exchange, patience: float) -> None:
    """`span` of `file`, as fast as `client`, a non-blocking socket, takes it.

    Raises TimeoutError where it takes nothing for `patience` seconds.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    position, stop = span.start, span.stop or 0

    def pump() -> None:
        nonlocal position
        if done.done():
            return
        try:
            sent = os.sendfile(client, file, position, min(TURN, stop - position))
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            # Only the disk says EIO; all else is the client's end.
            done.set_exception(_unreadable(position) if error.errno == errno.EIO else error)
            return
        position += sent
        exchange.bytes += sent
        if position == stop:
            done.set_result(None)
        elif sent == 0:
            done.set_exception(_truncated(position, stop))

    pump()
    if not done.done():
        loop.add_writer(client, pump)
        try:
            before = -1
            while position > before and not done.done():
                before = position
                await asyncio.wait((done,), timeout=_bounded(patience))
        finally:
            loop.remove_writer(client)
            if done.done():
                done.exception()  # seen: who is cancelled, its client having left, does not await it
    if not done.done():
        raise TimeoutError("the client takes nothing")
    await done


async def _encrypt(
    request: web.BaseRequest,
    writer: AbstractStreamWriter,
    file: int,
    span: Span,
    exchange: Exchange,
    patience: float,
) -> None:
    """The same by TLS: what is counted has left this process, but for the last piece or two."""
    position, stop = span.start, span.stop or 0
    while position < stop:
        try:
            piece = os.pread(file, min(PIECE, stop - position), position)
        except OSError as error:
            raise _unreadable(position) from error
        if not piece:
            raise _truncated(position, stop)
        await _put(request, writer, piece, patience)
        position += len(piece)
        exchange.bytes += len(piece)
        await asyncio.sleep(0)  # nobody waits for the others while a client takes all at once


def _unreadable(position: int) -> StorageFailed:
    return StorageFailed(f"reading failed at byte {position}")


def _truncated(position: int, stop: int) -> EOFError:
    return EOFError(f"file ends at byte {position} of {stop}")


def reset(transport: Any, connection: Any) -> None:
    """Reset the connection: never a clean end to what is not complete."""
    if connection is None or connection.fileno() < 0:  # lost already
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()

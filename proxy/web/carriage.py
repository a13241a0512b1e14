"""Bundles over the admin API, as streams of any length: no more of them is in memory than a piece.

What comes in is first written, as it comes, to a file without a name; so an archive that is cut, or damaged
wherever, changes nothing.  What goes out breaks the connection where it fails: never does a part of a bundle
look like all of it.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import structlog
from aiohttp import web

from proxy.asking import BadField
from proxy.bundles import Bundles, Earlier, Given, Selection
from proxy.web.api import Body, Handler, decoded, in_json, query
from storage.errors import ArchiveInvalid, RegistryError, StorageFailed
from storage.exporting import Sink, TarSink
from storage.waiting import finished

log = structlog.get_logger()

TAR, GZIP = "application/x-tar", "application/gzip"
LARGEST = 64 << 20  # bytes of what is to be exported, in JSON: with what earlier bundles tell of themselves
STALLED = 300.0  # seconds that a client may send nothing of an archive, or take nothing of one
_FLAGS = {"true": True, "false": False}


class _Export(Body, frozen=True):
    """`since` holds the entrepot.json of each bundle that was made before."""

    names: tuple[str, ...] = ()
    used_within: str | None = None
    platforms: tuple[str, ...] = ()
    referrers: bool = True
    since: tuple[str, ...] = ()
    skip_incomplete: bool = False
    dry_run: bool = False

    def selection(self) -> Selection:
        since = [
            Earlier(f"since[{number}]", content.encode("utf-8", "replace"))
            for number, content in enumerate(self.since)
        ]
        return Selection(
            self.names, self.used_within, self.platforms, self.referrers, since, self.skip_incomplete
        )


class Carriage:
    def __init__(self, bundles: Bundles) -> None:
        self._bundles = bundles

    def routes(self) -> list[tuple[str, str, Handler]]:
        return [("POST", "/api/v1/import", self.import_), ("POST", "/api/v1/export", self.export)]

    async def import_(self, request: web.Request) -> web.StreamResponse:
        asked = query(request, name="", pin="false", dry_run="false")
        given = Given(asked["name"] or None, _flag(asked, "pin"), None, _flag(asked, "dry_run"))
        if request.content_type not in (TAR, GZIP):
            raise web.HTTPUnsupportedMediaType(reason=f"expected Content-Type: {TAR}, or {GZIP}")
        spooled = await self._spooled(request)
        return in_json(await self._bundles.import_spooled(spooled, "the archive", given))

    async def _spooled(self, request: web.Request) -> IO[bytes]:
        """All of the body, in a file without a name."""
        spool: Path = self._bundles.spool
        try:
            file = tempfile.TemporaryFile(dir=spool)  # noqa: SIM115
        except OSError as error:
            raise StorageFailed(f"{spool}: {error.strerror or error}") from error
        try:
            await _copy(request, file)
            return file
        except OSError as error:
            file.close()
            raise StorageFailed(f"{spool}: {error.strerror or error}") from error
        except BaseException:
            file.close()
            raise

    async def export(self, request: web.Request) -> web.StreamResponse:
        query(request)
        wanted = decoded(await _read(request), _Export)
        selection = wanted.selection()
        if wanted.dry_run:
            return in_json(await self._bundles.planned(selection, "the bundle"))
        response = web.StreamResponse(headers={"Content-Type": TAR})
        sending = asyncio.ensure_future(self._send(request, response, selection))
        try:
            await asyncio.shield(sending)
            await response.write_eof()
        except asyncio.CancelledError:
            _break(request)  # so that the thread waits for nobody any more
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            raise
        except RegistryError as error:
            if not response.prepared:
                raise
            log.warning("export.failed", error=str(error))
            _break(request)
        return response

    async def _send(self, request: web.Request, response: web.StreamResponse, selection: Selection) -> None:
        loop = asyncio.get_running_loop()

        def done(work: Coroutine[Any, Any, object]) -> None:
            asyncio.run_coroutine_threadsafe(_in_time(work), loop).result()

        @contextmanager
        def opened() -> Iterator[Sink]:
            done(response.prepare(request))  # only now: what speaks against it was told as an error
            sink = TarSink(lambda piece: done(response.write(piece)))
            yield sink
            sink.end()

        await self._bundles.export(selection, "the bundle", opened)


async def _read(request: web.Request) -> bytes:
    """All of a body that may be larger than others."""
    content = bytearray()
    while piece := await request.content.readany():
        content += piece
        if len(content) > LARGEST:
            raise web.HTTPRequestEntityTooLarge(LARGEST, len(content))
    return bytes(content)


async def _copy(request: web.Request, file: IO[bytes]) -> None:
    """Raises ArchiveInvalid where it does not come to its end, OSError where there is no room for it."""
    count = 0
    write: Callable[[bytes], object] = file.write
    while True:
        try:
            async with asyncio.timeout(STALLED):
                piece = await request.content.readany()
        except TimeoutError:
            raise ArchiveInvalid(f"nothing came of the archive for {STALLED:g} s") from None
        except (ConnectionError, web.RequestPayloadError):
            raise ArchiveInvalid(f"the archive was cut after {count} bytes") from None
        if not piece:
            break
        count += len(piece)
        await finished(write, piece)
    await finished(file.flush)


async def _in_time(work: Coroutine[Any, Any, object]) -> None:
    try:
        async with asyncio.timeout(STALLED):
            await work
    except TimeoutError:
        raise ConnectionResetError(f"the client took nothing for {STALLED:g} s") from None


def _break(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()


def _flag(asked: Any, name: str) -> bool:
    if asked[name] not in _FLAGS:
        raise BadField(name, "expected true or false")
    return _FLAGS[asked[name]]

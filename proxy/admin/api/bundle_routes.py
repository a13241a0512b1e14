"""Bundles over the admin API, as streams of any length, of which only a chunk is in memory.

An import first writes the archive to a file without a name, so that an archive that is cut or damaged
changes nothing.  An export that fails breaks the connection, so that a part of a bundle never looks
complete.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import msgspec
import structlog
from aiohttp import web

from proxy.admin.api.routes import ROOT, Handler, decoded, in_json, query
from proxy.namespaces.references import FieldInvalid, read_platforms
from proxy.transfer.bundle_export import BundleExport, EarlierBundle, Selection
from proxy.transfer.bundle_import import BundleImport, ImportOptions
from proxy.transfer.results import DIGEST
from proxy.web.send import reset
from storage.archives.exporter import Sink, TarSink
from storage.concurrency import run_in_thread, shielded
from storage.errors import ArchiveInvalid, RegistryError, StorageFailed
from storage.oci import Digest

log = structlog.get_logger()

TAR = "application/x-tar"
ARCHIVES = (TAR, "application/gzip", "application/zstd")
LARGEST = 64 << 20  # bytes of the body of an export, which includes the entrepot.json of earlier bundles
SENDING = 2  # exports at a time: each occupies a thread that waits for its client
STALLED = 300.0  # seconds without progress of a client
_FLAGS = {"true": True, "false": False}


class _ExportBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of an export.  `since` holds the entrepot.json of each earlier bundle."""

    names: tuple[str, ...] = ()
    used_within: str | None = None
    platforms: tuple[str, ...] = ()
    referrers: bool = True
    since: tuple[str, ...] = ()
    skip_incomplete: bool = False
    dry_run: bool = False

    def selection(self) -> Selection:
        since = [
            EarlierBundle(f"since[{number}]", content.encode("utf-8", "replace"))
            for number, content in enumerate(self.since)
        ]
        return Selection(
            self.names, self.used_within, self.platforms, self.referrers, since, self.skip_incomplete
        )


class BundleRoutes:
    """The handlers of import and export.  `changed` is called when a summary may be outdated."""

    def __init__(self, exports: BundleExport, imports: BundleImport, changed: Callable[[], None]) -> None:
        self._exports = exports
        self._imports = imports
        self._changed = changed
        self._sending = asyncio.Semaphore(SENDING)

    def routes(self) -> list[tuple[str, str, Handler]]:
        return [("POST", f"{ROOT}import", self.import_), ("POST", f"{ROOT}export", self.export)]

    async def import_(self, request: web.Request) -> web.StreamResponse:
        fields = query(request, name="", pin="false", dry_run="false", platforms="")
        platforms = read_platforms("platforms", list(filter(None, fields["platforms"].split(","))))
        options = ImportOptions(
            fields["name"] or None, _flag(fields, "pin"), None, _flag(fields, "dry_run"), platforms
        )
        if request.content_type not in ARCHIVES:
            raise web.HTTPUnsupportedMediaType(reason=f"expected Content-Type: {', '.join(ARCHIVES)}")
        if "Content-Encoding" in request.headers:
            # aiohttp would decode it before its expanded size can be checked.
            raise web.HTTPUnsupportedMediaType(reason="expected the archive without Content-Encoding")
        spooled = await self._spooled(request)
        try:
            return in_json(await self._imports.import_spooled(spooled, "the archive", options))
        finally:
            self._changed()  # also after a failure half-way

    async def _spooled(self, request: web.Request) -> IO[bytes]:
        """The whole body, in a file without a name."""
        spool: Path = self._imports.spool
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
        body = decoded(await _read(request), _ExportBody)
        selection = body.selection()
        if body.dry_run:
            return in_json(await self._exports.planned(selection, "the bundle"))
        response = web.StreamResponse(headers={"Content-Type": TAR})
        async with self._sending:
            await self._send(request, response, selection)
        return response

    async def _send(self, request: web.Request, response: web.StreamResponse, selection: Selection) -> None:
        """Send the bundle.  Raises errors that occur before the response has begun, and unexpected ones."""
        transport, connection = request.transport, request.get_extra_info("socket")
        writing = asyncio.ensure_future(self._write(request, response, selection))
        try:
            await shielded(writing)
            await response.write_eof()
        except asyncio.CancelledError:
            reset(transport, connection)  # so that the thread stops waiting for the client
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
            raise
        except Exception as error:
            if not response.prepared:
                raise
            reset(transport, connection)
            if not isinstance(error, (RegistryError, OSError)):
                raise
            log.warning("export.failed", error=str(error))

    async def _write(self, request: web.Request, response: web.StreamResponse, selection: Selection) -> None:
        loop = asyncio.get_running_loop()

        def done(work: Coroutine[Any, Any, object]) -> None:
            asyncio.run_coroutine_threadsafe(_in_time(work), loop).result()

        @contextmanager
        def opened(digest: Digest) -> Iterator[Sink]:
            response.headers[DIGEST] = str(digest)
            done(response.prepare(request))  # only now, so that earlier errors become an error response
            sink = TarSink(lambda piece: done(response.write(piece)))
            yield sink
            sink.end()

        await self._exports.export(selection, "the bundle", opened)


async def _read(request: web.Request) -> bytes:
    """The whole body, which may be larger than aiohttp allows by default."""
    content = bytearray()
    while piece := await request.content.readany():
        content += piece
        if len(content) > LARGEST:
            raise web.HTTPRequestEntityTooLarge(LARGEST, len(content))
    return bytes(content)


async def _copy(request: web.Request, file: IO[bytes]) -> None:
    """Write the body to a file.  Raises ArchiveInvalid if it ends early, OSError if it cannot be written."""
    count = 0
    write: Callable[[bytes], object] = file.write
    while True:
        try:
            async with asyncio.timeout(STALLED):
                piece = await request.content.readany()
        except TimeoutError:
            raise ArchiveInvalid(f"the client sent nothing of the archive for {STALLED:g} s") from None
        except (ConnectionError, web.RequestPayloadError):
            raise ArchiveInvalid(f"the archive was cut after {count} bytes") from None
        if not piece:
            break
        count += len(piece)
        await run_in_thread(write, piece)
    await run_in_thread(file.flush)


async def _in_time(work: Coroutine[Any, Any, object]) -> None:
    try:
        async with asyncio.timeout(STALLED):
            await work
    except TimeoutError:
        raise ConnectionResetError(f"the client received nothing for {STALLED:g} s") from None


def _flag(fields: Any, name: str) -> bool:
    if fields[name] not in _FLAGS:
        raise FieldInvalid(name, "expected true or false")
    return _FLAGS[fields[name]]

"""What is known of the fill of one blob: who transfers it, and how far it is."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import structlog

from proxy.cache.readers import BlobSource
from proxy.cache.rest import Idle, Rest
from proxy.telemetry.tracing import TraceSpan, current_span, failed
from storage.disk.sparse import SparseUpload
from storage.errors import BlobUnknown, StorageFailed, Unavailable
from storage.oci import Descriptor, Digest, Span

log = structlog.get_logger()

LARGEST_UNSIZED = 64 << 30  # bytes of a blob whose size the origin does not state: a body must end some time


class Abandoned(StorageFailed):
    """The process that transferred the blob has thrown away what had come, for whatever reason.

    Who has read some of it reads on from the origin; who has not may begin a fill.
    """


class RangeFetcher(Protocol):
    """What fetches the bytes of a fill in this process."""

    @property
    def coming(self) -> list[tuple[int, int]]:
        """What each transfer under way is to bring from now on."""

    @property
    def repeated(self) -> int:
        """How many bytes came and were dropped, as they were there, or another transfer brings them."""

    def want(self, source: BlobSource, offset: int, stop: int | None) -> None:
        """A client waits for [offset, stop)."""

    async def begin(self, source: BlobSource, span: Span) -> None:
        """Start the fill by a range, while it waits for its turn, if the origin sends ranges."""

    async def prepare(self, source: BlobSource, spans: Sequence[Span]) -> None:
        """Ask for what is missing of the spans, if the rest does not come by itself."""

    async def confirm(self) -> None:
        """Wait until it is known that the origin sends all of the blob.  Raises its error."""


@dataclass(frozen=True, slots=True)
class EndedFill:
    """A fill that has ended: how, and with which error; `repository` is a full name.

    `bytes` are those of the blob, or if it was not stored, those that had come.
    """

    digest: Digest
    namespace: str
    repository: str
    bytes: int
    begun: float
    ended: float
    result: str
    error: str | None


@dataclass(slots=True)
class Fill:
    """One transfer of a blob into the store.

    started: the upload to follow, or None if there is none: the store has the blob, or there is an `error`
    begun: in seconds since the epoch
    repositories: those whose origin has confirmed that they have the blob
    received: the origin has sent everything
    queued: it waits for its turn
    urged: another replica waits for it
    shown: repositories in which parts of the blob are shown
    rest: whether all of the blob is to be fetched
    cause, span: what started it, and itself, as parts of a trace
    """

    digest: Digest
    source: BlobSource
    started: asyncio.Future[tuple[SparseUpload, Descriptor] | None]
    begun: float
    rest: Rest
    followers: int = 0
    repositories: set[str] = field(default_factory=set)
    upload: SparseUpload | None = None
    fetcher: RangeFetcher | None = None
    size: int = -1  # bytes, once it is stored
    task: asyncio.Task[None] | None = None
    received: bool = False
    opened: asyncio.Event = field(default_factory=asyncio.Event)  # `upload` is there, or `error`
    queued: bool = False
    urged: asyncio.Event = field(default_factory=asyncio.Event)
    shown: set[str] = field(default_factory=set)
    error: Exception | None = None
    cause: TraceSpan = field(default_factory=current_span.get)
    span: TraceSpan = field(default_factory=lambda: current_span.get().child("fill"))

    def want(self, source: BlobSource, offset: int, stop: int | None) -> None:
        """A client waits for [offset, stop)."""
        if self.error is not None:
            return  # who reads gets it
        if self.fetcher is not None:
            self.fetcher.want(source, offset, stop)
        elif self.upload is not None:
            if self.rest.due:
                offset, stop = awaited(self.upload, offset, stop)
            if offset != stop and not self.upload.has(offset):
                client = "" if self.rest.due else source.client
                self.upload.wanted.tell(offset, LARGEST_UNSIZED if stop is None else stop, client)
        self._tell_all()

    def demand(self) -> None:
        """A client wants all of the blob."""
        self.rest.demand()
        self._tell_all()

    def _tell_all(self) -> None:
        """The process that transfers it may have been asked for parts only."""
        if self.fetcher is None and self.rest.demanded and self.upload is not None:
            self.upload.wanted.tell_all()

    def ended(self, result: str, now: float) -> EndedFill:
        came = self.size if self.size >= 0 else self.upload.offset if self.upload else 0
        error = None if self.error is None else str(self.error) or type(self.error).__name__
        source = self.source
        return EndedFill(
            self.digest, source.namespace, source.full_name, came, self.begun, now, result, error
        )

    async def watch(self, upload: SparseUpload) -> bool:
        """Follow the process that transfers it: see FileUpload.watch().

        Raises Abandoned, and Idle when nobody reads.
        """
        watching = asyncio.ensure_future(upload.watch(self.digest))
        try:
            await self.rest.wait(lambda: False, lambda: True, watching)
            committed = await watching
            if not committed and self.rest.due and not upload.offset:
                # Nothing was promised to anybody: who waits gets the answer of the origin.
                self.started = asyncio.get_running_loop().create_future()
            return committed
        except Idle as error:
            self.error = error  # before anybody can join
            raise
        except Unavailable as error:  # its disk is ours, and may be full: clients read on
            raise Abandoned(str(error)) from error
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    def note_request(self) -> None:
        """Link the trace of what follows it, which may be another one than that of its cause."""
        follower = current_span.get()
        if follower is not self.cause:
            follower.link(self.span)
            self.span.link(follower)

    def note_trace(self, upload: SparseUpload) -> None:
        """Tell other processes, which follow what this one writes, of which trace it is a part."""
        if self.span.recorded:
            upload.note.write(self.span.headers())

    def link_writer(self, span: TraceSpan) -> None:
        """Link a span to the fill of the process that transfers the blob, if that is another one."""
        if span.recorded and self.upload is not None and not self.upload.ours:
            span.link_remote(self.upload.note.read())

    def end_span(self, result: str) -> None:
        """End its part of a trace, with how it ended."""
        if not self.span.recorded:
            return
        source, bytes = (
            self.source,
            self.size if self.size >= 0 or self.upload is None else self.upload.offset,
        )
        self.span.set(
            {
                "entrepot.namespace": source.namespace,
                "entrepot.repository": source.name,
                "entrepot.digest": self.digest,
                "entrepot.fill.result": result,
                "entrepot.fill.bytes": max(bytes, 0),
            }
        )
        if result in ("failed", "uncached") and self.error is not None:
            failed(self.span, self.error)
        else:
            self.span.end()

    @property
    def log(self) -> Any:
        source = self.source
        return log.bind(namespace=source.namespace, repository=source.name, digest=self.digest)


def awaited(upload: SparseUpload, offset: int, stop: int | None) -> tuple[int, int | None]:
    """What a reader of verified bytes waits for that has come to `offset`, and reads up to `stop`.

    The last byte is withheld until all are there: it waits for the first ones that are missing then.
    """
    last = offset == upload.listed_size - 1 and upload.has(offset)
    return upload.extents.gap(0, upload.listed_size) if last else (offset, stop)


@contextmanager
def kept(digest: Digest) -> Iterator[None]:
    """Raise StorageFailed if the blob, which was just stored, is evicted meanwhile: its origin has it."""
    try:
        yield
    except BlobUnknown as error:
        raise StorageFailed(f"{digest} was evicted as soon as it was stored") from error

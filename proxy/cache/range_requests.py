"""Requests for ranges of a blob, whose answers may ignore the range."""

from __future__ import annotations

from proxy.cache.readers import BlobSource
from storage.oci import Digest, Span
from storage.registry import Blob

PATIENCE = 2  # answers in a row that may ignore a range, of an origin that has sent others


class RangeRequests:
    """The requests for ranges of one blob.

    One answer with all of the blob, after others with ranges, may be that of a proxy, or of another server
    with the same name: the range is asked for again.

    dropped: bytes that came with such answers
    """

    def __init__(self, digest: Digest) -> None:
        self.dropped = 0
        self._digest = digest
        self._patience = 0

    async def send(self, source: BlobSource, span: Span) -> Blob:
        """The transfer of `span`, or of more if the origin ignores ranges."""
        while True:
            blob = await source.origin.get_blob(source.name, self._digest, span)
            if is_range(blob, span):
                self._patience = PATIENCE
                return blob
            if not self._patience:
                return blob
            self._patience -= 1
            self.dropped += blob.unread
            await blob.close()


def is_range(blob: Blob, span: Span) -> bool:
    """Whether this is a transfer of `span` alone, of a blob whose size is known."""
    return not blob.whole and blob.position == span.start and blob.descriptor.size >= 0

"""The objects of a bucket, read by signed URLs, by a thread and from the socket, as the blobs of an upstream.

The client of the bucket passes on pieces of memory of its own, which have to be made, copied and returned.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from yarl import URL

from proxy.upstream.connect import Connect
from proxy.upstream.responses import Download, stated_extent
from proxy.upstream.transport import Transport
from storage.errors import OriginFailed
from storage.oci import Descriptor, Span
from storage.registry import Blob

REST = 600.0  # seconds for which a bucket is not asked that refuses signed URLs
LEAST = 128 << 10  # bytes of a body that a thread reads, which can hash meanwhile
_REFUSALS = frozenset((400, 401, 403, 405, 501))


class SignedObjects:
    """Reads the objects of the bucket `name`.

    quick: the keys are known with which URLs are signed
    ticks: seconds of a clock that nobody sets
    """

    def __init__(
        self, name: str, connect: Connect, quick: bool, ticks: Callable[[], float] = time.monotonic
    ) -> None:
        self.quick = quick
        self._name = name
        self._connect = replace(connect, least=LEAST)
        self._ticks = ticks
        self._until = -float("inf")
        self._transport: Transport | None = None

    @property
    def resting(self) -> bool:
        """Whether the bucket has just refused a signed URL."""
        return self._ticks() < self._until

    async def open(self, url: str, descriptor: Descriptor, start: int, stop: int) -> Blob | None:
        """The bytes [start, stop) of an object, which can be read once; None if they do not come so.

        Raises OriginTimeout without an answer.
        """
        target = URL(url, encoded=True)  # another escape would be another signature
        if self._transport is None:
            self._transport = Transport(self._name, self._connect, target)
        span = None if (start, stop) == (0, descriptor.size) else Span(start, stop)
        headers = {} if span is None else {"Range": f"bytes={start}-{stop - 1}"}
        try:
            response = await self._transport.send("GET", target, headers)
        except OriginFailed:
            return None
        try:
            expected = response.status == (200 if span is None else 206)
            if expected and stated_extent(self._name, response, span) == (start, descriptor.size):
                return Download(self._transport, response, descriptor, start, _uncounted)
        except OriginFailed:
            pass
        if response.status in _REFUSALS:
            self._until = self._ticks() + REST
        response.close()
        return None

    async def close(self) -> None:
        if self._transport is not None:
            await self._transport.close()


async def _uncounted(number: int) -> None:
    """Of the bytes of a bucket no budget is kept."""

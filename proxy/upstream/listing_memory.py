"""The memory for listings of upstreams that are being read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from storage.errors import Unavailable

LISTINGS_TOTAL = 64 << 20  # bytes of the pages of all listings; as Python values they need some times more
AGAIN = 1.0  # seconds


def ignore(number: int) -> None:
    """Count nothing."""


class ListingMemory:
    """A limit on the bytes of all listings that are read at the same time; several upstreams share one."""

    def __init__(self, limit: int = LISTINGS_TOTAL) -> None:
        self._limit = limit
        self.used = 0

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """The share of one listing: a function to call before more bytes are kept, which raises Unavailable.

        They are free again at the end of the block.
        """
        taken = 0

        def take(number: int) -> None:
            nonlocal taken
            if self.used + number > self._limit:
                raise Unavailable(
                    f"the lists that upstreams are sending now have over {self._limit >> 20} MiB: try again",
                    retry_after=AGAIN,
                )
            self.used += number
            taken += number

        try:
            yield take
        finally:
            self.used -= taken

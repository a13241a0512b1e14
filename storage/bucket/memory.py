"""Memory that passes objects on: a few pieces of some MiB at a time, in threads of a library and of ours."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD, mallopt(3)
LEAST = 1 << 20  # bytes


def return_large_pieces() -> None:
    """Have the C library return pieces of LEAST bytes to the system once they are freed, where it can.

    By default glibc learns to keep them, for each thread some: 35 MiB after the first large blob.
    """
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, LEAST)

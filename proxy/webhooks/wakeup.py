"""Telling who delivers, in a process of its own, that there is something new: a datagram to a socket of his.

There is nothing in it, and it need not come: who begins to deliver looks first at what is there.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NAME = "webhooks"


def caller(run: Path) -> Callable[[], None]:
    """To be called where somebody else listens in the directory `run`; where nobody does, nothing happens."""

    def wake() -> None:
        # Without a wait: if the socket is full, he is being woken already.
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as calling:
            calling.setblocking(False)
            calling.sendto(b"\n", str(run / NAME))

    return wake


@contextmanager
def listening(run: Path, wake: Callable[[], None]) -> Iterator[None]:
    """Call `wake` for whoever calls.  Only one process at a time may be inside, for each `run`."""
    path = run / NAME
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as called:

        def heard() -> None:
            with suppress(BlockingIOError):
                while called.recv(1):
                    pass
            wake()

        path.unlink(missing_ok=True)  # of one that was killed
        called.bind(str(path))
        path.chmod(0o600)
        called.setblocking(False)
        loop.add_reader(called, heard)
        try:
            yield
        finally:
            loop.remove_reader(called)
            path.unlink(missing_ok=True)

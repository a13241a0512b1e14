"""A signal to the process that delivers events: an empty datagram to its socket.

The signal may get lost: the dispatcher reads its queues when it starts, and once in a while.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NAME = "webhooks"


def sender(run: Path) -> Callable[[], None]:
    """Return a function that sends the signal to the process that listens in the directory `run`, if any."""

    def wake() -> None:
        # Without waiting: if the socket is full, the other process is being woken already.
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sending:
            sending.setblocking(False)
            sending.sendto(b"\n", str(run / NAME))

    return wake


@contextmanager
def listening(run: Path, wake: Callable[[], None]) -> Iterator[None]:
    """Call `wake` for each signal.  Only one process at a time may listen in a directory."""
    path = run / NAME
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiving:

        def receive() -> None:
            with suppress(BlockingIOError):
                while receiving.recv(1):
                    pass
            wake()

        path.unlink(missing_ok=True)  # left by a process that was killed
        receiving.bind(str(path))
        path.chmod(0o600)
        receiving.setblocking(False)
        loop.add_reader(receiving, receive)
        try:
            yield
        finally:
            loop.remove_reader(receiving)
            path.unlink(missing_ok=True)

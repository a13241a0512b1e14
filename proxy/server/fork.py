"""Run a function in a copy of this process, from a running event loop.

The copy shares the memory of all that this process has imported, and starts at once.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from storage.concurrency import shielded

_END = b"\0"  # of the message


class Parent:
    """The connection from a forked process to its parent."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def report(self, message: str) -> None:
        """Send the one message that `ForkedProcess.message` returns."""
        self._connection.sendall(message.encode() + _END)

    def fileno(self) -> int:
        """A descriptor that becomes readable when the parent has ended."""
        return self._connection.fileno()


class ForkedProcess:
    """A process made by fork().  The first call is message()."""

    def __init__(self, pid: int, connection: socket.socket) -> None:
        self.pid = pid
        self._connection = connection
        self._ended: asyncio.Task[int] | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def message(self) -> str:
        """What it reported; empty if it has ended without a report."""
        reader, self._writer = await asyncio.open_unix_connection(sock=self._connection)
        try:
            return (await reader.readuntil(_END))[:-1].decode()
        except (asyncio.IncompleteReadError, ConnectionError):
            return ""
        finally:
            self._ended = asyncio.create_task(self._status(reader, self._writer))

    async def wait(self) -> int:
        """Its exit status once it has ended; negative if a signal ended it."""
        assert self._ended is not None
        return await shielded(self._ended)

    async def _status(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
        with suppress(ConnectionError):
            await reader.read()
        status = os.waitpid(self.pid, 0)[1]  # noqa: ASYNC222  # at once: its descriptors are closed
        writer.close()
        return os.waitstatus_to_exitcode(status)

    def send_signal(self, number: int) -> None:
        if self._ended is None or not self._ended.done():
            os.kill(self.pid, number)

    def leave(self) -> None:
        """Close the connection, as the end of this process does."""
        if self._writer is not None:
            self._writer.close()


def fork(work: Callable[[Parent], int], keep: Iterable[int]) -> ForkedProcess:
    """Run `work` in a copy of this process; its result is the exit status.  Raises OSError.

    keep: the descriptors that stay open in the copy, besides standard output and standard error
    """
    ours, theirs = socket.socketpair()
    _flush()
    try:
        with _blocked_signals():
            pid = os.fork()
            if pid == 0:
                _forget_event_loop()
                _close_all_but({1, 2, theirs.fileno(), *keep})
        if pid == 0:
            _exit(work, Parent(theirs))
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()
    return ForkedProcess(pid, ours)


@contextmanager
def _blocked_signals() -> Iterator[None]:
    # A signal that reached the copy before it has forgotten the event loop would be handled in its parent:
    # both would have the same wake-up descriptor.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _forget_event_loop() -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    asyncio._set_running_loop(None)


def _close_all_but(keep: set[int]) -> None:
    """Close descriptors whose objects stay in memory: the frames of the parent's event loop hold them."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for file in [int(each.name) for each in Path("/dev/fd").iterdir()]:
        if file not in {0, *keep}:
            with suppress(OSError):  # the one that read the directory is closed already
                os.close(file)


def _exit(work: Callable[[Parent], int], parent: Parent) -> None:
    status = 1
    try:
        status = work(parent)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        _flush()
        os._exit(status)


def _flush() -> None:
    """Write what waits in the standard streams, unless their reader has ended or their disk is full."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()

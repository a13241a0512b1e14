"""What systemd hears of this service, if systemd has started it: the protocol of sd_notify(3)."""

from __future__ import annotations

import asyncio
import os
import socket
import time

import structlog

log = structlog.get_logger()


def ready() -> None:
    """The server serves: it has started, or a reload has ended."""
    _notify("READY=1")


def reloading() -> None:
    """A reload has begun; ready() ends it."""
    _notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")


def stopping() -> None:
    _notify("STOPPING=1")


async def keep_alive() -> None:
    """Tell systemd twice in each WatchdogSec= that this process runs; return if it does not want to know."""
    process, limit = os.environ.get("WATCHDOG_PID", ""), os.environ.get("WATCHDOG_USEC", "")
    if process not in ("", str(os.getpid())) or not limit.isdecimal():
        return
    while True:
        _notify("WATCHDOG=1")
        await asyncio.sleep(int(limit) / 1e6 / 2)


def _notify(state: str) -> None:
    """Send one datagram to the socket that NOTIFY_SOCKET names; without it, nothing."""
    name = os.environ.get("NOTIFY_SOCKET", "")
    if not name:
        return
    address = "\0" + name[1:] if name.startswith("@") else name  # unix(7): an abstract socket
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as connection:
            connection.connect(address)
            connection.sendall(state.encode())
    except OSError as error:
        log.warning("systemd.unreachable", socket=name, reason=error.strerror or str(error))

"""The functions of a process that the parts of its composition call."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from storage.disk.health import MakeRoom, make_no_room


def nothing() -> None:
    """The default of a hook without arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """Functions of a process that the parts of its composition call, and what kind of process it is.

    make_room: makes room on the disk before a blob or an upload is written
    wake: is called after events were put into the queues of the webhooks
    pause: blocks for a number of seconds between two pieces of maintenance; may raise Cancelled
    drill_begun: is called when a drill begins
    background: whether half of the slots for transfers are left to other processes
    """

    make_room: MakeRoom = make_no_room
    wake: Callable[[], None] = nothing
    pause: Callable[[float], None] = time.sleep
    drill_begun: Callable[[], None] = nothing
    background: bool = False


NONE = Hooks()  # of a process that calls nothing

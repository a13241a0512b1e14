"""The results of the doctor.

A Check is ok, a warning, or failed.  It says what was found and, unless it is ok, what to do about it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterable, Sequence
from typing import Literal, TypeAlias

import msgspec

from proxy.config.quantities import format_duration
from proxy.connections.failures import reason

State: TypeAlias = Literal["ok", "warning", "failed"]


class Check(msgspec.Struct, frozen=True):
    """The result of one check.  `subject` is the namespace, file or client that was checked."""

    name: str
    subject: str
    state: State
    message: str
    advice: str = ""


class Diagnosis(msgspec.Struct, frozen=True):
    """All checks, and the number of checks in each state."""

    checks: list[Check]
    ok: int
    warnings: int
    failed: int

    @classmethod
    def of(cls, checks: Iterable[Check]) -> Diagnosis:
        found = list(checks)
        states = [each.state for each in found]
        return cls(found, *(states.count(each) for each in ("ok", "warning", "failed")))


def ok(name: str, subject: str, message: str) -> Check:
    return Check(name, subject, "ok", message)


def warning(name: str, subject: str, message: str, advice: str) -> Check:
    return Check(name, subject, "warning", message, advice)


def failed(name: str, subject: str, message: str, advice: str) -> Check:
    return Check(name, subject, "failed", message, advice)


def check_skew(subject: str, ahead: float | None, most: float) -> list[Check]:
    """A warning if another machine's clock is more than `most` seconds ahead of, or behind, this one's."""
    if ahead is None or abs(ahead) <= most:
        return []
    which = "ahead of" if ahead > 0 else "behind"
    message = f"its clock is {format_duration(abs(ahead))} {which} this machine's"
    return [warning("clock", subject, message, "synchronize both by NTP")]


async def guarded(name: str, subject: str, checks: Awaitable[Sequence[Check]]) -> Sequence[Check]:
    """The results of checks; if one of them fails itself, that is the only result."""
    try:
        return await checks
    except Exception as error:
        advice = "look at what it is about in the configuration; if that is right, report this as a fault"
        return [failed(name, subject, f"could not be checked: {reason(error)}", advice)]

"""Sizes, durations, shares and rates: how they are read, and how they are written for people.

Each parser takes what YAML gave, and raises ValueError with the cause, in half a sentence."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime

_RESERVE = re.compile(r"([0-9]{1,9})(%?)", re.ASCII)
_PERCENT = re.compile(r"([0-9]{1,3})%", re.ASCII)
SHORTEST_GRACE = 3600.0  # seconds
_UNITS = {"w": 604800.0, "d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_DURATION = re.compile("".join(f"(?:([0-9]{{1,9}}){unit})?" for unit in _UNITS))
_SIZE = re.compile(r"([0-9]{1,9})(?:([KMGT])(i)?)?B", re.ASCII)
BLOCKED = 86400.0  # seconds without a request at most, whatever Retry-After says
_AGES = ((86400 * 365, "y"), (86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


@dataclass(frozen=True, slots=True)
class Reserve:
    """What to keep of a rate limit: so many requests, or so many in a hundred."""

    requests: int = 0
    percent: int = 0

    def of(self, limit: int) -> float:
        return self.requests or limit * self.percent / 100


@dataclass(frozen=True, slots=True)
class Share:
    """So many bytes, or so many in a hundred."""

    size: int = 0
    percent: int = 0

    def of(self, whole: int) -> int:
        return self.size or whole * self.percent // 100


def parse_duration(value: object) -> float:
    """`500ms`, `10s`, `1h30m`, `2w`: larger units first; in seconds."""
    if isinstance(value, int) and not isinstance(value, bool) and value == 0:
        return 0.0
    found = _DURATION.fullmatch(value) if isinstance(value, str) and value else None
    if not found:
        raise ValueError(
            "expected a duration: a number and its unit, one of ms, s, m, h, d, w, such as 1h30m"
        )
    return math.fsum(int(n) * unit for n, unit in zip(found.groups(), _UNITS.values(), strict=True) if n)


def parse_timeout(value: object) -> float:
    seconds = parse_duration(value)
    if not seconds:
        raise ValueError("must be more than 0")
    return seconds


def parse_size(value: object) -> int:
    """`512KiB`, `100MB`, `500GiB`: in bytes; K, M, G and T with iB are powers of 1024, with B of 1000."""
    found = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if not found or not int(found[1]):
        raise ValueError(
            "expected a size: a number and its unit, one of B, KiB, MiB, GiB, TiB, KB, MB, GB, TB"
        )
    power: int = (1024 if found[3] else 1000) ** " KMGT".index(found[2] or " ")
    return int(found[1]) * power


def parse_freshness(value: object) -> float:
    """A duration, or infinity for `forever`."""
    return math.inf if value == "forever" else parse_duration(value)


def parse_keep(value: object) -> float:
    """A duration of more than 0, or infinity for `never`."""
    return math.inf if value == "never" else parse_timeout(value)


def parse_every(value: object) -> float | None:
    """A duration of more than 0; None for `off`, which YAML reads as false."""
    return None if value is False or value == "off" else parse_timeout(value)


def parse_grace(value: object) -> float:
    seconds = parse_duration(value)
    if seconds < SHORTEST_GRACE:
        raise ValueError("must be 1h or more: a push in progress relies on it")
    return seconds


def parse_share(value: object) -> Share:
    """A size, or a percentage of the whole; `0` is nothing."""
    if value == 0 and not isinstance(value, bool):
        return Share()
    found = _PERCENT.fullmatch(value) if isinstance(value, str) else None
    if found and int(found[1]) < 100:
        return Share(percent=int(found[1]))
    try:
        return Share(size=parse_size(value))
    except ValueError:
        raise ValueError("expected a size such as 10GiB, or a percentage below 100% of the disk") from None


def parse_percentage(value: object) -> float:
    """`90%`, as a fraction."""
    found = _PERCENT.fullmatch(value) if isinstance(value, str) else None
    if not found or not 1 <= int(found[1]) <= 100:
        raise ValueError("expected a percentage from 1% to 100%")
    return int(found[1]) / 100


def parse_rate(value: object) -> int | None:
    """Bytes a second, as a size; None for `off`, which YAML reads as false."""
    return None if value is False or value == "off" else parse_size(value)


def parse_reserve(value: object) -> Reserve:
    """A number of requests, or a percentage of the limit."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return Reserve(requests=value)
    found = _RESERVE.fullmatch(value) if isinstance(value, str) else None
    if not found or (found[2] and int(found[1]) > 100):
        raise ValueError("expected a number of requests, or a percentage of the limit such as 10%")
    return Reserve(percent=int(found[1])) if found[2] else Reserve(requests=int(found[1]))


def seconds_until(headers: Mapping[str, str], now: Callable[[], float]) -> float | None:
    """Retry-After (RFC 9110 §10.2.3) in seconds, where there is one that can be read.

    A date is compared with the answer's own where it has one: its clock and ours may differ.  `now` is in
    seconds since the epoch.
    """
    value = headers.get("Retry-After", "")
    if value.isascii() and value.isdigit():
        return min(BLOCKED, float(value[:10]))
    due, sent = _date(value), _date(headers.get("Date", ""))
    if due is None:
        return None
    return min(BLOCKED, max(0.0, due - (now() if sent is None else sent)))


def _date(text: str) -> float | None:
    try:
        found = parsedate_to_datetime(text)
    except ValueError:
        return None
    # RFC 9110 §5.6.7: always GMT; a zone of -0000 is parsed as none.
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def size(count: float | None) -> str:
    """`1.2 GiB`; `?` for what is not known."""
    if count is None or count < 0:
        return "?"
    if count < 1024:
        return f"{int(count)} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):  # noqa: B007
        count /= 1024
        # 1023.96 would be written as 1024.0 of a unit.
        if count < 1023.95:
            break
    return f"{count:.1f} {unit}"


def duration(seconds: float) -> str:
    """In its largest unit: `3 h`, `10 min`; `for ever` for infinity."""
    if math.isinf(seconds):
        return "for ever"
    for length, unit in _AGES:
        if seconds >= length:
            return f"{int(seconds / length)} {unit}"
    return "0 s"


def moment(time: float | None, now: float, never: str = "never") -> str:
    """`3 h ago`, `now`, `in 10 min`; `never` for None."""
    if time is None:
        return never
    if math.isinf(time):
        return "for ever"
    if abs(time - now) < 1:
        return "now"
    return f"{duration(now - time)} ago" if time < now else f"in {duration(time - now)}"


def share(part: float | None) -> str:
    """A fraction as a percentage; `-` for none of nothing."""
    return "-" if part is None else f"{part:.1%}"


def plural(count: int, noun: str, nouns: str = "") -> str:
    """`1 blob`, `3 blobs`."""
    return f"{count} {noun if count == 1 else nouns or noun + 's'}"

"""Quantities: sizes, durations, shares and rates, read from the configuration and formatted for people.

A `parse_` function takes a value as YAML gives it, and raises ValueError with half a sentence that follows
the name of the key.  A `format_` function returns text for a terminal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

T = TypeVar("T")

MIN_GRACE = 3600.0  # seconds
MAX_RETRY_AFTER = 86400.0  # seconds; a longer Retry-After is cut to this
# The units of durations from the largest on, each as it is written, and in seconds.
_DURATION_UNITS = {
    "w|weeks?": 604800.0,
    "d|days?": 86400.0,
    "h|hours?": 3600.0,
    "m|min|minutes?": 60.0,
    "s|sec|seconds?": 1.0,
    "ms": 0.001,
}
DURATION = " ?".join(f"(?:([0-9]{{1,9}}) ?(?:{unit}))?" for unit in _DURATION_UNITS)
_DURATION = re.compile(DURATION)
_SIZE = re.compile(r"([0-9]{1,9}) ?(?:([KMGT])(i)?B?|B)", re.ASCII | re.IGNORECASE)
_PERCENT = re.compile(r"([0-9]{1,3}) ?%", re.ASCII)
_RESERVE = re.compile(r"([0-9]{1,9})(%?)", re.ASCII)
_MOMENT = re.compile(r"([0-9]{4}-[0-9]{2}-[0-9]{2})(?:T([0-9]{2}:[0-9]{2}:[0-9]{2})Z)?", re.ASCII)
_NUMBER = re.compile(r"[0-9]{1,19}")
_FORMAT_UNITS = ((86400 * 365, "y"), (86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


@dataclass(frozen=True, slots=True)
class Reserve:
    """The part of an upstream's rate limit to keep free: a number of requests, or a percentage."""

    requests: int = 0
    percent: int = 0

    def of(self, limit: int) -> float:
        return self.requests or limit * self.percent / 100


@dataclass(frozen=True, slots=True)
class Share:
    """A number of bytes, or a percentage of a whole."""

    size: int = 0
    percent: int = 0

    def of(self, whole: int) -> int:
        return self.size or whole * self.percent // 100


def _is_zero(value: object) -> bool:
    """Whether it is 0 without a unit: as a number, or as text, which a variable always gives."""
    return value == "0" or (isinstance(value, int) and not isinstance(value, bool) and value == 0)


# Durations


def parse_duration(value: object) -> float:
    """Seconds, from `500ms`, `10s`, `10 min`, `1h30m` or `2w`; larger units come first.  0 needs no unit."""
    if _is_zero(value):
        return 0.0
    text = value if isinstance(value, str) and value == value.strip() else ""
    found = _DURATION.fullmatch(text) if text else None
    if not found:
        raise ValueError(
            "expected a duration: a number and its unit, one of ms, s, m, h, d, w, such as 1h30m"
        )
    parts = zip(found.groups(), _DURATION_UNITS.values(), strict=True)
    return math.fsum(int(number) * unit for number, unit in parts if number)


def parse_timeout(value: object) -> float:
    """Seconds, more than 0."""
    seconds = parse_duration(value)
    if not seconds:
        raise ValueError("must be more than 0")
    return seconds


def parse_freshness(value: object) -> float:
    """Seconds; infinity for `forever`."""
    return math.inf if value == "forever" else parse_duration(value)


def parse_keep(value: object) -> float:
    """Seconds, more than 0; infinity for `never`."""
    return math.inf if value == "never" else _or("never", parse_timeout, value)


def parse_every(value: object) -> float | None:
    """Seconds, more than 0; None for `off`, which YAML reads as false."""
    return None if value is False or value == "off" else _or("off", parse_timeout, value)


def _or(word: str, parse: Callable[[object], T], value: object) -> T:
    """The value, where `word` may stand in its place: an error says so."""
    try:
        return parse(value)
    except ValueError as error:
        raise ValueError(f"{error}, or {word}") from None


def parse_grace(value: object) -> float:
    """Seconds, an hour or more."""
    seconds = parse_duration(value)
    if seconds < MIN_GRACE:
        raise ValueError("must be 1h or more, so that no push in progress is collected")
    return seconds


def parse_number(text: str) -> int | None:
    """A number in a header: 1*DIGIT, ASCII by the grammar (RFC 5234), below 2**63; None if it is malformed.

    int() would accept "+1", "1_0" and the digits of other scripts, and raise for 5,000 digits.
    """
    number = int(text) if _NUMBER.fullmatch(text) else None
    return number if number is not None and number < 1 << 63 else None


def seconds_until(headers: Mapping[str, str], now: Callable[[], float]) -> float | None:
    """The seconds that Retry-After asks to wait, or None if it is missing or malformed.  RFC 9110 §10.2.3.

    A date is compared with the response's own Date if there is one, since the two clocks may differ.  `now`
    returns seconds since the epoch.
    """
    value = headers.get("Retry-After", "")
    if value.isascii() and value.isdigit():
        return MAX_RETRY_AFTER if (number := parse_number(value)) is None else min(MAX_RETRY_AFTER, number)
    due, sent = _date(value), _date(headers.get("Date", ""))
    if due is None:
        return None
    return min(MAX_RETRY_AFTER, max(0.0, due - (now() if sent is None else sent)))


def _date(text: str) -> float | None:
    if not text.isascii():
        return None
    try:
        found = parsedate_to_datetime(text)
        # RFC 9110 §5.6.7: always GMT; a zone of -0000 is parsed as a naive datetime.
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


# Sizes, shares and rates


def parse_size(value: object) -> int:
    """Bytes, from `512KiB`, `100 MB` or `500G`; more than 0."""
    size = _size(value)
    if not size:
        raise ValueError("must be more than 0")
    return size


def _size(value: object) -> int:
    """KiB and Ki are 1024, KB and K are 1000, and so on.  0 needs no unit."""
    if _is_zero(value):
        return 0
    found = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if not found:
        raise ValueError(
            "expected a size: a number and its unit, one of B, KiB, MiB, GiB, TiB, KB, MB, GB, TB"
        )
    power: int = (1024 if found[3] else 1000) ** " KMGT".index((found[2] or " ").upper())
    return int(found[1]) * power


def parse_share(value: object) -> Share:
    """A size, or a percentage below 100; 0 for nothing."""
    found = _PERCENT.fullmatch(value) if isinstance(value, str) else None
    if found and int(found[1]) < 100:
        return Share(percent=int(found[1]))
    try:
        return Share(size=_size(value))
    except ValueError:
        raise ValueError("expected a size such as 10GiB, or a percentage below 100% of the disk") from None


def parse_percentage(value: object) -> float:
    """A fraction, from `90%`."""
    found = _PERCENT.fullmatch(value) if isinstance(value, str) else None
    if not found or not 1 <= int(found[1]) <= 100:
        raise ValueError("expected a percentage from 1% to 100%")
    return int(found[1]) / 100


def parse_rate(value: object) -> int | None:
    """Bytes per second, from a size; None for `off`, which YAML reads as false."""
    return None if value is False or value == "off" else _or("off", parse_size, value)


def parse_memory(value: object) -> int:
    """Bytes, from a size; 0 for `off`, which YAML reads as false."""
    return 0 if value is False or value == "off" else _or("off", parse_size, value)


def parse_reserve(value: object) -> Reserve:
    """A number of requests, or a percentage of the limit."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return Reserve(requests=value)
    found = _RESERVE.fullmatch(value) if isinstance(value, str) else None
    if not found or (found[2] and int(found[1]) > 100):
        raise ValueError("expected a number of requests, or a percentage of the rate limit such as 10%")
    return Reserve(percent=int(found[1])) if found[2] else Reserve(requests=int(found[1]))


# Text for people


def format_duration(seconds: float) -> str:
    """`3 h`, `10 min`: rounded down to the largest unit; `forever` for infinity."""
    if math.isinf(seconds):
        return "forever"
    for length, unit in _FORMAT_UNITS:
        if seconds >= length:
            return f"{int(seconds / length)} {unit}"
    return "0 s"


def parse_moment(text: str) -> float:
    """A date, which is the end of that day, or a time such as 2026-08-01T14:30:00Z; both in UTC.

    Raises ValueError.
    """
    found = _MOMENT.fullmatch(text)
    try:
        if found is None:
            raise ValueError
        begun = datetime.fromisoformat(f"{found[1]}T{found[2] or '00:00:00'}+00:00").timestamp()
    except ValueError:
        raise ValueError("expected a date such as 2026-08-01, or 2026-08-01T14:30:00Z") from None
    return begun if found[2] else begun + 86400 - 1


def format_time(time: float | None, now: float, never: str = "never") -> str:
    """`3 h ago`, `now`, `in 10 min`; `never` for None, `forever` for infinity.  Seconds since the epoch."""
    if time is None:
        return never
    if math.isinf(time):
        return "forever"
    if abs(time - now) < 1:
        return "now"
    return f"{format_duration(now - time)} ago" if time < now else f"in {format_duration(time - now)}"


def format_past(time: float | None, now: float, never: str = "never") -> str:
    """As format_time() of what has happened: it may be later than `now` by the clock of another replica."""
    return format_time(None if time is None else min(time, now), now, never)


def format_size(count: float | None) -> str:
    """`1.2 GiB`; `?` for None or a negative count, which stand for unknown."""
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


def format_share(part: float | None) -> str:
    """A fraction as a percentage; `-` for None."""
    return "-" if part is None else f"{part:.1%}"


def plural(count: int, noun: str, nouns: str = "") -> str:
    """`1 blob`, `3 blobs`."""
    return f"{count} {noun if count == 1 else nouns or noun + 's'}"

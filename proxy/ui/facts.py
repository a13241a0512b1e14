"""The result of an operation as names and values for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from proxy.config.quantities import format_duration, format_size
from proxy.ui.rendering import iso

MOST = 100  # values of a list that are shown
_SIZES = ("bytes", "short", "bytes_whole", "bytes_held")
_TIMES = ("at", "begun", "since", "until", "seen", "moves_at")
_DURATIONS = ("seconds", "left", "keep_fresh", "older_than")
_LEFT_OUT = ("dry_run",)


def facts(found: object) -> list[tuple[str, Sequence[str]]]:
    """The fields of a result that say something: the name of each, and its values, each a line."""
    if isinstance(found, list):
        return [fact for each in found[:MOST] for fact in facts(each)]
    if not isinstance(found, msgspec.Struct):
        return []
    rows = ((name, getattr(found, name)) for name in found.__struct_fields__ if name not in _LEFT_OUT)
    return [(name.replace("_", " "), lines) for name, value in rows if (lines := [*_lines(name, value)])]


def _lines(name: str, value: object) -> Iterator[str]:
    """The value as lines; none if it says nothing."""
    if isinstance(value, list):
        for each in value[:MOST]:
            yield from _lines(name, each)
        if len(value) > MOST:
            yield f"and {len(value) - MOST:,} more"
    elif isinstance(value, msgspec.Struct):
        yield ", ".join(f"{key} {' '.join(lines)}" for key, lines in facts(value))
    elif isinstance(value, bool):
        yield "yes" if value else "no"
    elif isinstance(value, int | float) and name in _SIZES:
        yield format_size(value)
    elif isinstance(value, int | float) and name in _DURATIONS:
        yield format_duration(value)
    elif isinstance(value, int | float) and name in _TIMES:
        yield from [iso(value)] if value else []
    elif value not in (None, ""):
        yield f"{value:,}" if isinstance(value, int | float) else str(value)

"""Log events as lines for people.

A request is one line: the time, then its status, result, method and reference, the client, size and
duration, and the reason that the client was given.  Of other events the keys that have a value follow the
name.  Control characters, which clients and upstreams may send, are replaced.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import structlog

from proxy.config.quantities import format_size

SHORT = 12  # characters of a digest
_RED, _GREEN, _YELLOW, _BOLD = "31", "32", "33", "1"
_LEVELS = {"warning": _YELLOW, "error": _RED, "critical": _RED}
_RESULTS = {"hit": _GREEN, "revalidated": _GREEN, "stale": _YELLOW, "negative": _YELLOW, "error": _RED}
_FILLS = ("fill.committed", "fill.linked", "fill.followed")


class ConsoleLines:
    """Renders the events, as the last processor of structlog.  `now` returns seconds since the epoch."""

    def __init__(self, colored: bool, now: Callable[[], float] = time.time) -> None:
        self._colored = colored
        self._now = now

    def __call__(self, logger: object, method: str, event: Mapping[str, Any]) -> str:
        if is_ping(event):
            raise structlog.DropEvent
        values = dict(event)
        name, level = values.pop("event"), values.pop("level", "info")
        exception = values.pop("exception", "")
        if name == "request.served":
            parts = self._request(values)
        elif name in _FILLS:
            parts = [self._color(name, _BOLD), *self._fill(values)]
        else:
            known = (f"{key}={_text(value)}" for key, value in values.items() if not _empty(value))
            parts = [self._color(name, _LEVELS.get(level, _BOLD)), *known]
        words = [] if level == "info" else [self._color(level, _LEVELS.get(level, ""))]
        line = " ".join([time.strftime("%H:%M:%S", time.localtime(self._now())), *words, *parts])
        return "\n".join([line, *map(_text, exception.splitlines())])

    def _request(self, event: Mapping[str, Any]) -> list[str]:
        status, result = event["status"], event["result"]
        color = _RED if status >= 500 else _YELLOW if status >= 400 else _GREEN
        kind = "" if event["kind"] == "manifest" else event["kind"]
        client = " ".join(filter(None, (_text(event["client"]), _text(event["user"]))))
        size = event["bytes"] or event["received"]
        seconds = event["seconds"]
        # The code of an error says less than its message, of which it is the short form.
        causes = [event["reason"]] if event["reason"] else [event["detail"]]
        return [
            self._color(str(status), color),
            *filter(None, (self._color(result, _RESULTS.get(result, "")), event["method"], kind)),
            *filter(None, (_reference(event),)),
            client,
            *([format_size(size)] if size else []),
            f"{_duration(seconds)}{_speed(size, seconds)}",
            *(f"- {_text(cause)}" for cause in causes if cause),
        ]

    def _fill(self, event: Mapping[str, Any]) -> list[str]:
        size, seconds = event["bytes"], event["seconds"]
        return [_reference(event), format_size(size), f"{_duration(seconds)}{_speed(size, seconds)}"]

    def _color(self, text: str, color: str) -> str:
        return f"\x1b[{color}m{text}\x1b[0m" if text and color and self._colored else text


def is_ping(event: Mapping[str, Any]) -> bool:
    """Whether the event is of a request that only asks whether a registry is there, as health checks do.

    A client without credentials is answered 401 first.
    """
    return (
        event["event"] == "request.served" and event.get("kind") == "base" and event["status"] in (200, 401)
    )


def _reference(event: Mapping[str, Any]) -> str:
    """The full name of what was requested, with a digest cut to its beginning."""
    name = "/".join(each for each in (event["namespace"], event["repository"]) if each and each != "-")
    reference = event.get("reference") or event.get("digest") or ""
    algorithm, colon, encoded = reference.partition(":")
    if colon:
        reference = f"{algorithm}:{encoded[:SHORT]}"
    joint = ("@" if colon else ":") if name and reference else ""
    return _text(f"{name}{joint}{reference}")


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _speed(size: int, seconds: float) -> str:
    """The speed of a transfer that is large enough to have one."""
    return f", {format_size(size / seconds)}/s" if size >= 1 << 20 and seconds else ""


def _text(value: object) -> str:
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in str(value))


def _empty(value: object) -> bool:
    return value is None or value == "" or value == [] or value == ()

"""The format of log events: lines for people, or JSON."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, TextIO, cast

import msgspec
import structlog

from proxy.telemetry.console_lines import ConsoleLines, is_ping
from proxy.telemetry.request_log import BatchedLines, RequestLog


def configure(
    format: str = "auto", level: str = "info", stream: TextIO = sys.stderr, access: str = "all"
) -> RequestLog:
    """Write events to `stream`: readable on a terminal, otherwise as one JSON object per line.

    Of the requests, `access` of them are logged: all, errors, or off for none.  Returns the log of requests.
    """
    lines = BatchedLines(stream)
    console = stream.isatty() if format == "auto" else format == "console"
    processors: list[Any] = [] if access == "all" else [_RequestFilter(access == "errors")]
    processors.append(structlog.processors.add_log_level)
    if console:
        last: Any = ConsoleLines(stream.isatty() and not os.environ.get("NO_COLOR"))
    else:
        processors.append(structlog.processors.TimeStamper(fmt="iso", utc=True))
        last = structlog.processors.JSONRenderer(serializer=_to_json)
    processors += [structlog.processors.format_exc_info, last]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, lines)),
        cache_logger_on_first_use=False,
    )
    if access == "off" or level not in ("debug", "info"):
        return RequestLog(off=True)
    return RequestLog() if console or access != "all" else RequestLog(lines)


class _RequestFilter:
    """Drops the lines of requests, or keeps `errors` among them."""

    def __init__(self, errors: bool) -> None:
        self._errors = errors

    def __call__(self, logger: object, method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
        if event["event"] == "request.served" and not (
            self._errors and event["status"] >= 400 and not is_ping(event)
        ):
            raise structlog.DropEvent
        return event


def _to_json(event: dict[str, Any], **_: Any) -> str:
    try:
        return msgspec.json.encode(event, enc_hook=str).decode()
    except UnicodeEncodeError:  # a client's header that is not UTF-8: json is slower, but escapes it
        return json.dumps(event, default=str)

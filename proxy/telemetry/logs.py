"""How events are written: as lines for people, or as JSON."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any, TextIO

import msgspec
import structlog


def configure(format: str = "auto", level: str = "info", stream: TextIO = sys.stderr) -> None:
    """Send events to `stream`: for people on a terminal, one JSON object a line elsewhere."""
    console = stream.isatty() if format == "auto" else format == "console"
    processors: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if console:
        # Its own choice, where rich is installed, shows the values of variables: tokens among them.
        plain = structlog.dev.plain_traceback
        processors.append(structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=plain))
    else:
        processors.append(structlog.processors.format_exc_info)
        processors.append(structlog.processors.JSONRenderer(serializer=_to_json))
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )


def _to_json(event: dict[str, Any], **_: Any) -> str:
    try:
        return msgspec.json.encode(event, enc_hook=str).decode()
    except UnicodeEncodeError:  # a client's header that is not UTF-8: slower, but escapes it
        return json.dumps(event, default=str)

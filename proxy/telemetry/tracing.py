"""Traces: what is done because of what, as spans, and the way of a trace from one server to the next.

This is all that the rest of the program knows of tracing.  Without OpenTelemetry's variables in the
environment nothing is traced, and nothing of OpenTelemetry is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, Protocol, TypeAlias

Attributes: TypeAlias = Mapping[str, str | int | float | bool]
Kind: TypeAlias = Literal["internal", "server", "client"]
_NOTHING: Mapping[str, str] = {}


class TraceSpan:
    """A part of a trace; this one is of no trace, and does nothing.

    trace_id, span_id: hexadecimal digits; empty of no trace
    recorded: whether it is sent to a collector: what is set in others is lost
    """

    __slots__ = ()
    recorded = False

    @property
    def trace_id(self) -> str:
        return ""

    @property
    def span_id(self) -> str:
        return ""

    def child(self, name: str, kind: Kind = "internal") -> TraceSpan:
        """Begin a part of this one."""
        return self

    def name(self, name: str) -> None:
        """Change its name."""

    def set(self, attributes: Attributes) -> None:
        """Add attributes, by the names of OpenTelemetry's semantic conventions."""

    def link(self, other: TraceSpan) -> None:
        """Note that it has to do with another one, which may be of another trace."""

    def link_remote(self, headers: Mapping[str, str]) -> None:
        """Note that it has to do with a span of another process, which has these `headers()`."""

    def headers(self) -> Mapping[str, str]:
        """Those of a request that continues the trace elsewhere: W3C Trace Context."""
        return _NOTHING

    def end(self, error: str = "") -> None:
        """End it, successfully without an `error`."""


NO_SPAN = TraceSpan()
# The span of this context.  Tasks inherit it: what a fill does belongs to the request that began it.
current_span: ContextVar[TraceSpan] = ContextVar("span", default=NO_SPAN)


class Tracer(Protocol):
    """Begins traces."""

    @property
    def background(self) -> TraceSpan:
        """For what no request causes: each of its children is a trace of its own."""

    def request(self, headers: Mapping[str, str]) -> TraceSpan:
        """Begin the span of a client's request; it continues the trace that the headers name."""

    async def close(self) -> None:
        """Send what waits to be sent, as far as that takes no longer than a moment."""


class NoTracer:
    """Traces nothing."""

    background = NO_SPAN

    def request(self, headers: Mapping[str, str]) -> TraceSpan:
        return NO_SPAN

    async def close(self) -> None:
        pass


@contextmanager
def step(name: str, kind: Kind = "internal", attributes: Attributes = _NOTHING) -> Iterator[TraceSpan]:
    """What happens inside is a part of the current span."""
    above = current_span.get()
    if above is NO_SPAN:
        yield above
        return
    span = above.child(name, kind)
    if span.recorded:
        span.set(attributes)
    token = current_span.set(span)
    try:
        yield span
    except BaseException as error:
        failed(span, error)
        raise
    else:
        span.end()
    finally:
        current_span.reset(token)


def failed(span: TraceSpan, error: BaseException) -> None:
    """End a span with an error."""
    if span.recorded:
        span.set({"error.type": type(error).__name__})
        span.end(str(error) or type(error).__name__)

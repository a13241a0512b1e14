"""Traces by OpenTelemetry, which reads its own variables; the only module that imports it.

Whether a trace is recorded is decided before its first span is made: one that is not costs a random number
and a comparison.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import os
import random
import socket
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress

import structlog
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace import Span as RecordedSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision, Sampler
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace import Span as LibrarySpan
from opentelemetry.trace import Tracer as LibraryTracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from proxy.telemetry.tracing import Attributes, Kind, TraceSpan

log = structlog.get_logger()

FLUSH = 3.0  # seconds that the end of a process waits for the collector
LONGEST = 2000  # characters of an attribute
CLOSING = "tracing.close"  # the thread that sends what waits at the end
TRACEPARENT, TRACESTATE = "traceparent", "tracestate"
_KINDS = {"internal": SpanKind.INTERNAL, "server": SpanKind.SERVER, "client": SpanKind.CLIENT}
_ROOT = Context()
_RECORDED = Decision.RECORD_AND_SAMPLE
_LOW = (1 << 64) - 1  # of a trace's id
_W3C = TraceContextTextMapPropagator()
_EXPORT = ("opentelemetry.exporter", "opentelemetry.sdk._shared_internal")  # what says that nothing is sent


class OpenTelemetry:
    """The tracer of a process.  It starts a thread, so it is made after a fork."""

    def __init__(self, *, tell: bool = True) -> None:
        self._messages = _Messages(tell)
        library = logging.getLogger("opentelemetry")
        library.handlers, library.propagate = [self._messages], False
        exporter = _ToldExporter(OTLPSpanExporter(), self._messages)
        self._ids = _Ids()
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False, id_generator=self._ids)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._bound = _bound(self._provider.sampler)
        self._tracer = self._provider.get_tracer("entrepot")
        self.background: TraceSpan = _Background(self)

    def request(self, headers: Mapping[str, str]) -> TraceSpan:
        context = _context(headers) if TRACEPARENT in headers else _ROOT
        return self.begin("HTTP", "server") if context is _ROOT else self._continue(context)

    def begin(self, name: str, kind: Kind) -> TraceSpan:
        """Begin a trace."""
        trace = random.getrandbits(128) or 1
        if trace & _LOW >= self._bound:
            return _UnrecordedSpan(trace, None)
        self._ids.next = trace
        made = self._tracer.start_span(name, _ROOT, _KINDS[kind])
        assert isinstance(made, RecordedSpan)
        return _RecordedSpan(made, self._tracer)

    def _continue(self, context: Context) -> TraceSpan:
        """Begin the span of a request that belongs to another server's trace."""
        made = self._tracer.start_span("HTTP", context, SpanKind.SERVER)
        return _made(made, self._tracer)

    async def close(self) -> None:
        # A thread that asyncio does not wait for: a collector that does not answer may take longer.
        loop, sent = asyncio.get_running_loop(), asyncio.Event()

        def shut_down() -> None:
            self._provider.shutdown()
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(sent.set)

        threading.Thread(target=shut_down, name=CLOSING, daemon=True).start()
        with suppress(TimeoutError):
            async with asyncio.timeout(FLUSH):
                await sent.wait()


class _Ids(RandomIdGenerator):
    """Random ids, but for that of the `next` trace."""

    def __init__(self) -> None:
        self.next = 0

    def generate_trace_id(self) -> int:
        return self.next


class _Background(TraceSpan):
    """No span itself: each of its children is a trace of its own."""

    __slots__ = ("_tracer",)

    def __init__(self, tracer: OpenTelemetry) -> None:
        self._tracer = tracer

    def child(self, name: str, kind: Kind = "internal") -> TraceSpan:
        return self._tracer.begin(name, kind)


class _UnrecordedSpan(TraceSpan):
    """A span that is not sent to the collector, and stands for all its children too.

    Its trace has an id all the same, which other servers are told: so the lines of all logs say it.
    """

    __slots__ = ("_parent", "_trace")

    def __init__(self, trace: int, parent: SpanContext | None) -> None:
        self._trace = trace
        self._parent = parent

    @property
    def trace_id(self) -> str:
        return f"{self._trace:032x}"

    def headers(self) -> Mapping[str, str]:
        state = self._parent.trace_state if self._parent is not None else None
        context = SpanContext(self._trace, random.getrandbits(64) or 1, False, None, state)
        return _headers(context)


class _RecordedSpan(TraceSpan):
    """A span that is sent to the collector when it has ended."""

    __slots__ = ("_ended", "_made", "_tracer")
    recorded = True

    def __init__(self, made: RecordedSpan, tracer: LibraryTracer) -> None:
        self._made = made
        self._tracer = tracer

    @property
    def context(self) -> SpanContext:
        return self._made.get_span_context()

    @property
    def trace_id(self) -> str:
        return f"{self.context.trace_id:032x}"

    @property
    def span_id(self) -> str:
        return f"{self.context.span_id:016x}"

    def child(self, name: str, kind: Kind = "internal") -> TraceSpan:
        made = self._tracer.start_span(name, set_span_in_context(self._made, _ROOT), _KINDS[kind])
        return _made(made, self._tracer)

    def name(self, name: str) -> None:
        self._made.update_name(name)

    def set(self, attributes: Attributes) -> None:
        self._made.set_attributes(
            {name: _text(value) if isinstance(value, str) else value for name, value in attributes.items()}
        )

    def link(self, other: TraceSpan) -> None:
        if isinstance(other, _RecordedSpan) and other is not self:
            self._made.add_link(other.context)

    def link_remote(self, headers: Mapping[str, str]) -> None:
        if TRACEPARENT in headers and (context := _context(headers)) is not _ROOT:
            self._made.add_link(get_current_span(context).get_span_context())

    def headers(self) -> Mapping[str, str]:
        return _headers(self.context)

    def end(self, error: str = "") -> None:
        if error:
            self._made.set_status(Status(StatusCode.ERROR, _text(error)))
        self._made.end()


class _Messages(logging.Handler):
    """What OpenTelemetry's library says: each once, but of an export the first, which is the cause."""

    def __init__(self, tell: bool) -> None:
        super().__init__(logging.WARNING)
        self.cause = ""
        self._tell = tell
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.name.startswith(_EXPORT):
            self.cause = self.cause or text
        elif self._tell and record.msg not in self._said:
            self._said.add(record.msg)
            log.warning("tracing.warned", warning=text)


class _ToldExporter(SpanExporter):
    """An exporter that logs when the collector begins to fail, and when it works again."""

    def __init__(self, exporter: SpanExporter, messages: _Messages) -> None:
        self._exporter = exporter
        self._messages = messages
        self._failing = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._messages.cause = ""
        result = self._exporter.export(spans)
        failing = result is not SpanExportResult.SUCCESS
        if failing and not self._failing:
            log.warning("tracing.failed", error=self._messages.cause)
        elif self._failing and not failing:
            log.info("tracing.restored")
        self._failing = failing
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._exporter.force_flush(timeout_millis)


def _resource() -> Resource:
    """What sends the spans, as far as the environment does not say it."""
    own: dict[str, str | int] = {
        "service.name": "entrepot",
        "service.version": importlib.metadata.version("entrepot"),
        "service.instance.id": f"{socket.gethostname()}:{os.getpid()}",
        "host.name": socket.gethostname(),
        "process.pid": os.getpid(),
    }
    given = OTELResourceDetector().detect().attributes
    return Resource.create({name: value for name, value in own.items() if name not in given})


def _context(headers: Mapping[str, str]) -> Context:
    """What a client's headers say; _ROOT if that is nothing, or malformed: then a new trace begins."""
    carrier = {name: _all(headers, name) for name in (TRACEPARENT, TRACESTATE)}
    if len(carrier[TRACEPARENT]) != 1:  # Trace Context, section 3.2: there must be exactly one
        return _ROOT
    context = _W3C.extract({name: values for name, values in carrier.items() if values}, _ROOT)
    return context if context and get_current_span(context).get_span_context().is_valid else _ROOT


def _all(headers: Mapping[str, str], name: str) -> list[str]:
    getall = getattr(headers, "getall", None)  # aiohttp's: a header may come more than once
    return list(getall(name, [])) if getall is not None else [headers[name]] if name in headers else []


def _headers(context: SpanContext) -> Mapping[str, str]:
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, set_span_in_context(NonRecordingSpan(context), _ROOT))
    return carrier


def _made(made: LibrarySpan, tracer: LibraryTracer) -> TraceSpan:
    if isinstance(made, RecordedSpan):
        return _RecordedSpan(made, tracer)
    context = made.get_span_context()
    return _UnrecordedSpan(context.trace_id, context)


def _bound(sampler: Sampler) -> int:
    """The least value of the low half of a trace's id with which a trace that begins here is not recorded.

    All samplers that the specification names compare it, if they compare anything.  To ask one costs more
    than all the rest of what is not recorded.
    """
    least, beyond = 0, _LOW + 1
    while least < beyond:
        middle = (least + beyond) // 2
        if sampler.should_sample(_ROOT, middle, "HTTP", SpanKind.SERVER).decision is _RECORDED:
            least = middle + 1
        else:
            beyond = middle
    return least


def _text(value: str) -> str:
    """Text that can be sent: clients send bytes that are no UTF-8."""
    return value[:LONGEST].encode("utf-8", "replace").decode()

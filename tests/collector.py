"""A collector of traces: a server that takes what OTLP exporters send by HTTP."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

PATIENCE = 30.0  # seconds; only what never comes takes them
PROTOBUF = "application/x-protobuf"
KINDS = {1: "internal", 2: "server", 3: "client"}
STATUSES = {0: "", 1: "ok", 2: "error"}


class TracedSpan:
    """A span as it came; ids are hexadecimal, times are in nanoseconds since the epoch."""

    def __init__(self, span: Any, resource: dict[str, Any]) -> None:
        self.name = span.name
        self.kind = KINDS[span.kind]
        self.trace = span.trace_id.hex()
        self.id = span.span_id.hex()
        self.parent = span.parent_span_id.hex()
        self.state = span.trace_state
        self.links = [each.span_id.hex() for each in span.links]
        self.status = STATUSES[span.status.code]
        self.message = span.status.message
        self.begun, self.ended = span.start_time_unix_nano, span.end_time_unix_nano
        self.attributes = _values(span.attributes)
        self.service = resource["service.name"]
        self.resource = resource

    def __getitem__(self, attribute: str) -> Any:
        return self.attributes[attribute]


class Collector:
    """`spans` are those that have come.  While `gate` is closed, it answers nobody."""

    def __init__(self) -> None:
        self.spans: list[TracedSpan] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.reached = asyncio.Event()
        self.url = ""
        self._port = 0
        self._news = asyncio.Event()
        self._runner: web.ServerRunner | None = None

    async def start(self) -> None:
        """After stop() on the same port as before."""
        server = web.Server(self._take, handler_cancellation=True)
        self._runner = web.ServerRunner(server, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port).start()
        self._port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self._port}"

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _take(self, request: web.BaseRequest) -> web.Response:
        assert (request.method, request.path) == ("POST", "/v1/traces")
        assert request.content_type == PROTOBUF
        body = await request.read()
        self.reached.set()
        await self.gate.wait()
        if request.headers.get("Content-Encoding") == "gzip" and body.startswith(b"\x1f\x8b"):
            body = gzip.decompress(body)
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            resource = _values(group.resource.attributes)
            for scope in group.scope_spans:
                self.spans += [TracedSpan(each, resource) for each in scope.spans]
        self._news.set()
        return web.Response(body=ExportTraceServiceResponse().SerializeToString(), content_type=PROTOBUF)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until what has come fulfils it."""
        async with asyncio.timeout(PATIENCE):
            while not condition():
                self._news.clear()
                await self._news.wait()

    def of(self, name: str, service: str = "", **attributes: Any) -> list[TracedSpan]:
        """Those of that name, of that service if it is named, with those attributes; __ stands for a dot."""
        wanted = {key.replace("__", "."): value for key, value in attributes.items()}
        return [
            each
            for each in self.spans
            if each.name == name
            and service in ("", each.service)
            and wanted.items() <= each.attributes.items()
        ]

    def one(self, name: str, service: str = "", **attributes: Any) -> TracedSpan:
        (found,) = self.of(name, service, **attributes)
        return found

    def children(self, span: TracedSpan) -> list[TracedSpan]:
        """In the order in which they began."""
        return sorted((each for each in self.spans if each.parent == span.id), key=lambda each: each.begun)


def _values(pairs: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in pairs}


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    collector = Collector()
    await collector.start()
    yield collector
    collector.gate.set()
    await collector.stop()

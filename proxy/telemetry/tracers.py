"""The tracer of a process, as OpenTelemetry's variables in the environment configure it."""

from __future__ import annotations

import os
from collections.abc import Mapping

import structlog

from proxy.telemetry.tracing import NoTracer, Tracer

log = structlog.get_logger()

LIBRARY = "proxy.telemetry.otel"  # the module that imports OpenTelemetry's
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_SUPPORTED = "http/protobuf"


def configured(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether OpenTelemetry's variables ask for traces: they name a collector, or the exporter `otlp`."""
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    if exporters := environ.get("OTEL_TRACES_EXPORTER", "").strip():
        return "otlp" in [each.strip().lower() for each in exporters.split(",")]
    return any(environ.get(each, "").strip() for each in _ENDPOINTS)


def make_tracer(*, tell: bool = True) -> Tracer:
    """The tracer that the environment configures.  A process makes its own, after it was forked.

    Without OpenTelemetry, or with variables that it does not take, nothing is traced, and the server serves:
    a warning says so, unless another process does, and `tell` is False.
    """
    environ = os.environ
    if not configured(environ):
        return NoTracer()
    try:
        protocol = next(filter(None, (environ.get(each, "").strip() for each in _PROTOCOLS)), _SUPPORTED)
        if protocol != _SUPPORTED:
            raise ValueError(f"the protocol is {protocol}: set OTEL_EXPORTER_OTLP_PROTOCOL to {_SUPPORTED}")
        from proxy.telemetry.otel import OpenTelemetry

        return OpenTelemetry(tell=tell)
    except ImportError:
        error = "OpenTelemetry is not installed: install entrepot[tracing]"
    except Exception as wrong:  # of a library that reads its own variables
        error = str(wrong)
    if tell:
        log.warning("tracing.unavailable", error=error)
    return NoTracer()

#!/usr/bin/env bash
# Expected: `force_flush(500)` of OpenTelemetry's BatchSpanProcessor ends after 500 ms, and returns whether all spans were exported by then,
#   as its docstring says. `shutdown` ends after the time limit of the exporter.
# Actual: the argument is not looked at. Where the collector takes connections but is silent, each of them ends after the limit of the
#   exporter (10 s by default) for each batch of 512 spans, one after the other; `force_flush` returns True,
#   though no span was exported. A collector that answers 503 is asked again and again meanwhile.
# Versions: opentelemetry-sdk 1.45.2, opentelemetry-exporter-otlp-proto-http 1.45.2 (PyPI).
# Why a registry cache must care: where its collector hangs, a server that flushes its spans at the end stops by half a minute later, past
#   what a deployment waits before it kills it, with pulls under way. True is no proof that spans have arrived. Shut down
#   in a thread that nobody waits for longer than a limit of its own.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install --disable-pip-version-check opentelemetry-sdk==1.45.2 \
    opentelemetry-exporter-otlp-proto-http==1.45.2
cd "$work"
timeout 120 "$work/venv/bin/python" - <<'PYTHON'
import http.server
import importlib.metadata
import logging
import socket
import sys
import threading
import time

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

LIMIT = 3  # seconds for each export
logging.disable(logging.CRITICAL)


class Unavailable(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    asked = 0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        Unavailable.asked += 1
        self.send_response(503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


silent = socket.create_server(("127.0.0.1", 0))  # the kernel takes connections for it
busy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Unavailable)
threading.Thread(target=busy.serve_forever, daemon=True).start()


def end(how: str, port: int, spans: int) -> tuple[object, float]:
    """What it returns, and the seconds until then."""
    provider = TracerProvider(shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=f"http://127.0.0.1:{port}/v1/traces", timeout=LIMIT)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=60_000))
    tracer = provider.get_tracer("test")
    for _ in range(spans):
        tracer.start_span("span").end()
    began = time.monotonic()
    returned = provider.force_flush(500) if how == "force_flush(500)" else provider.shutdown()
    return returned, time.monotonic() - began


names = ("opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http")
print(*(f"{each} {importlib.metadata.version(each)}" for each in names), f"limit of an export {LIMIT} s", sep=", ")
holds = True
for collector, port, how, spans, least, returns in (
    ("is silent", silent.getsockname()[1], "force_flush(500)", 1, LIMIT, True),
    ("is silent", silent.getsockname()[1], "force_flush(500)", 511 * 3, 3 * LIMIT, True),
    ("is silent", silent.getsockname()[1], "shutdown()", 511 * 3, 3 * LIMIT, None),
    ("answers 503", busy.server_port, "force_flush(500)", 1, 1, True),
):
    Unavailable.asked = 0
    returned, seconds = end(how, port, spans)
    print(f"the collector {collector}, {spans} spans: {how} is {returned} after {seconds:.1f} s", end="")
    print(f", {Unavailable.asked} requests" if Unavailable.asked else "")
    holds = holds and returned is returns and seconds >= least - 0.1
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

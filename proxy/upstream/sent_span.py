"""The span of a request to another server, by the HTTP semantic conventions of OpenTelemetry.

https://opentelemetry.io/docs/specs/semconv/http/http-spans/, "HTTP client": one for each time that a request
is sent, which ends with the head of the response.
"""

from __future__ import annotations

from yarl import URL

from proxy.telemetry.tracing import Attributes, TraceSpan, current_span


def described(method: str, url: URL, attempt: int) -> Attributes:
    """What is known of a request before it is sent for the first (0) or a later time."""
    if not current_span.get().recorded:
        return {}
    # The query of a signed URL is a credential.
    attributes: dict[str, str | int] = {
        "http.request.method": method,
        "url.full": str(url.with_user(None).with_query(None).with_fragment(None)),
        "server.address": url.raw_host or "",
        "server.port": url.port or 0,
    }
    if attempt:
        attributes["http.request.resend_count"] = attempt
    return attributes


def note_status(span: TraceSpan, status: int, *, expected: bool) -> None:
    """Record the status of the response.  An `expected` one is no failure."""
    if not span.recorded:
        return
    span.set({"http.response.status_code": status})
    if status >= 400 and not expected:
        span.set({"error.type": str(status)})
        span.end(str(status))

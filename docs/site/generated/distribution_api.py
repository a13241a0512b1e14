"""The distribution API as it is served: paths, methods and errors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, cast

import proxy.web.routes
import storage.errors
from generated.markdown import code, paragraphs, prose, table
from proxy.telemetry.metrics import Metrics
from proxy.web.routes import Endpoint
from proxy.web.server import DistributionAPI
from proxy.web.token_endpoint import TokenEndpoint
from storage.errors import RegistryError

_ROW = re.compile(r"^    (/\S+) +(?:([A-Z]+) +)?(.+)$", re.MULTILINE)
_ERROR = re.compile(r"^[ │├└─]*(\w+) +([A-Z_]+) +(\d{3})(?: +(.+))?$", re.MULTILINE)
_HEAD = """\
# Distribution API

What the listeners for clients serve: the [OCI distribution
specification](https://github.com/opencontainers/distribution-spec/blob/main/spec.md), of which an end is an
endpoint, and what Docker's registry has besides. [Conformance](../conformance.md) says how that is checked.
Namespaces with an upstream refuse what changes content: see [limits](../index.md#limits).
"""


def page() -> str:
    parts = [_HEAD, "## Endpoints", table(("Path", "Methods", "What it is"), endpoints())]
    parts += [paragraphs(_rules())]
    parts += ["## Errors", "The body of an error is the JSON of the specification, with one of these codes."]
    parts.append(table(("Code", "Status", "When"), errors()))
    return "\n\n".join(parts) + "\n"


def endpoints() -> Iterator[tuple[str, str, str]]:
    """The path, the methods, and what it is, of the grammar and of the table of handlers."""
    methods = handled()
    for path, kind, meaning in _ROW.findall(proxy.web.routes.__doc__ or ""):
        shown = " ".join(map(code, methods[Endpoint[kind]])) if kind else ""
        yield code(path), shown, prose(meaning)


def handled() -> dict[Endpoint, list[str]]:
    nothing: Any = None  # handlers are looked at, not called
    api = DistributionAPI(nothing, nothing, Metrics())
    tokens = cast(TokenEndpoint, object.__new__(TokenEndpoint)).handlers
    return {kind: [*methods] for kind, methods in {**api._handlers, Endpoint.TOKEN: tokens}.items()}


def _rules() -> str:
    """What the grammar says below its table."""
    return (proxy.web.routes.__doc__ or "").partition("Rules:")[2]


def errors() -> Iterator[tuple[str, str, str]]:
    """Of the table of errors, each as its class says it."""
    for name, _, _, note in _ERROR.findall(storage.errors.__doc__ or ""):
        kind: type[RegistryError] = getattr(storage.errors, name)
        when = note.partition("; see below")[0].replace("see below", "")
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
        yield code(kind.code), str(kind.status), prose(when or words)

"""The routes of the admin API, made from the list of operations; openapi.yaml describes them.

An unknown field is refused: otherwise a misspelt `dry_run` would purge.  app.py decides who may ask.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any, TypeVar

import msgspec
import yaml
from aiohttp import web
from aiohttp_cache import cache

from proxy.admin.api.audited import ARGUMENTS, OPERATION
from proxy.admin.api.server_events import send_events
from proxy.admin.notices import HEADER, in_header, warnings
from proxy.admin.operations import OPERATIONS, Operation, Operations, perform
from proxy.namespaces.references import FieldInvalid

T = TypeVar("T", bound=msgspec.Struct)
R = TypeVar("R", bound=web.StreamResponse)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

SUMMARY = 10  # seconds that a costly answer is kept
ROOT = "/api/v1/"
# How an error of msgspec names the field: `$.pattern`, or the field that is missing or not known.
_FIELD = re.compile(r"`\$\.(\w+)|field `([^`]+)`")


class Api:
    """A handler for each operation.  `changed` is called after an operation that may have changed a
    summary.
    """

    def __init__(self, operations: Operations, changed: Callable[[], None]) -> None:
        self._operations = operations
        self._changed = changed

    def routes(self) -> list[tuple[str, str, Handler]]:
        made = [(each.method, ROOT + each.path, self._handler(each)) for each in OPERATIONS.values()]
        return [("GET", f"{ROOT}openapi.json", _document), *made]

    def _handler(self, operation: Operation) -> Handler:
        async def follow(request: web.Request) -> web.StreamResponse:
            arguments = msgspec.structs.asdict(await read_query(request, operation.parameters))
            return await send_events(request, getattr(self._operations, operation.name)(**arguments))

        async def handle(request: web.Request) -> web.StreamResponse:
            read = read_query if operation.method == "GET" else read_body
            arguments = msgspec.structs.asdict(await read(request, operation.parameters))
            request[OPERATION], request[ARGUMENTS] = operation.name, arguments
            try:
                found = await perform(self._operations, operation, arguments)
            finally:
                if operation.changes:
                    self._changed()  # also after a failure half-way
            return with_warnings(in_json(found, operation.status))  # here, so a summary is kept with them

        if operation.stream:
            return follow
        return cache(expires=SUMMARY)(handle) if operation.summary else handle


def with_warnings(response: R) -> R:
    """The answer with the warnings that were heard."""
    if found := warnings():
        response.headers[HEADER] = in_header(found)
    return response


async def _document(request: web.Request) -> web.Response:
    return web.Response(body=_openapi(), content_type="application/json")


def in_json(value: object, status: int = 200) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(value), content_type="application/json")


@functools.cache
def _openapi() -> bytes:
    text = files("proxy.admin.api").joinpath("openapi.yaml").read_text(encoding="utf-8")
    return msgspec.json.encode(yaml.safe_load(text))


def query(request: web.Request, **known: str | None) -> dict[str, str]:
    """The fields of the query, with the defaults in `known`; None marks a field that is required.

    Raises FieldInvalid.
    """
    found: dict[str, Any] = dict(known)
    for name, value in request.query.items():
        if name not in known:
            raise FieldInvalid(name, "there is no such field")
        if len(request.query.getall(name)) > 1:
            raise FieldInvalid(name, "is given twice")
        found[name] = value
    for name, value in found.items():
        if value is None or (value == "" and known[name]):
            raise FieldInvalid(name, "is required")
    return found


async def read_query(request: web.Request, form: type[T]) -> T:
    """The query as a struct.  Raises FieldInvalid."""
    fields = msgspec.structs.fields(form)
    arguments = query(request, **{each.name: None if each.required else str(each.default) for each in fields})
    try:
        return msgspec.convert(arguments, form, strict=False)
    except msgspec.ValidationError as error:
        raise _field_invalid(error) from None


async def read_body(request: web.Request, form: type[T]) -> T:
    """The JSON body as a struct.  Raises FieldInvalid."""
    query(request)
    return decoded(await request.read(), form)


def decoded(content: bytes, form: type[T]) -> T:
    """A struct out of JSON.  Raises FieldInvalid."""
    try:
        return msgspec.json.decode(content or b"{}", type=form)
    except msgspec.ValidationError as error:
        raise _field_invalid(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FieldInvalid("body", f"is not JSON: {error}") from None


def _field_invalid(error: msgspec.ValidationError) -> FieldInvalid:
    found = _FIELD.search(str(error))
    return FieldInvalid((found[1] or found[2]) if found else "body", error)

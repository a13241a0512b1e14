"""The admin API: the methods of Operations over HTTP, as openapi.yaml describes them.

What is asked is in the query, what is to be done in a JSON body; a field that is not known is refused, lest
a misspelt `dry_run` purge.  Who may ask is decided before: see admin.py.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Awaitable, Callable, Mapping
from importlib.resources import files
from typing import Any, TypeVar

import msgspec
import yaml
from aiohttp import web
from aiohttp_cache import cache

from proxy.admin.operations import Operations
from proxy.namespaces.references import FieldInvalid

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

SUMMARY = 10  # seconds that a costly answer is given again
PAGE, LARGEST_PAGE = 100, 1000  # images
# Where msgspec says what is wrong: `$.pattern`, or the field that is missing or not known.
_FIELD = re.compile(r"`\$\.(\w+)|field `([^`]+)`")


class Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class _Purge(Body, frozen=True):
    pattern: str
    dry_run: bool = False
    force: bool = False


class _Refresh(Body, frozen=True):
    reference: str
    platforms: tuple[str, ...] = ()


class _Pin(Body, frozen=True):
    pattern: str
    keep_fresh: float | None = None
    platforms: tuple[str, ...] = ()


class _Unpin(Body, frozen=True):
    pattern: str


class _Evict(Body, frozen=True):
    to: int | None = None
    dry_run: bool = False


class _Warm(Body, frozen=True):
    reference: str
    platforms: tuple[str, ...] = ()
    referrers: bool = True


class _Ready(Body, frozen=True):
    references: tuple[str, ...]
    platforms: tuple[str, ...] = ()
    referrers: bool = True


class _Drill(Body, frozen=True):
    seconds: float
    namespaces: tuple[str, ...] = ()


class _Collect(Body, frozen=True):
    dry_run: bool = False


class _Nothing(Body, frozen=True):
    pass


class Api:
    """`changed` is called when something was done that may change what there is to see."""

    def __init__(self, operations: Operations, changed: Callable[[], None]) -> None:
        self._operations = operations
        self._changed = changed

    def routes(self) -> list[tuple[str, str, Handler]]:
        return [
            ("GET", "/api/v1/openapi.json", self.document),
            ("GET", "/api/v1/repositories", self.repositories),
            ("GET", "/api/v1/images", self.images),
            ("GET", "/api/v1/image", self.image),
            ("GET", "/api/v1/stats", self.stats),
            ("GET", "/api/v1/fills", self.fills),
            ("GET", "/api/v1/why", self.why),
            ("GET", "/api/v1/pins", self.pins),
            ("GET", "/api/v1/scrub", self.scrub_state),
            ("GET", "/api/v1/webhooks", self.webhooks),
            ("GET", "/api/v1/drill", self.drill),
            ("POST", "/api/v1/ready", self.ready),
            ("POST", "/api/v1/warm", self._doing(self.warm)),
            ("POST", "/api/v1/drill", self.begin_drill),
            ("DELETE", "/api/v1/drill", self.end_drill),
            ("GET", "/api/v1/collect", self.collected),
            ("POST", "/api/v1/purge", self._doing(self.purge)),
            ("POST", "/api/v1/refresh", self._doing(self.refresh)),
            ("POST", "/api/v1/pins", self._doing(self.pin)),
            ("DELETE", "/api/v1/pins", self._doing(self.unpin)),
            ("POST", "/api/v1/evict", self._doing(self.evict)),
            ("POST", "/api/v1/scrub", self._doing(self.scrub)),
            ("POST", "/api/v1/collect", self._doing(self.collect)),
        ]

    def _doing(self, handler: Handler) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                return await handler(request)
            finally:
                self._changed()  # also by what failed half-way

        return handle

    async def document(self, request: web.Request) -> web.Response:
        return web.Response(body=_document(), content_type="application/json")

    @cache(expires=SUMMARY)
    async def repositories(self, request: web.Request) -> web.Response:
        asked = query(request, match="*")
        return in_json(await self._operations.ls(asked["match"]))

    @cache(expires=SUMMARY)
    async def images(self, request: web.Request) -> web.Response:
        asked = query(request, match="*", limit=str(PAGE), last="")
        limit = _count("limit", asked["limit"], LARGEST_PAGE)
        return in_json(await self._operations.ls(asked["match"], tags=True, limit=limit, last=asked["last"]))

    async def image(self, request: web.Request) -> web.Response:
        return in_json(await self._operations.show(query(request, ref=None)["ref"]))

    @cache(expires=SUMMARY)
    async def stats(self, request: web.Request) -> web.Response:
        return in_json(await self._operations.stats(query(request, period="24h")["period"]))

    async def fills(self, request: web.Request) -> web.Response:
        query(request)
        return in_json(await self._operations.fills())

    async def why(self, request: web.Request) -> web.Response:
        return in_json(await self._operations.why(query(request, ref=None)["ref"]))

    async def pins(self, request: web.Request) -> web.Response:
        query(request)
        return in_json(await self._operations.pins())

    async def scrub_state(self, request: web.Request) -> web.Response:
        query(request)
        return in_json(await self._operations.scrubbing())

    async def webhooks(self, request: web.Request) -> web.Response:
        query(request)
        return in_json(await self._operations.webhooks())

    async def collected(self, request: web.Request) -> web.Response:
        query(request)
        return in_json(await self._operations.collected())

    async def purge(self, request: web.Request) -> web.Response:
        wanted = await body(request, _Purge)
        return in_json(
            await self._operations.purge(wanted.pattern, dry_run=wanted.dry_run, force=wanted.force)
        )

    async def refresh(self, request: web.Request) -> web.Response:
        wanted = await body(request, _Refresh)
        return in_json(await self._operations.refresh(wanted.reference, wanted.platforms))

    async def pin(self, request: web.Request) -> web.Response:
        wanted = await body(request, _Pin)
        return in_json(await self._operations.pin(wanted.pattern, wanted.keep_fresh, wanted.platforms))

    async def unpin(self, request: web.Request) -> web.Response:
        return in_json(await self._operations.unpin((await body(request, _Unpin)).pattern))

    async def evict(self, request: web.Request) -> web.Response:
        wanted = await body(request, _Evict)
        return in_json(await self._operations.evict(wanted.to, dry_run=wanted.dry_run))

    async def scrub(self, request: web.Request) -> web.Response:
        await body(request, _Nothing)
        return in_json(await self._operations.scrub(), 202)

    async def warm(self, request: web.Request) -> web.Response:
        wanted = await body(request, _Warm)
        return in_json(await self._operations.warm(wanted.reference, wanted.platforms, wanted.referrers))

    async def ready(self, request: web.Request) -> web.Response:
        wanted = await body(request, _Ready)
        if len(wanted.references) > LARGEST_PAGE:
            raise FieldInvalid("references", f"expected at most {LARGEST_PAGE}")
        return in_json(await self._operations.ready(wanted.references, wanted.platforms, wanted.referrers))

    async def drill(self, request: web.Request) -> web.Response:
        query(request)
        return in_json(await self._operations.drill())

    async def begin_drill(self, request: web.Request) -> web.Response:
        wanted = await body(request, _Drill)
        return in_json(await self._operations.begin_drill(wanted.seconds, wanted.namespaces))

    async def end_drill(self, request: web.Request) -> web.Response:
        await body(request, _Nothing)
        return in_json(await self._operations.end_drill())

    async def collect(self, request: web.Request) -> web.Response:
        wanted = await body(request, _Collect)
        return in_json(await self._operations.collect(dry_run=wanted.dry_run))


def in_json(value: object, status: int = 200) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(value), content_type="application/json")


@functools.cache
def _document() -> bytes:
    text = files("proxy.admin.api").joinpath("openapi.yaml").read_text(encoding="utf-8")
    return msgspec.json.encode(yaml.safe_load(text))


def query(request: web.Request, **known: str | None) -> Mapping[str, str]:
    """The query, with what is left out as in `known`; None there: it must be given.  Raises BadField."""
    found: dict[str, Any] = dict(known)
    for name, value in request.query.items():
        if name not in known:
            raise FieldInvalid(name, "there is no such field")
        if len(request.query.getall(name)) > 1:
            raise FieldInvalid(name, "is given twice")
        found[name] = value
    for name, value in found.items():
        if value is None or (value == "" and known[name]):
            raise FieldInvalid(name, "is to be given")
    return found


def _count(name: str, text: str, most: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 0 < int(text) <= most):
        raise FieldInvalid(name, f"expected a number from 1 to {most}")
    return int(text)


async def body(request: web.Request, form: type[T]) -> T:
    """Raises BadField."""
    query(request)
    return decoded(await request.read(), form)


def decoded(content: bytes, form: type[T]) -> T:
    """A body in JSON.  Raises BadField."""
    try:
        return msgspec.json.decode(content or b"{}", type=form)
    except msgspec.ValidationError as error:
        found = _FIELD.search(str(error))
        raise FieldInvalid((found[1] or found[2]) if found else "body", error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FieldInvalid("body", f"is no JSON: {error}") from None

"""Events of what requests do to content."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

from aiohttp import web

from proxy.access.client_address import absolute
from proxy.telemetry.exchange import Exchange
from proxy.web.routes import Endpoint, Route, build_location
from proxy.web.send import LEFT
from proxy.webhooks.event import ContentKind, Event, EventAction, EventRequest, causing
from storage.oci import Descriptor, Digest, Tag

_CONTENT = (Endpoint.MANIFEST, Endpoint.BLOB)


class EventReporter(Protocol):
    """Receives events.  `pulls` says whether it wants those of pulls."""

    pulls: bool

    async def publish(self, event: Event) -> None: ...

    def publish_later(self, event: Event) -> None: ...


class RequestEvents:
    """Makes events of requests and passes them to a reporter, if there is one."""

    def __init__(self, reporter: EventReporter | None, clock: Callable[[], float] = time.time) -> None:
        self._reporter = reporter
        self._clock = clock
        self.pulls = reporter is not None and reporter.pulls

    async def report(
        self,
        action: EventAction,
        kind: ContentKind,
        request: web.BaseRequest,
        route: Route,
        exchange: Exchange,
        descriptor: Descriptor | None = None,
        source: str | None = None,
    ) -> None:
        """Report an action, and return when the response may be sent.  Raises nothing.

        `source` is the repository that a blob was mounted from.
        """
        if self._reporter is not None:
            event = self._event(action, kind, request, route, exchange, descriptor, None, source)
            await self._reporter.publish(event)

    @asynccontextmanager
    async def caused_by(
        self,
        action: EventAction,
        kind: ContentKind,
        request: web.BaseRequest,
        route: Route,
        exchange: Exchange,
        descriptor: Descriptor | None = None,
        tags: Sequence[Tag | None] = (None,),
    ) -> AsyncIterator[None]:
        """Report an action that is taken in this context, once for each of `tags`.

        A private registry records the events with the action.  Others are reported after it, unless it fails.
        """
        if self._reporter is None:
            yield
            return
        parts = action, kind, request, route, exchange, descriptor
        with causing(self._event(*parts, tag, None) for tag in tags) as left:
            yield
        for event in left:
            await self._reporter.publish(event)

    def report_pull(self, request: web.BaseRequest, route: Route, exchange: Exchange, status: int) -> None:
        """Report an answered GET or HEAD of content, also by a redirect; a 304 for a manifest is no pull."""
        blob = route.kind is Endpoint.BLOB
        if (
            self._reporter is None
            or route.kind not in _CONTENT
            or exchange.detail == LEFT
            or exchange.content is None
        ):
            return
        if status in (200, 206) or (blob and status in (304, 307)):
            tag = route.reference if isinstance(route.reference, Tag) else None
            kind: ContentKind = "blob" if blob else "manifest"
            self._reporter.publish_later(
                self._event("pull", kind, request, route, exchange, exchange.content, tag, None)
            )

    def _event(
        self,
        action: EventAction,
        kind: ContentKind,
        request: web.BaseRequest,
        route: Route,
        exchange: Exchange,
        descriptor: Descriptor | None,
        tag: Tag | None,
        source: str | None,
    ) -> Event:
        deleted = action == "delete"
        return Event(
            id=str(uuid.uuid4()),
            at=self._clock(),
            action=action,
            kind=kind,
            repository=f"{exchange.namespace}/{exchange.repository}",
            digest=str(descriptor.digest) if descriptor else "",
            media_type=_text(descriptor.media_type) if descriptor else "",
            size=descriptor.size if descriptor else -1,
            tag=str(tag or ""),
            source=source or "",
            actor=exchange.user,
            url=""
            if deleted or not descriptor
            else _url(request, route, kind, descriptor.digest, exchange.ns),
            request=EventRequest(
                id=exchange.id,
                address=request.remote or "",
                host=_text(request.host),
                method=request.method,
                agent=_text(request.headers.get("User-Agent", "")[:200]),
            ),
        )


def _url(request: web.BaseRequest, route: Route, kind: ContentKind, digest: Digest, ns: str | None) -> str:
    """The URL of content, as this client reaches the server."""
    endpoint = Endpoint.BLOB if kind == "blob" else Endpoint.MANIFEST
    return absolute(request, build_location(Route(endpoint, route.name, digest, route.prefix), ns))


def _text(value: str) -> str:
    """A header, which may not be UTF-8, with other bytes replaced."""
    return value.encode("utf-8", "replace").decode()

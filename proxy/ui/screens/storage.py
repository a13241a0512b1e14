"""What the cache holds, what it loses next, and what is kept."""

from __future__ import annotations

from aiohttp import web

from proxy.admin.operations import Operations
from proxy.admin.reports import Evicted
from proxy.config.quantities import parse_size
from proxy.namespaces.references import FieldInvalid
from proxy.ui.answers import Answer, tried
from proxy.ui.rendering import Renderer
from proxy.ui.screens.overview import by_namespace
from proxy.ui.snapshot import RepositorySnapshot

SHOWN = 50  # blobs that are evicted next


class StorageScreen:
    """The disk by namespace, what is evicted next, what a limit would evict, and the pins."""

    def __init__(self, operations: Operations, repositories: RepositorySnapshot, renderer: Renderer) -> None:
        self._operations = operations
        self._repositories = repositories
        self._renderer = renderer

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/storage", self._show)]

    async def _show(self, request: web.Request) -> web.Response:
        limit = request.query.get("limit", "").strip()
        answer = await tried(self._evicted(limit)) if limit else Answer[Evicted](None)
        return self._renderer.page(
            request,
            "storage.html",
            "Storage",
            status=answer.status,
            next=await self._operations.evictable(SHOWN),
            pins=await self._operations.pins(),
            namespaces=by_namespace((await self._repositories.get()).repositories),
            limit=limit,
            would=answer.found,
            fault=answer.fault,
        )

    async def _evicted(self, limit: str) -> Evicted:
        """What a limit would evict.  Raises FieldInvalid."""
        try:
            size = parse_size(limit)
        except ValueError as error:
            raise FieldInvalid("limit", error) from None
        return await self._operations.evict(size, dry_run=True)

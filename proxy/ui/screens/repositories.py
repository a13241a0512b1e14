"""The repositories, and the tags of each: searched, sorted, in pages."""

from __future__ import annotations

from aiohttp import web

from proxy.admin.models import Sort
from proxy.admin.operations import Operations
from proxy.namespaces.references import FieldInvalid
from proxy.ui.listing import ROWS, ListView
from proxy.ui.rendering import Renderer
from proxy.ui.snapshot import ORDERS, RepositorySnapshot

TAG_ORDERS: tuple[Sort, ...] = ("name", "updated", "used")


class RepositoriesScreen:
    """A list of repositories, and one of the tags of a repository."""

    def __init__(self, operations: Operations, repositories: RepositorySnapshot, renderer: Renderer) -> None:
        self._operations = operations
        self._repositories = repositories
        self._renderer = renderer

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/repositories", self._list), web.get("/repository", self._tags)]

    async def _list(self, request: web.Request) -> web.Response:
        view = ListView(request, "repositories", ("name", *ORDERS), tuple(ORDERS))
        rows, matched = await self._repositories.page(view)
        notes = (await self._repositories.get()).notes
        return self._renderer.page(
            request, "repositories.html", "Repositories", view=view, rows=rows, matched=matched, notes=notes
        )

    async def _tags(self, request: web.Request) -> web.Response:
        name = request.query.get("name", "")
        if "/" not in name or set(name) & set("*?@ "):
            raise FieldInvalid("name", "expected the full name of a repository: docker.io/library/alpine")
        view = ListView(request, "repository", TAG_ORDERS, TAG_ORDERS[1:], {"name": name})
        pattern = f"*{glob(view.search)}*" if view.search else "*"
        sort: Sort = next(each for each in TAG_ORDERS if each == view.sort)
        found = await self._operations.find(f"{name}:{pattern}", sort, view.reverse, view.offset, ROWS)
        listed = await self._operations.repositories(name)
        return self._renderer.page(
            request,
            "repository.html",
            name,
            view=view,
            name=name,
            found=found,
            repository=next(iter(listed.repositories), None),
        )


def glob(text: str) -> str:
    """A pattern that means the text itself, whatever it holds; no tag holds a space."""
    return "".join(f"[{each}]" if each in "*?[" else "?" if each.isspace() else each for each in text)

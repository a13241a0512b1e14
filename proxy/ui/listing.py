"""A long list on a screen: what the query of the request asks of it, and links to other parts of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import urlencode

from aiohttp import web

from proxy.namespaces.references import FieldInvalid

ROWS = 50  # of a page


def link(path: str, **fields: object) -> str:
    """A relative address; fields that are empty are left out."""
    given = {name: str(value) for name, value in fields.items() if value not in ("", None)}
    return f"{path}?{urlencode(given)}" if given else path


class ListView:
    """What is asked of a list: the text to search for, its order, and the page.

    `fields` are what else the address holds, `orders` the names of the orders, of which those in `falling`
    begin with the largest.  Raises FieldInvalid.
    """

    def __init__(
        self,
        request: web.Request,
        path: str,
        orders: Sequence[str] = ("",),
        falling: Sequence[str] = (),
        fields: Mapping[str, str] | None = None,
    ) -> None:
        query = request.query
        self._path = path
        self._falling = falling
        self._fields = fields or {}
        self.search = query.get("q", "").strip()
        self.sort = query.get("sort", orders[0])
        if self.sort not in orders:
            raise FieldInvalid("sort", f"expected one of {', '.join(orders)}")
        order = query.get("order", self._first(self.sort))
        if order not in ("up", "down"):
            raise FieldInvalid("order", "expected up or down")
        self.reverse = order == "down"
        page = query.get("page", "1")
        if not (page.isascii() and page.isdigit() and 0 < len(page) < 7 and int(page)):
            raise FieldInvalid("page", "expected a number from 1 on")
        self.page = int(page)

    @property
    def offset(self) -> int:
        return (self.page - 1) * ROWS

    def pages(self, matched: int) -> int:
        return max(1, -(-matched // ROWS))

    def at(self, page: int) -> str:
        """The address of another page."""
        return self._link(self.sort, self.reverse, page)

    def by(self, sort: str) -> str:
        """The address of the list in another order; of the present one, the other way round."""
        reverse = not self.reverse if sort == self.sort else self._first(sort) == "down"
        return self._link(sort, reverse, 1)

    def direction(self, sort: str) -> str:
        """The value of aria-sort: WAI-ARIA 1.2."""
        return "none" if sort != self.sort else "descending" if self.reverse else "ascending"

    def _first(self, sort: str) -> str:
        return "down" if sort in self._falling else "up"

    def _link(self, sort: str, reverse: bool, page: int) -> str:
        order = "down" if reverse else "up"
        shown = "" if order == self._first(sort) else order
        return link(
            self._path, **self._fields, q=self.search, sort=sort, order=shown, page=page if page > 1 else ""
        )

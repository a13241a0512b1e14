"""Pages of lists from which something is left out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

AT_LEAST = 100  # names that are read at once, however few are asked for


async def shown(
    read: Callable[[str, int | None], Awaitable[list[str]]],
    shows: Callable[[str], bool],
    last: str,
    limit: int | None,
) -> list[str]:
    """The names after `last` that are shown, in order; at most `limit`, and less only if there are no more.

    `read` returns the names after one, at most so many.
    """
    size = None if limit is None else max(limit, AT_LEAST)
    found: list[str] = []
    while limit is None or len(found) < limit:
        names = await read(last, size)
        found += filter(shows, names)
        if size is None or len(names) < size:
            break
        last = names[-1]
    return found[:limit]

"""Lists repositories where names that a client may see can be: it costs what is shown, not what is stored.

Names that begin otherwise than what the client may see are passed over by one look-up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from storage.registry import Registry

FIRST = 16  # repositories that are read at first
PAGE = 1000  # repositories that are read at once


async def visible_repositories(
    registry: Registry, starts: Iterable[str], visible: Callable[[str], bool], last: str, limit: int | None
) -> list[str]:
    """The visible repositories after `last`, in order; at most `limit`.

    starts: what every visible name begins with, one or the other; "" stands for any name
    """
    found: list[str] = []
    for start in _distinct(starts):
        if start < last and not last.startswith(start):
            continue  # all of its names are before `last`
        after, size, names = max(last, _before(start)), min(FIRST, PAGE), list[str]()
        while (limit is None or len(found) < limit) and (not names or names[-1].startswith(start)):
            names = await registry.repositories(after, size)
            found += [name for name in names if name.startswith(start) and visible(name)]
            if len(names) < size:
                break
            after, size = names[-1], min(2 * size, PAGE)
    return found[:limit]


def _distinct(starts: Iterable[str]) -> Iterator[str]:
    """In order, and none that begins with another one, or that no name can begin with."""
    former = None
    for each in sorted(each for each in set(starts) if each.isascii() and each.isprintable()):
        if former is None or not each.startswith(former):
            yield (former := each)


def _before(start: str) -> str:
    """A text between which and the names that begin with `start` no name lies."""
    return f"{start[:-1]}{chr(ord(start[-1]) - 1)}~" if start else ""

"""What is wrong with the keys of a configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with the value of the key at `path`; the path of the whole configuration is empty.

    `source` is the variable or the option that gave the value, empty for the file.
    """

    path: str
    cause: str
    source: str = ""

    def __str__(self) -> str:
        return f"{self.path}: {self.cause}" if self.path else self.cause


class Faults(Exception):
    """All that is wrong with a part of the configuration, in the order of its keys."""

    def __init__(self, *faults: Fault) -> None:
        super().__init__(*faults)
        self.faults = faults


def refuse(path: str, cause: object) -> Faults:
    return Faults(Fault(path, str(cause)))


def gather(calls: Iterable[Callable[[], T]]) -> list[T]:
    """What the calls return.  Raises all that they raise as one Faults."""
    found: list[T] = []
    faults: list[Fault] = []
    for call in calls:
        try:
            found.append(call())
        except Faults as error:
            faults += error.faults
    if faults:
        raise Faults(*faults) from None
    return found


def join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def within(path: str, outer: str) -> bool:
    """Whether the key at `path` is that at `outer`, or in it."""
    return bool(outer) and path.startswith(outer) and path[len(outer) :][:1] in ("", ".", "[")


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint at what may have been meant."""
    known = list(known)
    from difflib import get_close_matches  # no configuration without a fault needs it

    found = get_close_matches(word, known, n=1)
    return f"; did you mean {found[0]}?" if found else f"; known are {', '.join(known)}"

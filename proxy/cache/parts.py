"""The parts of a blob that are being transferred: which bytes each brings, and how soon they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from storage.disk.extents import Extents

SOON = 1.0  # seconds; bytes that come later are fetched by a transfer of their own
ASSUMED = 16 << 20  # bytes per second of a transfer whose pace is not known
MEASURED = 0.25  # seconds after which the pace of a transfer is known


@dataclass(slots=True, eq=False)
class Part:
    """One transfer: of [position, stop), as far as it has not come.

    requested: the origin is asked for it
    granted: no other transfer brings these bytes
    claimed: up to where a thread may be writing them
    start: the position at the beginning
    since, base: a time in the last two seconds, and the position at that time
    """

    position: int
    stop: int
    since: float
    requested: bool = False
    granted: bool = False
    claimed: int = 0
    start: int = field(init=False)
    base: int = field(init=False)
    later: tuple[float, int] = field(init=False)  # the next `since` and `base`

    def __post_init__(self) -> None:
        self.start = self.base = self.position
        self.later = self.since, self.position

    def advance(self, number: int, now: float) -> None:
        self.position += number
        if now - self.later[0] > SOON:
            self.since, self.base = self.later
            self.later = now, self.position

    def seconds_to(self, offset: int, now: float) -> float:
        """How long it takes until the byte at `offset` comes, at the present pace."""
        ahead, elapsed = offset - self.position, now - self.since
        pace = (self.position - self.base) / elapsed if elapsed >= MEASURED else ASSUMED
        return 0.0 if ahead <= 0 else ahead / pace if pace else float("inf")


class Parts:
    """The parts of one blob that are being transferred.  Each byte is `taken` by one, or is there.

    ticks: seconds of a clock that nobody sets
    """

    def __init__(self, there: Extents, ticks: Callable[[], float]) -> None:
        self.taken = Extents(there)
        self._ticks = ticks
        self._parts: list[Part] = []

    def __iter__(self) -> Iterator[Part]:
        return iter(self._parts)

    def add(self, start: int, stop: int) -> Part:
        """A part that takes nothing yet."""
        self._parts.append(Part(start, stop, self._ticks()))
        return self._parts[-1]

    def take(self, start: int, stop: int) -> Part:
        """A part of a gap(), which takes all of it."""
        part = self.add(start, stop)
        part.requested = part.granted = True
        self.taken.add(start, stop)
        return part

    def grant(self, part: Part) -> bool:
        """Take the bytes of `part` from the one that would bring them; False if they have come."""
        for other in self._parts:
            if other.granted and other.position < part.position < other.stop:
                self.taken.remove(part.position, other.stop)
                other.stop = part.position
        start, stop = self.taken.gap(part.position, part.stop)
        if start > part.position or start == stop:
            return False
        part.stop, part.granted = stop, True
        self.taken.add(start, stop)
        return True

    def restart(self, there: Extents) -> None:
        """The upload is another one."""
        self.taken = Extents(there)

    def cut(self, part: Part, size: int) -> None:
        """The blob has no more than `size` bytes."""
        if size < part.stop:
            self.taken.remove(max(size, part.position), part.stop)
            part.stop = size

    def remove(self, part: Part) -> None:
        """What it did not bring is missing again."""
        if part.granted:
            self.taken.remove(part.position, part.stop)
        self._parts.remove(part)

    def clip(self, part: Part) -> bool:
        """Shorten `part` by what others bring; False if they bring its beginning, and soon."""
        start = part.position
        for other in self._parts:
            if other.requested and other.position <= start < other.stop:
                part.stop = min(part.stop, other.stop)
                return other.seconds_to(start, self._ticks()) > SOON
        missing, part.stop = self.taken.gap(start, part.stop)
        return missing == start < part.stop

    def gap(self, end: int) -> tuple[int, int]:
        """The first bytes before `end` that neither are there nor are asked for."""
        taken = Extents(self.taken)
        for part in self._parts:
            if part.requested:
                taken.add(part.position, part.stop)
        return taken.gap(0, end)

    def late(self, offset: int, stop: int) -> int:
        """Where the bytes of [offset, stop) end that no part brings: `offset` if these come soon."""
        now = self._ticks()
        coming = [part for part in self._parts if part.position <= offset < part.stop]
        if any(part.seconds_to(offset, now) <= SOON for part in coming):
            return offset
        return min([stop, *(part.position for part in self._parts if part.position > offset)])

    def has(self, offset: int) -> bool:
        """Whether the byte has come, or a transfer has begun that brings it."""
        return self.taken.end(offset) > offset

    def coming(self, size: int) -> list[tuple[int, int]]:
        """What each is to bring from now on of a blob of `size` bytes."""
        spans = ((part.position, min(part.stop, size)) for part in self._parts if part.requested)
        return sorted((start, stop) for start, stop in spans if start < stop)

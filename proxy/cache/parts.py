"""The parts of a blob that are being transferred: which bytes each brings, and how soon they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from storage.disk.extents import Extents

SOON = 1.0  # seconds; bytes that come later are fetched by a transfer of their own
ASSUMED = 16 << 20  # bytes per second of a transfer whose pace is not known
PIECE = 64 << 20  # bytes that one transfer is asked for at most while clients read long ranges
LEAST = 4 << 20  # bytes, or as many if there are so many: a request for fewer is not worth it
LONG = 8 << 20  # bytes; a range of more is fetched in pieces, the first one of so many
AWAY = 0.75  # seconds for which a transfer brings other bytes than those that its client waits for
MEASURED = 0.25  # seconds after which the pace of a transfer is known


@dataclass(slots=True, eq=False)
class Part:
    """One transfer: of [position, stop), as far as it has not come.

    goal: up to where the client reads for whom it began; what is after `stop` comes piece by piece
    home: where this client waits, while the transfer brings a piece from elsewhere; else -1
    left: how many bytes it brings in all, also from elsewhere if others bring some of its own
    assumed: its pace, in bytes per second, until that is measured
    requested: the origin is asked for it
    granted: no other transfer brings these bytes
    claimed: up to where a thread may be writing them
    instead: it takes the place of a transfer that has ended, where the origin accepts no further one
    start: the position at the beginning
    since, base: a time in the last two seconds, and the position at that time
    """

    position: int
    stop: int
    since: float
    goal: int = -1
    home: int = -1
    left: int = 0
    assumed: float = ASSUMED
    requested: bool = False
    granted: bool = False
    claimed: int = 0
    instead: bool = False
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
        ahead, pace = offset - self.position, self.pace(now)
        if self.home >= 0 and not self.position <= offset < self.stop:
            ahead = offset - self.home + self.stop - self.position
        return 0.0 if ahead <= 0 else ahead / pace if pace else float("inf")

    def pace(self, now: float) -> float:
        """In bytes per second."""
        elapsed = now - self.since
        return (self.position - self.base) / elapsed if elapsed >= MEASURED else self.assumed

    def brings(self, offset: int) -> bool:
        """Whether the byte is one of its bytes, or comes in a later piece, if no other transfer brings it."""
        begin = self.position if self.home < 0 else self.home
        return self.position <= offset < self.stop or begin <= offset < self.goal


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

    def add(self, start: int, stop: int, in_pieces: bool = False, instead: bool = False) -> Part:
        """A part that takes nothing yet; a long one may come `in_pieces`."""
        part = Part(start, stop, self._ticks(), assumed=ASSUMED, instead=instead)
        if in_pieces and stop - start > LONG:
            part.goal, part.left = stop, stop - start
        self._parts.append(part)
        return part

    def take(self, start: int, stop: int) -> Part:
        """A part of a gap(), which takes all of it."""
        part = self.add(start, stop)
        part.requested = part.granted = True
        self.taken.add(start, stop)
        return part

    def grant(self, part: Part, end: int) -> bool:
        """Take the bytes of `part` from the one that would bring them; False if they have come.

        If it has a goal, others that were asked for more than a piece bring no more than that.
        """
        piece = self.piece(end)
        for other in self._parts if part.goal >= 0 else ():
            if other.granted and other.stop - other.start > PIECE + LEAST:
                self.end_at(min(other.stop, other.position + piece), other)
        for other in self._parts:
            if other.granted and other.position < part.position < other.stop:
                self.end_at(part.position, other)
        start, stop = self.taken.gap(part.position, part.stop)
        if start > part.position or start == stop:
            return False
        part.stop, part.granted = stop, True
        self.taken.add(start, stop)
        return True

    def end_at(self, stop: int, part: Part) -> None:
        """The part ends there; other transfers may bring the rest."""
        self.taken.remove(stop, part.stop)
        part.stop = stop

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
        if part.goal >= 0:
            part.stop = min(part.stop, start + LONG)
        for other in self._parts:
            if other.requested and other.position <= start < other.stop:
                part.stop = min(part.stop, other.stop)
                return other.seconds_to(start, self._ticks()) > SOON
        missing, part.stop = self.taken.gap(start, part.stop)
        return missing == start < part.stop

    def _asked(self) -> Extents:
        """What is there or asked for."""
        asked = Extents(self.taken)
        for part in self._parts:
            if part.requested:
                asked.add(part.position, part.stop)
        return asked

    def gap(self, end: int, whole: bool = False) -> tuple[int, int]:
        """The first bytes before `end` that neither are there nor are asked for.

        For a transfer of the `whole` blob, the first that no transfer brings: what is asked for by range may
        be refused, and would be left out.
        """
        return (self.taken if whole else self._asked()).gap(0, end)

    def piece(self, end: int) -> int:
        """How many of the bytes before `end` are asked for at once: fewer, the fewer are missing.

        So the last transfers end at about the same time, and little is left to hash then.
        """
        coming = sum(part.stop - part.position for part in self._parts if part.granted)
        missing = end - self.taken.total + coming
        return max(LEAST, min(PIECE, missing // (2 * max(1, len(self._parts)))))

    def first(self, end: int) -> Part | None:
        """A part of the first gap, for a transfer that nobody waits for."""
        start, stop = self.gap(end)
        if start == stop:
            return None
        part = self.take(start, min(stop, start + LONG))
        part.left = end
        return part

    def following(self, part: Part, end: int, anywhere: bool, brief: bool = False) -> Part | None:
        """What the transfer of `part`, which has come, brings next, of the bytes before `end`.

        It comes nearer to its goal; or, if it may go `anywhere`, it brings what comes first: in turn if that
        takes no longer than its client may wait, or if others have brought it to its goal.  It is `brief` if
        others wait for the transfer to end.
        """
        asked, pace = self._asked(), part.pace(self._ticks())
        at, size = part.stop if part.home < 0 else part.home, LEAST if brief else self.piece(end)
        (start, stop), first = asked.gap(at, max(at, min(part.goal, end))), asked.gap(0, end)
        left = (end - part.start if part.left > end else part.left) - (part.position - part.start)
        quick = pace * SOON > LONG
        away = quick and anywhere and part.home < 0 and first[0] < start < stop
        idle = anywhere and start == stop and left >= LEAST
        if quick:
            size = min(size, int(pace * AWAY))
        elif idle:
            size = min(size, max(LONG, int(2 * pace * SOON)))  # who comes next may need its slot
        home, goal = start if away else -1, -1 if idle else part.goal
        if away or idle:
            start, stop = first
        if start == stop:
            return None
        last = stop - start <= size + (0 if away else LEAST)
        found = self.take(start, stop if last else start + size)
        found.goal, found.home, found.left, found.assumed = goal, home, left, pace
        return found

    def rest(self, part: Part) -> Part:
        """What is left of a part that broke off, and what follows it, for the next request of its client."""
        left, stop = max(0, part.left - (part.position - part.start)), part.stop
        self.end_at(part.position, part)
        found = self.take(part.position, stop)
        found.goal, found.home, found.left = part.goal, part.home, left
        found.assumed = part.pace(self._ticks())
        return found

    def late(self, offset: int, stop: int) -> int:
        """Where the bytes of [offset, stop) end that no part brings: `offset` if they come soon."""
        now = self._ticks()
        coming = [part for part in self._parts if part.brings(offset)]
        if (self.has(offset) and not coming) or any(part.seconds_to(offset, now) <= SOON for part in coming):
            return offset
        return min([stop, *(part.position for part in self._parts if part.position > offset)])

    def has(self, offset: int) -> bool:
        """Whether the byte has come, or a transfer has begun that brings it."""
        return self.taken.end(offset) > offset

    def coming(self, size: int) -> list[tuple[int, int]]:
        """What each is to bring from now on of a blob of `size` bytes."""
        spans = ((part.position, min(part.stop, size)) for part in self._parts if part.requested)
        return sorted((start, stop) for start, stop in spans if start < stop)

"""The parts of a blob that are being transferred, and how soon their bytes come."""

from __future__ import annotations

from dataclasses import dataclass, field

SOON = 1.0  # seconds; bytes that come later are fetched by a transfer of their own
ASSUMED = 16 << 20  # bytes per second of a transfer whose pace is not known
MEASURED = 0.25  # seconds after which the pace of a transfer is known


@dataclass(slots=True, eq=False)
class Part:
    """One transfer: of [position, stop), as far as it has not come.

    requested: the origin is asked for it
    granted: no other transfer brings these bytes
    claimed: up to where a thread may be writing them
    since, base: a time in the last two seconds, and the position at that time
    """

    position: int
    stop: int
    since: float
    requested: bool = False
    granted: bool = False
    claimed: int = 0
    base: int = field(init=False)
    later: tuple[float, int] = field(init=False)  # the next `since` and `base`

    def __post_init__(self) -> None:
        self.base, self.later = self.position, (self.since, self.position)

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

"""How far a scrub got, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from storage.oci import Digest

COUNTED = ("checked", "bytes", "damaged", "healed", "foreign")


@dataclass(slots=True)
class ScrubProgress:
    """How far a scrub got.

    `checked` counts blobs and manifests; `damaged` includes what is missing.  `total_bytes` is an estimate.
    `foreign` counts paths that are not blobs.  `current` is the blob that is being read.  `counted` is as in
    Scrub.
    """

    started_at: float
    counted: Callable[[str, int], None] = lambda name, number: None
    checked: int = 0
    bytes: int = 0
    total_bytes: int = 0
    damaged: int = 0
    healed: int = 0
    foreign: int = 0
    current: Digest | None = None
    running: bool = True

    def count(self, name: str, number: int = 1) -> None:
        """Count `number` more of what the attribute `name` counts, and tell `counted`."""
        setattr(self, name, getattr(self, name) + number)
        self.counted(name, number)


@dataclass(frozen=True, slots=True)
class ScrubReport:
    """The result of a scrub; see ScrubProgress."""

    checked: int
    bytes: int
    damaged: int
    healed: int
    foreign: int
    seconds: float

"""The conditions of rules: what content has to be, beyond its name, for a rule to allow it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from storage.oci import Manifest
from storage.registry import Registry


@dataclass(frozen=True, slots=True)
class Subject:
    """A manifest that is judged, and the registry that has it.

    repository: its full name, with the namespace
    name: what `registry` calls the repository; signatures are fetched from there, and nothing judges them
    """

    repository: str
    name: str
    manifest: Manifest
    registry: Registry


@dataclass(frozen=True, slots=True)
class Evidence:
    """Whether a subject meets a condition.

    reason: half a sentence that follows "it", such as `is signed by release`, or `has no signature`
    until: the time until which it is known, in seconds since the epoch; infinity unless it depends on time
    """

    met: bool
    reason: str
    until: float = math.inf


class Condition(Protocol):
    """What a manifest has to be for a rule to allow it."""

    async def judge(self, subject: Subject) -> Evidence:
        """Raises Unavailable if what it needs cannot be fetched now: then nothing is known of the subject."""
        ...

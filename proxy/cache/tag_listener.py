"""The interface to what learns that a tag of a cache has moved."""

from __future__ import annotations

from typing import Protocol

from storage.oci import Digest, Tag
from storage.records import Batch


class TagListener(Protocol):
    """Is called for each move, with the full name of the repository."""

    def record(self, batch: Batch, repository: str, tag: Tag, old: Digest, new: Digest) -> None:
        """In the transaction that moves the tag."""

    async def moved(self, repository: str, tag: Tag, old: Digest, new: Digest) -> None:
        """After it."""

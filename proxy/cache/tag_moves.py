"""What hears that a tag of a cache has moved."""

from __future__ import annotations

from typing import Protocol

from storage.oci import Digest, Tag
from storage.records import Batch


class TagMoves(Protocol):
    """Hears of each move, with the full name of the repository: in its transaction, and after it."""

    def record(self, batch: Batch, repository: str, tag: Tag, old: Digest, new: Digest) -> None: ...

    async def tell(self, repository: str, tag: Tag, old: Digest, new: Digest) -> None: ...

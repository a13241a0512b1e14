"""Exceptions from the policy that an operator makes for some time: what is refused or held is served then.

    override <image>        JSON of an Override; the image is `repository:tag` or `repository@digest`

They are read from the records of the caches, and hold for all processes at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

import msgspec
import structlog

from storage.disk.remembered import Remembered
from storage.errors import NameUnknown, StorageFailed
from storage.keys import OVERRIDE
from storage.names import written
from storage.store import Store

log = structlog.get_logger()

LONGEST = 7 * 86400.0  # seconds of an override


class Override(msgspec.Struct, frozen=True):
    """An exception for one image, by its full name and a tag or digest: from `since` until `until`.

    Times are seconds since the epoch.
    """

    image: str
    since: float
    until: float
    reason: str

    @property
    def repository(self) -> str:
        name, at, _ = self.image.partition("@")
        return name if at else name.rpartition(":")[0]


class Overrides:
    """The overrides in the records of the caches.  Methods that list or change them raise StorageFailed."""

    def __init__(self, caches: Store, clock: Callable[[], float]) -> None:
        self._store = caches
        self._clock = clock
        self._recorded = Remembered(caches.records, self._read)

    def _read(self) -> dict[str, Override]:
        found = {}
        for _, value in self._store.records.scan(OVERRIDE.prefix()):
            with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                each = msgspec.json.decode(value, type=Override)
                found[each.image] = each
        return found

    def _now(self) -> dict[str, Override]:
        """Those of which the time has not ended; none while the records cannot be read."""
        try:
            recorded = self._recorded()
        except StorageFailed:
            return {}
        if not recorded:
            return recorded
        now = self._clock()
        return {image: each for image, each in recorded.items() if each.since <= now < each.until}

    def concern(self, repository: str) -> bool:
        """Whether there is one for an image of a repository, which is given by its full name."""
        return any(each.repository == repository for each in self._now().values())

    def find(self, repository: str, references: Iterable[str]) -> Override | None:
        """The one for a tag or a digest of a repository, which is given by its full name."""
        if not (active := self._now()):
            return None
        found = (active.get(written(repository, each)) for each in references)
        return next(filter(None, found), None)

    def list(self) -> list[Override]:
        """Those of which the time has not ended, the next to end first.  Blocks."""
        now = self._clock()
        return sorted(
            (each for each in self._read().values() if now < each.until), key=lambda each: each.until
        )

    async def begin(self, image: str, seconds: float, reason: str) -> Override:
        """Make an exception for some time, in place of one for the same image."""
        now = self._clock()
        made = Override(image, now, now + seconds, reason)
        await self._store.run(self._put, made)
        log.warning("override.begun", image=image, seconds=seconds, reason=reason)
        return made

    def _put(self, made: Override) -> None:
        records = self._store.records
        for each in self._read().values():
            if each.until <= made.since:
                records.delete(OVERRIDE.key(each.image))
        records.put(OVERRIDE.key(made.image), msgspec.json.encode(made))

    async def end(self, image: str) -> Override:
        """End an exception now.  Raises NameUnknown if there is none."""
        found = next((each for each in await self._store.run(self.list) if each.image == image), None)
        if found is None or not await self._store.run(self._store.records.delete, OVERRIDE.key(image)):
            raise NameUnknown(f"there is no override for {image}: entrepot policy overrides lists them")
        log.warning("override.ended", image=image)
        return msgspec.structs.replace(found, until=self._clock())


class NoOverrides(Overrides):
    """None, and there never are any."""

    def __init__(self) -> None:
        pass

    def concern(self, repository: str) -> bool:
        return False

    def find(self, repository: str, references: Iterable[str]) -> Override | None:
        return None

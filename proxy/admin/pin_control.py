"""The pins that an operator adds and removes, beside those of the configuration."""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from proxy.admin.inventory import Inventory
from proxy.admin.models import PinRow
from proxy.namespaces.references import FieldInvalid, ReferenceReader, read_pattern, read_platforms
from storage.errors import NameUnknown
from storage.graph import walk
from storage.maintenance.pins import Pin, Pins, matching
from storage.oci import Digest

log = structlog.get_logger()


class PinControl:
    """Lists, adds and removes pins.  Every method blocks, and may raise StorageFailed."""

    def __init__(self, pins: Pins, inventories: Sequence[Inventory], reader: ReferenceReader) -> None:
        self._pins = pins
        self._inventories = inventories
        self._reader = reader

    def rows(self) -> list[PinRow]:
        return [self._row(pin) for pin in self._pins.list()]

    def add(self, pattern: str, keep_fresh: float | None, platforms: Sequence[str], now: float) -> PinRow:
        """Add a pin, or replace the pin of the same pattern.  Raises FieldInvalid."""
        parsed = self._reader.pattern("pattern", pattern)
        only = read_platforms("platforms", platforms)
        try:
            pin = Pin(parsed.pattern, keep_fresh, only, now)
        except ValueError as error:
            raise FieldInvalid("keep_fresh", error) from None
        try:
            self._pins.add(pin)
        except ValueError as error:
            raise FieldInvalid("pattern", error) from None
        log.info("pin.added", pattern=pin.pattern, keep_fresh=keep_fresh, platforms=pin.platforms)
        return self._row(pin)

    def remove(self, pattern: str) -> str:
        """Remove the pin of a pattern, as it is listed or as a client writes it, and return its pattern.

        Raises NameUnknown if an operator has added no such pin.
        """
        listed, completed = read_pattern("pattern", pattern), self._reader.pattern("pattern", pattern)
        for each in dict.fromkeys((listed.pattern, completed.pattern)):
            if self._pins.remove(each):
                log.info("pin.removed", pattern=each)
                return each
            if any(pin.pattern == each for pin in self._pins.list()):
                raise NameUnknown(f"{each} is pinned by the configuration: remove it there")
        raise NameUnknown(f"{pattern} is not pinned: give the pattern as the list of pins shows it")

    def _row(self, pin: Pin) -> PinRow:
        manifests: set[Digest] = set()
        stored: dict[Digest, int] = {}
        references = 0
        for each in self._inventories:
            for repository, reference in matching(each.store, pin):
                references += 1
                if (digest := each.digest(repository, reference)) is not None:
                    found = walk(each.store, repository, digest, pin.platforms)
                    manifests |= found.manifests
                    blobs = ((blob, named.size) for blob, named in found.blobs.items())
                    stored |= {blob: max(0, size) for blob, size in blobs if each.store.holds(blob)}
        return PinRow(
            pattern=pin.pattern,
            keep_fresh=pin.keep_fresh,
            platforms=list(pin.platforms),
            since=pin.since,
            references=references,
            manifests=len(manifests),
            blobs=len(stored),
            bytes=sum(stored.values()),
        )

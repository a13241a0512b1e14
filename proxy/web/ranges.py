"""The `Range` header: its parser, and the spans that satisfy it (RFC 9110, section 14)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from storage.errors import RangeInvalid
from storage.oci import Span

_RANGES = re.compile(r"\s*bytes\s*=(.*)", re.IGNORECASE | re.DOTALL)
_RANGE = re.compile(r"[ \t]*([0-9]*)-([0-9]*)[ \t]*")
_DIGITS = 20  # of a position that no content has


@dataclass(frozen=True, slots=True)
class Range:
    """A range-spec as the client wrote it: `bytes=first-last`, `first-`, or the last `suffix` bytes."""

    first: int | None = None
    last: int | None = None
    suffix: int | None = None

    @property
    def backwards(self) -> bool:
        return self.first is not None and self.last is not None and self.last < self.first

    @property
    def span(self) -> Span | None:
        """The requested bytes; None if there are none."""
        if self.first is None:
            return Span(-self.suffix) if self.suffix else None
        if self.backwards:
            return None
        return Span(self.first, None if self.last is None else self.last + 1)


def parse_ranges(header: str | None) -> list[Range]:
    """Parse the header (RFC 9110 §14.1.2).  A malformed one, or one of another unit, is ignored (§14.2)."""
    found = _RANGES.fullmatch(header or "")
    if found is None:
        return []
    ranges = []
    for text in found[1].split(","):
        if not text.strip():
            continue  # RFC 9110 §5.6.1: empty list elements are ignored
        spec = _RANGE.fullmatch(text)
        if spec is None or spec[1] == spec[2] == "":
            return []
        if spec[1] == "":
            ranges.append(Range(suffix=_position(spec[2])))
            continue
        ranges.append(Range(_position(spec[1]), _position(spec[2]) if spec[2] else None))
    # RFC 9110 §14.2 lets a server ignore an invalid range or reject it.  A single one is rejected, as the
    # conformance suite wants; with one among others, all ranges are ignored.
    return [] if len(ranges) > 1 and any(each.backwards for each in ranges) else ranges


def _position(text: str) -> int:
    """The number; one beyond all content has only its first digits, as int() refuses more than 4300."""
    return int(text.lstrip("0")[:_DIGITS] or "0")


def satisfy(ranges: Sequence[Range], size: int) -> list[Span]:
    """The spans of `size` bytes to be sent; [] means everything.  Raises RangeInvalid if no span exists.

    The spans are in the order of the request, and are not merged, as clients of zstd:chunked layers expect.
    Their number is limited only by the length of the header: clients request more than 1,000 at once.
    Empty content is sent whole: containerd asks for `bytes=0-` before it knows that a layer is empty.
    """
    if size == 0:
        return []
    spans = []
    for each in ranges:
        if each.first is None:
            start, stop = max(0, size - (each.suffix or 0)), size
        else:
            start, stop = each.first, size if each.last is None else min(size, each.last + 1)
        if start < stop:
            spans.append(Span(start, stop))
    if ranges and not spans:
        raise RangeInvalid(f"no such range in {size} bytes")
    # Overlapping ranges that add up to more than the content would only cause work (RFC 9110 §17.15).
    return spans if sum((span.stop or 0) - span.start for span in spans) <= size else []

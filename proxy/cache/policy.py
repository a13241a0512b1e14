"""Policy: how long a cache counts answers as fresh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Policy:
    """How long a cache counts answers as fresh, and when it asks its origin; times are in seconds.

    `fresh_for` maps a tag to its freshness lifetime (RFC 9111 §4.2); listings have that of the tag "".
    `negative_for` is how long the origin is not asked again for what it does not know.  With `lazy`, a
    request for a byte range of a blob that is not cached does not start a fill.
    """

    fresh_for: Callable[[str], float]
    negative_for: float = 10.0
    drop_deleted: bool = False
    offline: bool = False
    lazy: bool = False

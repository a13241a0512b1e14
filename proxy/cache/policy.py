"""Policy: how long a cache counts answers as fresh."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Threshold:
    """When the rest of a blob is fetched of which clients read parts: by the first of these.

    share: of the blob that is here, at most 1
    clients: that have asked for bytes that were not here
    """

    share: float = 0.5
    clients: float = 2


@dataclass(frozen=True, slots=True)
class Policy:
    """How long a cache counts answers as fresh, and when it asks its origin; times are in seconds.

    `fresh_for` maps a tag to its freshness lifetime (RFC 9111 §4.2); listings have that of the tag "".
    A tag that is no longer fresh waits for the origin for `revalidate_timeout`; then it is served stale, and
    the validation continues.  `negative_for` is how long the origin is not asked again for what it does not
    know; `absent_for` is how long it is taken not to have it while it cannot be asked.
    With `lazy`, only the requested ranges of a blob are fetched, until its threshold is reached.
    `refuse_incomplete` says which clients are refused an image whose layers cannot come.
    """

    fresh_for: Callable[[str], float]
    negative_for: float = 10.0
    absent_for: float = 86_400.0
    revalidate_timeout: float = math.inf
    drop_deleted: bool = False
    offline: bool = False
    lazy: Threshold | None = None
    refuse_incomplete: Literal["containers", "always", "never"] = "containers"

"""Where an upstream has redirected requests for blobs: the next range costs one request instead of two."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from yarl import URL

from proxy.config.quantities import parse_number

KEPT = 60.0  # seconds; a signed URL is good for some minutes at least
MOST = 256  # URLs that are kept, each of some kilobytes


class RedirectMemory:
    """The last target of each URL, for as long as it may be used again.

    A target may be a signed URL, which is as good as a password for what it leads to.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._targets: dict[
            URL, tuple[URL, float, float]
        ] = {}  # with when it was put here, and how long it is good

    def get(self, url: URL) -> URL | None:
        target, since, seconds = self._targets.get(url, (None, 0.0, 0.0))
        return target if 0 <= self._clock() - since < seconds else None

    def put(self, url: URL, target: URL, seconds: float) -> None:
        self._targets.pop(url, None)
        if seconds > 0:
            self._targets[url] = target, self._clock(), seconds
            if len(self._targets) > MOST:
                del self._targets[next(iter(self._targets))]

    def drop(self, url: URL) -> None:
        self._targets.pop(url, None)


def good_for(headers: Mapping[str, str]) -> float:
    """For how many seconds the target of a redirect with these headers is used: RFC 9111, section 5.2.2."""
    seconds = KEPT
    for directive in headers.get("Cache-Control", "").lower().split(","):
        name, _, value = directive.strip().partition("=")
        if name in ("no-store", "no-cache"):
            return 0.0
        if name == "max-age":
            seconds = min(seconds, parse_number(value.strip('"')) or 0)
    return seconds

"""URLs that fail whenever they are asked for, while their host answers other requests."""

from __future__ import annotations

import time
from collections.abc import Callable

from yarl import URL

from proxy.upstream.ratelimit import time_left

KEPT = 30.0  # seconds since it failed last
MOST = 256  # URLs that are kept


class FailingURLs:
    """URLs of which a request was sent several times, and was answered with a failure each time.

    Each is of one method: a HEAD may be answered where a GET fails.  What a query says does not count: it may
    be a signature.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: dict[tuple[str, URL], float] = {}

    def since(self, method: str, url: URL) -> float | None:
        """When it failed last; None if that is no longer known, or if it did not."""
        since = self._since.get((method, url.with_query(None))) if self._since else None
        return since if since is not None and time_left(since, KEPT, self._clock()) > 0 else None

    def note(self, method: str, url: URL, failed: bool) -> None:
        """Remember how a request to it ended."""
        if failed or self._since:
            self._since.pop(key := (method, url.with_query(None)), None)
            if failed:
                self._since[key] = self._clock()
                if len(self._since) > MOST:
                    del self._since[next(iter(self._since))]

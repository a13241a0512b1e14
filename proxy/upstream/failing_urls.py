"""URLs that fail whenever they are asked for, while their host answers other requests."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from yarl import URL

from proxy.upstream.breaker import Outlook
from proxy.upstream.ratelimit import time_left

KEPT = 30.0  # seconds since it failed last
MOST = 256  # URLs that are kept


class FailingURL(NamedTuple):
    """When it failed first, and last."""

    first: float
    last: float


class FailingURLs:
    """URLs of which a request was sent several times, and was answered with a failure each time.

    Each is of one method: a HEAD may be answered where a GET fails.  What a query says does not count: it may
    be a signature.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[tuple[str, URL], FailingURL] = {}

    def has(self, method: str, url: URL) -> bool:
        """Whether it has failed, and not long ago."""
        return self._get(method, url) is not None

    def outlook(
        self, method: str, url: URL, answered_after: Callable[[float], bool], moment: float
    ) -> Outlook:
        """What a further failure says of its host, if such a failure may be over in a `moment`.

        `answered_after` says whether the host has answered since then.
        """
        known = self._get(method, url)
        if known is None or not answered_after(known.last):
            return Outlook.SOON
        return Outlook.UNKNOWN if self._clock() - known.first >= moment else Outlook.ALONE

    def _get(self, method: str, url: URL) -> FailingURL | None:
        found = self._known.get((method, url.with_query(None))) if self._known else None
        return found if found is not None and time_left(found.last, KEPT, self._clock()) > 0 else None

    def note(self, method: str, url: URL, failed: bool) -> None:
        """Remember how a request to it ended."""
        if failed or self._known:
            known = self._get(method, url)
            self._known.pop(key := (method, url.with_query(None)), None)
            if failed:
                now = self._clock()
                self._known[key] = FailingURL(known.first if known else now, now)
                if len(self._known) > MOST:
                    del self._known[next(iter(self._known))]

"""Warming by a schedule: each rule of the configuration names images, and when to fetch them."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

import msgspec
import structlog

from proxy.admin.image_files import Unreadable, find_images
from proxy.admin.reports import WarmRow
from proxy.admin.warm import JOBS, Warmer
from proxy.cache.refresh import BACKOFF, LONGEST_BACKOFF
from proxy.config.schema import WarmRule
from storage.concurrency import for_each, run_in_thread
from storage.keys import WARMING
from storage.records import Records

log = structlog.get_logger()


class _WarmRun(msgspec.Struct, frozen=True):
    """The last run of a rule: when it began, and how many images failed."""

    begun: float
    failed: int


class Schedule:
    """Warms images as the rules say.  A run that fails is repeated, at growing intervals.

    The last run of each rule is a record, `warmed <rule>`, so that a restart neither repeats nor skips a run.
    """

    def __init__(
        self,
        rules: Sequence[WarmRule],
        warmer: Warmer,
        records: Records,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._rules = {_key(rule): rule for rule in rules}
        self._warmer = warmer
        self._records = records
        self._clock = clock
        self._since = clock()
        self._failed: dict[str, tuple[int, float]] = {}  # failures in a row, and the time of the next attempt

    async def run_once(self) -> list[WarmRow]:
        """Run each rule that is due, one after the other.  Raises StorageFailed."""
        for key in [key for key, _ in self._records.scan(WARMING.prefix()) if key not in self._rules]:
            await run_in_thread(self._records.delete, key)
        rows = []
        for key, rule in self._rules.items():
            if self._due(key, rule):
                rows += await self._run(key, rule)
        return rows

    def _due(self, key: str, rule: WarmRule) -> bool:
        now = self._clock()
        if (failed := self._failed.get(key)) is not None and failed[1] <= now:
            return True
        last = self._last(key)
        if last is None:
            return rule.every is not None or latest(rule.at or (0, 0), now) > self._since
        # A clock that was set back must not delay it.
        if last.begun > now or (last.failed and failed is None):
            return True
        if rule.every is not None:
            return now - last.begun >= rule.every
        return latest(rule.at or (0, 0), now) > last.begun

    def _last(self, key: str) -> _WarmRun | None:
        record = self._records.get(key)
        try:
            return None if record is None else msgspec.json.decode(record, type=_WarmRun)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None

    async def _run(self, key: str, rule: WarmRule) -> list[WarmRow]:
        begun, unreadable = self._clock(), 0
        found: dict[str, WarmRow] = {}

        async def warm(text: str) -> None:
            row = found[text] = await self._warmer.warm(text, rule.platforms, rule.referrers)
            if row.error is not None:
                log.warning("warm.failed", reference=text, here=row.here, error=row.error)

        try:
            images = await run_in_thread(_images, rule)
        except Unreadable as error:
            log.warning("warm.failed", list=str(rule.list), error=str(error))
            images, unreadable = list(rule.images), 1
        await for_each(warm, images, JOBS)
        rows = [found[each] for each in images]
        failed = sum(not row.here for row in rows) + unreadable
        again_in = self._again(key, failed)
        await run_in_thread(self._records.put, key, msgspec.json.encode(_WarmRun(begun, failed)))
        log.info(
            "warm.done",
            images=len(rows),
            failed=failed,
            blobs=sum(row.fetched for row in rows),
            bytes=sum(row.bytes for row in rows),
            again_in=again_in,
        )
        return rows

    def _again(self, key: str, failed: int) -> float | None:
        if not failed:
            self._failed.pop(key, None)
            return None
        times = self._failed.get(key, (0, 0.0))[0]
        seconds: float = min(BACKOFF * 2 ** min(times, 10), LONGEST_BACKOFF)
        self._failed[key] = times + 1, self._clock() + seconds
        return seconds


def _key(rule: WarmRule) -> str:
    # By its content and not by its place in the list, which changes with other rules.
    return WARMING.key(hashlib.sha256(repr(rule).encode()).hexdigest())


def _images(rule: WarmRule) -> list[str]:
    """Raises Unreadable."""
    listed = [] if rule.list is None else find_images([str(rule.list)], sys.stdin, os.environ).references
    return list(dict.fromkeys([*rule.images, *listed]))


def latest(at: tuple[int, int], now: float) -> float:
    """The last time that it was this hour and minute, in local time."""
    today = datetime.fromtimestamp(now).replace(hour=at[0], minute=at[1], second=0, microsecond=0)
    moment = today.timestamp()
    return moment if moment <= now else (today - timedelta(days=1)).timestamp()

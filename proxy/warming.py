"""Warming: whole images are fetched before anybody asks for them, once or by a schedule.

What is here is not fetched again: so what was interrupted is gone on with by beginning anew.  Clients come
first: what is kept in reserve of an upstream's rate limit is theirs, and few images are fetched at once, in
the process that keeps house, whose turns are none of theirs.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta

import msgspec
import structlog

from proxy.answers import ReadyRow, WarmRow
from proxy.cache.refresh import BACKOFF, LONGEST_BACKOFF, Refreshed, refresh
from proxy.config.schema import WarmRule
from proxy.imagefiles import Unreadable, look
from proxy.namespaces.references import FieldInvalid, ReferenceReader
from proxy.namespaces.routing import Namespaces
from proxy.readiness import Readiness
from storage.concurrency import for_each, run_in_thread
from storage.disk.records import Records
from storage.errors import RegistryError, Unsupported

log = structlog.get_logger()

JOBS = 4  # images at once


class Warmer:
    """`forget` drops what is remembered of an upstream's having had nothing for a repository."""

    def __init__(
        self, namespaces: Namespaces, readiness: Readiness, forget: Callable[[str], Awaitable[None]]
    ) -> None:
        self._namespaces = namespaces
        self._readiness = readiness
        self._forget = forget
        self._reading = ReferenceReader(namespaces)

    async def warm(self, text: str, platforms: Sequence[str] = (), referrers: bool = True) -> WarmRow:
        """Have all of it here.  What fails is told in the answer; only StorageFailed is raised."""
        try:
            asked = self._reading.reference("reference", text)
        except FieldInvalid as bad:
            return WarmRow(
                asked=text, repository="", reference="", digest=None, here=False, error=str(bad),
                code="FIELD_INVALID",
            )  # fmt: skip
        await self._forget(asked.repository)
        done: Refreshed | None = None
        error: RegistryError | None = None
        try:
            done = await refresh(
                self._namespaces, asked.repository, asked.reference, platforms, referrers, sparing=True
            )
        except RegistryError as failed:
            error = failed
        # Where upstream cannot be asked, what refers to it is at least to be here as far as it is known.
        found = await run_in_thread(self._readiness.judge, asked, platforms, referrers and error is not None)
        return _row(found, done, error)


def _row(found: ReadyRow, done: Refreshed | None, error: RegistryError | None) -> WarmRow:
    here = found.state == "complete" and not isinstance(error, Unsupported)
    reason, code = (None, None) if error is None else (str(error) or error.code, error.code)
    if error is None and not here:
        reason, code = incomplete(found), "INCOMPLETE"
    return WarmRow(
        asked=found.asked,
        repository=found.repository,
        reference=found.reference,
        digest=found.digest,
        here=here,
        manifests=done.manifests if done else 0,
        referrers=done.referrers if done else 0,
        blobs=done.blobs if done else 0,
        fetched=done.fetched if done else 0,
        bytes=done.bytes if done else 0,
        error=reason,
        code=code,
    )


def incomplete(found: ReadyRow) -> str:
    """What is not here of it, in a few words."""
    said = [f"there is nothing for {each}" for each in found.lacking]
    if found.missing:
        said.append(f"{len(found.missing)} of what it consists of did not stay")
    return ", ".join(said) or "it is not here"


class _Record(msgspec.Struct, frozen=True):
    """Of a rule's last run: when it began, and how many images failed."""

    begun: float
    failed: int


class Schedule:
    """Warms what the rules say, when they say it.  What fails is tried again, by and by less often.

    The last run of each is a record, `warmed <rule>`; so the next is when it is due, whatever starts between.
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
        self._failed: dict[str, tuple[int, float]] = {}  # how often in a row, and when it is tried again

    async def run_once(self) -> list[WarmRow]:
        """Warm what is due, one rule after the other.  Raises StorageFailed."""
        for key in [key for key, _ in self._records.scan("warmed ") if key not in self._rules]:
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
        # A clock that was set back must not put it off.
        if last.begun > now or (last.failed and failed is None):
            return True
        if rule.every is not None:
            return now - last.begun >= rule.every
        return latest(rule.at or (0, 0), now) > last.begun

    def _last(self, key: str) -> _Record | None:
        record = self._records.get(key)
        try:
            return None if record is None else msgspec.json.decode(record, type=_Record)
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
        await run_in_thread(self._records.put, key, msgspec.json.encode(_Record(begun, failed)))
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
    # By what it says and not by its place in the list: that changes with others.
    return f"warmed {hashlib.sha256(repr(rule).encode()).hexdigest()}"


def _images(rule: WarmRule) -> list[str]:
    """Raises Unreadable."""
    listed = [] if rule.list is None else look([str(rule.list)], sys.stdin, os.environ).references
    return list(dict.fromkeys([*rule.images, *listed]))


def latest(at: tuple[int, int], now: float) -> float:
    """When it was that hour and minute last, in local time."""
    today = datetime.fromtimestamp(now).replace(hour=at[0], minute=at[1], second=0, microsecond=0)
    moment = today.timestamp()
    return moment if moment <= now else (today - timedelta(days=1)).timestamp()

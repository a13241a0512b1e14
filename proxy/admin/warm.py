"""Warming: whole images are fetched before clients need them.

Stored content is not fetched again, so warming continues after an interruption.  Clients come first: the
reserve of an upstream's rate limit is theirs, and few images are fetched at once, in the housekeeping
process, which leaves them half of the slots for transfers.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import structlog

from proxy.admin.readiness import Readiness
from proxy.admin.reports import ReadyRow, WarmRow
from proxy.cache.refresh import RefreshResult, refresh
from proxy.namespaces.references import FieldInvalid, ReferenceReader
from proxy.namespaces.routing import Namespaces
from storage.concurrency import run_in_thread
from storage.errors import RegistryError, Unsupported

log = structlog.get_logger()

JOBS = 4  # images at once


class Warmer:
    """Warms images.  `forget` makes all processes forget the negatives of a repository."""

    def __init__(
        self, namespaces: Namespaces, readiness: Readiness, forget: Callable[[str], Awaitable[None]]
    ) -> None:
        self._namespaces = namespaces
        self._readiness = readiness
        self._forget = forget
        self._reader = ReferenceReader(namespaces)

    async def warm(self, text: str, platforms: Sequence[str] = (), referrers: bool = True) -> WarmRow:
        """Fetch all of an image.  The answer holds the error of a failure; only StorageFailed is raised."""
        try:
            image = self._reader.reference("reference", text)
        except FieldInvalid as bad:
            return WarmRow(
                asked=text, repository="", reference="", digest=None, here=False, error=bad.cause,
                code="FIELD_INVALID",
            )  # fmt: skip
        await self._forget(image.repository)
        done: RefreshResult | None = None
        error: RegistryError | None = None
        try:
            done = await refresh(
                self._namespaces, image.repository, image.reference, platforms, referrers, sparing=True
            )
        except RegistryError as failed:
            error = failed
        # If upstream failed, at least the known referrers must be stored.
        found = await run_in_thread(self._readiness.judge, image, platforms, referrers and error is not None)
        return _row(found, done, error, platforms)


def _row(
    found: ReadyRow, done: RefreshResult | None, error: RegistryError | None, platforms: Sequence[str]
) -> WarmRow:
    # Of several platforms those that it has: to fetch it again would bring no more.
    stored = found.state == "complete" or (
        found.state == "partial" and not found.missing and len(found.lacking) < len(platforms)
    )
    complete = stored and not isinstance(error, Unsupported)
    reason, code = (None, None) if error is None else (str(error) or error.code, error.code)
    if error is None and not complete:
        reason, code = incomplete(found), "INCOMPLETE"
    return WarmRow(
        asked=found.asked,
        repository=found.repository,
        reference=found.reference,
        digest=found.digest,
        here=complete,
        manifests=done.manifests if done else 0,
        referrers=done.referrers if done else 0,
        blobs=done.blobs if done else 0,
        fetched=done.fetched if done else 0,
        bytes=done.bytes if done else 0,
        lacking=found.lacking,
        error=reason,
        code=code,
    )


def incomplete(found: ReadyRow) -> str:
    """What is missing of an image, in a few words."""
    causes = [f"there is no image for {each}" for each in found.lacking]
    if found.missing:
        causes.append(f"{len(found.missing)} of its parts were not stored, or evicted again")
    return ", ".join(causes) or "it is not stored"

"""Records for the usage statistics and for webhooks that a tag of a cache has moved."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from proxy.telemetry.usage_recorder import UsageRecorder
from proxy.webhooks.event import about_tag
from storage.oci import Digest, Tag
from storage.records import Batch

if TYPE_CHECKING:  # only a server with webhooks imports it
    from proxy.webhooks.outbox import Outbox


class TagMoveRecorder:
    """A TagListener for a recorder of usage and for webhooks, as far as there are any.

    at_once: what a tag led to before is recorded at once, since digests are judged by that
    """

    def __init__(
        self,
        recorder: UsageRecorder | None,
        outbox: Outbox | None,
        at_once: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._recorder = recorder
        self._outbox = outbox
        self._at_once = at_once
        self._clock = clock

    def record(self, batch: Batch, repository: str, tag: Tag, old: Digest, new: Digest) -> None:
        if self._outbox is not None:
            self._outbox.record(batch, [about_tag("move", self._clock(), repository, tag, old, new)])

    async def moved(self, repository: str, tag: Tag, old: Digest, new: Digest) -> None:
        if self._recorder is not None:
            self._recorder.moved(repository, tag, old, new)
            if self._at_once:
                await self._recorder.flush()
        if self._outbox is not None:
            await self._outbox.flush()

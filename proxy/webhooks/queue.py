"""The queues of events on disk: one for each webhook, in the order in which the events happened.

    event <webhook> <number>    an event, as JSON
    number                      the last number that was used
    pending <webhook>           the number of events in the queue
    webhook <webhook>           the result of the deliveries: DeliveryState, as JSON

The transaction that adds an event also takes its number, so no event ever appears before one that was read
already, whichever process adds it.  Numbers are at least the time in µs, so that they still increase if the
last one is lost with a damaged database.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import msgspec

from proxy.webhooks.event import Event, decode, encode
from storage.keys import EVENT, NUMBER, PENDING, WEBHOOK
from storage.records import BATCH, Batch, Records

_DIGITS = 20


class DeliveryState(msgspec.Struct, frozen=True, omit_defaults=True):
    """The result of a webhook's deliveries so far.  Times are in seconds since the epoch.

    failing_since: since when deliveries fail; None if the last one succeeded
    failed_at, error: time and cause of the last failure
    """

    delivered_at: float | None = None
    failing_since: float | None = None
    failed_at: float | None = None
    error: str | None = None


class QueuedEvent(msgspec.Struct, frozen=True):
    """An event and its key in the queue; `event` is None if the record cannot be decoded."""

    key: str
    event: Event | None


class Queue:
    """The queues of all webhooks.

    Every method but close() blocks, so it is called in a thread, and raises StorageFailed.
    """

    def __init__(self, records: Records, clock: Callable[[], float] = time.time) -> None:
        self._records = records
        self._clock = clock

    def put(self, events: Sequence[tuple[Event, Sequence[str]]], limit: int) -> Counter[str]:
        """Add each event to the queues of its webhooks, and return how many were added to which queue.

        Pulls are left out where `limit` events are pending already.
        """
        encoded = [(event, names, encode(event)) for event, names in events]

        def work(batch: Batch) -> Counter[str]:
            number = max(_number(batch, NUMBER.key()), int(self._clock() * 1_000_000))
            pending: Counter[str] = Counter()
            queued: Counter[str] = Counter()
            for event, names, record in encoded:
                for name in names:
                    if name not in pending:
                        pending[name] = _number(batch, PENDING.key(name))
                    if event.action == "pull" and pending[name] >= limit:
                        continue
                    number += 1
                    batch.put(EVENT.key(name, f"{number:0{_DIGITS}}"), record)
                    pending[name] += 1
                    queued[name] += 1
            for name, count in pending.items():
                batch.put(PENDING.key(name), b"%d" % count)
            batch.put(NUMBER.key(), b"%d" % number)
            return queued

        return self._records.transaction(work)

    def read(self, webhook: str, after: str, limit: int) -> list[QueuedEvent]:
        """Return the first `limit` events, or those after the key `after` unless that is empty."""
        prefix = EVENT.prefix(webhook)
        found = self._records.scan(prefix, after.removeprefix(prefix))
        return [QueuedEvent(key, decode(record)) for key, record in islice(found, limit)]

    def remove(self, webhook: str, keys: Iterable[str], state: DeliveryState | None = None) -> None:
        """Remove the events of `keys`, and record `state` if it is given."""

        def work(batch: Batch) -> None:
            removed = sum(batch.delete(key) for key in keys)
            batch.put(PENDING.key(webhook), b"%d" % max(0, _number(batch, PENDING.key(webhook)) - removed))
            if state is not None:
                batch.put(WEBHOOK.key(webhook), msgspec.json.encode(state))

        self._records.transaction(work)

    def pending(self, webhook: str) -> int:
        return _number(self._records, PENDING.key(webhook))

    def oldest(self, webhook: str) -> float | None:
        """Return the time of the first pending event."""
        return next((each.event.at for each in self.read(webhook, "", 1) if each.event), None)

    def state(self, webhook: str) -> DeliveryState:
        try:
            return msgspec.json.decode(self._records.get(WEBHOOK.key(webhook)) or b"{}", type=DeliveryState)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return DeliveryState()

    def settle(self, webhooks: Iterable[str]) -> dict[str, int]:
        """Count the events of `webhooks` again, and drop those of any other webhook.

        Returns the number of dropped events by the name of the webhook.
        """
        names = set(webhooks)
        dropped: dict[str, int] = {}
        for name in self._known() - names:
            dropped[name] = self._drop(name)
        for name in names:
            self._records.transaction(lambda batch, name=name: self._count(batch, name))  # type: ignore[misc]
        return {name: count for name, count in dropped.items() if count}

    def _known(self) -> set[str]:
        return {
            kind.parse(key)[0] for kind in (PENDING, WEBHOOK) for key, _ in self._records.scan(kind.prefix())
        }

    def _drop(self, webhook: str) -> int:
        count = 0
        while events := self.read(webhook, "", BATCH):
            self.remove(webhook, [each.key for each in events])
            count += len(events)
        for kind in (PENDING, WEBHOOK):
            self._records.delete(kind.key(webhook))
        return count

    def _count(self, batch: Batch, webhook: str) -> None:
        batch.put(PENDING.key(webhook), b"%d" % batch.count(EVENT.prefix(webhook)))

    def close(self) -> None:
        self._records.close()


def _number(records: Records | Batch, key: str) -> int:
    record = records.get(key) or b"0"
    return int(record) if record.isdigit() else 0

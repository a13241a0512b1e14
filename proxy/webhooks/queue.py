"""What webhooks are still to be told of, on disk: one queue for each, in the order in which it happened.

    event <webhook> <number>    the event, as JSON
    number                      the last one that was given
    pending <webhook>           how many events there are of it
    webhook <webhook>           how its deliveries went: DeliveryState, as JSON

A number is given in the transaction that puts the event there: so no event ever comes up behind one that was
read already, whichever process put it.  Numbers begin with the time, in µs, so that they go on increasing
should the last one be lost with a damaged database.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import msgspec

from proxy.webhooks.event import Event, decode, encode
from storage.disk.records import Batch, Records
from storage.keys import EVENT, NUMBER, PENDING, WEBHOOK

_DIGITS = 20


class DeliveryState(msgspec.Struct, frozen=True, omit_defaults=True):
    """Times in seconds since the epoch; None where there is none.

    While deliveries fail, `failing_since` tells since when.  `error` is what the last one that failed, at
    `failed_at`, has failed with.
    """

    delivered_at: float | None = None
    failing_since: float | None = None
    failed_at: float | None = None
    error: str | None = None


class QueuedEvent(msgspec.Struct, frozen=True):
    """`key` is what it has in the queue; `event` None where that cannot be read."""

    key: str
    event: Event | None


class Queue:
    """Every method raises StorageFailed, and is to be called in a thread; close() apart."""

    def __init__(self, records: Records, clock: Callable[[], float] = time.time) -> None:
        self._records = records
        self._clock = clock

    def put(self, events: Sequence[tuple[Event, Sequence[str]]], limit: int) -> Counter[str]:
        """Each into the queues of the webhooks that are named with it; how many came into which.

        What was pulled does not where `limit` events are pending already.
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
        """The first of those after the key `after`; of all, where that is empty."""
        prefix = EVENT.prefix(webhook)
        found = self._records.scan(prefix, after.removeprefix(prefix))
        return [QueuedEvent(key, decode(record)) for key, record in islice(found, limit)]

    def remove(self, webhook: str, keys: Iterable[str], state: DeliveryState | None = None) -> None:
        """What it was told of, or never will be; and how deliveries go, where that has changed."""

        def work(batch: Batch) -> None:
            gone = sum(batch.delete(key) for key in keys)
            batch.put(PENDING.key(webhook), b"%d" % max(0, _number(batch, PENDING.key(webhook)) - gone))
            if state is not None:
                batch.put(WEBHOOK.key(webhook), msgspec.json.encode(state))

        self._records.transaction(work)

    def pending(self, webhook: str) -> int:
        return _number(self._records, PENDING.key(webhook))

    def oldest(self, webhook: str) -> float | None:
        """When the first event that it has not been told of happened."""
        return next((each.event.at for each in self.read(webhook, "", 1) if each.event), None)

    def state(self, webhook: str) -> DeliveryState:
        try:
            return msgspec.json.decode(self._records.get(WEBHOOK.key(webhook)) or b"{}", type=DeliveryState)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return DeliveryState()

    def settle(self, webhooks: Iterable[str]) -> dict[str, int]:
        """Count anew, and drop what is of no webhook of these: how many events, by its name."""
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
        while events := self.read(webhook, "", 500):
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

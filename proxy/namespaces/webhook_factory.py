"""What a configuration with webhooks has in each process, made of classes that no other loads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from proxy.config.schema import Config
from proxy.telemetry.metrics import Metrics
from storage.disk.health import DiskHealth
from storage.disk.records import SQLiteRecords
from storage.store import Store

if TYPE_CHECKING:
    from proxy.webhooks.outbox import Outbox
    from proxy.webhooks.publisher import Publisher
    from proxy.webhooks.queue import Queue


def queue_and_publisher(
    config: Config,
    disk: DiskHealth,
    clock: Callable[[], float],
    metrics: Metrics,
    wake: Callable[[], None],
) -> tuple[Queue, Publisher]:
    """`disk` is that of the queue's directory."""
    from proxy.webhooks.publisher import Publisher
    from proxy.webhooks.queue import Queue

    queue = Queue(SQLiteRecords(config.disk.path / "events" / "records", clock, disk, durable=True), clock)
    return queue, Publisher(queue, config.webhooks, metrics, clock, wake)


def outboxes_of(
    stores: Iterable[Store | None], publisher: Publisher | None, clock: Callable[[], float]
) -> list[Outbox | None]:
    """One for each store, if there is a publisher."""
    if publisher is None:
        return [None for _ in stores]
    from proxy.webhooks.outbox import Outbox

    return [None if store is None else Outbox(store, publisher, clock) for store in stores]

"""What happens gets into the queues: before a push is answered, and behind a pull."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import LogCapture

from proxy.config.values import Secret, parse_pattern
from proxy.config.webhooks import WebhookConfig
from proxy.telemetry.metrics import Metrics
from proxy.webhooks import publisher as module
from proxy.webhooks.event import Event, EventAction, about_tag
from proxy.webhooks.publisher import Publisher
from proxy.webhooks.queue import Queue
from storage.disk.records import SQLiteRecords
from storage.errors import StorageFailed
from storage.oci import Digest, Tag
from tests.conftest import Clock

OLD, NEW = Digest.of(b"old"), Digest.of(b"new")


def webhook(name: str = "a", **keys: Any) -> WebhookConfig:
    for key in ("match", "media_types"):
        keys[key] = tuple(map(parse_pattern, keys.get(key, ())))
    return WebhookConfig(name=name, url=Secret("http://localhost/"), **keys)


def happening(number: int = 0, action: EventAction = "push", **keys: Any) -> Event:
    keys = {"kind": "manifest", "repository": "local/a", **keys}
    return Event(id=str(number), at=0.0, action=action, **keys)


class Disk(Queue):
    """Writes when the test lets it, and fails when it says so."""

    def __init__(self, records: SQLiteRecords, clock: Clock) -> None:
        super().__init__(records, clock)
        self.gate = threading.Event()
        self.gate.set()
        self.began = threading.Semaphore(0)
        self.full = False
        self.transactions: list[int] = []

    def put(self, happenings: Any, limit: int) -> Any:
        self.began.release()
        assert self.gate.wait(20)
        if self.full:
            raise StorageFailed("No space left on device")
        self.transactions.append(len(happenings))
        return super().put(happenings, limit)

    def ids(self, webhook: str = "a") -> list[str]:
        return [each.event.id for each in self.read(webhook, "", 100_000) if each.event]


@pytest.fixture
async def disk(tmp_path: Path, clock: Clock) -> AsyncIterator[Disk]:
    disk = Disk(SQLiteRecords(tmp_path / "records", clock), clock)
    yield disk
    disk.close()


def counted(metrics: Metrics, result: str, name: str = "a") -> float:
    return float(metrics.webhook_events.labels(name, result)._value.get())


async def test_what_is_told_is_on_the_disk_and_somebody_is_woken(disk: Disk) -> None:
    woken: list[int] = []
    metrics = Metrics()
    publisher = Publisher(disk, [webhook()], metrics, wake=lambda: woken.append(disk.pending("a")))
    await publisher.publish(happening(1))
    assert disk.ids() == ["1"]
    assert woken == [1]
    assert counted(metrics, "queued") == 1
    await publisher.close()


async def test_who_tells_waits_for_the_disk_and_all_who_wait_share_a_transaction(disk: Disk) -> None:
    publisher = Publisher(disk, [webhook()], Metrics())
    disk.gate.clear()
    first = asyncio.create_task(publisher.publish(happening(0)))
    await asyncio.to_thread(disk.began.acquire)
    rest = [asyncio.create_task(publisher.publish(happening(number))) for number in range(1, 50)]
    await asyncio.sleep(0)
    assert not first.done()
    disk.gate.set()
    await asyncio.gather(first, *rest)
    assert disk.transactions == [1, 49]
    assert disk.ids() == [str(number) for number in range(50)]
    await publisher.close()


async def test_what_nobody_wants_is_not_waited_for(disk: Disk) -> None:
    publisher = Publisher(disk, [webhook(actions=("delete",)), webhook("b", match=["other/*"])], Metrics())
    disk.gate.clear()
    await publisher.publish(happening())
    assert not publisher.pulls
    await publisher.close()
    assert disk.transactions == []


async def test_a_pull_is_written_later_by_itself(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LATER", 0.0)
    written = asyncio.Event()
    publisher = Publisher(disk, [webhook(actions=("pull",))], Metrics(), wake=written.set)
    assert publisher.pulls
    publisher.publish_later(happening(1, "pull"))
    assert disk.transactions == []
    await written.wait()
    assert disk.ids() == ["1"]
    await publisher.close()


async def test_pulls_are_gathered_and_keep_their_order_with_pushes(disk: Disk) -> None:
    publisher = Publisher(disk, [webhook(actions=("pull", "push"))], Metrics())
    for number in range(5):
        publisher.publish_later(happening(number, "pull"))
    await publisher.publish(happening(5))
    publisher.publish_later(happening(6, "pull"))
    await publisher.close()
    assert disk.ids() == [str(number) for number in range(7)]
    assert disk.transactions == [6, 1]


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({}, ["push", "blob", "move", "delete"]),
        ({"actions": ("push",)}, ["push", "blob"]),
        ({"match": ["local/*"]}, ["push", "blob", "delete"]),
        ({"match": ["re:docker\\.io/.*", "ghcr.io/*"]}, ["move"]),
        # What has no media type is kept away by none.
        ({"media_types": ["application/vnd.oci.image.*"]}, ["push", "move", "delete"]),
    ],
)
async def test_filters(disk: Disk, keys: dict[str, Any], told: list[str]) -> None:
    publisher = Publisher(disk, [webhook(**keys)], Metrics())
    kind = "application/vnd.oci.image.manifest.v1+json"
    names = ["push", "blob", "move", "delete"]
    await publisher.publish(happening(0, media_type=kind))
    await publisher.publish(happening(1, media_type="application/octet-stream"))
    await publisher.publish(about_tag("move", 7.0, "docker.io/library/alpine", Tag("3"), OLD, NEW))
    await publisher.publish(happening(3, "delete"))
    found = [each.event for each in disk.read("a", "", 9)]
    assert [each.action if each and each.id != "1" else "blob" for each in found] == told
    assert set(told) <= set(names)
    await publisher.close()


async def test_a_move_says_from_where_to_where(disk: Disk, clock: Clock) -> None:
    publisher = Publisher(disk, [webhook()], Metrics())
    await publisher.publish(about_tag("move", clock(), "docker.io/library/alpine", Tag("3"), OLD, NEW))
    (event,) = disk.read("a", "", 9)
    found = event.event
    assert found is not None
    assert (found.action, found.kind, found.repository) == ("move", "tag", "docker.io/library/alpine")
    assert (found.tag, found.former, found.digest, found.at) == ("3", OLD, NEW, clock())
    await publisher.close()


@pytest.mark.errors("webhook.lost")
async def test_a_full_disk_fails_nobody_and_is_told_once(disk: Disk, events: LogCapture) -> None:
    publisher = Publisher(disk, [webhook()], metrics := Metrics())
    disk.full = True
    await publisher.publish(happening(1))
    await publisher.publish(happening(2))
    disk.full = False
    await publisher.publish(happening(3))
    assert disk.ids() == ["3"]
    (lost,) = [each for each in events.entries if each["event"] == "webhook.lost"]
    assert (lost["webhook"], lost["events"], lost["cause"]) == ("a", 1, "No space left on device")
    assert (counted(metrics, "lost"), counted(metrics, "queued")) == (2, 1)
    disk.full = True
    await publisher.publish(happening(4))
    assert len([each for each in events.entries if each["event"] == "webhook.lost"]) == 2
    await publisher.close()


@pytest.mark.errors("webhook.lost")
async def test_memory_is_bounded_when_the_disk_is_slow(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GATHERED", 10)
    publisher = Publisher(disk, [webhook(actions=("pull",))], metrics := Metrics())
    for number in range(25):
        publisher.publish_later(happening(number, "pull"))
    await publisher.close()
    assert disk.ids() == [str(number) for number in range(10)]
    assert counted(metrics, "lost") == 15


@pytest.mark.errors("webhook.lost")
async def test_too_many_pending_lose_pulls_only(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PENDING", 2)
    publisher = Publisher(disk, [webhook(actions=("pull", "push"))], metrics := Metrics())
    for number in range(4):
        publisher.publish_later(happening(number, "pull"))
    await publisher.publish(happening(4))
    assert disk.ids() == ["0", "1", "4"]
    assert counted(metrics, "lost") == 2
    await publisher.close()


async def test_who_leaves_while_he_tells_takes_nothing_along(disk: Disk) -> None:
    publisher = Publisher(disk, [webhook()], Metrics())
    disk.gate.clear()
    leaving = asyncio.create_task(publisher.publish(happening(1)))
    await asyncio.to_thread(disk.began.acquire)
    staying = asyncio.create_task(publisher.publish(happening(2)))
    await asyncio.sleep(0)
    leaving.cancel()
    disk.gate.set()
    await staying
    assert disk.ids() == ["1", "2"]
    await publisher.close()

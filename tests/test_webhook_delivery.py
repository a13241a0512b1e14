"""To a receiver on a real socket: in order, until it has taken them, whatever becomes of it meanwhile."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trustme
from structlog.testing import LogCapture

from proxy.config.errors import StartError
from proxy.config.values import Secret
from proxy.config.webhooks import WebhookConfig
from proxy.telemetry.metrics import Metrics
from proxy.webhooks import delivery as module
from proxy.webhooks.delivery import Dispatcher
from proxy.webhooks.event import Event
from proxy.webhooks.queue import Queue
from storage.disk.records import SQLiteRecords
from storage.errors import StorageFailed
from tests.conftest import Clock
from tests.events import Ear
from tests.receiver import PATIENCE, Receiver, receiver  # noqa: F401  a fixture

HOUR = 3600.0


class Watched(Queue):
    """Tells the loop when something was removed."""

    def __init__(self, records: SQLiteRecords, clock: Clock) -> None:
        super().__init__(records, clock)
        self.loop = asyncio.get_running_loop()
        self.removed = asyncio.Event()

    def remove(self, *arguments: Any) -> None:
        super().remove(*arguments)
        self.loop.call_soon_threadsafe(self.removed.set)


class Rig:
    """Deliveries to `receiver`, on which time passes only by waiting for the next attempt."""

    def __init__(self, directory: Path, clock: Clock, receiver: Receiver) -> None:  # noqa: F811
        self.directory = directory
        self.clock = clock
        self.receiver = receiver
        self.metrics = Metrics()
        self.queue = Watched(SQLiteRecords(directory / "records", clock), clock)
        self.waits: list[float] = []
        self.meanwhile: Callable[[], Awaitable[object]] | None = None
        self.deliveries: Dispatcher | None = None
        self._running: asyncio.Task[None] | None = None

    def webhook(self, name: str = "a", **keys: Any) -> WebhookConfig:
        return WebhookConfig(name=name, url=Secret(keys.pop("url", self.receiver.url)), **keys)

    def start(self, *webhooks: WebhookConfig) -> None:
        self.deliveries = Dispatcher(
            webhooks or [self.webhook()], self.queue, 5000, self.metrics, self.clock, wait=self._wait
        )
        self._running = asyncio.create_task(self.deliveries.run())

    async def _wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.clock.advance(seconds)
        if self.meanwhile is not None:
            await self.meanwhile()

    async def stop(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
            self._running = None

    def put(self, *numbers: int, webhooks: tuple[str, ...] = ("a",), **keys: Any) -> None:
        """Happened just now."""
        given = {"action": "push", "kind": "manifest", "repository": "local/a", **keys}
        happenings = [Event(id=str(each), at=self.clock(), **given) for each in numbers]
        self.queue.put([(each, webhooks) for each in happenings], 1000)
        if self.deliveries is not None:
            self.deliveries.wake()

    async def took(self, number: int) -> list[str]:
        return [each["id"] for each in await self.receiver.took(number)]

    async def empty(self, webhook: str = "a") -> None:
        """Wait until nothing is pending."""
        async with asyncio.timeout(PATIENCE):
            while self.queue.pending(webhook):
                self.queue.removed.clear()
                if self.queue.pending(webhook):
                    await self.queue.removed.wait()

    def counted(self, result: str, name: str = "a") -> float:
        return float(self.metrics.webhook_events.labels(name, result)._value.get())


@pytest.fixture
async def rig(tmp_path: Path, clock: Clock, receiver: Receiver) -> AsyncIterator[Rig]:  # noqa: F811
    rig = Rig(tmp_path, clock, receiver)
    yield rig
    await rig.stop()
    rig.queue.close()


async def test_what_is_there_and_what_comes_is_delivered_in_order_and_goes(rig: Rig) -> None:
    rig.put(*range(5))
    rig.start()
    assert await rig.took(5) == [str(number) for number in range(5)]
    rig.put(5, 6)
    rig.put(7)
    assert await rig.took(8) == [str(number) for number in range(8)]
    await rig.empty()
    await rig.stop()
    assert rig.queue.pending("a") == 0
    assert rig.queue.read("a", "", 9) == []
    assert rig.receiver.most_at_once == 1
    assert rig.counted("delivered") == 8
    state = rig.queue.state("a")
    assert (state.delivered_at, state.failing_since, state.error) == (rig.clock(), None, None)


async def test_more_than_are_read_at_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 3)
    rig.put(*range(20))
    rig.start()
    assert await rig.took(20) == [str(number) for number in range(20)]
    await rig.empty()
    await rig.stop()
    assert rig.queue.pending("a") == 0


async def test_what_a_request_has_on_it(rig: Rig) -> None:
    rig.put(1)
    rig.start(rig.webhook(headers={"Authorization": Secret("Bearer t")}, secret=Secret("key")))
    await rig.took(1)
    (notice,) = rig.receiver.notices
    assert notice.path == "/hook?token=hidden"
    assert notice.headers["Content-Type"] == "application/vnd.docker.distribution.events.v2+json"
    assert notice.headers["Authorization"] == "Bearer t"
    assert notice.headers["User-Agent"].startswith("entrepot/")
    signature = hmac.new(b"key", notice.body, hashlib.sha256).hexdigest()
    assert notice.headers["X-Hub-Signature-256"] == f"sha256={signature}"
    source = notice.event["source"]
    assert source["addr"].endswith(":5000")
    assert source["instanceID"]


async def test_without_a_secret_nothing_is_signed(rig: Rig) -> None:
    rig.put(1)
    rig.start(rig.webhook(format="cloudevents"))
    (event,) = await rig.receiver.took(1)
    assert event["type"] == "entrepot.manifest.pushed"
    assert "X-Hub-Signature-256" not in rig.receiver.notices[0].headers


async def test_a_receiver_that_is_down_for_an_hour_loses_nothing(rig: Rig, events: LogCapture) -> None:
    begun = rig.clock()
    await rig.receiver.stop()
    came = list(range(5))

    async def meanwhile() -> None:
        if rig.clock() - begun >= HOUR:
            await rig.receiver.start()
        elif len(came) < 30:
            rig.put(len(came))  # things go on happening
            came.append(len(came))

    rig.meanwhile = meanwhile
    rig.put(*came)
    rig.start()
    assert await rig.took(30) == [str(number) for number in range(30)]
    await rig.empty()
    await rig.stop()
    assert rig.queue.pending("a") == 0
    told = [each for each in events.entries if each["event"].startswith("webhook.")]
    assert [each["event"] for each in told] == ["webhook.failing", "webhook.recovered"]
    assert "nothing listens there (connection refused)" in told[0]["error"]
    assert told[1]["seconds"] >= HOUR
    assert "hidden" not in str(told)


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 408, 410, 422, 429, 500, 502, 503])
async def test_an_hour_of_any_refusal_loses_nothing(rig: Rig, status: int) -> None:
    begun = rig.clock()
    rig.receiver.answer = status, {"Location": "http://localhost:1/elsewhere"}

    async def meanwhile() -> None:
        if rig.clock() - begun >= HOUR:
            rig.receiver.answer = 204

    rig.meanwhile = meanwhile
    rig.put(1, 2)
    rig.start()
    assert await rig.took(2) == ["1", "2"]
    await rig.stop()
    state = rig.queue.state("a")
    assert (state.error or "").startswith(f"answered {status}")
    assert state.failing_since is None
    assert state.failed_at is not None
    assert rig.counted("failed") == len(rig.waits)


async def test_attempts_come_less_and_less_often_up_to_a_limit(rig: Rig) -> None:
    rig.receiver.answers = [500] * 9
    rig.put(1)
    rig.start(rig.webhook(backoff=1.0, backoff_limit=60.0))
    await rig.took(1)
    await rig.stop()
    assert len(rig.waits) == 9
    for wait, most in zip(rig.waits, [1, 2, 4, 8, 16, 32, 60, 60, 60], strict=True):
        assert most / 2 <= wait <= most


@pytest.mark.parametrize(
    ("told", "least", "most"),
    [("120", 120, 120), ("100000", 3600, 3600), ("0", 0.5, 1), ("soon", 0.5, 1)],
)
async def test_retry_after_is_kept_to(rig: Rig, told: str, least: float, most: float) -> None:
    rig.receiver.answers = [(503, {"Retry-After": told})]
    rig.put(1)
    rig.start()
    await rig.took(1)
    (wait,) = rig.waits
    assert least <= wait <= most


@pytest.mark.errors("webhook.dropped")
async def test_what_is_refused_for_what_it_is_stands_not_in_the_way_for_ever(
    rig: Rig, events: LogCapture
) -> None:
    rig.receiver.answer = 422

    async def meanwhile() -> None:
        if rig.counted("dropped") == 1:
            rig.receiver.answer = 200

    rig.meanwhile = meanwhile
    begun = rig.clock()
    rig.put(1, 2)
    rig.start()
    assert await rig.took(1) == ["2"]
    await rig.empty()
    await rig.stop()
    assert 2 * HOUR <= rig.clock() - begun < 3 * HOUR
    (dropped,) = [each for each in events.entries if each["event"] == "webhook.dropped"]
    assert (dropped["webhook"], dropped["events"]) == ("a", 1)
    assert dropped["cause"] == "rejected for two hours: answered 422"
    assert rig.queue.pending("a") == 0


@pytest.mark.clients
async def test_a_server_error_in_between_is_no_refusal_of_the_event(rig: Rig) -> None:
    rig.receiver.answers = [400, 503] * 300
    rig.put(1)
    rig.start()
    assert await rig.took(1) == ["1"]
    assert sum(rig.waits) > 4 * HOUR


@pytest.mark.errors("webhook.dropped")
async def test_events_are_kept_for_so_long_and_no_longer(rig: Rig, events: LogCapture) -> None:
    rig.receiver.answer = 500
    rig.put(*range(250))
    rig.clock.advance(5 * HOUR)
    rig.put(250)

    async def meanwhile() -> None:
        if rig.counted("dropped"):
            rig.receiver.answer = 200

    rig.meanwhile = meanwhile
    rig.start(rig.webhook(keep=6 * HOUR))
    assert await rig.took(1) == ["250"]
    await rig.empty()
    await rig.stop()
    dropped = [each["events"] for each in events.entries if each["event"] == "webhook.dropped"]
    assert sum(dropped) == rig.counted("dropped") == 250
    assert len(dropped) <= 4


@pytest.mark.errors("webhook.dropped")
async def test_what_cannot_be_read_is_dropped(rig: Rig) -> None:
    rig.put(1, 2)
    (first, _) = rig.queue.read("a", "", 9)
    rig.queue._records.put(first.key, b"of another version")
    rig.start()
    assert await rig.took(1) == ["2"]
    await rig.empty()
    await rig.stop()
    assert (rig.queue.pending("a"), rig.counted("dropped")) == (0, 1)


async def test_a_silent_receiver_is_given_up_in_time(rig: Rig) -> None:
    rig.receiver.gate = asyncio.Event()

    async def meanwhile() -> None:
        assert rig.receiver.gate is not None
        rig.receiver.gate.set()

    rig.meanwhile = meanwhile
    rig.put(1)
    rig.start(rig.webhook(timeout=0.05))
    assert await rig.took(2) == ["1", "1"]  # the first was not answered: it comes once more
    await rig.stop()
    assert rig.queue.state("a").error == "no answer within 0.05 s"


async def test_a_slow_receiver_holds_up_nobody_else(rig: Rig) -> None:
    other = Receiver()
    await other.start()
    other.gate = asyncio.Event()
    try:
        rig.put(*range(10), webhooks=("a", "slow"))
        rig.start(rig.webhook("slow", url=other.url), rig.webhook("a"))
        await other.asked_for(1)
        assert await rig.took(10) == [str(number) for number in range(10)]
        assert other.asked == 1
        other.gate.set()
        assert len(await other.took(10)) == 10
    finally:
        await other.stop()


async def test_many_webhooks(rig: Rig) -> None:
    names = tuple(f"hook-{number}" for number in range(40))
    rig.put(1, 2, webhooks=names)
    rig.start(*(rig.webhook(name, url=f"{rig.receiver.url}&{name}") for name in names))
    await rig.took(80)
    by_path: dict[str, list[str]] = {}
    for notice in rig.receiver.notices:
        by_path.setdefault(notice.path, []).append(notice.event["id"])
    assert list(by_path.values()) == [["1", "2"]] * 40


async def test_a_redirect_is_not_followed(rig: Rig) -> None:
    other = Receiver()
    await other.start()
    try:
        rig.receiver.answers = [(307, {"Location": other.url})]
        rig.put(1)
        rig.start(rig.webhook(headers={"Authorization": Secret("Bearer t")}))
        assert await rig.took(1) == ["1"]
        assert other.asked == 0
        assert rig.queue.state("a").error == "answered 307: redirects are not followed"
    finally:
        await other.stop()


async def test_who_is_stopped_in_mid_delivery_delivers_it_another_time(rig: Rig) -> None:
    rig.receiver.gate = asyncio.Event()
    rig.put(1, 2)
    rig.start()
    await rig.receiver.asked_for(1)
    await rig.stop()
    rig.receiver.gate = None
    assert rig.queue.pending("a") == 2
    rig.receiver.notices.clear()
    rig.start()
    assert await rig.took(2) == ["1", "2"]


async def test_a_disk_that_takes_no_removal_makes_nothing_come_twice(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise StorageFailed("read-only")

    rig.put(1, 2)
    with monkeypatch.context() as broken:
        broken.setattr(rig.queue, "remove", fail)
        rig.start()
        await rig.took(2)
        rig.put(3)
        await rig.took(3)
    rig.put(4)
    assert await rig.took(4) == ["1", "2", "3", "4"]
    await rig.empty()
    await rig.stop()
    assert rig.queue.pending("a") == 0


async def test_a_disk_that_cannot_be_read_is_tried_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    read, failed = rig.queue.read, iter([True])

    def fail(*arguments: Any) -> Any:
        if next(failed, False):
            raise StorageFailed("input/output error")
        return read(*arguments)

    monkeypatch.setattr(rig.queue, "read", fail)
    rig.put(1)
    rig.start()
    assert await rig.took(1) == ["1"]
    assert rig.waits == [module.AGAIN]


async def test_what_is_of_no_webhook_any_more_is_dropped_at_the_start(rig: Rig) -> None:
    rig.put(1, 2, webhooks=("a", "gone"))
    ear = Ear()
    rig.start()
    event = await ear.heard("webhook.dropped")
    assert (event["webhook"], event["events"], event["cause"]) == ("gone", 2, "no longer configured")
    assert await rig.took(2) == ["1", "2"]


async def test_pending_is_shown_while_it_fails(rig: Rig) -> None:
    rig.receiver.answer = 500
    shown: list[float] = []

    async def meanwhile() -> None:
        shown.append(rig.metrics.webhook_pending.labels("a")._value.get())
        rig.put(len(shown) + 1)
        if len(shown) == 3:
            rig.receiver.answer = 200

    rig.meanwhile = meanwhile
    rig.put(1)
    rig.start()
    await rig.took(4)
    assert shown == [1, 2, 3]


# TLS


@pytest.fixture
async def secure(rig: Rig, tmp_path: Path) -> Path:
    """The receiver under a certificate; the authority's file."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    await rig.receiver.stop()
    await rig.receiver.start(context)
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return path


async def test_a_receiver_with_an_authority_of_its_own(rig: Rig, secure: Path) -> None:
    rig.put(1)
    rig.start(rig.webhook(ca_file=secure))
    assert await rig.took(1) == ["1"]


async def test_a_certificate_that_nobody_vouches_for_is_not_spoken_to(rig: Rig, secure: Path) -> None:
    ear = Ear()
    rig.put(1)
    tried = asyncio.Event()

    async def meanwhile() -> None:
        tried.set()
        await asyncio.Event().wait()

    rig.meanwhile = meanwhile
    rig.start()
    event = await ear.heard("webhook.failing")
    assert "its certificate is from an authority that is not trusted here" in event["error"]
    await tried.wait()
    assert rig.receiver.asked == 0
    assert rig.queue.pending("a") == 1


async def test_a_file_that_holds_no_authority_is_named(rig: Rig, tmp_path: Path) -> None:
    for path in (tmp_path / "missing.pem", tmp_path / "empty.pem"):
        if path.stem == "empty":
            path.touch()
        with pytest.raises(StartError, match=rf"webhooks\[1\]\.ca_file: {path}: "):
            rig.start(rig.webhook(), rig.webhook("b", ca_file=path))

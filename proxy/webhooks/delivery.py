"""Delivers queued events to webhooks: one task for each webhook, one POST for each event, in order.

A webhook with an extension has one call of that for each event in place of the POST.

- A 2xx response means delivered.  A redirect is not followed and counts as a failure: the receiver has not
  taken the event.
- After any other result the delivery is retried until the event is older than `keep`, with increasing delays
  up to a limit, and not before the time in Retry-After.  Later events wait meanwhile.
- An event that the receiver rejects as such, with 400, 413, 415 or 422, is dropped after two hours, so that
  it does not block the queue for days.
- A delivered event is removed afterwards.  If the process is killed in between, the event is delivered again,
  with the same id: delivery is at least once.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import random
import secrets
import ssl
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, nullcontext, suppress
from importlib.metadata import version
from pathlib import Path

import aiohttp
import msgspec
import structlog
from yarl import URL

from proxy.config.errors import StartError
from proxy.config.quantities import seconds_until
from proxy.config.webhooks import WebhookConfig
from proxy.connections.failures import explain, file_fault
from proxy.connections.trust import shared_context
from proxy.extensions.extension import Extension, ExtensionFailed, Extensions
from proxy.telemetry.metrics import Metrics
from proxy.webhooks import wakeup
from proxy.webhooks.event import Event
from proxy.webhooks.formats import EventSource, cloudevent, render
from proxy.webhooks.queue import DeliveryState, Queue, QueuedEvent
from storage.concurrency import run_in_thread
from storage.errors import StorageFailed

log = structlog.get_logger()

AT_ONCE = 100  # events in memory, and in a transaction that removes them
POLL = 60.0  # seconds between reads of a queue without a signal; commands without a server send none
REFUSED = 7200.0  # seconds after which an event that the receiver rejects is dropped
LATEST = 3600.0  # seconds for which Retry-After is obeyed at most
IDLE = (
    4.0  # seconds that an idle connection is kept: less than servers keep it, or they might close it in use
)
AGAIN = 60.0  # seconds between attempts while the disk fails
_OF_THE_EVENT = (400, 413, 415, 422)

Wait = Callable[[float], Awaitable[None]]


class DeliveryFailed(Exception):
    """An event was not delivered.  `status` is 0 without a response, `after` the value of Retry-After."""

    def __init__(self, cause: str, status: int = 0, after: float | None = None) -> None:
        super().__init__(cause)
        self.status = status
        self.after = after


class Dispatcher:
    """Delivers the events of all webhooks, from run() until that is cancelled.

    Other processes send their signals for new events in `run_directory`.  `extensions` has the event sinks.
    Raises StartError if a `ca_file` cannot be used.
    """

    def __init__(
        self,
        webhooks: Sequence[WebhookConfig],
        queue: Queue,
        port: int,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
        run_directory: Path | None = None,
        wait: Wait = asyncio.sleep,
        extensions: Extensions | None = None,
    ) -> None:
        self._queue = queue
        self._run_directory = run_directory
        source = EventSource.of_this_process(port, secrets.token_hex(8))
        self._deliveries = []
        for number, each in enumerate(webhooks):
            try:
                context = shared_context(each.ca_file)
            except OSError as error:
                where = f"webhooks[{number}].ca_file: {each.ca_file}"
                raise StartError(f"{where}: {file_fault(error)}") from error
            sink = None
            if each.extension is not None and extensions is not None:
                sink = extensions.get(each.extension)
            made = Delivery(each, queue, source, context, metrics, clock, wait, sink=sink)
            self._deliveries.append(made)

    def wake(self) -> None:
        for each in self._deliveries:
            each.wake()

    async def run(self) -> None:
        directory = self._run_directory
        with nullcontext() if directory is None else wakeup.listening(directory, self.wake):
            try:
                settled = await run_in_thread(self._queue.settle, [each.name for each in self._deliveries])
                for name, events in settled.items():
                    log.warning("webhook.dropped", webhook=name, events=events, cause="no longer configured")
            except StorageFailed:
                pass  # DiskHealth has logged it; the next start settles
            async with asyncio.TaskGroup() as work:
                for each in self._deliveries:
                    work.create_task(each.run())


class Delivery:
    """The deliveries to one webhook.  `wait` is asyncio.sleep; tests replace it.  `sink` is its extension."""

    def __init__(
        self,
        webhook: WebhookConfig,
        queue: Queue,
        source: EventSource,
        context: ssl.SSLContext,
        metrics: Metrics,
        clock: Callable[[], float],
        wait: Wait,
        jitter: Callable[[], float] = random.random,
        sink: Extension | None = None,
    ) -> None:
        self.name = webhook.name
        self._webhook = webhook
        self._queue = queue
        self._source = source
        self._context = context
        self._events = metrics.webhook_events
        self._pending = metrics.webhook_pending.labels(webhook.name)
        self._clock = clock
        self._wait = wait
        self._jitter = jitter
        self._sink = sink
        self._signal = asyncio.Event()
        self._after = ""  # the key of the last event that was delivered or dropped
        self._state = DeliveryState()
        self._done: list[str] = []  # keys of the events to be removed
        self._removing: asyncio.Task[None] | None = None
        self._dropped: Counter[str] = Counter()  # events whose loss is to be logged, by cause

    def wake(self) -> None:
        self._signal.set()

    async def run(self) -> None:
        async with self._session() as session, AsyncExitStack() as closing:
            closing.push_async_callback(self._removed)
            self._state = await run_in_thread(self._queue.state, self.name)
            while True:
                self._signal.clear()
                try:
                    events = await run_in_thread(self._queue.read, self.name, self._after, AT_ONCE)
                    self._pending.set(await run_in_thread(self._queue.pending, self.name))
                except StorageFailed:  # DiskHealth has logged it
                    await self._wait(AGAIN)
                    continue
                for each in events:
                    await self._deliver(session, each)
                await self._removed()
                if not events:
                    await self._wait_for_signal()

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self._context, limit=1, keepalive_timeout=IDLE),
            timeout=aiohttp.ClientTimeout(total=self._webhook.timeout),
            headers={"User-Agent": f"entrepot/{version('entrepot')}"},
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def _wait_for_signal(self) -> None:
        """Wait for a signal."""
        with suppress(TimeoutError):
            async with asyncio.timeout(POLL):
                await self._signal.wait()

    async def _deliver(self, session: aiohttp.ClientSession, event: QueuedEvent) -> None:
        """Try until the event is delivered or dropped."""
        content_event, attempts, refused_at = event.event, 0, None
        while True:
            now = self._clock()
            if content_event is None:
                return self._drop(event, "cannot be read")
            if now - content_event.at > self._webhook.keep:
                return self._drop(event, "older than its webhook keeps events")
            if refused_at is not None and now - refused_at >= REFUSED:
                return self._drop(event, f"rejected for two hours: {self._state.error}")
            try:
                await self._post(session, content_event)
            except DeliveryFailed as failure:
                of_the_event = failure.status in _OF_THE_EVENT
                refused_at = (now if refused_at is None else refused_at) if of_the_event else None
                await self._failed(failure)
                await self._wait(self._delay(attempts, failure.after or 0.0))
                attempts += 1
            else:
                return self._delivered(event)

    def _delay(self, attempts: int, after: float) -> float:
        webhook = self._webhook
        delay = min(webhook.backoff_limit, webhook.backoff * 2.0 ** min(attempts, 30))
        return max(delay * (1 + self._jitter()) / 2, min(after, LATEST))

    async def _post(self, session: aiohttp.ClientSession, content_event: Event) -> None:
        """Raises DeliveryFailed."""
        if self._sink is not None:
            await self._hand_over(self._sink, content_event)
            return
        webhook = self._webhook
        media_type, body = render(content_event, webhook.format, self._source)
        headers = {**webhook.headers, "Content-Type": media_type}
        if webhook.secret is not None:
            signature = hmac.new(webhook.secret.encode(), body, hashlib.sha256).hexdigest()
            headers["X-Hub-Signature-256"] = f"sha256={signature}"
        url = URL(str(webhook.url), encoded=True)
        try:
            async with session.post(url, data=body, headers=headers, allow_redirects=False) as response:
                status = response.status
                after = seconds_until(response.headers, self._clock)
        except TimeoutError:
            raise DeliveryFailed(f"no answer within {webhook.timeout:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise DeliveryFailed(str(explain(error, url, f"ca_file of the webhook {self.name}"))) from None
        if not 200 <= status < 300:
            hint = ": redirects are not followed" if 300 <= status < 400 else ""
            raise DeliveryFailed(f"answered {status}{hint}", status, after)

    async def _hand_over(self, sink: Extension, content_event: Event) -> None:
        try:
            await sink.call("send", cloudevent(content_event, self._source), gives=type(None))
        except ExtensionFailed as error:
            raise DeliveryFailed(str(error)) from None

    # Results

    def _delivered(self, event: QueuedEvent) -> None:
        now = self._clock()
        if (since := self._state.failing_since) is not None:
            log.info("webhook.recovered", webhook=self.name, seconds=round(now - since, 3))
        self._state = msgspec.structs.replace(self._state, delivered_at=now, failing_since=None)
        self._settle(event, "delivered")

    async def _failed(self, failure: DeliveryFailed) -> None:
        now, since, cause = self._clock(), self._state.failing_since, str(failure)
        self._state = msgspec.structs.replace(
            self._state, failing_since=now if since is None else since, failed_at=now, error=cause
        )
        self._events.labels(self.name, "failed").inc()
        await self._removed()
        with suppress(StorageFailed):
            await run_in_thread(self._queue.remove, self.name, [], self._state)
            self._pending.set(await run_in_thread(self._queue.pending, self.name))
        if since is None:
            log.warning("webhook.failing", webhook=self.name, error=cause)

    def _drop(self, event: QueuedEvent, cause: str) -> None:
        self._dropped[cause] += 1
        self._settle(event, "dropped")

    def _settle(self, event: QueuedEvent, result: str) -> None:
        self._after = event.key
        self._events.labels(self.name, result).inc()
        self._done.append(event.key)
        self._remove_soon()

    def _remove_soon(self) -> None:
        if self._done and self._removing is None:
            self._removing = asyncio.create_task(self._remove())

    async def _remove(self) -> None:
        try:
            while keys := self._done[:AT_ONCE]:
                await run_in_thread(self._queue.remove, self.name, keys, self._state)
                del self._done[: len(keys)]
        except StorageFailed:
            pass  # DiskHealth has logged it; the next removal tries again
        finally:
            self._removing = None

    async def _removed(self) -> None:
        """Remove what was delivered or dropped, if the disk permits, and log what was dropped."""
        self._remove_soon()
        if self._removing is not None:
            await asyncio.wait([self._removing])
        dropped, self._dropped = self._dropped, Counter()
        for cause, events in dropped.items():
            log.error("webhook.dropped", webhook=self.name, events=events, cause=cause)

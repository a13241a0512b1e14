"""Upstreams that are away for a moment: who asks for what is not stored waits.  With real servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest

from proxy.telemetry.exchange import Exchange, current_exchange, needed
from proxy.telemetry.metrics import Metrics
from proxy.upstream import breaker, transport
from proxy.upstream.client import UpstreamRegistry
from proxy.upstream.credentials import Credentials
from proxy.upstream.failing_urls import KEPT
from proxy.upstream.failover import ROUNDS, Failover
from proxy.upstream.requests import UpstreamSettings
from proxy.upstream.transport import RETRIES
from storage.errors import ManifestUnknown, OriginFailed, TooManyRequests
from storage.oci import Digest, Tag
from tests.conftest import Clock, Serve
from tests.outages import OTHER, STALE, TAG, anything, blob_of, pull, warm
from tests.test_completeness import ask
from tests.upstream import Bearer, Fault, Refuse, Reset, RetryAfter, Status, Upstream
from tests.upstream_client import PLAIN

LATEST = Tag("latest")


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts may be back within 3 seconds, and requests are sent again at once."""
    monkeypatch.setattr(transport, "BACKOFF", 1e-9)
    monkeypatch.setattr(transport, "RESTART", 3e9)


class Waits:
    """An origin of upstreams; where it waits for one, the clock advances, and `then` is called."""

    def __init__(self, clock: Clock, upstreams: list[Upstream]) -> None:
        self.waited: list[float] = []
        self.then: list[Callable[[], Awaitable[object]]] = []
        self._clock = clock
        made = [
            UpstreamRegistry("up", UpstreamSettings(each.url, PLAIN), [Credentials()], Metrics(), clock)
            for each in upstreams
        ]
        self.origin = Failover(made, clock, rest=self._rest)

    async def _rest(self, seconds: float) -> None:
        self.waited.append(seconds)
        until = self._clock.now + seconds
        if self.then:
            await self.then.pop(0)()
        self._clock.now = max(self._clock.now, until)


Make = Callable[..., Waits]


@pytest.fixture
async def waits(clock: Clock) -> AsyncIterator[Make]:
    async with AsyncExitStack() as stack:

        def make(*upstreams: Upstream) -> Waits:
            made = Waits(clock, [*upstreams])
            stack.push_async_callback(made.origin.close)
            return made

        yield make


async def nothing() -> None:
    pass


@pytest.mark.parametrize("kind", ["tag", "manifest", "blob", "size"])
@pytest.mark.parametrize("first", [True, False])
async def test_what_is_asked_for_while_it_restarts_is_got(
    waits: Make, upstream: Upstream, kind: str, first: bool
) -> None:
    """Whether or not it was asked before."""
    image, up = upstream.image("a/b", "latest"), waits(upstream)
    if not first:
        assert await up.origin.tags("a/b") == ["latest"]
    await upstream.stop()
    up.then = [nothing, nothing, upstream.start]
    layer = Digest(image.layers[0])
    if kind == "blob":
        await (await up.origin.get_blob("a/b", layer)).close()
    elif kind == "size":
        assert (await up.origin.resolve_blob("a/b", layer)).digest == layer
    else:
        what = LATEST if kind == "tag" else Digest(image.digest)
        assert (await up.origin.get_manifest("a/b", what)).digest == image.digest
    assert up.waited == [0.25] * 3


async def test_but_not_for_long_and_then_nobody_waits(waits: Make, upstream: Upstream) -> None:
    up = waits(upstream)
    await upstream.stop()
    with pytest.raises(OriginFailed, match="cannot be reached"):
        await up.origin.get_manifest("a/b", LATEST)
    assert 3 <= sum(up.waited) < 4
    assert len(up.waited) < ROUNDS
    up.waited.clear()
    with pytest.raises(OriginFailed, match="not due yet"):
        await up.origin.get_manifest("a/b", LATEST)
    assert up.waited == []


@pytest.mark.parametrize("kind", ["tags", "referrers"])
async def test_a_list_of_which_nothing_is_known_is_waited_for(
    waits: Make, upstream: Upstream, kind: str
) -> None:
    image, up = upstream.image("a/b", "latest"), waits(upstream)
    needed.set(True)
    await upstream.stop()
    up.then = [nothing, upstream.start]
    if kind == "tags":
        assert await up.origin.tags("a/b") == ["latest"]
    else:
        assert await up.origin.referrers("a/b", Digest(image.digest)) == []
    assert up.waited == [0.25] * 2


@pytest.mark.parametrize("kind", ["tag", "tags", "referrers"])
async def test_what_may_be_known_is_not_waited_for(waits: Make, upstream: Upstream, kind: str) -> None:
    up = waits(upstream)
    await upstream.stop()
    with pytest.raises(OriginFailed):
        if kind == "tag":
            await up.origin.resolve_manifest("a/b", LATEST)
        elif kind == "tags":
            await up.origin.tags("a/b")
        else:
            await up.origin.referrers("a/b", Digest("sha256:" + 64 * "0"))
    assert up.waited == []


async def test_another_replica_asks_elsewhere(waits: Make, upstream: Upstream) -> None:
    up = waits(upstream)
    await upstream.stop()
    current_exchange.set(Exchange(peer="http://replica.example"))
    with pytest.raises(OriginFailed):
        await up.origin.get_manifest("a/b", LATEST)
    assert up.waited == []


@pytest.mark.parametrize(
    ("fault", "asked"),
    [
        (Refuse(), 1 + RETRIES),
        (Reset(None), 1 + RETRIES),
        (Status(503), 1),
        (Status(502), 1),
        (Status(504), 1),
    ],
    ids=str,
)
async def test_it_answers_nothing_or_for_a_program_that_is_not_there(
    waits: Make, upstream: Upstream, fault: Fault, asked: int
) -> None:
    """A request that was answered so three times is then sent once.  Who waits asks whether it is back."""
    image, up = upstream.image("a/b", "latest"), waits(upstream)
    upstream.next("GET", anything, fault, times=2 * (1 + RETRIES) + 3 * asked)
    assert (await up.origin.get_manifest("a/b", LATEST)).digest == image.digest
    assert len(up.waited) == 5
    assert upstream.log.count("GET manifest a/b:latest") == 1 + RETRIES + 1
    assert len(upstream.log) == 2 * (1 + RETRIES) + 3 * asked + 2


@pytest.mark.parametrize("fault", [Refuse(), Status(503), RetryAfter(1, 503)], ids=str)
async def test_what_fails_alone_is_asked_for_twice_more(
    waits: Make, upstream: Upstream, fault: Fault
) -> None:
    """The upstream answers other requests: a proxy may have lost the one server that has it.

    If it fails for longer than a restart takes, it is asked for once more.
    """
    upstream.image("a/b", "latest")
    up = waits(upstream)
    upstream.next("GET", "latest", fault, times=100)
    for _ in range(2):
        with pytest.raises(OriginFailed):
            await up.origin.get_manifest("a/b", LATEST)
    rest = 1.0 if isinstance(fault, RetryAfter) else 0.25
    assert up.waited == [rest, 3.0, rest]
    first, again = (1 if isinstance(fault, RetryAfter) else 1 + RETRIES), (3 if fault == Refuse() else 1)
    assert upstream.log.count("GET manifest a/b:latest") == first + 4 * again
    assert len(upstream.log) == first + 4 * again + 2


async def test_what_fails_alone_for_long_does_not_say_that_its_host_is_away(
    waits: Make, upstream: Upstream
) -> None:
    image, up = upstream.image("a/b", "latest"), waits(upstream)
    upstream.image("a/b", "other", [b"another"])
    upstream.next("GET", "latest", Status(502), times=100)
    for number in range(3):
        with pytest.raises(OriginFailed):
            await up.origin.get_manifest("a/b", LATEST)
        await up.origin.get_manifest("a/b", Tag("other"))
        assert len(up.waited) == 2 + number
    assert upstream.log.count("GET manifest a/b:latest") == 5 + 2 + 2
    await upstream.stop()
    up.waited.clear()
    up.then = [nothing, upstream.start]
    assert (await up.origin.get_manifest("a/b", Digest(image.digest))).digest == image.digest
    assert up.waited == [0.25] * 2


async def test_what_was_there_again_after_it_had_failed_alone(waits: Make, upstream: Upstream) -> None:
    image, up = upstream.image("a/b", "latest"), waits(upstream)
    upstream.next("GET", "latest", Status(502), times=1 + RETRIES + 1)
    assert (await up.origin.get_manifest("a/b", LATEST)).digest == image.digest
    assert up.waited == [0.25, 3.0]


@pytest.mark.parametrize("fault", [Refuse(), Status(502), RetryAfter(1, 503)], ids=str)
@pytest.mark.parametrize("again", [True, False])
async def test_what_failed_as_another_request_was_answered_is_asked_for_once_more(
    waits: Make, upstream: Upstream, monkeypatch: pytest.MonkeyPatch, fault: Fault, again: bool
) -> None:
    """One of several servers behind a name may be away."""
    image, up = upstream.image("a/b", "latest"), waits(upstream)
    monkeypatch.setattr(Failover, "pause", None)
    upstream.next("GET", "latest", fault, times=(1 if isinstance(fault, RetryAfter) else 1 + RETRIES) + again)
    if again and fault != Refuse():
        with pytest.raises(OriginFailed):
            await up.origin.get_manifest("a/b", LATEST)
    else:
        assert (await up.origin.get_manifest("a/b", LATEST)).digest == image.digest
    assert up.waited == [0.25]


async def test_it_says_when_to_ask_again(waits: Make, upstream: Upstream) -> None:
    image, up = upstream.image("a/b", "latest"), waits(upstream)
    upstream.next("GET", anything, RetryAfter(2, 503), times=2)
    assert (await up.origin.get_manifest("a/b", LATEST)).digest == image.digest
    assert up.waited == [2.0, 2.0]
    assert upstream.log == ["GET manifest a/b:latest", "GET base", "GET manifest a/b:latest"]


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (RetryAfter(4, 503), OriginFailed),
        (Status(500), OriginFailed),
        (Status(429), TooManyRequests),
        (Status(404), ManifestUnknown),
    ],
    ids=str,
)
async def test_other_answers_are_not_of_an_upstream_that_restarts(
    waits: Make, upstream: Upstream, fault: Fault, error: type[Exception]
) -> None:
    up = waits(upstream)
    upstream.next("GET", "latest", fault, times=100)
    with pytest.raises(error):
        await up.origin.get_manifest("a/b", LATEST)
    assert up.waited == []


async def test_other_upstreams_are_asked_first(waits: Make, upstream: Upstream) -> None:
    async with Upstream() as second:
        for each in (upstream, second):
            image = each.image("a/b", "latest")
        up = waits(upstream, second)
        await upstream.stop()
        assert (await up.origin.get_manifest("a/b", LATEST)).digest == image.digest
        assert up.waited == []
        await second.stop()
        up.then = [nothing, upstream.start]
        assert (await up.origin.get_manifest("a/b", LATEST)).digest == image.digest
        assert up.waited == [0.25] * 2


async def test_one_that_is_down_for_long_keeps_nobody_from_waiting_for_a_mirror(
    waits: Make, upstream: Upstream, clock: Clock
) -> None:
    async with Upstream() as second:
        image, up = upstream.image("a/b", "latest"), waits(upstream, second)
        await second.stop()
        with pytest.raises(OriginFailed):
            await up.origin.tags("a/x")
        clock.advance(60)
        await upstream.stop()
        up.then = [nothing, upstream.start]
        assert (await up.origin.get_manifest("a/b", LATEST)).digest == image.digest
        assert len(up.waited) == 2


async def test_a_token_server_that_restarts_is_waited_for(waits: Make, upstream: Upstream) -> None:
    image, up = upstream.image("a/b", "latest"), waits(upstream)
    upstream.auth = Bearer()
    upstream.next("GET", "token", Status(502), times=1 + RETRIES + 1)
    assert (await up.origin.get_manifest("a/b", LATEST)).digest == image.digest
    assert len(up.waited) == 2


async def test_those_who_wait_send_one_request_until_it_is_back(waits: Make, upstream: Upstream) -> None:
    many, up = 10, waits(upstream)
    images = [upstream.image("a/b", f"v{number}", [b"%d" % number]) for number in range(many)]
    upstream.next("GET", anything, Status(503), times=(many + 1) * (1 + RETRIES) + 1)
    gate = asyncio.Barrier(many)

    async def all_wait() -> None:
        await gate.wait()

    up.then = [all_wait] * many * 3
    asking = [up.origin.get_manifest("a/b", Tag(f"v{number}")) for number in range(many)]
    found = await asyncio.gather(*asking)
    assert [each.digest for each in found] == [each.digest for each in images]
    assert len(up.waited) == many * 3
    assert len(upstream.log) == (many + 1) * (1 + RETRIES) + 1 + 1 + many


async def test_who_leaves_while_waiting_keeps_nobody_from_the_answer(waits: Make, upstream: Upstream) -> None:
    image, up = upstream.image("a/b", "latest"), waits(upstream)
    upstream.next("GET", anything, Status(503), times=3 * (1 + RETRIES))
    waiting, gate = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        waiting.set()
        await gate.wait()

    up.then = [wait, wait]
    leaves, stays = (asyncio.create_task(up.origin.get_manifest("a/b", LATEST)) for _ in range(2))
    await waiting.wait()
    leaves.cancel()
    gate.set()
    assert (await stays).digest == image.digest
    with pytest.raises(asyncio.CancelledError):
        await leaves


# A server


async def test_a_pull_of_what_is_not_stored(
    serve: Serve, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breaker, "SOON", 0.0)
    image = upstream.image("a/b", "latest")
    site = await serve(upstream)
    for what, path in (
        ("latest", TAG),
        (image.digest, f"/v2/a/b/manifests/{image.digest}"),
        (image.layers[0], blob_of(image.layers[0])),
    ):
        upstream.next("GET", what, Refuse(), times=4 * (1 + RETRIES))
        assert (await pull(site, path))[0] == 200


async def test_what_is_known_is_served_at_once(serve: Serve, upstream: Upstream) -> None:
    site, _ = await warm(serve, upstream)
    await upstream.stop()
    for path in (TAG, OTHER):
        status, _, told = await pull(site, path)
        assert (status, STALE in told) == (200, True)


async def test_whether_the_rest_of_an_image_can_come_is_answered_when_it_is_back(
    serve: Serve, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To clients that would ask nobody else for it."""
    monkeypatch.setattr(breaker, "SOON", 0.0)
    site, image = await warm(serve, upstream)
    await upstream.stop()
    assert (await pull(site, OTHER))[0] == 200
    await upstream.start()
    upstream.next("GET", "base", Refuse(), times=2 * (1 + RETRIES))
    assert (await ask(site, f"/v2/a/b/manifests/{image.digest}"))[0] == 200
    assert upstream.unmet == []


# URLs that fail


async def test_what_failed_three_times_is_asked_for_once_for_a_while(
    waits: Make, upstream: Upstream, clock: Clock
) -> None:
    up = waits(upstream)
    upstream.image("a/b", "latest")
    upstream.next("GET", "latest", Status(500), times=9)
    for asked in (3, 4, 5):
        with pytest.raises(OriginFailed):
            await up.origin.get_manifest("a/b", LATEST)
        assert len(upstream.log) == asked
    clock.advance(KEPT)
    with pytest.raises(OriginFailed):
        await up.origin.get_manifest("a/b", LATEST)
    assert len(upstream.log) == 8
    await up.origin.tags("a/b")
    with pytest.raises(OriginFailed):
        await up.origin.get_manifest("a/b", LATEST)
    assert len(upstream.log) == 10
    await up.origin.get_manifest("a/b", LATEST)
    upstream.next("GET", "latest", Status(500), times=2)
    await up.origin.get_manifest("a/b", LATEST)
    assert upstream.unmet == []

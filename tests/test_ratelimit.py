"""The rate limit of an upstream: read, exported, obeyed."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any

import pytest
from structlog.testing import LogCapture

from proxy.upstream.ratelimit import LONGEST_BLOCK
from tests.conftest import Clock, Serve, Site
from tests.upstream import Basic, Bearer, Fault, Request, RetryAfter, Status, Upstream

FRESH = 600.0  # seconds, the default
STALE = "; ttl=-"  # in Cache-Status
PAUSE = 10.0  # seconds that a tag is not asked for after it could not be; the default
TAG = "/v2/a/b/manifests/latest"
WINDOW = 21600


# Clients, which have no other host to ask, are told how long it takes.
EXACT = {"fallback": "deny"}


def anything(request: Request) -> bool:
    return True


def manifest_of(reference: str) -> str:
    return f"/v2/a/b/manifests/{reference}"


async def pull(site: Site, path: str = TAG) -> tuple[int, bytes, str]:
    """Status, body, and what Cache-Status says."""
    status, headers, body = await site.get(path)
    return status, body, headers.get("Cache-Status", "")


async def refusal(site: Site, path: str) -> float:
    """Of a pull that is answered with 503: Retry-After."""
    status, headers, body = await site.get(path)
    assert (status, json.loads(body)["errors"][0]["code"]) == (503, "TOOMANYREQUESTS")
    return float(headers["Retry-After"])


async def gauges(site: Site) -> dict[str, float]:
    """What is exported of the rate limit, by name and credential."""
    found = re.findall(r'entrepot_ratelimit_(\w+)\{credential="(\d+)",.*\} (\S+)', await site.metrics())
    return {f"{name} {credential}": float(value) for name, credential, value in found}


async def warm(serve: Serve, upstream: Upstream, tags: int = 1, **keys: Any) -> Site:
    """A site that has pulled a/b:latest and more, all of which are due."""
    site = await serve(upstream, top=EXACT, **keys)
    for tag in ["latest", *map(str, range(1, tags))]:
        upstream.image("a/b", tag, [tag.encode()])
        assert (await site.get(manifest_of(tag)))[0] == 200
    site.clock.advance(FRESH + 1)
    upstream.clear()
    return site


# Read and exported


async def test_what_the_upstream_tells_is_exported(serve: Serve, upstream: Upstream) -> None:
    upstream.ratelimit = 100, WINDOW, 77
    site = await warm(serve, upstream)
    assert await gauges(site) == {"limit 0": 100, "remaining 0": 76}


async def test_what_it_does_not_tell_is_not(serve: Serve, upstream: Upstream) -> None:
    site = await warm(serve, upstream)
    assert await gauges(site) == {}


# The reserve


async def test_below_the_reserve_tags_are_not_revalidated_and_misses_are_served(
    serve: Serve, upstream: Upstream
) -> None:
    upstream.ratelimit = 100, WINDOW * 1000, 10
    site = await warm(serve, upstream, tags=3)  # 7 remain, of 10 that are kept by default
    upstream.image("a/b", "latest", [b"moved"])
    upstream.image("a/b", "new")
    for path in (TAG, manifest_of("1"), TAG):
        status, _, told = await pull(site, path)
        assert (status, STALE in told) == (200, True)
    assert upstream.log == []
    assert (await pull(site, manifest_of("new")))[0] == 200
    assert upstream.log == ["GET manifest a/b:new"]


@pytest.mark.parametrize(("reserve", "asked"), [(0, 1), (7, 1), (8, 0), ("7%", 1), ("8%", 0)])
async def test_the_reserve_is_a_setting(
    serve: Serve, upstream: Upstream, reserve: int | str, asked: int
) -> None:
    upstream.ratelimit = 100, WINDOW * 1000, 8
    site = await warm(serve, upstream, options={"reserve": reserve})
    assert (await pull(site))[0] == 200
    assert upstream.log == ["HEAD manifest a/b:latest"] * asked


async def test_when_enough_remains_again_tags_are_revalidated_again(
    serve: Serve, upstream: Upstream, clock: Clock
) -> None:
    upstream.ratelimit = 100, WINDOW * 1000, 5
    site = await warm(serve, upstream, tags=2)
    assert STALE in (await pull(site))[2]
    upstream.ratelimit = 100, WINDOW * 1000, 90
    upstream.image("a/b", "new")
    await pull(site, manifest_of("new"))  # which tells of it
    clock.advance(PAUSE + 1)
    upstream.clear()
    for path in (TAG, manifest_of("1")):
        assert (await pull(site, path))[0] == 200
    assert upstream.log == ["HEAD manifest a/b:latest", "HEAD manifest a/b:1"]


async def test_below_the_reserve_one_request_looks_whether_some_came_back_as_often_as_one_does(
    serve: Serve, upstream: Upstream, clock: Clock
) -> None:
    upstream.ratelimit = 100, WINDOW, 5
    site = await warm(serve, upstream, tags=4)  # FRESH is more than 216 s
    for _ in range(2):
        upstream.clear()
        for path in (TAG, manifest_of("1"), manifest_of("2"), manifest_of("3")):
            assert (await pull(site, path))[0] == 200
        assert upstream.log == ["HEAD manifest a/b:latest"]
        clock.advance(FRESH + 1)


async def test_what_is_not_cached_may_use_the_last_request(serve: Serve, upstream: Upstream) -> None:
    upstream.ratelimit = 100, WINDOW, 1
    site = await warm(serve, upstream)
    assert upstream.ratelimit == (100, WINDOW, 0)
    assert await gauges(site) == {"limit 0": 100, "remaining 0": 0}


# A 429


async def test_after_a_429_nothing_is_sent_until_retry_after(
    serve: Serve, upstream: Upstream, clock: Clock, events: LogCapture
) -> None:
    site = await warm(serve, upstream)
    image = upstream.image("a/b", "new")
    upstream.next("GET", anything, RetryAfter(120))
    assert await refusal(site, manifest_of("new")) == 120
    asked = upstream.log.copy()
    clock.advance(90)
    for path in (
        manifest_of("new"),
        manifest_of("2"),
        f"/v2/a/b/blobs/{image.layers[0]}",
        "/v2/a/b/tags/list",
    ):
        assert await refusal(site, path) == 30, path
    assert STALE in (await pull(site))[2], "what is cached is served"
    assert upstream.log == asked
    limited = [each for each in events.entries if each["event"] == "upstream.limited"]
    assert [(each["log_level"], each["credential"], each["seconds"]) for each in limited] == [
        ("warning", 0, 120)
    ]
    clock.advance(30)
    assert (await pull(site, manifest_of("new")))[:2] == (200, image.content)


async def test_a_429_to_a_revalidation_counts_as_well(serve: Serve, upstream: Upstream) -> None:
    site = await warm(serve, upstream)
    upstream.next("HEAD", "latest", RetryAfter(120))
    assert STALE in (await pull(site))[2]
    assert await refusal(site, manifest_of("new")) == 120
    assert len(upstream.log) == 1


async def test_without_retry_after_nothing_is_sent_for_the_rest_of_the_window_or_for_minutes(
    serve: Serve, upstream: Upstream, clock: Clock
) -> None:
    upstream.ratelimit = 100, WINDOW, 1
    site = await warm(serve, upstream)  # which told of the window, 601 seconds ago
    image = upstream.image("a/b", "new")
    for asked in (1, 2):
        assert await refusal(site, manifest_of("new")) == LONGEST_BLOCK
        clock.advance(LONGEST_BLOCK - 1)
        assert await refusal(site, manifest_of("new")) == 1
        assert upstream.log == ["GET manifest a/b:new"] * asked
        clock.advance(1)
    clock.advance(WINDOW - FRESH - 2 * LONGEST_BLOCK - 11)
    assert await refusal(site, manifest_of("new")) == 10
    clock.advance(10)
    upstream.ratelimit = 100, WINDOW, 100
    assert (await pull(site, manifest_of("new")))[:2] == (200, image.content)


async def test_nor_for_a_minute_where_no_window_is_known(
    serve: Serve, upstream: Upstream, clock: Clock
) -> None:
    upstream.image("a/b", "latest")
    site = await serve(upstream, top=EXACT)
    upstream.next("GET", "latest", Status(429))
    assert await refusal(site, TAG) == 60
    clock.advance(60)
    assert (await pull(site))[0] == 200


async def test_retry_after_may_be_a_date(serve: Serve, upstream: Upstream) -> None:
    site = await serve(upstream, top=EXACT)
    upstream.next("GET", "latest", RetryAfter(formatdate(time.time() + 800, usegmt=True)))
    assert 500 < await refusal(site, TAG) <= 800


async def test_a_token_server_that_limits_us(serve: Serve, upstream: Upstream, clock: Clock) -> None:
    upstream.auth = Bearer()
    upstream.image("a/b", "latest")
    site = await serve(upstream, top=EXACT)
    upstream.next("GET", "token", Status(429))
    assert await refusal(site, TAG) == 60
    asked = len(upstream.log)
    assert await refusal(site, TAG) == 60
    assert len(upstream.log) == asked
    clock.advance(60)
    assert (await pull(site))[0] == 200


async def test_a_cdn_that_limits_us_says_nothing_of_the_registry(serve: Serve, upstream: Upstream) -> None:
    upstream.cdn = True
    site = await warm(serve, upstream)
    image = upstream.image("a/b", "new")
    upstream.next("GET", "cdn", RetryAfter(7))
    status, headers, _ = await site.get(f"/v2/a/b/blobs/{image.layers[0]}")
    assert (status, headers["Retry-After"]) == (503, "7")
    assert (await pull(site, manifest_of("new")))[0] == 200


# Several credentials

ALICE, BOB = Basic("alice", "secret-a"), Basic("bob", "secret-b")
BOTH = {
    "credentials": [
        {"username": "alice", "password": "secret-a"},
        {"username": "bob", "password": "secret-b"},
    ]
}


class _AnyOf:
    def __init__(self, *known: str) -> None:
        self.known = known

    def __eq__(self, other: object) -> bool:
        return other in self.known

    __hash__ = object.__hash__


@dataclass(frozen=True)
class Users(Basic):
    """Lets in more than one."""

    others: tuple[Basic, ...] = ()

    @property
    def header(self) -> Any:
        return _AnyOf(Basic(self.user, self.password).header, *(each.header for each in self.others))


@dataclass(frozen=True)
class Limits(Fault):
    """Every user is told what remains to him, which the answer does not change."""

    remaining: dict[str, int]  # by Authorization

    def strike(self, answer: Any, request: Request) -> Any:
        remaining = self.remaining.get(request.headers.get("Authorization", ""))
        if remaining is not None:
            answer.headers["RateLimit-Limit"] = f"100;w={WINDOW}"
            answer.headers["RateLimit-Remaining"] = f"{remaining};w={WINDOW}"
        return answer


def by(user: Basic) -> Any:
    return lambda request: request.headers.get("Authorization") == user.header


def users(upstream: Upstream) -> list[str]:
    """Who asked, of the requests that were let in."""
    names = {ALICE.header: "alice", BOB.header: "bob"}
    shown = (each.headers.get("Authorization") for each in upstream.requests)
    return [names[each] for each in shown if each in names]


@pytest.fixture
def two(upstream: Upstream) -> Upstream:
    """An upstream of alice and bob with many images."""
    for number in range(10):
        upstream.image("a/b", str(number), [str(number).encode()])
    upstream.auth = Users("alice", "secret-a", (BOB,))
    return upstream


async def test_credentials_are_used_in_turn(serve: Serve, two: Upstream) -> None:
    site = await serve(two, options=BOTH, top=EXACT)
    for number in range(4):
        assert (await pull(site, manifest_of(str(number))))[0] == 200
    assert users(two) == ["alice", "bob", "alice", "bob"]


async def test_those_with_more_left_come_first(serve: Serve, two: Upstream) -> None:
    site = await serve(two, options=BOTH, top=EXACT)
    two.next("GET", "manifest", Limits({ALICE.header: 30, BOB.header: 60}), times=100)
    for number in range(6):
        assert (await pull(site, manifest_of(str(number))))[0] == 200
    assert users(two) == ["alice", "bob", "bob", "bob", "bob", "bob"]
    assert await gauges(site) == {"limit 0": 100, "remaining 0": 30, "limit 1": 100, "remaining 1": 60}


async def test_a_429_blocks_one_of_them_and_the_request_is_repeated_with_another(
    serve: Serve, two: Upstream, clock: Clock
) -> None:
    site = await serve(two, options=BOTH, top=EXACT)
    two.next("GET", by(ALICE), RetryAfter(100))
    for number in range(3):
        assert (await pull(site, manifest_of(str(number))))[0] == 200
    assert users(two) == ["alice", "bob", "bob", "bob"]
    clock.advance(100)
    two.clear()
    for number in range(4, 6):
        assert (await pull(site, manifest_of(str(number))))[0] == 200
    assert sorted(users(two)) == ["alice", "bob"]


async def test_when_all_are_blocked_nothing_is_sent_until_the_first_is_not(
    serve: Serve, two: Upstream, clock: Clock
) -> None:
    site = await serve(two, options=BOTH, top=EXACT)
    two.next("GET", by(ALICE), RetryAfter(100))
    two.next("GET", by(BOB), RetryAfter(40))
    assert await refusal(site, manifest_of("0")) == 40
    asked = len(two.log)
    clock.advance(39)
    assert await refusal(site, manifest_of("1")) == 1
    assert len(two.log) == asked
    clock.advance(1)
    two.clear()
    assert (await pull(site, manifest_of("0")))[0] == 200
    assert users(two) == ["bob"]


async def test_the_reserve_is_that_of_the_best(serve: Serve, two: Upstream, clock: Clock) -> None:
    site = await serve(two, options=BOTH, top=EXACT)
    two.next("GET", "manifest", Limits({ALICE.header: 2, BOB.header: 60}), times=100)
    for number in range(3):
        await pull(site, manifest_of(str(number)))
    clock.advance(FRESH + 1)
    two.clear()
    assert (await pull(site, manifest_of("0")))[0] == 200
    assert users(two) == ["bob"]
    assert two.log[-1] == "HEAD manifest a/b:0"


async def test_one_that_is_refused_is_passed_over(serve: Serve, two: Upstream) -> None:
    two.auth = Users("nobody", "at-all", (BOB,))
    site = await serve(two, options=BOTH)
    for number in range(4):
        assert (await pull(site, manifest_of(str(number))))[0] == 200
    two.auth = Users("nobody", "at-all")
    assert (await pull(site, manifest_of("5")))[0] == 404


async def test_where_one_is_refused_and_the_other_blocked_it_is_not_a_refusal(
    serve: Serve, two: Upstream, clock: Clock
) -> None:
    site = await serve(two, options=BOTH, top=EXACT)
    for number in range(2):
        assert (await pull(site, manifest_of(str(number))))[0] == 200
    clock.advance(FRESH + 1)
    two.auth = Users("nobody", "at-all", (BOB,))
    two.next("HEAD", by(BOB), RetryAfter(100), times=100)
    two.next("GET", by(BOB), RetryAfter(100), times=100)
    for number in range(2):
        status, _, told = await pull(site, manifest_of(str(number)))
        assert (status, STALE in told) == (200, True)


async def test_neither_metrics_nor_events_tell_who(serve: Serve, two: Upstream, events: LogCapture) -> None:
    site = await serve(two, options=BOTH, top=EXACT)
    two.next("GET", by(ALICE), RetryAfter(100))
    await pull(site, manifest_of("0"))
    told = await site.metrics() + str(events.entries)
    assert "upstream.limited" in told
    assert not [word for word in ("alice", "bob", "secret") if word in told]

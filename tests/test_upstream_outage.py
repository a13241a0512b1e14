"""A dead upstream costs a client milliseconds after the first timeout.  With real servers."""

from __future__ import annotations

import asyncio

import pytest
from yarl import URL

from proxy.cache import tags
from proxy.upstream.breaker import FAILURES, FIRST, NOTED
from proxy.upstream.transport import RETRIES
from tests.conftest import Clock, Serve
from tests.events import Ear
from tests.outages import (
    OTHER,
    PAUSE,
    QUICK,
    STALE,
    TAG,
    anything,
    blob_of,
    code_of,
    metric,
    pull,
    silence,
    warm,
)
from tests.test_fills import heard
from tests.upstream import (
    Bearer,
    Reset,
    RetryAfter,
    Status,
    Upstream,
)


async def test_of_an_upstream_that_hangs_a_cached_tag_costs_the_header_time_out_once(
    serve: Serve, upstream: Upstream
) -> None:
    site, image = await warm(serve, upstream, options=QUICK)
    upstream.next("HEAD", anything, silence(), times=100)
    assert (await pull(site))[:2] == (200, image.content)
    assert upstream.log == ["HEAD manifest a/b:latest"]
    for path in (TAG, OTHER):  # the other was not asked for before
        status, _, told = await pull(site, path)
        assert (status, STALE in told) == (200, True)
    assert len(upstream.log) == 1, "answered without a request, hence without waiting for one"


async def test_what_is_not_cached_is_refused_at_once_and_told_when_to_come_back(
    serve: Serve, upstream: Upstream
) -> None:
    image = upstream.image("a/b", "latest")
    site = await serve(upstream, options=QUICK)
    upstream.next("GET", anything, silence(), times=100)
    assert (await pull(site))[0] == 504
    for path in (TAG, OTHER, blob_of(image.layers[0]), "/v2/a/b/tags/list"):
        status, headers, body = await site.get(path)
        assert (status, code_of(body), headers["Retry-After"]) == (504, "UNAVAILABLE", "1")
    assert len(upstream.log) == 1


async def test_the_probe_is_one_request_and_its_answer_closes_the_breaker(
    serve: Serve, upstream: Upstream, clock: Clock
) -> None:
    image = upstream.image("a/b", "latest")
    site = await serve(upstream)
    ear = Ear()
    await upstream.stop()
    assert (await pull(site))[0] == 502
    await upstream.start()
    opened = await ear.heard("upstream.opened", namespace="docker.io")
    assert opened["host"] == URL(upstream.url).host_port_subcomponent
    assert await metric(site, "entrepot_upstream_open") == {opened["host"]: 1}
    clock.advance(1)
    held = silence()
    upstream.next("GET", "latest", held)
    probe = asyncio.create_task(pull(site))
    await held.reached.wait()
    assert (await pull(site, blob_of(image.layers[0])))[0] == 502
    held.gate.set()
    assert (await probe)[:2] == (200, image.content)
    assert len(upstream.log) == 1
    await ear.heard("upstream.closed", namespace="docker.io", host=opened["host"])
    assert await metric(site, "entrepot_upstream_open") == {opened["host"]: 0}
    assert (await pull(site, blob_of(image.layers[0])))[0] == 200


async def test_who_can_be_served_does_not_wait_for_one_that_has_failed(
    serve: Serve, upstream: Upstream, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tags, "PATIENCE", 0.0)
    site, old = await warm(serve, upstream)
    upstream.next("HEAD", "latest", Status(503), times=1 + RETRIES)
    assert STALE in (await pull(site))[2]
    clock.advance(PAUSE + 1)
    new = upstream.image("a/b", "latest", [b"moved"])
    upstream.next("GET", "absent", Status(503), times=1 + RETRIES)
    assert (await pull(site, "/v2/a/b/manifests/absent"))[0] == 502
    held = silence()
    upstream.next("HEAD", "latest", held)
    upstream.clear()
    for _ in range(2):
        status, body, told = await pull(site)
        assert (status, body, STALE in told) == (200, old.content, True)
    await held.reached.wait()
    ear = Ear()
    held.gate.set()
    await ear.heard("tag.moved")
    assert upstream.log == ["HEAD manifest a/b:latest", f"GET manifest a/b@{new.digest[:19]}"]
    assert (await pull(site))[:2] == (200, new.content)
    assert len(upstream.log) == 2


async def test_transfers_that_break_off_together_do_not_open_it(serve: Serve, upstream: Upstream) -> None:
    image = upstream.image("a/b", "latest", [bytes([each]) * 100_000 for each in range(FAILURES + 1)])
    site = await serve(upstream)
    holds, resumed = [silence(1000) for _ in image.layers], silence()
    for layer, held in zip(image.layers, holds, strict=True):
        upstream.next("GET", layer, held, Reset(1000))
        upstream.next("GET", layer, resumed)
    interrupted = heard("fill.interrupted", FAILURES + 1)
    pulls = [asyncio.create_task(pull(site, blob_of(each))) for each in image.layers]
    for held in holds:
        await held.reached.wait()
    for held in holds:
        held.gate.set()
    await interrupted.wait()
    assert (await pull(site, blob_of(image.config)))[0] == 200
    resumed.gate.set()
    assert [status for status, *_ in await asyncio.gather(*pulls)] == [200] * len(pulls)


async def test_an_object_that_hangs_does_not_refuse_others(
    serve: Serve, upstream: Upstream, clock: Clock
) -> None:
    site, image = await warm(serve, upstream, options=QUICK)
    held = silence()
    upstream.next("GET", image.layers[0], held)
    slow = asyncio.create_task(pull(site, blob_of(image.layers[0])))
    await held.reached.wait()
    clock.advance(NOTED)
    assert (await pull(site, OTHER))[0] == 200
    assert (await slow)[0] == 504
    assert (await pull(site, blob_of(image.config)))[0] == 200


async def test_a_refused_connection_opens_it_at_once(serve: Serve, upstream: Upstream, clock: Clock) -> None:
    site, image = await warm(serve, upstream)
    await upstream.stop()
    status, headers, _ = await site.get("/v2/a/b/manifests/absent")
    assert status == 502
    status, headers, _ = await site.get("/v2/a/b/manifests/absent")
    assert (status, headers["Retry-After"]) == (502, "1")
    assert (await pull(site))[:2] == (200, image.content)
    await upstream.start()
    assert (await pull(site, "/v2/a/b/manifests/absent"))[0] == 502
    clock.advance(1)
    assert (await pull(site, "/v2/a/b/manifests/absent"))[0] == 404


@pytest.mark.parametrize(
    ("status", "asked"), [(502, FAILURES), (503, FAILURES), (504, FAILURES), (500, FAILURES + 2)]
)
async def test_answers_of_a_gateway_open_it_when_they_are_several_and_those_about_one_request_do_not(
    serve: Serve, upstream: Upstream, status: int, asked: int
) -> None:
    site = await serve(upstream)
    upstream.next("GET", anything, RetryAfter(0, status), times=100)
    for number in range(FAILURES + 2):
        assert (await pull(site, f"/v2/a/b/manifests/{number}"))[0] == 502
    assert len(upstream.log) == asked


async def test_a_token_server_that_hangs_is_bounded_and_then_refused_at_once(
    serve: Serve, upstream: Upstream
) -> None:
    upstream.auth = Bearer(realm="{cdn_url}/token")
    options = {**QUICK, "token_realms": ["localhost"]}
    site, image = await warm(serve, upstream, options=options)
    upstream.expire_tokens()
    upstream.next("GET", "token", silence(), times=100)
    assert (await pull(site, blob_of(image.layers[0])))[0] == 504
    assert upstream.log.count("GET token repository:a/b:pull") == 1
    status, headers, _ = await site.get(blob_of(image.config))
    assert (status, headers["Retry-After"]) == (504, "1")
    assert (await pull(site))[:2] == (200, image.content)
    assert upstream.log.count("GET token repository:a/b:pull") == 1
    open_hosts = await metric(site, "entrepot_upstream_open")
    assert open_hosts[URL(upstream.url).host_port_subcomponent or ""] == 0, "the registry itself answers"
    assert open_hosts[URL(upstream.cdn_url).host_port_subcomponent or ""] == 1


@pytest.mark.parametrize("after", [0, 1, 20])
async def test_a_token_server_that_stops_in_its_answer_is_paused_too(
    serve: Serve, upstream: Upstream, after: int
) -> None:
    upstream.auth = Bearer(realm="{cdn_url}/token")
    options = {**QUICK, "token_realms": ["localhost"], "progress_timeout": "1h"}
    site, image = await warm(serve, upstream, options=options)
    upstream.expire_tokens()
    upstream.next("GET", "token", silence(after), times=100)
    assert (await pull(site, blob_of(image.layers[0])))[0] == 504
    assert (await pull(site, blob_of(image.config)))[0] == 504
    assert (await pull(site))[:2] == (200, image.content)
    assert upstream.log.count("GET token repository:a/b:pull") == 1
    open_hosts = await metric(site, "entrepot_upstream_open")
    assert open_hosts[URL(upstream.cdn_url).host_port_subcomponent or ""] == 1


async def test_a_slow_object_pauses_its_host_once(serve: Serve, upstream: Upstream, clock: Clock) -> None:
    upstream.cdn = True
    image = upstream.image("a/b", "many", [bytes([number]) * 1000 for number in range(3)])
    site = await serve(upstream, options=QUICK)
    slow, *others = image.layers
    for other, status in zip(others, (504, 200), strict=True):
        upstream.next("GET", "cdn", silence())
        assert (await pull(site, blob_of(slow)))[0] == 504
        assert (await pull(site, blob_of(other)))[0] == status
        clock.advance(FIRST)
        assert (await pull(site, blob_of(other)))[0] == 200


async def test_a_cdn_that_hangs_is_no_reason_not_to_ask_for_tags(serve: Serve, upstream: Upstream) -> None:
    upstream.cdn = True
    site, image = await warm(serve, upstream, options=QUICK)
    upstream.next("GET", "cdn", silence(), times=100)
    for layer in (image.layers[0], image.config, image.layers[0]):
        assert (await pull(site, blob_of(layer)))[0] == 504
    assert [each.kind for each in upstream.requests] == ["blob", "cdn", "blob", "blob"]
    assert "revalidated" in (await pull(site))[2] or upstream.log[-1] == "HEAD manifest a/b:latest"

"""Credentials that an upstream refuses, and where an operator sees that."""

from __future__ import annotations

import json
from typing import Any, TypeVar

import msgspec
import pytest
from structlog.testing import LogCapture

from proxy.admin.models import Listed
from proxy.admin.reports import Why
from proxy.cli.content import listing_tables
from proxy.cli.status import why_tables
from proxy.telemetry.metrics import Metrics
from proxy.upstream.refusals import SILENCE, Refusal, Refusals
from storage.shared import SharedTable
from tests.conftest import Clock, Serve, Site
from tests.outages import metric
from tests.upstream import Basic, Bearer, Status, Upstream
from tests.upstream_client import USER

T = TypeVar("T")

WRONG = {"username": "ci", "password": "wrong"}
RIGHT = {"username": USER.user, "password": USER.password}
PATH = "/v2/a/b/manifests/latest"


def refused(events: LogCapture) -> list[dict[str, Any]]:
    return [dict(each) for each in events.entries if each["event"] == "upstream.refused"]


def host_of(upstream: Upstream) -> str:
    return upstream.url.partition("//")[2]


async def ask(site: Site, path: str, form: type[T]) -> T:
    async with site.session.get(f"{site.app.admin_url}/api/v1/{path}") as response:
        assert response.status == 200
        return msgspec.json.decode(await response.read(), type=form)


async def readyz(site: Site) -> dict[str, str]:
    async with site.session.get(site.app.admin_url / "readyz") as response:
        assert response.status == 200
        found: dict[str, str] = await response.json()
        return found


@pytest.mark.parametrize("door", [USER, Bearer(USER), Bearer(USER, anonymous=False)], ids=str)
async def test_wrong_credentials_are_visible(
    serve: Serve, upstream: Upstream, events: LogCapture, clock: Clock, door: Basic | Bearer
) -> None:
    upstream.image("a/b", "latest")
    upstream.auth = door
    site = await serve(upstream, options=WRONG)
    assert (await site.get(PATH))[0] != 200
    host = host_of(upstream)
    assert refused(events) == [
        {
            "event": "upstream.refused",
            "log_level": "warning",
            "namespace": "docker.io",
            "host": host,
            "credential": 0,
            "status": 401,
        }
    ]
    note = f"docker.io: {host} refused credential 0 with status 401"
    assert await readyz(site) == {"status": "ready", "credentials": note}
    assert (await metric(site, "entrepot_upstream_refused_total"))[host] == 1
    assert (await ask(site, "repositories", Listed)).notes == [note]
    images = await ask(site, "images", Listed)
    assert images.notes == [note]
    [table] = listing_tables(images, clock())
    assert table.notes == [note]
    why = await ask(site, "why?ref=a/b:latest", Why)
    [found] = why.upstreams
    assert [(each.credential, each.host, each.status) for each in found.refused] == [(0, host, 401)]
    rows = [row for each in why_tables(why, clock()) for row in each.rows]
    assert any(f"{host} refused credential 0 with status 401" in cell for row in rows for cell in row)


@pytest.mark.parametrize("status", [401, 403])
async def test_a_refusal_after_a_grant_stands_until_the_next_grant(
    serve: Serve, upstream: Upstream, events: LogCapture, status: int
) -> None:
    for tag in ("latest", "other", "third"):
        upstream.image("a/b", tag, [tag.encode()])
    upstream.auth = Bearer(USER)
    site = await serve(upstream, options=RIGHT)
    assert (await site.get(PATH))[0] == 200
    assert "credentials" not in await readyz(site)
    upstream.next("GET", "other", Status(status), times=2)
    assert (await site.get("/v2/a/b/manifests/other"))[0] != 200
    assert [(each["credential"], each["status"]) for each in refused(events)] == [(0, status)]
    assert "credentials" in await readyz(site)
    assert (await site.get("/v2/a/b/manifests/third"))[0] == 200
    assert "credentials" not in await readyz(site)


async def test_the_credential_that_is_refused_is_named(
    serve: Serve, upstream: Upstream, events: LogCapture
) -> None:
    upstream.image("a/b", "latest")
    upstream.auth = Bearer(USER, anonymous=False)
    site = await serve(upstream, options={"credentials": [WRONG, RIGHT]})
    assert (await site.get(PATH))[0] == 200
    assert [each["credential"] for each in refused(events)] == [0]


@pytest.mark.parametrize("door", [USER, Bearer(), Bearer(USER, anonymous=False)], ids=str)
async def test_anonymous_requests_are_not_refused_credentials(
    serve: Serve, upstream: Upstream, events: LogCapture, door: Basic | Bearer
) -> None:
    upstream.auth = door
    upstream.next("GET", "manifest", Status(401), times=9)
    site = await serve(upstream)
    assert (await site.get(PATH))[0] == 404
    assert refused(events) == []
    assert await readyz(site) == {"status": "ready"}


async def test_the_access_line_has_the_reason(serve: Serve, upstream: Upstream, events: LogCapture) -> None:
    upstream.image("a/b", "latest")
    upstream.auth = USER
    site = await serve(upstream, options=WRONG)
    for path in (PATH, "/v2/a/b/manifests/9", "/v2/A/manifests/1", "/v2/b/blobs/x"):
        _, _, body = await site.get(path)
        await site.get("/v2/")
        served = [each for each in events.entries if each["event"] == "request.served"]
        assert served[-2]["reason"] == json.loads(body)["errors"][0]["message"]
        assert served[-1]["reason"] == ""


def test_one_event_an_hour_for_each_credential_and_host(clock: Clock, events: LogCapture) -> None:
    refusals = Refusals("up", Metrics(), clock)
    for credential, host in ((0, "a"), (0, "a"), (1, "a"), (0, "b"), (1, "a")):
        refusals.answered(credential, host, 401)
    assert [(each["credential"], each["host"]) for each in refused(events)] == [(0, "a"), (1, "a"), (0, "b")]
    clock.advance(SILENCE - 1)
    refusals.answered(0, "a", 403)
    assert len(refused(events)) == 3
    clock.advance(1)
    refusals.answered(0, "a", 403)
    assert refused(events)[3:] == [{**refused(events)[0], "status": 403}]
    assert refusals.state() == [
        Refusal(0, "a", 403, 0),
        Refusal(0, "b", 401, SILENCE),
        Refusal(1, "a", 401, SILENCE),
    ]


@pytest.mark.parametrize(("status", "stands"), [(200, False), (206, False), (404, True), (503, True)])
def test_what_ends_a_refusal(clock: Clock, status: int, stands: bool) -> None:
    refusals = Refusals("up", Metrics(), clock)
    refusals.answered(0, "a", 401)
    refusals.answered(1, "a", status)
    refusals.answered(0, "b", status)
    assert len(refusals.state()) == 1
    refusals.answered(0, "a", status)
    assert bool(refusals.state()) is stands


def test_processes_share_what_is_refused(clock: Clock, events: LogCapture) -> None:
    table = SharedTable()
    one, two = [Refusals("up", Metrics(), clock, table, ["ci"]) for _ in range(2)]
    one.answered(0, "a", 401)
    two.answered(0, "a", 403)
    assert len(refused(events)) == 1
    assert one.state() == two.state() == [Refusal(0, "a", 403, 0)]
    two.answered(0, "a", 200)
    assert one.state() == two.state() == []
    one.answered(0, "a", 401)
    assert len(refused(events)) == 1, "the hour is not over"
    Refusals("up", Metrics(), clock, table, ["other"]).answered(0, "a", 401)
    assert len(refused(events)) == 2

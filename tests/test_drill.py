"""Drills: upstreams are cut off for a time, in all processes, and what failed for it is told."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp
import msgspec
import pytest
from structlog.testing import LogCapture

from proxy.admin.reports import Drilling
from proxy.cache import drill as module
from proxy.cache.drill import Drill, DrillOrder, DrillState, MissedRequest, merged
from proxy.telemetry.exchange import Exchange, current_exchange
from storage.oci import Digest
from tests.conftest import Clock, Serve, Site
from tests.processes import Place, Server, place
from tests.upstream import Hold, Image, Upstream

__all__ = ["place"]  # a fixture

NAME = "docker.io/library/app"


# One process


@pytest.fixture
def client() -> Iterator[Callable[..., None]]:
    """Be served as a client."""
    tokens = []

    def serve(reference: str = "1", client: str = "10.0.0.7", id: str = "x-1") -> None:
        found = Exchange(id, "docker.io", "library/app", reference, "manifest", client=client)
        tokens.append(current_exchange.set(found))

    yield serve
    for token in reversed(tokens):
        current_exchange.reset(token)


def test_it_cuts_what_it_is_told_to_until_its_time_is_up(clock: Clock) -> None:
    drill = Drill(clock)
    assert (drill.cuts("a"), drill.left, drill.state().order) == (False, 0, None)
    drill.begin(DrillOrder(begun=clock(), seconds=60.0, namespaces=("a",)))
    assert (drill.cuts("a"), drill.cuts("b"), drill.left) == (True, False, 60)
    clock.advance(59)
    assert (drill.cuts("a"), drill.left) == (True, 1)
    clock.advance(1)
    assert (drill.cuts("a"), drill.left) == (False, 0)
    drill.begin(DrillOrder(begun=clock(), seconds=60.0))
    assert (drill.cuts("a"), drill.cuts("b")) == (True, True)
    clock.advance(-3600)  # set back: no hours come of it
    assert not drill.cuts("a")
    clock.advance(3600)
    drill.end()
    assert (drill.cuts("a"), drill.left) == (False, 0)


def test_namespaces_with_one_key_are_cut_off_by_it(clock: Clock) -> None:
    drill = Drill(clock, key_of=lambda name: name if name == "own" else "*")
    drill.begin(DrillOrder(begun=clock(), seconds=60.0, namespaces=("*",)))
    assert [drill.cuts(each) for each in ("a", "b", "own")] == [True, True, False]
    drill.end()
    drill.begin(DrillOrder(begun=clock() + 0.0, seconds=50.0, namespaces=("a", "own")))
    assert [drill.cuts(each) for each in ("a", "b", "own")] == [True, False, True]


def test_what_failed_is_kept_until_the_next(clock: Clock, client: Callable[..., None]) -> None:
    drill = Drill(clock)
    order = DrillOrder(begun=clock(), seconds=60.0)
    drill.begin(order)
    client("1")
    drill.missed()
    clock.advance(5)
    drill.missed()
    drill.begin(order)  # told twice
    client("1", "10.0.0.8")
    drill.missed()
    client("1", id="")  # what the server does by itself is nobody's pull
    drill.missed()
    drill.end()
    found = [(each.client, each.count, each.last - each.first) for each in drill.state().missed]
    assert found == [("10.0.0.7", 2, 5), ("10.0.0.8", 1, 0)]
    drill.begin(DrillOrder(begun=clock(), seconds=1.0))
    assert drill.state().missed == []


def test_what_is_too_much_is_counted(
    clock: Clock, client: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST", 2)
    drill = Drill(clock)
    drill.begin(DrillOrder(begun=clock(), seconds=60.0))
    for reference in ("1", "2", "3", "1", "4"):
        client(reference)
        drill.missed()
    state = drill.state()
    assert ([each.count for each in state.missed], state.untold) == ([2, 1], 2)


def test_what_processes_tell_is_put_together() -> None:
    def missed(reference: str, first: float, last: float, count: int = 1) -> MissedRequest:
        return MissedRequest(
            client="c", kind="manifest", namespace="n", repository="r", reference=reference, count=count,
            first=first, last=last,
        )  # fmt: skip

    old, new = DrillOrder(begun=1.0, seconds=9.0), DrillOrder(begun=5.0, seconds=9.0)
    assert merged([]) is None
    assert merged([DrillState(order=None, left=0.0, missed=[], untold=0)]) is None
    found = merged(
        [
            DrillState(order=new, left=3.0, missed=[missed("b", 7, 7), missed("a", 8, 9)], untold=1),
            DrillState(order=old, left=0.0, missed=[missed("old", 2, 2)], untold=9),
            DrillState(order=new, left=2.0, missed=[missed("a", 6, 8, 2)], untold=2),
        ]
    )
    assert found == DrillState(
        order=new, left=3.0, missed=[missed("a", 6, 9, 3), missed("b", 7, 7)], untold=3
    )


# A server


async def ask(site: Site, method: str, body: Any = None) -> Drilling:
    body = {} if method == "DELETE" else body
    assert site.app.admin_url is not None
    async with site.session.request(method, site.app.admin_url / "api/v1/drill", json=body) as response:
        assert response.status == 200, await response.text()
        return msgspec.json.decode(await response.read(), type=Drilling)


async def ready(site: Site) -> dict[str, str]:
    assert site.app.admin_url is not None
    async with site.session.get(site.app.admin_url / "readyz") as response:
        found: dict[str, str] = await response.json()
        return found


async def pull(site: Site, image: Image, tag: str) -> list[int]:
    """The statuses."""
    paths = [f"manifests/{tag}", *(f"blobs/{each}" for each in (image.config, *image.layers))]
    statuses = [(await site.get(f"/v2/library/app/{path}"))[0] for path in paths]
    going_on = site.app.composition.fills.in_flight()
    await asyncio.gather(*(each.task for each in going_on if each.task))
    return statuses


async def test_what_is_here_is_served_and_the_rest_is_listed(
    serve: Serve, upstream: Upstream, clock: Clock, events: LogCapture
) -> None:
    here = upstream.image("library/app", "1", [b"here"])
    there = upstream.image("library/app", "2", [b"there"])
    site = await serve(upstream)
    assert (await ask(site, "GET")) == Drilling(
        running=False, begun=0.0, seconds=0.0, left=0.0, namespaces=[], missed=[], untold=0
    )
    assert await pull(site, here, "1") == [200] * 3
    assert (await site.get("/v2/library/app/manifests/9"))[0] == 404
    clock.advance(1)
    begun = await ask(site, "POST", {"seconds": 600})
    assert (begun.running, begun.left, begun.missed) == (True, 600, [])
    assert "entrepot_drill 1.0" in await site.metrics()
    assert await ready(site) == {"status": "ready", "drill": "upstreams are cut off for 600 s more"}
    clock.advance(599)
    upstream.clear()
    assert await pull(site, here, "1") == [200] * 3  # whatever its age
    assert await pull(site, there, "2") == [404] * 3
    status, _, body = await site.get("/v2/library/app/manifests/2")
    assert (status, b"is cut off by a drill" in body) == (404, True)
    assert upstream.log == []
    found = await ask(site, "GET")
    wanted = [("manifest", "2", 2), ("blob", there.config, 1), ("blob", there.layers[0], 1)]
    assert [(each.kind, each.reference, each.count) for each in found.missed] == wanted
    assert {(each.repository, each.client) for each in found.missed} == {(NAME, "127.0.0.1")}
    clock.advance(1)  # its time is up, whoever watches
    assert (await ask(site, "GET")).running is False
    assert await ready(site) == {"status": "ready"}
    assert await pull(site, there, "2") == [200] * 3
    ended = await ask(site, "DELETE")
    assert (ended.running, len(ended.missed)) == (False, 3)
    assert "entrepot_drill 0.0" in await site.metrics()
    assert [each["event"] for each in events.entries if each["event"].startswith("drill.")] == [
        "drill.begun",
        "drill.ended",
    ]


async def test_what_upstream_has_not_is_no_failure_of_the_drill(serve: Serve, upstream: Upstream) -> None:
    upstream.image("library/app", "1")
    site = await serve(upstream)
    assert (await site.get("/v2/library/app/manifests/9"))[0] == 404
    await ask(site, "POST", {"seconds": 600})
    assert (await site.get("/v2/library/app/manifests/9"))[0] == 404
    assert (await ask(site, "DELETE")).missed == []


async def test_one_namespace_and_one_drill_at_a_time(serve: Serve, upstream: Upstream) -> None:
    image = upstream.image("library/app", "1")
    site = await serve(upstream, more={"other.example": {"upstream": upstream.url}})
    await ask(site, "POST", {"seconds": 600, "namespaces": ["other.example"]})
    assert await pull(site, image, "1") == [200] * 3
    assert (await site.get("/v2/other.example/library/app/manifests/1"))[0] == 404
    url = f"{site.app.admin_url}/api/v1/drill"
    async with site.session.post(url, json={"seconds": 1}) as response:
        assert response.status == 403
        assert "a drill is running for 600 s more" in (await response.json())["error"]
    found = await ask(site, "DELETE")
    assert [each.repository for each in found.missed] == ["other.example/library/app"]
    assert (await site.get("/v2/other.example/library/app/manifests/1"))[0] == 200
    await ask(site, "POST", {"seconds": 1})
    await ask(site, "DELETE")


async def test_listings_that_were_seen_are_served(serve: Serve, upstream: Upstream) -> None:
    image = upstream.image("library/app", "1")
    site = await serve(upstream)
    for path in ("tags/list", f"referrers/{image.digest}"):
        assert (await site.get(f"/v2/library/app/{path}"))[0] == 200
    await ask(site, "POST", {"seconds": 600})
    for path in ("tags/list", f"referrers/{image.digest}"):
        assert (await site.get(f"/v2/library/app/{path}"))[0] == 200
    assert (await site.get("/v2/library/other/tags/list"))[0] == 404
    found = await ask(site, "DELETE")
    assert [(each.kind, each.repository) for each in found.missed] == [("tags", "docker.io/library/other")]


@pytest.mark.housekeeping
async def test_housekeeping_is_put_off_and_does_not_fail(
    serve: Serve, upstream: Upstream, events: LogCapture
) -> None:
    image = upstream.image("library/app", "1", [b"pinned" * 100])
    other = upstream.image("library/app", "2", [b"warmed" * 100])
    holds = [Hold(asyncio.Event(), after=None) for _ in range(2)]
    for each, hold in zip((image, other), holds, strict=True):
        upstream.next("GET", each.layers[0], hold)
    site = await serve(
        upstream,
        top={
            "pins": [{"match": f"{NAME}:1", "keep_fresh": "1h"}],
            "warm": [{"images": ["app:2"], "every": "1h"}],
        },
    )
    await asyncio.gather(*(hold.reached.wait() for hold in holds))  # the keeper has begun with both
    await ask(site, "POST", {"seconds": 600})
    for work in (site.app.housekeeper._refresh, site.app.housekeeper._warm):
        await work()
    assert not [each for each in events.entries if each["event"] in FETCHED]
    assert (await ask(site, "DELETE")).missed == []
    for hold in holds:
        hold.gate.set()
    for work in (site.app.housekeeper._refresh, site.app.housekeeper._warm):
        await work()
    told = {each["event"] for each in events.entries if each["event"] in FETCHED}
    assert "warm.done" in told
    assert not told & {"pin.failed", "warm.failed"}
    assert all(site.app.composition.store.holds(Digest(each.layers[0])) for each in (image, other))


FETCHED = ("pin.failed", "pin.refreshed", "warm.failed", "warm.done")


# Several processes


async def told(server: Server, method: str, body: Any = None) -> dict[str, Any]:
    body = {} if method == "DELETE" else body
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, f"{server.admin_url}/api/v1/drill", json=body) as response,
    ):
        assert response.status == 200, await response.text()
        found: dict[str, Any] = await response.json()
        return found


def missed(found: dict[str, Any]) -> dict[str, int]:
    return {each["reference"]: each["count"] for each in found["missed"]}


@pytest.mark.clients
async def test_all_workers_are_cut_off_and_tell(place: Place, upstream: Upstream) -> None:
    upstream.image("library/app", "1")
    server = await place.start()
    one, other = await server.workers()
    await one.get("/v2/library/app/manifests/1")
    await told(server, "POST", {"seconds": 3600})
    assert await server.metric("entrepot_drill") == 1
    upstream.clear()
    for worker in (one, other):
        await worker.get("/v2/library/app/manifests/1")
        await worker.get("/v2/library/app/manifests/2", 404)
    await one.get("/v2/library/app/manifests/3", 404)
    assert upstream.log == []
    assert missed(await told(server, "GET")) == {"2": 2, "3": 1}
    found = await told(server, "DELETE")
    assert (found["running"], missed(found)) == (False, {"2": 2, "3": 1})
    assert await server.metric("entrepot_drill") == 0
    upstream.image("library/app", "2")
    for worker in (one, other):
        await worker.get("/v2/library/app/manifests/2")
    await server.stop()


@pytest.mark.clients
@pytest.mark.errors("worker.died", "keeper.died")
async def test_who_comes_new_takes_part(place: Place, upstream: Upstream) -> None:
    upstream.image("library/app", "1")
    server = await place.start()
    await told(server, "POST", {"seconds": 3600})
    first, second = server.pids()
    os.kill(first, signal.SIGKILL)
    replaced = await server.heard("worker.replaced")
    worker = await server.worker(next(pid for pid in server.pids() if pid != second))
    assert worker.pid != first, replaced
    await worker.get("/v2/library/app/manifests/1", 404)
    assert missed(await told(server, "GET")) == {"1": 1}
    os.kill(server.keeper(), signal.SIGKILL)
    await server.heard("keeper.replaced")
    found = await told(server, "GET")
    assert (found["running"], missed(found)) == (True, {"1": 1})
    assert await server.metric("entrepot_drill") == 1
    await told(server, "DELETE")
    await worker.get("/v2/library/app/manifests/1")
    # A drill is over with its server.
    await told(server, "POST", {"seconds": 3600})
    await server.stop()
    again = await place.start()
    assert (await told(again, "GET"))["running"] is False
    await again.stop()

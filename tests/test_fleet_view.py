"""One view of a fleet: whichever replica an operator asks, it answers for all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web

from proxy.admin import fleet as asking
from proxy.admin import reports
from proxy.admin.answers import Answers
from proxy.admin.api.client import AdminClient, OperationFailed
from proxy.admin.combination import COMBINE, drilling
from proxy.admin.fleet import Fleet
from proxy.admin.operations import OPERATIONS
from proxy.cli.history import history_tables
from proxy.cli.maintenance import scrub_tables
from proxy.upstream.peers import PEER, SECRET
from proxy.upstream.replicas import EXCHANGE, PATH, FleetRequest
from storage.oci import Digest, Tag
from tests import fleet as fleets
from tests.conftest import OPEN, Clock
from tests.fleet import Replica, Replicas, free_ports, replicas
from tests.pulls import FRESH
from tests.test_peers import BUSYBOX, LATEST, NAME, cached, image_of
from tests.upstream import Hold, Upstream

TAG = f"{NAME}:latest"
POLICY = {"moves": [{"name": "approved", "approval": True, "tags": ["latest"]}], "journal": "7d"}


class Operator:
    """An operator at one replica, who hears warnings."""

    def __init__(self, replica: Replica) -> None:
        assert replica.app.admin_url is not None
        self.url = replica.url
        self.warnings: list[str] = []
        self.ask = AdminClient(replica.session, replica.app.admin_url, None, self.warnings.append)


def operators(fleet: Replicas) -> list[Operator]:
    return [Operator(each) for each in fleet.all]


def joined(replica: Replica) -> Fleet:
    fleet = replica.app._member.fleet
    assert fleet is not None
    return fleet


@pytest.fixture
async def fleet(tmp_path: Path, clock: Clock, upstream: Upstream) -> AsyncIterator[Replicas]:
    async with replicas(3, tmp_path, clock, cached(upstream)) as fleet:
        yield fleet


async def pulled(replica: Replica, path: str = LATEST) -> None:
    status, _, body = await replica.get(path)
    assert status == 200, body


def test_each_operation_that_is_done_everywhere_has_its_answers_combined() -> None:
    assert set(COMBINE) == {each.name for each in OPERATIONS.values() if each.everywhere}


# What replicas know


async def test_what_is_stored_is_told_by_replica(fleet: Replicas, upstream: Upstream) -> None:
    image_of(upstream)
    owner, *others = fleet.ranked(NAME)
    await pulled(owner)
    for each in operators(fleet):
        (row,) = (await each.ask.repositories()).repositories
        assert (row.repository, row.replica) == (NAME, owner.url)
        (image,) = (await each.ask.images()).images
        assert (image.tag, image.replica) == ("latest", owner.url)
        assert (await each.ask.show(TAG)).digest == image.digest
        assert each.warnings == []
    for replica in others:
        await pulled(replica)
    for each in operators(fleet):  # of another name, since an answer is kept for a moment
        (row,) = (await each.ask.repositories("docker.io")).repositories
        assert row.replica is None
        (image,) = (await each.ask.images("docker.io")).images
        assert image.replica is None


async def test_who_answers_for_itself_alone_says_so(fleet: Replicas, upstream: Upstream) -> None:
    image_of(upstream)
    owner, *others = fleet.ranked(NAME)
    for replica in (owner, others[0]):
        await pulled(replica)
        one = Operator(replica)
        scrub = await one.ask.scrub()
        assert {scrub.replica, (await one.ask.scrubbing()).replica} == {replica.url}
        found = await one.ask.find("docker.io/**")
        assert (found.replica, found.matched) == (replica.url, 1)
        for table in scrub_tables(scrub, 0.0):
            assert any(replica.url.removeprefix("http://") in note for note in table.notes)
    found = await Operator(others[1]).ask.find("docker.io/**")
    assert (found.replica, found.matched) == (others[1].url, 0)
    alone = msgspec.structs.replace(scrub, replica=None)
    assert not any("replica" in note for table in scrub_tables(alone, 0.0) for note in table.notes)


async def test_the_history_of_a_tag_is_told_by_replica(
    fleet: Replicas, upstream: Upstream, clock: Clock
) -> None:
    image_of(upstream)
    owner, other, third = fleet.ranked(NAME)
    start = clock()
    for replica in (owner, other):
        await pulled(replica)
        clock.advance(60)
    shown = [(row.since - start, row.replica) for row in (await Operator(third).ask.history(TAG)).rows]
    assert shown == [(60.0, other.url), (0.0, owner.url)]
    for replica in fleet.all:
        await pulled(replica)
    former = await Operator(third).ask.history(TAG)
    clock.advance(FRESH + 1)
    moved = upstream.image("library/busybox", "latest", [b"another layer"])
    for replica in fleet.all:
        await pulled(replica)
    for each in operators(fleet):
        found = await each.ask.history(TAG)
        assert [(row.digest, row.since, row.replica) for row in found.rows[:1]] == [
            (moved.digest, clock(), None)
        ]
        assert [row.replica for row in found.rows[1:]] == [row.replica for row in former.rows]
        (table,) = history_tables(found, clock())
        assert [row[-1] for row in table.rows][:2] == ["all", third.url.removeprefix("http://")]


async def test_pages_have_each_image_once(fleet: Replicas, upstream: Upstream) -> None:
    for number in range(7):
        upstream.image("library/busybox", f"t{number}", [b"a layer"])
        for replica in fleet.all[number % 3 : number % 3 + 1 + number % 2]:
            await pulled(replica, f"{BUSYBOX}/manifests/t{number}")
    (one, *_) = operators(fleet)
    names, last = [], ""
    while True:
        page = await one.ask.images("*", 2, last)
        tags = list(dict.fromkeys(each.tag for each in page.images))
        assert len(tags) <= 2
        names += tags
        if page.next is None:
            break
        last = page.next
    assert names == [f"t{number}" for number in range(7)]


async def test_the_tree_says_who_stores_what(fleet: Replicas, upstream: Upstream, clock: Clock) -> None:
    image = image_of(upstream)
    owner, other, third = fleet.ranked(NAME)
    await pulled(owner)
    layer, _ = image.layers
    await pulled(third, f"{BUSYBOX}/blobs/{layer}")
    stored = {str(layer): {*(each.url for each in fleet.ranked(str(layer))[:1]), third.url}}
    for each in operators(fleet):
        tree = await each.ask.show(TAG)
        assert (tree.node.present, tree.node.replicas) == (True, [owner.url])
        for node in tree.node.children:
            # What a repository shows is known to the one that has asked for it alone.
            assert node.present == (node.digest in stored and owner.url in node.replicas), node
    with pytest.raises(OperationFailed, match="is not stored"):
        await operators(fleet)[0].ask.show(f"{NAME}:other")
    moved = image_of(upstream, b"a newer layer")
    clock.advance(10_000)
    await pulled(other)
    tree = await Operator(owner).ask.show(TAG)
    assert {each.digest for each in tree.elsewhere} <= {str(moved.digest), str(image.digest)}


async def test_stats_are_sums(fleet: Replicas, upstream: Upstream) -> None:
    image = image_of(upstream)
    for replica in fleet.all:
        for path in ("manifests/latest", f"blobs/{image.layers[0]}"):
            await pulled(replica, f"{BUSYBOX}/{path}")
    found = await operators(fleet)[1].ask.stats()
    (cache,) = found.namespaces
    assert (cache.requests, found.total.requests) == (6, 6)
    assert [each.total.requests for each in found.replicas] == [2, 2, 2]
    assert {each.replica for each in found.replicas} == set(fleet.urls)
    assert found.total.sent_bytes == sum(each.total.sent_bytes for each in found.replicas)
    assert found.total.received_bytes == upstream.bytes_sent + len(image.content)
    (day,) = found.days
    assert (day.requests, day.upstream_requests) == (6, len(upstream.log))
    assert (day.bytes_saved, day.requests_saved) == (found.total.bytes_saved, found.total.requests_saved)
    assert found.stored_bytes == sum(each.stored_bytes for each in found.replicas) > 0


async def test_activity_is_that_of_all(fleet: Replicas, upstream: Upstream) -> None:
    image_of(upstream)
    for replica in fleet.all:
        for _ in range(10):
            await pulled(replica, f"{BUSYBOX}/manifests/latest")
    found = await operators(fleet)[0].ask.activity()
    assert (found.processes, found.requests, found.served + found.misses) == (3, 30, 30)
    waited = [each.first for each in found.slowest]
    assert len(waited) == 20 and waited == sorted(waited, reverse=True)
    assert {each.replica for each in found.slowest} == set(fleet.urls)
    assert found.free_bytes > 0 and found.limit is None


async def test_fills_are_told_by_replica(fleet: Replicas, upstream: Upstream) -> None:
    layer = b"0123456789abcdef" * (1 << 16)
    digest = upstream.blob("library/busybox", layer)
    upstream.next("GET", digest, Hold(gate := asyncio.Event(), after=1 << 19))
    owner, other, _ = fleet.ranked(str(digest))
    async with other.request("GET", f"{BUSYBOX}/blobs/{digest}") as response:
        await response.content.readexactly(1 << 18)
        for each in operators(fleet):
            rows = await each.ask.fills()
            assert {(row.digest, row.replica) for row in rows} == {
                (str(digest), owner.url),
                (str(digest), other.url),
            }
        gate.set()
        await response.read()


async def test_why_says_where_a_pull_would_do_something_else(fleet: Replicas, upstream: Upstream) -> None:
    image_of(upstream)
    owner, *others = fleet.ranked(NAME)
    await pulled(owner)
    found = await Operator(owner).ask.why(TAG)
    assert found.verdict == "hit"
    assert {(each.replica, each.verdict) for each in found.elsewhere} == {
        (each.url, "miss") for each in others
    }
    for replica in others:
        await pulled(replica)
    assert (await Operator(owner).ask.why(TAG)).elsewhere == []


async def test_an_image_is_ready_if_any_replica_has_it(fleet: Replicas, upstream: Upstream) -> None:
    image = image_of(upstream)
    owner, other, _ = fleet.ranked(NAME)
    assert (await Operator(owner).ask.warm(TAG)).here
    (row,) = await Operator(other).ask.ready([TAG])
    assert (row.state, row.replica, row.digest) == ("complete", owner.url, str(image.digest))
    (row,) = await Operator(owner).ask.ready([TAG])
    assert (row.state, row.replica) == ("complete", None)


async def test_the_web_page_says_whose_rows_it_shows(
    tmp_path: Path, clock: Clock, upstream: Upstream
) -> None:
    image_of(upstream)
    async with replicas(3, tmp_path, clock, cached(upstream), {"admin_ui": "on"}) as fleet:
        owner, other, third = fleet.ranked(NAME)
        await pulled(owner)
        await third.stop()
        page = str(other.app.admin_url).rstrip("/") + "/ui/"
        tags = f"repository?name={NAME}"
        for screen in ("repositories", "", "storage", "transfers", "policy", "audit", tags):
            async with other.session.get(page + screen) as response:
                assert response.status == 200, await response.text()
                text = await response.text()
            if screen in ("repositories", "storage", "transfers"):
                assert f"{third.url} cannot be reached" in text, screen
            if screen == "repositories":
                assert f'{NAME}</a> <small class="soft">{owner.url.removeprefix("http://")}</small>' in text
            if screen == tags:
                assert f' <small class="soft">{other.url.removeprefix("http://")}</small></p>' in text


# What operators do


async def test_a_purge_reaches_all(fleet: Replicas, upstream: Upstream) -> None:
    image_of(upstream)
    for replica in fleet.all:
        await pulled(replica)
    one, other, _ = operators(fleet)
    would = await one.ask.purge(TAG, dry_run=True)
    assert (would.references, would.manifests) == ([TAG], 3)
    assert len((await other.ask.images()).images) == 1
    purged = await one.ask.purge(TAG)
    assert (purged.references, purged.manifests) == ([TAG], 3)
    for each in operators(fleet):  # also what another one had answered a moment ago
        assert (await each.ask.images()).images == []


async def test_pins_are_those_of_all(fleet: Replicas, upstream: Upstream) -> None:
    one, other, third = operators(fleet)
    (row,) = await one.ask.pin("busybox", 3600.0, ["linux/amd64"])
    assert (row.pattern, row.replica) == (NAME, None)
    for each in (one, other, third):
        assert [(row.pattern, row.keep_fresh, row.replica) for row in await each.ask.pins()] == [
            (NAME, 3600.0, None)
        ]
    # What each has of it differs.
    image_of(upstream)
    owner = fleet.ranked(NAME)[0]
    await pulled(owner)
    rows = await other.ask.pins()
    assert {row.replica: row.references for row in rows} == {
        url: 1 if url == owner.url else 0 for url in fleet.urls
    }
    assert (await other.ask.unpin(NAME)).pattern == NAME
    for each in (one, other, third):
        assert await each.ask.pins() == []
    with pytest.raises(OperationFailed, match="is not pinned"):
        await third.ask.unpin(NAME)


async def test_a_drill_cuts_all_off(fleet: Replicas, upstream: Upstream) -> None:
    image_of(upstream)
    one, other, third = operators(fleet)
    assert (await one.ask.begin_drill(600.0)).running
    for number, replica in enumerate(fleet.all):
        assert (await replica.get(f"{BUSYBOX}/manifests/t{number}"))[0] != 200
    found = await other.ask.drill()
    assert found.running
    assert {(row.reference, row.replica) for row in found.missed} >= {
        (f"t{number}", url) for number, url in enumerate(fleet.urls)
    }
    with pytest.raises(OperationFailed, match="a drill is running"):
        await other.ask.begin_drill(600.0)
    assert not (await third.ask.end_drill()).running
    assert [(await each.ask.drill()).running for each in (one, other, third)] == [False] * 3
    for replica in fleet.all:
        await pulled(replica)
    assert third.warnings == []


async def test_a_replica_that_joins_a_drill_later_is_asked_for_what_failed(
    fleet: Replicas, clock: Clock, upstream: Upstream
) -> None:
    image_of(upstream)
    await fleet.all[2].stop()
    one = operators(fleet)[0]
    await one.ask.begin_drill(600.0)
    clock.advance(100)
    late = await fleet.start(2)
    await joined(late).exchange()
    assert (await late.get(LATEST))[0] != 200
    for ask in (one.ask.drill, one.ask.end_drill, one.ask.drill):
        assert fleet.urls[2] in {row.replica for row in (await ask()).missed}


def drill_of(begun: float, seconds: float, running: bool, failed: str) -> reports.Drilling:
    row = reports.MissedRow(
        client="10.0.0.9",
        kind="manifest",
        repository="docker.io/a/b",
        reference=failed,
        count=1,
        first=begun,
        last=begun,
    )
    left = seconds / 2 if running else 0.0
    return reports.Drilling(
        running=running, begun=begun, seconds=seconds, left=left, namespaces=[], missed=[row], untold=1
    )


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ((1000.0, 600.0, True), True),
        ((1003.0, 600.0, True), True),
        ((1100.0, 500.0, True), True),  # it learned of it later, or its clock is ahead
        ((1100.0, 500.0, False), True),  # and it has ended there
        ((940.0, 600.0, True), True),  # its clock is behind
        ((1000.0, 600.0, False), True),  # it was told the end
        ((200.0, 600.0, False), False),
        ((940.0, 600.0, False), False),
        ((0.0, 0.0, False), False),
    ],
)
def test_what_failed_is_that_of_one_drill(other: tuple[float, float, bool], same: bool) -> None:
    found = {"http://a": drill_of(1000.0, 600.0, True, "1"), "http://b": drill_of(*other, "2")}
    for answers in (found, dict(reversed(found.items()))):
        combined = drilling(Answers(answers))
        assert combined.running
        assert combined.left == 300.0
        assert {row.replica for row in combined.missed} == (set(found) if same else {"http://a"})
        assert combined.untold == len(combined.missed)


async def test_decisions_about_tags_reach_all(tmp_path: Path, clock: Clock, upstream: Upstream) -> None:
    async with replicas(3, tmp_path, clock, cached(upstream, fresh_for="1m"), {"policy": POLICY}) as fleet:
        old = image_of(upstream)
        for replica in fleet.all:
            await pulled(replica)
        new = image_of(upstream, b"a newer layer")
        clock.advance(3600)
        for replica in fleet.all:
            await pulled(replica)
        one, other, third = operators(fleet)
        rows = await one.ask.held()  # by the owner: the others were given what it holds
        assert {(row.digest, row.candidate, row.replica) for row in rows} == {
            (str(old.digest), str(new.digest), fleet.ranked(NAME)[0].url)
        }
        assert (await other.ask.approve(f"{TAG}@{new.digest}")).digest == str(new.digest)
        assert [await each.ask.held() for each in (one, other, third)] == [[], [], []]
        clock.advance(3600)
        for replica in fleet.all:
            assert (await replica.get(LATEST))[1]["Docker-Content-Digest"] == str(new.digest)
        made = await third.ask.override("busybox:latest", 600.0, "an incident")
        assert made.image == TAG
        for each in (one, other, third):
            assert [(row.image, row.replica) for row in await each.ask.overrides()] == [(TAG, None)]
        await one.ask.end_override(TAG)
        assert [await each.ask.overrides() for each in (one, other, third)] == [[], [], []]
        clients = await one.ask.pulled("1d")
        assert {row.replica for row in clients} == set(fleet.urls)
        assert sum(row.count for row in clients) == 9


async def test_a_refresh_reaches_those_that_have_the_image(
    fleet: Replicas, upstream: Upstream, clock: Clock
) -> None:
    image_of(upstream)
    owner, other, third = fleet.ranked(NAME)
    await pulled(owner)
    await pulled(other)
    moved = image_of(upstream, b"a newer layer")
    done = await Operator(owner).ask.refresh(TAG)
    assert done.digest == str(moved.digest)
    _, headers, _ = await other.get(LATEST)
    assert headers["Docker-Content-Digest"] == str(moved.digest)
    assert (await Operator(owner).ask.why(TAG)).elsewhere[0].replica == third.url
    assert upstream.bytes_sent < 10_000


async def test_private_registries_of_their_own_are_collected_by_each(
    tmp_path: Path, clock: Clock, upstream: Upstream
) -> None:
    stores = {"local": {"store": {}}}
    async with replicas(2, tmp_path, clock, cached(upstream), {"access": OPEN}, stores) as fleet:
        for number, replica in enumerate(fleet.all):
            content = f"content of {number}".encode()
            path = f"/v2/local/app{number}/blobs/uploads/?digest={Digest.of(content)}"
            async with replica.request("POST", path, data=content) as response:
                assert response.status == 201
        found = await operators(fleet)[0].ask.collect(dry_run=True)
        assert found.repositories == 2
        assert {row.repository: row.replica for row in found.rows} == {
            f"local/app{number}": url for number, url in enumerate(fleet.urls)
        }


# Replicas that were down


@pytest.mark.clients
async def test_one_that_was_down_does_what_it_has_missed(
    fleet: Replicas, upstream: Upstream, clock: Clock
) -> None:
    image_of(upstream)
    for replica in fleet.all:
        await pulled(replica)
    one, other, late = operators(fleet)
    await late.ask.pin("a/removed")
    await fleet.all[2].stop()
    for operator in (one, other):
        operator.warnings.clear()
    await one.ask.purge(TAG)
    await other.ask.pin("a/kept", 60.0)
    await one.ask.unpin("a/removed")
    await one.ask.begin_drill(600.0, ["docker.io"])
    await one.ask.pin("a/short")
    await other.ask.unpin("a/short")
    for operator in (one, other):
        (warning,) = operator.warnings
        assert f"{late.url} cannot be reached" in warning
    clock.advance(100)
    back = await fleet.start(2)
    await joined(back).exchange()
    state = back.app.composition
    assert [pin.pattern for pin in state.pins.list()] == ["docker.io/a/kept"]
    assert state.store.pointer(NAME, Tag("latest")) is None
    assert 499 <= state.drill.left <= 500
    for operator in operators(fleet):
        assert [row.replica for row in await operator.ask.pins()] == [None]
        assert (await operator.ask.drill()).running
    # It tells others as well, and each does an act once.
    await fleet.all[0].stop()
    await operators(fleet)[2].ask.end_drill()
    first = await fleet.start(0)
    await joined(first).exchange()
    assert first.app.composition.drill.left == 0
    assert [pin.pattern for pin in first.app.composition.pins.list()] == ["docker.io/a/kept"]


async def test_an_act_whose_time_has_passed_is_not_done(fleet: Replicas, clock: Clock) -> None:
    await fleet.all[2].stop()
    await operators(fleet)[0].ask.begin_drill(60.0)
    clock.advance(61)
    back = await fleet.start(2)
    await joined(back).exchange()
    assert back.app.composition.drill.left == 0
    await joined(back).exchange()


async def test_the_last_act_counts_whatever_the_order_in_which_it_is_learned(
    fleet: Replicas, clock: Clock
) -> None:
    one, other, _ = operators(fleet)
    await one.ask.pin("a/b", 60.0)
    clock.advance(-30)  # the clock of the one that is asked now is behind
    await other.ask.pin("a/b", 90.0)
    for replica in fleet.all:
        await joined(replica).exchange()
        assert [pin.keep_fresh for pin in replica.app.composition.pins.list()] == [90.0]
    stale = FleetRequest("pin", {"pattern": "a/b", "keep_fresh": 60.0}, one.url, "pin docker.io/a/b", 1.0)
    status, body = await joined(fleet.all[0]).answer(msgspec.json.encode(stale))
    assert (status, b"later pin" in body) == (403, True)
    assert [pin.keep_fresh for pin in fleet.all[0].app.composition.pins.list()] == [90.0]


async def test_of_acts_at_the_same_time_all_take_the_same_one_for_the_last(fleet: Replicas) -> None:
    """As two operators make them at once, at replicas whose clocks are behind that of a third."""
    pattern = "docker.io/a/b"
    told = [
        FleetRequest(operation, arguments, "http://x", f"pin {pattern}", 7e9)
        for operation, arguments in [
            ("pin", {"pattern": pattern, "keep_fresh": 60.0}),
            ("unpin", {"pattern": pattern}),
            ("pin", {"pattern": pattern, "keep_fresh": 90.0}),
        ]
    ]
    for replica, order in zip(fleet.all, ([0, 1, 2], [2, 0, 1], [1]), strict=True):
        for number in order:
            await joined(replica).answer(msgspec.json.encode(told[number]))
    for replica in fleet.all:
        await joined(replica).exchange()
    known = [await joined(replica)._acts.known() for replica in fleet.all]
    assert known[0] == known[1] == known[2]
    found = [[pin.keep_fresh for pin in replica.app.composition.pins.list()] for replica in fleet.all]
    assert found[0] == found[1] == found[2]


async def test_replicas_that_took_different_acts_for_the_last_learn_of_it(fleet: Replicas) -> None:
    """Though they know acts about the same subjects, of the same times."""
    for replica, seconds in zip(fleet.all, (60.0, 90.0, 60.0), strict=True):
        arguments = {"pattern": "docker.io/a/b", "keep_fresh": seconds}
        request = FleetRequest("pin", arguments, "http://x", "pin docker.io/a/b", 5.0)
        assert (await joined(replica).answer(msgspec.json.encode(request)))[0] == 200
    for replica in fleet.all:
        await joined(replica).exchange()
        assert [pin.keep_fresh for pin in replica.app.composition.pins.list()] == [90.0]


async def test_an_act_that_finds_nothing_still_replaces_an_earlier_one(fleet: Replicas, clock: Clock) -> None:
    replica = fleet.all[0]
    undone = FleetRequest("unpin", {"pattern": "a/b"}, "http://x", "pin docker.io/a/b", clock() + 60)
    status, _ = await joined(replica).answer(msgspec.json.encode(undone))
    assert status == 404
    done = FleetRequest("pin", {"pattern": "a/b"}, "http://x", "pin docker.io/a/b", clock())
    status, body = await joined(replica).answer(msgspec.json.encode(done))
    assert (status, b"later unpin" in body) == (403, True)
    assert not replica.app.composition.pins.list()


# Replicas that cannot be asked


Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@pytest.fixture
async def odd(tmp_path: Path, clock: Clock, upstream: Upstream) -> AsyncIterator[Any]:
    """A replica, and another one that answers as the test says."""
    requests: list[str] = []
    answers: list[Handler] = []

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        requests.append(msgspec.json.decode(await request.read(), type=FleetRequest).operation)
        return await answers[-1](request)

    server = web.ServerRunner(web.Server(handle), shutdown_timeout=0.1)
    await server.setup()
    (own,) = free_ports(1)
    site = web.TCPSite(server, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{server.addresses[0][1]}"
    tree = {
        "listen": f"127.0.0.1:{own}",
        "peers": {"urls": [f"http://127.0.0.1:{own}", url], "secret": fleets.SECRET},
        "namespaces": {"docker.io": cached(upstream)},
    }

    async def unknown(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(status=404)

    answers.append(unknown)
    replica = await fleets.start(tmp_path / "one", clock, tree)
    try:
        yield replica, url, requests, answers
    finally:
        await replica.stop()
        await server.cleanup()


@pytest.mark.parametrize(
    ("status", "body", "headers", "warning"),
    [
        (404, b"not found", {}, "does not take the secret, or has another version"),
        (200, b"[]", {}, "does not take the secret, or has another version"),
        (200, b'{"surprise": ', {PEER: "x"}, "has another version: its answer cannot be read"),
        (200, b'[{"pattern": 7}]', {PEER: "x"}, "has another version: its answer cannot be read"),
        (
            405,
            b'{"error": "pins is no operation", "code": "UNSUPPORTED"}',
            {PEER: "x"},
            ": pins is no operation",
        ),
        (503, b'{"error": "its disk is full", "code": "UNAVAILABLE"}', {PEER: "x"}, ": its disk is full"),
        (302, b"", {PEER: "x", "Location": "/elsewhere"}, "has another version: its answer cannot be read"),
    ],
)
async def test_a_replica_that_answers_something_else_is_named(
    odd: Any, status: int, body: bytes, headers: dict[str, str], warning: str
) -> None:
    replica, url, _, answers = odd

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(status=status, body=body, headers=headers)

    answers.append(answer)
    operator = Operator(replica)
    await operator.ask.pin("a/b")
    assert [row.pattern for row in await operator.ask.pins()] == ["docker.io/a/b"]
    (said,) = operator.warnings
    assert said.startswith(url)
    assert warning in said


async def test_a_silent_replica_is_waited_for_a_bounded_time(
    odd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica, url, _, answers = odd
    monkeypatch.setattr(asking, "READ", 0.05)
    never = asyncio.Event()

    async def silent(request: web.BaseRequest) -> web.StreamResponse:
        await never.wait()
        return web.Response()

    answers.append(silent)
    operator = Operator(replica)
    assert await operator.ask.pins() == []
    assert operator.warnings == [f"{url} has not answered within 0 s"]
    never.set()


async def test_what_a_replica_asks_for_is_asked_of_no_third(odd: Any) -> None:
    replica, url, requests, _ = odd
    headers = {SECRET: fleets.SECRET, PEER: url}
    for operation, arguments in (("repositories", {}), ("purge", {"pattern": "a/b"}), ("pins", {})):
        body = msgspec.json.encode(FleetRequest(operation, arguments, url))
        async with replica.request("POST", PATH, data=body, headers=headers) as response:
            assert (response.status, response.headers[PEER]) == (200, replica.url)
    assert set(requests) <= {EXCHANGE}  # which it asks for by itself


async def test_only_other_replicas_are_answered(odd: Any) -> None:
    replica, url, _, _ = odd
    body = msgspec.json.encode(FleetRequest("pins", {}, url))
    for headers in ({}, {SECRET: "another-secret-altogether", PEER: url}, {PEER: url}):
        async with replica.request("POST", PATH, data=body, headers=headers) as response:
            assert response.status == 404
            assert PEER not in response.headers
    good = {SECRET: fleets.SECRET, PEER: url}
    async with replica.request("GET", PATH, headers=good) as response:
        assert response.status == 404
    for content, status in (
        (b"no json", 400),
        (msgspec.json.encode(FleetRequest("delete", {"pattern": "a/b"})), 405),
        (msgspec.json.encode(FleetRequest("policy", {"ref": "a/b"})), 405),
        (msgspec.json.encode(FleetRequest("nothing", {})), 405),
        (msgspec.json.encode(FleetRequest("purge", {"patern": "a/b"})), 400),
    ):
        async with replica.request("POST", PATH, data=content, headers=good) as response:
            assert (response.status, response.headers[PEER]) == (status, replica.url)


async def test_without_other_replicas_nothing_is_asked(
    tmp_path: Path, clock: Clock, upstream: Upstream
) -> None:
    tree = {"listen": "127.0.0.1:0", "namespaces": {"docker.io": cached(upstream)}}
    alone = await fleets.start(tmp_path, clock, tree)
    try:
        async with alone.request("POST", PATH, data=b"{}", headers={SECRET: fleets.SECRET}) as response:
            assert response.status == 404
        operator = Operator(alone)
        await operator.ask.pin("a/b")
        (row,) = await operator.ask.pins()
        assert (row.replica, operator.warnings) == (None, [])
    finally:
        await alone.stop()


async def test_one_that_does_not_know_itself_says_so(
    tmp_path: Path, clock: Clock, upstream: Upstream
) -> None:
    (port,) = free_ports(1)
    peers = {"urls": [f"http://192.0.2.1:{port}", f"http://192.0.2.2:{port}"], "secret": fleets.SECRET}
    tree = {"listen": "127.0.0.1:0", "peers": peers, "namespaces": {"docker.io": cached(upstream)}}
    lost = await fleets.start(tmp_path, clock, tree)
    try:
        operator = Operator(lost)
        assert await operator.ask.pins() == []
        assert operator.warnings == ["this replica does not know which of the peers it is: set peers.self"]
    finally:
        await lost.stop()


async def test_warnings_are_kept_with_a_summary(fleet: Replicas) -> None:
    await fleet.all[2].stop()
    for _ in range(2):
        async with fleet.all[0].session.get(f"{fleet.all[0].app.admin_url}/api/v1/repositories") as response:
            assert fleet.urls[2] in response.headers["Entrepot-Warnings"]
    async with fleet.all[0].session.get(f"{fleet.all[0].app.admin_url}/api/v1/image?ref=none") as response:
        assert response.status == 404
        assert fleet.urls[2] in response.headers["Entrepot-Warnings"]

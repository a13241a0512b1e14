"""Replicas that ask each other before they ask the upstream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from structlog.testing import LogCapture

from proxy.admin.notices import heard
from proxy.config.schema import Config
from proxy.upstream import fleet as upstream_fleet
from proxy.upstream.membership import REFRESH, Membership
from proxy.upstream.peers import KNOWN, ORIGIN, PEER, SECRET
from proxy.upstream.rendezvous import ranked
from storage.oci import Digest, Tag
from tests import fleet as fleets
from tests.authority import Authority
from tests.conftest import Clock
from tests.fleet import Replica, Replicas, replicas
from tests.upstream import Basic, Hold, Image, Status, Upstream

NAME = "docker.io/library/busybox"
BUSYBOX = f"/v2/{NAME}"
LATEST = f"{BUSYBOX}/manifests/latest"
QUICK = {"connect_timeout": "2s", "header_timeout": "2s", "progress_timeout": "2s"}


def cached(upstream: Upstream, **keys: Any) -> dict[str, Any]:
    return {"upstream": {"url": upstream.url, **QUICK}, "revalidate_timeout": "1h", **keys}


@pytest.fixture
async def fleet(tmp_path: Path, clock: Clock, upstream: Upstream) -> AsyncIterator[Replicas]:
    async with replicas(3, tmp_path, clock, cached(upstream)) as fleet:
        yield fleet


def image_of(upstream: Upstream, *layers: bytes) -> Image:
    return upstream.image("library/busybox", "latest", layers=list(layers or (b"a layer", b"another")))


def from_a_peer(asker: str, **more: str) -> dict[str, str]:
    return {PEER: asker, SECRET: fleets.SECRET, **more}


async def request(
    replica: Replica, path: str, headers: dict[str, str], method: str = "GET"
) -> tuple[int, Any, bytes]:
    async with replica.request(method, path, headers=headers) as response:
        return response.status, response.headers, await response.read()


# What is asked of whom


@pytest.mark.clients
async def test_what_all_replicas_ask_for_is_fetched_once(fleet: Replicas, upstream: Upstream) -> None:
    image = image_of(upstream, b"a layer" * 1000, b"another")
    paths = ["manifests/latest", f"manifests/{image.digest}"]
    paths += [f"blobs/{each}" for each in (image.config, *image.layers)]
    for path in paths:
        answers = await asyncio.gather(*(each.get(f"{BUSYBOX}/{path}") for each in fleet.all * 3))
        assert {status for status, _, _ in answers} == {200}
        bodies = {body for *_, body in answers}
        assert len(bodies) == 1
        if path.startswith("blobs"):
            assert str(Digest.of(bodies.pop())) == path.removeprefix("blobs/")
        else:
            assert bodies == {image.content}
    assert len(upstream.log) == len(paths) - 1  # the manifest has come with its tag


@pytest.mark.clients
async def test_what_another_replica_receives_is_followed(fleet: Replicas, upstream: Upstream) -> None:
    layer = b"0123456789abcdef" * (1 << 16)
    digest = upstream.blob("library/busybox", layer)
    hold = Hold(gate := asyncio.Event(), after=1 << 19)
    upstream.next("GET", digest, hold)
    async with AsyncExitStack() as stack:
        responses = [
            await stack.enter_async_context(each.request("GET", f"{BUSYBOX}/blobs/{digest}"))
            for each in fleet.all
        ]
        for each in responses:  # all but the byte that is withheld at each replica on the way
            assert await each.content.readexactly((1 << 19) - 2) == layer[: (1 << 19) - 2]
        gate.set()
        for each in responses:
            assert await each.read() == layer[(1 << 19) - 2 :]
    assert upstream.bytes_sent == len(layer)


async def test_ranges_of_a_lazy_cache_come_from_the_owner(
    tmp_path: Path, clock: Clock, upstream: Upstream
) -> None:
    layer = b"0123456789abcdef" * (1 << 16)
    digest = upstream.blob("library/busybox", layer)
    lazy = cached(upstream, lazy=True, lazy_until={"share": "100%", "clients": "never"})
    async with replicas(3, tmp_path, clock, lazy) as fleet:
        for each in fleet.all:
            status, _, body = await each.get(f"{BUSYBOX}/blobs/{digest}", Range="bytes=1000-1999")
            assert (status, body) == (206, layer[1000:2000])
        assert upstream.bytes_sent == 1000
        for each in fleet.all:
            for path in (each.directory / "cache" / "partial").iterdir():
                path.unlink()


async def test_an_unknown_is_asked_for_once(fleet: Replicas, upstream: Upstream, clock: Clock) -> None:
    image_of(upstream)
    paths = [f"manifests/{Digest.of(b'nothing')}", "manifests/none", f"blobs/{Digest.of(b'no blob')}"]
    for path in paths:
        for each in fleet.all * 2:
            assert (await each.get(f"{BUSYBOX}/{path}"))[0] == 404
    assert len(upstream.log) == 3
    clock.advance(10)  # negative_for: it is not twice as long for those who heard it from the owner
    for path in paths:
        for each in fleet.all:
            assert (await each.get(f"{BUSYBOX}/{path}"))[0] == 404
    assert len(upstream.log) == 6


async def test_listings_are_asked_for_once(fleet: Replicas, upstream: Upstream) -> None:
    image = image_of(upstream)
    for path in ("tags/list", f"referrers/{image.digest}"):
        answers = [await each.get(f"{BUSYBOX}/{path}") for each in fleet.all]
        assert len({body for *_, body in answers}) == 1
        assert answers[0][0] == 200
    assert len(upstream.log) == 2


# Tags


@pytest.mark.clients
async def test_a_tag_is_asked_for_once_a_period_over_the_fleet(
    fleet: Replicas, upstream: Upstream, clock: Clock
) -> None:
    image_of(upstream)
    begun = clock.now
    for minute in range(41):
        clock.now = begun + 60 * minute
        for each in fleet.all[minute % 3 :] + fleet.all[: minute % 3]:
            status, headers, _ = await each.get(LATEST)
            assert status == 200
            assert int(headers.get("Age", 0)) < 600
    assert upstream.log.count("GET manifest library/busybox:latest") == 1
    assert sum("HEAD" in each for each in upstream.log) == 4


async def test_no_replica_serves_what_was_confirmed_too_long_ago(
    fleet: Replicas, upstream: Upstream, clock: Clock
) -> None:
    image_of(upstream)
    owner, second, _ = fleet.ranked(NAME)
    assert (await owner.get(LATEST))[0] == 200
    clock.advance(590)
    status, headers, _ = await second.get(LATEST)
    assert status == 200
    assert headers["Cache-Control"] == "public, max-age=600"  # clients subtract the age
    moved = upstream.image("library/busybox", "latest", layers=[b"newer"])
    clock.advance(10)
    assert (await second.get(LATEST))[2] == moved.content


async def test_a_tag_that_moved_is_fetched_once(fleet: Replicas, upstream: Upstream, clock: Clock) -> None:
    image_of(upstream)
    for each in fleet.all:
        await each.get(LATEST)
    moved = upstream.image("library/busybox", "latest", layers=[b"newer"])
    clock.advance(601)
    upstream.clear()
    for each in fleet.all:
        assert (await each.get(LATEST))[2] == moved.content
    assert len(upstream.log) == 2  # HEAD, and GET by digest


async def test_while_the_upstream_is_down_each_serves_what_it_has(
    fleet: Replicas, upstream: Upstream, clock: Clock
) -> None:
    image = image_of(upstream)
    owner, second, third = fleet.ranked(NAME)
    for each in (owner, second):
        await each.get(LATEST)
    clock.advance(601)
    await upstream.stop()
    for each in (second, owner, third):  # the third has the stale manifest from another
        status, _, body = await each.get(LATEST)
        assert (status, body) == (200, image.content)
    await upstream.start()
    moved = upstream.image("library/busybox", "latest", layers=[b"newer"])
    clock.advance(31)
    for each in (third, second, owner):
        assert (await each.get(LATEST))[2] == moved.content


# Who is a replica


async def test_without_the_right_secret_it_is_a_client(
    tmp_path: Path, clock: Clock, upstream: Upstream
) -> None:
    image_of(upstream)
    rules = [{"who": ["authenticated"], "may": ["pull"]}]
    top = {"access": {"rules": rules}}
    more = {"local": {"store": {}}}
    guarded = cached(upstream, visibility="rules")
    async with replicas(2, tmp_path, clock, guarded, top, more) as fleet:
        owner, other = fleet.ranked(NAME)
        for wrong in ("", "x", fleets.SECRET[:-1], f"{fleets.SECRET}x", "\N{SNOWMAN}"):
            headers = {PEER: "http://10.0.0.1:1", SECRET: wrong}
            status, answered, _ = await request(owner, LATEST, headers)
            assert status == 403
            assert not {PEER, ORIGIN, KNOWN} & set(answered)
        url = fleet.urls[fleet.all.index(other)]
        status, answered, _ = await request(owner, LATEST, from_a_peer(url))
        assert status == 200
        assert answered[PEER] == fleet.urls[fleet.all.index(owner)]
        # Nothing else is for replicas: neither what is pushed, nor what changes something.
        assert (await request(owner, "/v2/local/a/manifests/b", from_a_peer(url)))[0] == 404
        assert (await request(owner, LATEST, from_a_peer(url), "DELETE"))[0] in (401, 403, 405)
        assert (await request(owner, "/v2/", from_a_peer(url)))[1][PEER] == answered[PEER]


async def test_another_replica_is_no_client(fleet: Replicas, upstream: Upstream, events: LogCapture) -> None:
    image_of(upstream)
    owner, other, _ = fleet.ranked(NAME)
    await other.get(LATEST)
    text = await owner.metrics()
    assert 'entrepot_peer_requests_total{kind="manifest",namespace="docker.io",result="miss"} 1.0' in text
    assert 'entrepot_requests_total{kind="manifest"' not in text
    served = [each for each in events.entries if each["event"] == "request.served"]
    assert {each.get("user") for each in served} <= {None, "", fleet.urls[fleet.all.index(other)]}


async def test_no_request_is_passed_on_twice(fleet: Replicas, upstream: Upstream) -> None:
    """One who is asked asks no other replica, also if another is the owner."""
    image_of(upstream)
    owner, second, third = fleet.ranked(NAME)
    url = fleet.urls[fleet.all.index(third)]
    assert (await request(second, LATEST, from_a_peer(url)))[0] == 200
    assert "entrepot_peer_requests_total{" not in await owner.metrics()
    assert len(upstream.log) == 1


async def test_who_owns_it_less_does_not_answer(fleet: Replicas, upstream: Upstream) -> None:
    image_of(upstream)
    owner, second, _ = fleet.ranked(NAME)
    url = fleet.urls[fleet.all.index(owner)]
    status, _, body = await request(second, LATEST, from_a_peer(url))
    assert status == 421
    assert b"is asked for" in body
    assert upstream.log == []


@pytest.mark.clients
async def test_replicas_with_different_lists_do_not_wait_for_each_other(
    tmp_path: Path, clock: Clock, upstream: Upstream
) -> None:
    """Each knows another fleet: none has itself in all lists, and each is named in two of them."""
    layers = [upstream.blob("library/busybox", b"a layer %d" % number) for number in range(24)]
    ports = fleets.free_ports(4)
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    lists = [urls[:2], urls[1:3], [urls[2], urls[0], urls[3]], urls]
    async with AsyncExitStack() as stack:
        sites = []
        for at, known in enumerate(lists):
            peers = {"urls": known, "secret": fleets.SECRET, "self": urls[at]}
            tree = {"listen": f"127.0.0.1:{ports[at]}", "peers": peers}
            tree["namespaces"] = {"docker.io": cached(upstream)}
            site = await fleets.start(tmp_path / str(at), clock, tree)
            stack.push_async_callback(site.stop)
            sites.append(site)
        asked = [each.get(f"{BUSYBOX}/blobs/{digest}") for digest in layers for each in sites]
        async with asyncio.timeout(10):  # far less than a request to another replica may take
            answers = await asyncio.gather(*asked)
        for number, (status, _, body) in enumerate(answers):
            assert (status, body) == (200, b"a layer %d" % (number // 4))


@pytest.mark.clients
async def test_replicas_with_all_slots_in_use_do_not_wait_for_each_other(
    tmp_path: Path, clock: Clock, upstream: Upstream
) -> None:
    """Each uses its only slot for a blob of the other, and has clients that wait for blobs of its own."""
    blobs = {upstream.blob("library/busybox", each): each for each in (b"%d" % n * 1000 for n in range(16))}
    async with replicas(2, tmp_path, clock, cached(upstream), {"limits": {"fills": 1}}) as fleet:
        one, other = fleet.all
        owned = {each: [digest for digest in blobs if fleet.ranked(digest)[0] is each] for each in fleet.all}
        wanted = [(one, digest) for digest in owned[other]] + [(other, digest) for digest in owned[one]]
        wanted += [(each, digest) for each in fleet.all for digest in owned[each]]
        async with asyncio.timeout(10):  # less than a request to another replica may take
            answers = await asyncio.gather(
                *(each.get(f"{BUSYBOX}/blobs/{digest}") for each, digest in wanted)
            )
        for (_, digest), (status, _, body) in zip(wanted, answers, strict=True):
            assert (status, body) == (200, blobs[digest])
    assert upstream.bytes_sent == sum(map(len, blobs.values()))


# When a replica does not help


@pytest.mark.clients
async def test_an_owner_that_is_down_is_left_out(
    fleet: Replicas, upstream: Upstream, events: LogCapture
) -> None:
    contents = [b"layer %d" % number for number in range(12)]
    layers = [upstream.blob("library/busybox", each) for each in contents]
    dead, *others = fleet.ranked(layers[0])
    await dead.stop()
    for digest, content in zip(layers, contents, strict=True):
        for each in others:
            status, _, body = await each.get(f"{BUSYBOX}/blobs/{digest}")
            assert (status, body) == (200, content)
    assert len(upstream.log) == len(layers)
    opened = [each for each in events.entries if each["event"] == "upstream.opened"]
    url = fleet.urls[fleet.all.index(dead)]
    assert {(each["namespace"], f"http://{each['host']}") for each in opened} == {("peers", url)}
    assert len(opened) <= 2  # once at each of the others, if it has asked at all


async def test_an_owner_that_fails_is_passed_by(fleet: Replicas, upstream: Upstream) -> None:
    """Its own network may be at fault: who asked it asks the upstream."""
    image_of(upstream)
    _, second, _ = fleet.ranked(NAME)
    upstream.next("GET", "latest", Status(500))
    status, _, _ = await second.get(LATEST)
    assert status == 200
    assert len(upstream.log) == 2


async def test_an_owner_with_another_configuration_is_passed_by(
    tmp_path: Path, clock: Clock, upstream: Upstream
) -> None:
    """Its tags may be older than they may be here."""
    image_of(upstream)
    ports = fleets.free_ports(2)
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    owner, other = (urls.index(each) for each in ranked(NAME, urls))
    async with AsyncExitStack() as stack:
        sites = {}
        for at, fresh_for in ((owner, "1d"), (other, "10m")):
            tree = {
                "listen": f"127.0.0.1:{ports[at]}",
                "peers": {"urls": urls, "secret": fleets.SECRET},
                "namespaces": {"docker.io": cached(upstream, fresh_for=fresh_for)},
            }
            sites[at] = await fleets.start(tmp_path / str(at), clock, tree)
            stack.push_async_callback(sites[at].stop)
        assert (await sites[owner].get(LATEST))[0] == 200
        moved = upstream.image("library/busybox", "latest", layers=[b"newer"])
        clock.advance(601)
        assert (await sites[other].get(LATEST))[2] == moved.content


async def test_an_owner_that_is_offline_is_passed_by(
    tmp_path: Path, clock: Clock, upstream: Upstream
) -> None:
    image = image_of(upstream)
    ports = fleets.free_ports(2)
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    owner, other = (urls.index(each) for each in ranked(NAME, urls))
    async with AsyncExitStack() as stack:
        sites = {}
        for at in (owner, other):
            tree = {
                "listen": f"127.0.0.1:{ports[at]}",
                "peers": {"urls": urls, "secret": fleets.SECRET},
                "namespaces": {"docker.io": cached(upstream, offline=at == owner)},
            }
            sites[at] = await fleets.start(tmp_path / str(at), clock, tree)
            stack.push_async_callback(sites[at].stop)
        assert (await sites[other].get(LATEST))[2] == image.content
        assert (await sites[owner].get(LATEST))[0] == 404


async def test_a_replica_with_another_secret_is_passed_by(
    tmp_path: Path, clock: Clock, upstream: Upstream
) -> None:
    image = image_of(upstream)
    ports = fleets.free_ports(2)
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    async with AsyncExitStack() as stack:
        for at in range(2):
            tree = {
                "listen": f"127.0.0.1:{ports[at]}",
                "peers": {"urls": urls, "secret": f"{fleets.SECRET}-{at}"},
                "namespaces": {"docker.io": cached(upstream)},
            }
            site = await fleets.start(tmp_path / str(at), clock, tree)
            stack.push_async_callback(site.stop)
            assert (await site.get(LATEST))[2] == image.content


@pytest.mark.errors("fill.failed")
async def test_wrong_content_of_an_owner_is_never_complete_and_then_passed_by(
    fleet: Replicas, upstream: Upstream
) -> None:
    content = b"a layer" * 1000
    digest = upstream.blob("library/busybox", content)
    owner, second, _ = fleet.ranked(digest)
    await owner.app.composition.caches["docker.io"].fill_blob("library/busybox", Digest.parse(digest))
    (stored,) = (owner.directory / "cache" / "blobs").glob("sha256/*/*")
    stored.chmod(0o600)
    stored.write_bytes(b"A" + content[1:])
    with pytest.raises(aiohttp.ClientPayloadError):
        await second.get(f"{BUSYBOX}/blobs/{digest}")
    assert (await second.get(f"{BUSYBOX}/blobs/{digest}"))[::2] == (200, content)
    assert len(upstream.log) == 2


# What all know of the upstream


async def test_an_account_whose_requests_are_used_up_is_not_used_by_others(
    tmp_path: Path, clock: Clock, upstream: Upstream
) -> None:
    upstream.auth = Basic("ci", "password")
    upstream.ratelimit = (100, 21600, 0)
    image_of(upstream)
    login = {"username": "ci", "password": "password"}
    namespace = {"upstream": {"url": upstream.url, **QUICK, **login}}
    async with replicas(3, tmp_path, clock, namespace) as fleet:
        _, second, third = fleet.ranked(NAME)
        assert (await second.get(LATEST))[0] == 503
        asked = len([each for each in upstream.requests if "Authorization" in each.headers])
        assert asked == 1
        for each in (second, third):
            status, headers, _ = await each.get(f"{BUSYBOX}/manifests/other")
            assert status == 503
            assert "Retry-After" in headers
        asked = len([each for each in upstream.requests if "Authorization" in each.headers])
        assert asked == 1


# What clients may pull


@pytest.mark.clients
async def test_the_policy_is_applied_where_the_client_is(
    tmp_path: Path, clock: Clock, upstream: Upstream
) -> None:
    """An owner of a blob does not know what leads to it."""
    image = upstream.image("library/busybox", "v1", layers=[b"one", b"two"])
    upstream.image("library/busybox", "latest", layers=[b"three"])
    rules = [{"name": "releases", "action": "allow", "tags": ["v*"]}]
    policy = {"policy": {"rules": rules, "allow_list": ["docker.io/*"]}}
    async with replicas(3, tmp_path, clock, cached(upstream), policy) as fleet:
        for each in fleet.all:
            assert (await each.get(f"{BUSYBOX}/manifests/latest"))[0] == 403
            assert (await each.get(f"{BUSYBOX}/manifests/v1"))[0] == 200
            for digest in (image.config, *image.layers):
                assert (await each.get(f"{BUSYBOX}/blobs/{digest}"))[0] == 200
    assert len(upstream.log) == 4


# What an operator sees


async def test_why_names_the_owner(fleet: Replicas, upstream: Upstream) -> None:
    image_of(upstream)
    owner, second, third = fleet.ranked(NAME)
    url = fleet.urls[fleet.all.index(owner)]
    for each in (owner, second):
        found = (await _why(each))["owner"]
        assert (found["url"], found["own"], found["open"]) == (url, each is owner, False)
    await owner.stop()
    await third.get(LATEST)
    found = (await _why(third))["owner"]
    assert (found["url"], found["open"]) == (url, True)
    assert found["error"]


async def _why(replica: Replica) -> dict[str, Any]:
    assert replica.app.admin_url is not None
    async with replica.session.get(replica.app.admin_url / "api/v1/why", params={"ref": NAME}) as response:
        return dict(json.loads(await response.read()))


async def test_who_asks_for_news_gets_those_of_the_upstream(fleet: Replicas, upstream: Upstream) -> None:
    image_of(upstream)
    owner, second, _ = fleet.ranked(NAME)
    for each in (owner, second):
        await each.get(LATEST)
    moved = upstream.image("library/busybox", "latest", layers=[b"newer"])
    result, manifest, _ = await second.app.composition.caches["docker.io"].revalidate(
        "library/busybox", Tag("latest")
    )
    assert (result, manifest.content) == ("miss", moved.content)
    assert (await second.get(LATEST))[2] == moved.content


# What only others have


@pytest.mark.clients
async def test_what_any_replica_has_is_served_while_the_upstream_is_down(
    fleet: Replicas, upstream: Upstream, clock: Clock
) -> None:
    image = image_of(upstream)
    blob = image.layers[0]
    content = {
        f"{BUSYBOX}/manifests/{image.digest}": image.content,
        LATEST: image.content,
        f"{BUSYBOX}/blobs/{blob}": b"a layer",
    }
    with_manifests, with_blob = fleet.ranked(NAME)[-1], fleet.ranked(blob)[-1]
    for path in content:
        assert (await (with_blob if "/blobs/" in path else with_manifests).get(path))[0] == 200
    for each in fleet.all:  # the others have evicted it since, its owners too
        if each is not with_manifests:
            await _forget(each, "tag ", "manifest ")
        if each is not with_blob:
            await _forget(each, "link ")
    await upstream.stop()
    clock.advance(601)
    for path, expected in content.items():
        for each in fleet.all:
            status, _, body = await each.get(path)
            assert (status, body) == (200, expected)
    nowhere = f"{BUSYBOX}/blobs/{Digest.of(b'nowhere')}"
    assert [(await each.get(nowhere))[0] for each in fleet.all] == [502, 502, 502]


async def _forget(replica: Replica, *kinds: str) -> None:
    store = replica.app.composition.store
    for kind in kinds:
        for key in list(store.records.keys(kind)):
            await store.run(store.records.delete, key)


async def test_the_remaining_requests_are_in_the_metrics_of_all(fleet: Replicas, upstream: Upstream) -> None:
    upstream.ratelimit = (100, 21600, 60)
    image_of(upstream)
    _, second, _ = fleet.ranked(NAME)
    assert (await second.get(LATEST))[0] == 200
    labels = f'credential="0",host="{upstream.url.removeprefix("http://")}",namespace="docker.io"'
    assert f"entrepot_ratelimit_remaining{{{labels}}} 59.0" in await second.metrics()


# A name for all, and TLS


@pytest.mark.clients
async def test_replicas_that_are_found_by_a_name_and_reached_by_tls(
    tmp_path: Path, clock: Clock, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At addresses of their own, and with certificates for the name, as behind a headless service."""
    addresses = ["127.0.0.2", "127.0.0.3", "127.0.0.4"]
    (port,) = fleets.free_ports(1)
    ready, ticks = addresses[:2], Clock()

    async def resolve(name: str, number: int) -> list[str]:
        assert (name, number) == ("localhost", port)
        return list(ready)

    def membership_of(config: Config) -> Membership:
        assert config.peers is not None
        return Membership(config.peers, port, encrypted=True, resolve=resolve, ticks=ticks)

    monkeypatch.setattr(upstream_fleet, "membership_of", membership_of)
    authority = Authority(tmp_path)
    peers = {"dns": f"localhost:{port}", "secret": fleets.SECRET, "ca_file": str(authority.ca)}
    contents = [b"layer %d" % number for number in range(6)]
    layers = [upstream.blob("library/busybox", each) for each in contents]
    async with AsyncExitStack() as stack:
        sites = []
        for number, address in enumerate(addresses):
            tree = {
                "listen": f"{address}:{port}",
                "tls": authority.issue("server", "localhost"),
                # All of them are addresses of this machine.
                "peers": {**peers, "self": f"https://{address}:{port}"},
                "namespaces": {"docker.io": cached(upstream)},
            }
            site = await fleets.start(tmp_path / str(number), clock, tree)
            stack.push_async_callback(site.stop)
            sites.append(site)
        await _each_once(sites[:2], layers[:3], contents[:3], upstream)
        ready.append(addresses[2])
        ticks.advance(REFRESH)
        for each in sites:
            fleet = each.app.composition.peers
            assert fleet is not None
            await fleet.known()
            await asyncio.wait([fleet._membership._looking])  # type: ignore[list-item]
            assert len(await fleet.known()) == 3
        upstream.clear()
        await _each_once(sites, layers[3:], contents[3:], upstream)
        operators = sites[0].app._member.fleet
        assert operators is not None
        with heard() as warnings:
            await operators.pin("a/b")
            assert [each.replica for each in await operators.pins()] == [None]
        assert warnings == []


async def _each_once(
    sites: list[Replica], layers: list[str], contents: list[bytes], upstream: Upstream
) -> None:
    for digest, content in zip(layers, contents, strict=True):
        for each in sites:
            status, _, body = await each.get(f"{BUSYBOX}/blobs/{digest}")
            assert (status, body) == (200, content)
    assert len(upstream.log) == len(layers)


# An owner that is silent


class SilentOwner:
    """A replica that takes connections, and answers nothing, or only that it is there."""

    def __init__(self) -> None:
        self.pinged, self.asked = asyncio.Event(), asyncio.Event()
        self.answers = asyncio.Event()
        self.there = False
        self.begins = -1  # the number of bytes after which it is silent
        self.content, self.headers = b"", {"": ""}

    async def __aenter__(self) -> SilentOwner:
        self._runner = web.ServerRunner(web.Server(self._handle), shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *error: object) -> None:
        self.answers.set()
        await self._runner.cleanup()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/v2/" and self.there:
            self.pinged.set()
        elif request.method == "GET" and "/blobs/" in request.path:
            self.asked.set()
            if self.begins >= 0:
                return await self._begin(request)
            await self.answers.wait()
            return web.Response(body=self.content, headers=self.headers)
        else:
            await self.answers.wait()
        return web.Response()

    async def _begin(self, request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers=self.headers)
        response.content_length = len(self.content)
        await response.prepare(request)
        await response.write(self.content[: self.begins])
        await self.answers.wait()
        await response.write(self.content[self.begins :])
        return response


@pytest.fixture
async def silent(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    clock: Clock,
    upstream: Upstream,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[tuple[Replica, SilentOwner, str]]:
    """A replica, and one that owns a blob and is silent; the digest of the blob, of `param` bytes or more."""
    monkeypatch.setattr(upstream_fleet, "SILENCE", 0.02)
    async with SilentOwner() as owner:
        (port,) = fleets.free_ports(1)
        urls = [f"http://127.0.0.1:{port}", owner.url]
        size = getattr(request, "param", 0)
        contents = ((b"a layer %d" % number).ljust(size, b"!") for number in range(1000))
        owner.content = next(each for each in contents if ranked(str(Digest.of(each)), urls)[0] == owner.url)
        digest = upstream.blob("library/busybox", owner.content)
        tree = {
            "listen": urls[0].removeprefix("http://"),
            "peers": {"urls": urls, "secret": fleets.SECRET},
            "namespaces": {"docker.io": cached(upstream)},
        }
        replica = await fleets.start(tmp_path / "one", clock, tree)
        try:
            yield replica, owner, digest
        finally:
            await replica.stop()


async def test_an_owner_that_answers_nothing_is_not_waited_for(
    silent: tuple[Replica, SilentOwner, str], upstream: Upstream, events: LogCapture
) -> None:
    replica, owner, digest = silent
    status, _, body = await replica.get(f"{BUSYBOX}/blobs/{digest}")
    assert (status, body) == (200, owner.content)
    assert owner.asked.is_set()
    assert len(upstream.log) == 1
    (opened,) = [each for each in events.entries if each["event"] == "upstream.opened"]
    assert opened["namespace"] == "peers"


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer to the question whether an owner is there may take long, on a machine that has much to do."""
    monkeypatch.setattr("proxy.upstream.liveness.ANSWERED", 1000)


@pytest.mark.usefixtures("patient")
async def test_an_owner_that_is_there_may_take_its_time(
    silent: tuple[Replica, SilentOwner, str], upstream: Upstream
) -> None:
    replica, owner, digest = silent
    owner.there = True
    peers = replica.app.composition.peers
    assert peers is not None
    owner.headers = {PEER: owner.url, ORIGIN: peers._owners["docker.io"]._origin}
    pulling = asyncio.create_task(replica.get(f"{BUSYBOX}/blobs/{digest}"))
    await owner.pinged.wait()
    owner.answers.set()
    status, _, body = await pulling
    assert (status, body) == (200, owner.content)
    assert upstream.log == []


# A large body is read past the event loop, see socket_body.py.
SIZES = pytest.mark.parametrize("silent", [60_000, 3_000_000], indirect=True)


def begin(replica: Replica, owner: SilentOwner, size: int) -> None:
    """Have the owner begin to send the blob, with `size` bytes before it is silent."""
    peers = replica.app.composition.peers
    assert peers is not None
    owner.begins = size
    owner.headers = {PEER: owner.url, ORIGIN: peers._owners["docker.io"]._origin}


@SIZES
async def test_an_owner_that_is_gone_in_the_middle_is_not_waited_for(
    silent: tuple[Replica, SilentOwner, str], upstream: Upstream
) -> None:
    replica, owner, digest = silent
    begin(replica, owner, len(owner.content) // 2)
    status, _, body = await replica.get(f"{BUSYBOX}/blobs/{digest}")
    assert (status, body) == (200, owner.content)
    assert owner.asked.is_set()
    assert not owner.answers.is_set()
    assert upstream.bytes_sent < len(owner.content)  # the rest, by Range


@SIZES
@pytest.mark.usefixtures("patient")
async def test_an_owner_that_is_there_may_pause_in_the_middle(
    silent: tuple[Replica, SilentOwner, str], upstream: Upstream
) -> None:
    replica, owner, digest = silent
    begin(replica, owner, len(owner.content) // 2)
    owner.there = True
    pulling = asyncio.create_task(replica.get(f"{BUSYBOX}/blobs/{digest}"))
    for _ in range(3):  # it is asked again while it is silent
        await owner.pinged.wait()
        owner.pinged.clear()
    owner.answers.set()
    status, _, body = await pulling
    assert (status, body) == (200, owner.content)
    assert upstream.log == []

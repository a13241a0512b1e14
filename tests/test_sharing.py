"""Two servers on one disk, as two workers are: one transfer, one revalidation, whoever is asked.

A lock belongs to an open file, not to a process, so that two servers in one process are as far apart.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path

import aiohttp
import pytest

from proxy.cache import parts
from storage.errors import RegistryError
from tests.conftest import Clock, Serve, Site
from tests.events import Ear
from tests.test_faults import FRESH, LATER, SCENARIOS, Held, Switch, verify_store
from tests.upstream import Bearer, Corrupt, Hold, Status, Upstream, WrongLength

REPOSITORY = "library/alpine"
LAYER = os.urandom(3 << 20)


def requests(upstream: Upstream, digest: str) -> list[str]:
    return [line.replace(f"{REPOSITORY}@{digest[:19]}", "it") for line in upstream.log]


async def pull(site: Site, digest: str) -> bytes:
    status, _, body = await site.get(f"/v2/{REPOSITORY}/blobs/{digest}")
    assert status == 200
    return body


@pytest.fixture
async def sites(serve: Serve, upstream: Upstream, tmp_path: Path) -> list[Site]:
    directory, slow = tmp_path / "shared", {"progress_timeout": "60s"}
    return [await serve(upstream, directory=directory, options=slow, top={"drain": "0s"}) for _ in range(2)]


async def test_a_fill_of_one_worker_is_followed_from_another(sites: list[Site], upstream: Upstream) -> None:
    digest = upstream.blob(REPOSITORY, LAYER)
    hold = Hold(gate := asyncio.Event(), after=1 << 20)
    upstream.next("GET", digest, hold)
    first = asyncio.create_task(pull(sites[0], digest))
    await hold.reached.wait()
    async with sites[1].request("GET", f"/v2/{REPOSITORY}/blobs/{digest}") as response:
        # What is there already comes before the rest is: all but the byte that is withheld.
        begun = await response.content.readexactly((1 << 20) - 1)
        gate.set()
        body = begun + await response.read()
    assert body == LAYER == await first
    assert requests(upstream, digest) == ["GET blob it", "HEAD blob it"]
    assert upstream.bytes_sent == len(LAYER)
    assert await pull(sites[1], digest) == LAYER
    assert len(upstream.log) == 2


async def test_a_fill_whose_worker_ends_is_taken_over(sites: list[Site], upstream: Upstream) -> None:
    digest = upstream.blob(REPOSITORY, LAYER)
    hold = Hold(asyncio.Event(), after=1 << 20)
    upstream.next("GET", digest, hold)
    first = asyncio.create_task(pull(sites[0], digest))
    await hold.reached.wait()
    async with sites[1].request("GET", f"/v2/{REPOSITORY}/blobs/{digest}") as response:
        begun = await response.content.readexactly((1 << 20) - 1)
        await sites[0].app.stop()
        body = begun + await response.read()
    assert hashlib.sha256(body).hexdigest() == hashlib.sha256(LAYER).hexdigest()
    with pytest.raises(aiohttp.ClientError):
        await first
    log = requests(upstream, digest)
    assert log[:2] == ["GET blob it", "HEAD blob it"]
    assert log[2].startswith("GET blob it bytes=1048")
    assert upstream.bytes_sent <= 1.05 * len(LAYER)


async def test_ranges_of_a_fill_of_another_worker(
    sites: list[Site], upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "ASSUMED", 1)
    digest = upstream.blob(REPOSITORY, LAYER)
    path = f"/v2/{REPOSITORY}/blobs/{digest}"
    hold = Hold(asyncio.Event(), after=100_000)
    upstream.next("GET", digest, hold)
    for start in (1_000_000, 2_000_000):
        assert (await sites[0].get(path, Range=f"bytes={start}-{start + 99}"))[2] == LAYER[start:][:100]
    before = len(upstream.log)
    # What is there is read by all, and who has the fill fetches the rest for all.
    for start, more in ((1_000_000, 1), (2_000_000, 1), (3_000_000, 2), (3_000_000, 2)):
        assert (await sites[1].get(path, Range=f"bytes={start}-{start + 99}"))[2] == LAYER[start:][:100]
        assert len(upstream.log) == before + more
    async with sites[1].request("GET", path) as response:
        await response.content.readexactly(99_000)
        await sites[0].app.stop()
        assert await response.read() == LAYER[99_000:]
    assert [each.split()[-1] for each in upstream.log[before + 2 :]] == [
        "bytes=100000-999999",
        "bytes=1000100-1999999",
        "bytes=2000100-2999999",
        "bytes=3000100-",
    ]
    assert upstream.bytes_sent == len(LAYER)


ANSWERS = {
    429: (Status(429, {"Retry-After": "7"}), 503, b"TOOMANYREQUESTS"),
    503: (Status(503, {"Retry-After": "7"}), 502, b"UNAVAILABLE"),
    404: (Status(404), 404, b"BLOB_UNKNOWN"),
}


@pytest.mark.parametrize("later", [None, *ANSWERS])
@pytest.mark.parametrize("lazy", [False, True], ids=["default", "lazy"])
async def test_what_another_worker_is_refused_is_fetched_by_who_follows_it(
    serve: Serve, upstream: Upstream, tmp_path: Path, later: int | None, lazy: bool
) -> None:
    directory, top = tmp_path / "shared", {"fallback": "deny"}
    first, second = [await serve(upstream, directory=directory, top=top, lazy=lazy) for _ in range(2)]
    digest = upstream.blob(REPOSITORY, LAYER)
    path = f"/v2/{REPOSITORY}/blobs/{digest}"
    getting, heading = (Hold(asyncio.Event(), after=None) for _ in range(2))
    upstream.next("GET", digest, ANSWERS[429][0], getting)
    upstream.next("HEAD", digest, heading)
    refused = asyncio.create_task(first.get(path, Range="bytes=1000-1999"))
    await getting.reached.wait()
    answered = asyncio.create_task(second.get(path, Range="bytes=5000-5999"))
    await heading.reached.wait()  # it has seen that the first one transfers the blob
    if later is not None:
        upstream.next("GET", digest, ANSWERS[later][0])
    getting.gate.set()
    status, headers, _ = await refused
    assert (status, headers["Retry-After"]) == (503, "7")
    heading.gate.set()
    ear = Ear()
    status, headers, body = await answered
    if later is None:
        assert (status, body) == (206, LAYER[5000:6000])
        if not lazy:
            await ear.heard("fill.committed")
        for left in (directory / "cache" / "partial").iterdir():
            left.unlink()
    else:
        assert status == ANSWERS[later][1]
        assert ANSWERS[later][2] in body
        assert headers.get("Retry-After") == (None if later == 404 else "7")


@pytest.mark.parametrize("later", ANSWERS)
@pytest.mark.parametrize("span", [{}, {"Range": "bytes=5000-5999"}], ids=["all", "range"])
async def test_who_takes_over_before_the_first_byte_passes_on_what_it_is_answered(
    sites: list[Site], upstream: Upstream, later: int, span: dict[str, str]
) -> None:
    digest = upstream.blob(REPOSITORY, LAYER)
    path = f"/v2/{REPOSITORY}/blobs/{digest}"
    getting, heading = (Hold(asyncio.Event(), after=None) for _ in range(2))
    upstream.next("GET", digest, getting)
    upstream.next("HEAD", digest, heading)
    lost = asyncio.create_task(sites[0].get(path))
    await getting.reached.wait()
    answered = asyncio.create_task(sites[1].get(path, **span))
    await heading.reached.wait()
    heading.gate.set()
    upstream.next("GET", digest, ANSWERS[later][0], times=9)
    await sites[0].app.stop()
    with pytest.raises(aiohttp.ClientError):
        await lost
    status, _, body = await answered
    assert status == ANSWERS[later][1]
    assert ANSWERS[later][2] in body


@pytest.mark.errors("fill.failed")
async def test_who_takes_over_and_is_refused_fails(sites: list[Site], upstream: Upstream) -> None:
    digest = upstream.blob(REPOSITORY, LAYER)
    hold, failed = Hold(asyncio.Event(), after=1 << 20), Ear()
    upstream.next("GET", digest, hold)
    lost = asyncio.create_task(pull(sites[0], digest))
    await hold.reached.wait()
    async with sites[1].request("GET", f"/v2/{REPOSITORY}/blobs/{digest}") as response:
        await response.content.readexactly((1 << 20) - 1)
        upstream.next("GET", digest, Status(403), times=99)
        await sites[0].app.stop()
        with pytest.raises(aiohttp.ClientError):
            await response.read()
    assert "answered 403" in (await failed.heard("fill.failed"))["error"]
    with pytest.raises(aiohttp.ClientError):
        await lost
    for left in sites[1].partial:
        (sites[1].directory / "cache" / "partial" / left).unlink()


@pytest.mark.clients
async def test_ranges_of_all_workers_at_once_come_once(
    sites: list[Site], upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "ASSUMED", 1)
    digest, step = upstream.blob(REPOSITORY, LAYER), len(LAYER) // 16
    path = f"/v2/{REPOSITORY}/blobs/{digest}"
    hold, never = Hold(gate := asyncio.Event(), after=1000), asyncio.Event()
    upstream.next("GET", digest, hold, Hold(never, after=step))
    whole = asyncio.create_task(pull(sites[0], digest))
    await hold.reached.wait()
    starts = [step * each for each in range(1, 16)]
    ranges = [(sites[each % 2], start) for each, start in enumerate(starts * 2)]

    async def ranged(site: Site, start: int) -> bytes:
        status, _, body = await site.get(path, Range=f"bytes={start}-{start + step - 1}")
        assert status == 206
        return body

    pulls = [asyncio.create_task(ranged(*each)) for each in ranges]
    await asyncio.gather(*(each for each, at in zip(pulls, ranges, strict=True) if at[1] != starts[-1]))
    gate.set()  # the last byte needs all
    assert await asyncio.gather(*pulls) == [LAYER[start:][:step] for _, start in ranges]
    assert await whole == LAYER
    never.set()
    assert upstream.bytes_sent == len(LAYER)
    assert sum(line.startswith("HEAD") for line in upstream.log) == 1


async def test_a_fill_that_waits_for_its_turn_is_taken_over_as_well(
    serve: Serve, upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"progress_timeout": "60s", "max_fills": 1}
    one, other = [
        await serve(upstream, directory=tmp_path / "shared", options=options, top={"drain": "0s"})
        for _ in range(2)
    ]
    first, second = upstream.blob(REPOSITORY, LAYER), upstream.blob(REPOSITORY, LAYER[:-1])
    hold = Hold(asyncio.Event(), after=1 << 20)
    upstream.next("GET", first, hold)
    pulls = [asyncio.create_task(pull(one, first))]
    await hold.reached.wait()
    slots, queued = one.app.composition.fills._slots, asyncio.Event()
    turn = slots.turn

    def noted(namespace: str, urged: asyncio.Event) -> AbstractAsyncContextManager[None]:
        queued.set()
        return turn(namespace, urged=urged)

    monkeypatch.setattr(slots, "turn", noted)
    pulls.append(asyncio.create_task(pull(one, second)))
    await queued.wait()
    ear, following = Ear(), Hold(asyncio.Event(), after=None)
    upstream.next("HEAD", second, following)
    followed = asyncio.create_task(pull(other, second))
    await following.reached.wait()
    following.gate.set()
    assert upstream.bytes_sent < len(LAYER)
    await one.app.stop()
    assert await followed == LAYER[:-1]
    assert (await ear.heard("fill.committed"))["digest"] == second
    assert [each.split()[0] for each in requests(upstream, second) if "it" in each] == ["HEAD", "GET"]
    lost = await asyncio.gather(*pulls, return_exceptions=True)
    assert all(isinstance(each, aiohttp.ClientError) for each in lost)
    for each in one.partial:
        (one.directory / "cache" / "partial" / each).unlink()


@pytest.mark.errors("fill.failed")
async def test_wrong_bytes_of_one_worker_reach_no_client_of_another(
    sites: list[Site], upstream: Upstream
) -> None:
    digest = upstream.blob(REPOSITORY, LAYER)
    hold = Hold(gate := asyncio.Event(), after=1 << 20)
    upstream.next("GET", digest, hold, Corrupt(at=5))
    first = asyncio.create_task(pull(sites[0], digest))
    await hold.reached.wait()
    async with sites[1].request("GET", f"/v2/{REPOSITORY}/blobs/{digest}") as response:
        await response.content.readexactly(1000)
        gate.set()
        with pytest.raises(aiohttp.ClientError):
            await response.read()
    with pytest.raises(aiohttp.ClientError):
        await first
    assert await pull(sites[1], digest) == LAYER
    assert await pull(sites[0], digest) == LAYER


async def test_who_was_promised_too_little_by_a_head_gets_no_complete_blob(
    sites: list[Site], upstream: Upstream
) -> None:
    digest = upstream.blob(REPOSITORY, LAYER)
    hold = Hold(gate := asyncio.Event(), after=1 << 20)
    upstream.next("GET", digest, hold)
    upstream.next("HEAD", digest, WrongLength(by=500_000 - len(LAYER)))
    first = asyncio.create_task(pull(sites[0], digest))
    await hold.reached.wait()
    async with sites[1].request("GET", f"/v2/{REPOSITORY}/blobs/{digest}") as response:
        assert response.headers["Content-Length"] == "500000"
        assert await response.content.readexactly(499_999) == LAYER[:499_999]
        gate.set()
        with pytest.raises(aiohttp.ClientError):
            await response.read()
    assert await first == LAYER


async def test_a_tag_is_asked_for_once_in_its_time_over_all_workers(
    sites: list[Site], upstream: Upstream
) -> None:
    image = upstream.image(REPOSITORY, "latest")

    async def tag(site: Site) -> bytes:
        status, _, body = await site.get(f"/v2/{REPOSITORY}/manifests/latest")
        assert status == 200
        return body

    assert await asyncio.gather(*(tag(site) for site in sites * 10)) == [image.content] * 20
    assert upstream.log == ["GET manifest library/alpine:latest"]
    sites[0].clock.advance(601)
    assert await asyncio.gather(*(tag(site) for site in sites * 10)) == [image.content] * 20
    assert upstream.log[1:] == ["HEAD manifest library/alpine:latest"]


# Those after which the two must agree on what came of it: the bytes or their lack, not the manners.
FAULTS = (
    "status 404",
    "status 500",
    "refuse",
    "reset before headers",
    "reset",
    "truncate at once",
    "truncate",
    "corrupt",
    "hold",
    "length too long",
    "length too short",
    "wrong digest",
    "expired token",
    "gzip",
)


@pytest.mark.errors("fill.failed", "upstream.wrong_digest")
@pytest.mark.parametrize("operation", ["tag", "digest", "blob GET", "blob Range"])
@pytest.mark.parametrize("name", FAULTS)
async def test_fault_over_two_workers(
    serve: Serve, upstream: Upstream, clock: Clock, tmp_path: Path, name: str, operation: str
) -> None:
    """What test_faults.py asks of one: cold at both at once, warm at the one that did not fetch it."""
    scenario = SCENARIOS[name]
    if name == "expired token":
        upstream.auth = Bearer()
    directory = tmp_path / "shared"
    one, two = [await serve(upstream, directory=directory, options=scenario.options) for _ in range(2)]
    cold, warm, stale = (Held.put(upstream, f"a/{each}") for each in ("cold", "warm", "stale"))
    ear = Ear()
    for held in (warm, stale):
        assert await held.ask(one, operation) == "exact"
        if operation.startswith("blob"):
            await ear.heard("fill.committed")  # its client had the last byte before
    switch = Switch(upstream, scenario)
    switch.on = True
    upstream.clear()
    assert await warm.ask(two, operation) == "exact"
    assert upstream.log == []
    await asyncio.gather(*(cold.ask(site, operation) for site in (one, two)))
    assert upstream.requests
    clock.advance(FRESH + 1)
    outcomes = await asyncio.gather(*(stale.ask(site, operation) for site in (one, two)))
    if operation != "tag" or name in ("status 500", "refuse"):
        assert outcomes == ["exact", "exact"]
    switch.on = False
    clock.advance(LATER)
    for held in (cold, warm, stale):
        assert [await held.ask(site, operation) for site in (two, one)] == ["exact", "exact"]
    for site in (one, two):
        fills = site.app.composition.fills
        for each in fills.in_flight():  # a range may come before the rest
            with suppress(RegistryError):
                await fills.ended(each.digest)
    for site in (one, two):
        await site.app.stop()
    verify_store(directory)

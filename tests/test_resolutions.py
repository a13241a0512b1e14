"""What tags stood for when clients asked, and that they can be pulled as they were."""

from __future__ import annotations

from contextlib import closing
from datetime import UTC, datetime
from itertools import permutations
from typing import Any

import pytest

from proxy.config.quantities import parse_moment
from storage.disk.records import SQLiteRecords
from storage.keys import MOVES, RESOLVED
from storage.maintenance.resolutions import KEPT, ResolutionJournal, record_resolutions
from storage.oci import Digest
from tests.conftest import OPEN, Clock, Serve, Site
from tests.pulls import code_of
from tests.test_policed import LISTED, policy
from tests.test_policy_moves import COOLDOWN
from tests.upstream import OCI_MANIFEST, Basic, Image, Upstream

A, B, C = (Digest.of(each) for each in (b"a", b"b", b"c"))
DAY = 86400.0


@pytest.fixture
def records(tmp_path: Any) -> Any:
    found = SQLiteRecords(tmp_path / "records")
    yield found
    found.close()


def recorded(records: SQLiteRecords) -> list[tuple[float, Digest]]:
    class Holder:
        pass

    holder: Any = Holder()
    holder.records = records
    return ResolutionJournal(holder).of("x/y", "1")


def record(records: SQLiteRecords, *found: tuple[float, Digest]) -> None:
    records.transaction(lambda batch: record_resolutions(batch, "x/y", "1", found))


def test_only_changes_are_recorded(records: SQLiteRecords) -> None:
    for each in ((1.0, A), (2.0, A), (3.0, B), (4.0, B), (5.0, A), (6.0, C)):
        record(records, each)
    assert recorded(records) == [(1.0, A), (3.0, B), (5.0, A), (6.0, C)]


@pytest.mark.parametrize("order", list(permutations([(1.0, A), (2.0, B), (3.0, C)])))
def test_processes_may_record_late(records: SQLiteRecords, order: list[tuple[float, Digest]]) -> None:
    for each in order:
        record(records, each)
    record(records, (1.5, A), (2.5, B))
    assert recorded(records) == [(1.0, A), (2.0, B), (3.0, C)]


def test_what_was_hidden_by_a_late_record_comes_back(records: SQLiteRecords) -> None:
    record(records, (1.0, A))
    record(records, (5.0, A))
    record(records, (3.0, B))  # by another process
    record(records, (6.0, A))
    assert recorded(records) == [(1.0, A), (3.0, B), (6.0, A)]


def test_the_last_ones_are_kept(records: SQLiteRecords) -> None:
    found = [(float(number), (A, B)[number % 2]) for number in range(KEPT + 5)]
    record(records, *found)
    assert recorded(records) == found[5:]
    records.put(RESOLVED.key("x/y", "1"), b"damaged")
    assert recorded(records) == []


@pytest.mark.parametrize(
    ("text", "when"),
    [
        ("2026-08-01", "2026-08-01T23:59:59+00:00"),
        ("2026-08-01T14:30:00Z", "2026-08-01T14:30:00+00:00"),
        ("2024-02-29", "2024-02-29T23:59:59+00:00"),
    ],
)
def test_moments(text: str, when: str) -> None:
    assert datetime.fromtimestamp(parse_moment(text), UTC).isoformat() == when


@pytest.mark.parametrize(
    "text", ["", "2026-02-30", "2026-8-1", "2026-08-01T14:30Z", "2026-08-01T25:00:00Z", "x"]
)
def test_what_is_no_moment(text: str) -> None:
    with pytest.raises(ValueError, match="expected a date such as 2026-08-01"):
        parse_moment(text)


# Pulls


def day(clock: Clock) -> str:
    return datetime.fromtimestamp(clock.now, UTC).strftime("%Y-%m-%d")


async def pulled(site: Site, tag: str = "latest") -> None:
    assert (await site.get(f"/v2/a/b/manifests/{tag}"))[0] == 200
    await site.app.composition.recorder.flush()


async def moved(site: Site, upstream: Upstream, clock: Clock, tag: str = "latest") -> tuple[Image, str, str]:
    """A tag that moves two days later: what it was, and the two days."""
    old = upstream.image("a/b", tag, [b"old"])
    await pulled(site, tag)
    before = day(clock)
    clock.advance(2 * DAY)
    upstream.image("a/b", tag, [b"new"])
    await pulled(site, tag)
    return old, before, day(clock)


@pytest.mark.clients
async def test_tags_are_pulled_as_they_were(serve: Serve, upstream: Upstream, clock: Clock) -> None:
    site = await serve(upstream)
    begun = clock.now
    old, before, after = await moved(site, upstream, clock)
    new = upstream.repositories["a/b"].tags["latest"]
    upstream.clear()
    for _ in range(3):
        for name in ("a/b", "docker.io/a/b"):
            for method in ("GET", "HEAD"):
                async with site.request(method, f"/v2/@{before}/{name}/manifests/latest") as response:
                    assert response.status == 200
                    assert response.headers["Docker-Content-Digest"] == old.digest
                    assert response.headers["Cache-Control"] == "no-cache"
                    assert await response.read() == (old.content if method == "GET" else b"")
    assert (await site.get(f"/v2/@{after}/a/b/manifests/latest"))[1]["Docker-Content-Digest"] == new
    between = datetime.fromtimestamp(begun + DAY, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    assert (await site.get(f"/v2/@{between}/a/b/manifests/latest"))[2] == old.content
    assert (await site.get("/v2/a/b/manifests/latest"))[1]["Docker-Content-Digest"] == new
    assert upstream.log == []
    assert (await site.get(f"/v2/@{before}/a/b/manifests/{old.digest}"))[2] == old.content
    assert (await site.get(f"/v2/@{before}/a/b/blobs/{old.layers[0]}"))[2] == b"old"
    assert (await site.get(f"/v2/@{before}/a/b/tags/list"))[0] == 200
    answer, _, body = await site.get("/v2/@2020-01-01/a/b/manifests/latest")
    assert (answer, code_of(body)) == (404, "MANIFEST_UNKNOWN")
    assert b"no client had asked for docker.io/a/b:latest by 2020-01-01T23:59:59+00:00" in body


async def test_a_user_may_be_a_date(serve: Serve, upstream: Upstream, clock: Clock) -> None:
    site = await serve(upstream)
    old, before, after = await moved(site, upstream, clock)
    for date, content in ((before, old.content), (after, None)):
        login = Basic(f"asof+{date}", "whatever").header
        for _ in range(3):
            answer, _, body = await site.get("/v2/a/b/manifests/latest", Authorization=login)
            assert answer == 200
            assert (body == content) is (content is not None)
    login = Basic("asof+yesterday", "").header
    answer, _, body = await site.get("/v2/a/b/manifests/latest", Authorization=login)
    assert (answer, code_of(body)) == (400, "NAME_INVALID")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/@2026-13-01/a/b/manifests/latest", 400),
        ("GET", "/v2/@yesterday/a/b/manifests/latest", 404),
        ("GET", "/v2/@2026-08-01/", 404),
        ("GET", "/v2/@2026-08-01/_catalog", 404),
        ("GET", "/v2/@2026-08-01/@2026-08-01/a/b/manifests/latest", 404),
        ("PUT", "/v2/@2026-08-01/local/a/manifests/latest", 405),
        ("DELETE", "/v2/@2026-08-01/local/a/manifests/latest", 405),
        ("POST", "/v2/@2026-08-01/local/a/blobs/uploads/", 404),
    ],
)
async def test_what_cannot_be_asked_of_the_past(
    serve: Serve, upstream: Upstream, method: str, path: str, status: int
) -> None:
    site = await serve(upstream, more={"local": {"store": {}}}, top={"access": OPEN})
    async with site.request(method, path, data=b"{}", headers={"Content-Type": OCI_MANIFEST}) as response:
        assert response.status == status


@pytest.mark.clients
async def test_a_private_registry_has_a_past_too(serve: Serve, upstream: Upstream, clock: Clock) -> None:
    site = await serve(upstream, more={"local": {"store": {"sparse": True}}})
    images = [upstream.image("a/b", None, [each]) for each in (b"old", b"new")]
    days = []
    for image in images:
        url, typed = "/v2/local/a/manifests/v1", {"Content-Type": OCI_MANIFEST}
        async with site.request("PUT", url, data=image.content, headers=typed) as done:
            assert done.status == 201
        assert (await site.get(url))[2] == image.content
        await site.app.composition.recorder.flush()
        days.append(day(clock))
        clock.advance(2 * DAY)
    for date, image in zip(days, images, strict=True):
        assert (await site.get(f"/v2/@{date}/local/a/manifests/v1"))[2] == image.content


@pytest.mark.clients
async def test_the_past_is_judged_by_the_policy_of_now(
    serve: Serve, upstream: Upstream, clock: Clock
) -> None:
    site = await serve(upstream, top={"policy": LISTED})
    old, before, _ = await moved(site, upstream, clock, "v1")
    assert (await site.get(f"/v2/@{before}/a/b/manifests/v1"))[2] == old.content
    await site.app.stop()
    deny = {"name": "bad", "action": "deny", "reason": "it is bad", "tags": ["v1"]}
    site = await serve(upstream, top=policy(deny))
    assert (await site.get(f"/v2/@{before}/a/b/manifests/v1"))[0] == 403


@pytest.mark.clients
async def test_a_tag_of_the_past_is_judged_as_that_tag_however_often_it_moved(
    serve: Serve, upstream: Upstream, clock: Clock
) -> None:
    site = await serve(upstream)
    old, before, _ = await moved(site, upstream, clock, "v1")
    await site.app.stop()
    with closing(SQLiteRecords(site.directory / "cache" / "records")) as records:
        assert records.delete(MOVES.key("docker.io/a/b", "v1"))  # as after many more moves
    deny = {"name": "bad", "action": "deny", "reason": "it is bad", "tags": ["v1"]}
    past = f"/v2/@{before}/a/b/manifests/v1"
    site = await serve(upstream, top=policy(deny))
    for method in ("GET", "HEAD"):
        async with site.request(method, past) as response:
            assert response.status == 403
            assert method == "HEAD" or "bad refuses docker.io/a/b:v1: it is bad" in await response.text()
    await site.app.stop()
    site = await serve(upstream, top={"policy": LISTED})
    assert (await site.get(past))[2] == old.content
    await site.app.stop()
    # Another tag that leads there is no reason to answer what is asked for by this one.
    site = await serve(upstream, top=policy(deny))
    upstream.repositories["a/b"].tags["edge"] = old.digest
    assert (await site.get("/v2/a/b/manifests/edge"))[2] == old.content
    assert (await site.get(past))[0] == 403
    assert (await site.get(f"/v2/@{before}/a/b/manifests/{old.digest}"))[2] == old.content


async def test_what_clients_were_given_is_recorded_and_not_what_a_tag_would_move_to(
    serve: Serve, upstream: Upstream, clock: Clock
) -> None:
    site = await serve(upstream, top=policy(moves=[COOLDOWN]))
    old, _, after = await moved(site, upstream, clock)
    assert (await site.get(f"/v2/@{after}/a/b/manifests/latest"))[2] == old.content
    journal = ResolutionJournal(site.app.composition.store)
    assert [digest for _, digest in journal.of("docker.io/a/b", "latest")] == [old.digest]

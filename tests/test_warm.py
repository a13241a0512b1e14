"""Warming: whole images, once and by a schedule, before a fake upstream."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
from structlog.testing import LogCapture

from proxy.admin.readiness import Readiness
from proxy.admin.reports import WarmRow
from proxy.admin.warm import JOBS, Warmer
from proxy.admin.warm_schedule import Schedule, latest
from proxy.cache.refresh import BACKOFF, LONGEST_BACKOFF
from proxy.namespaces.composition import Composition, compose
from proxy.processes.state import state_of
from storage.oci import Digest
from tests.conftest import Clock, configuration
from tests.upstream import Hold, Image, Upstream

NAME = "docker.io/library/app"
HOUR = 3600.0
DAY = 86400.0


class Kitchen:
    """A composition before `upstream`, what warms it, and what it has forgotten."""

    def __init__(self, composition: Composition) -> None:
        self.composition = composition
        self.forgotten: list[str] = []
        self.warmer = Warmer(
            composition.namespaces,
            Readiness(composition.store, composition.private, composition.hosted),
            self._forget,
        )
        self.schedule = self.planned()

    async def _forget(self, repository: str) -> None:
        self.forgotten.append(repository)
        await state_of(self.composition).forget(repository)

    def planned(self) -> Schedule:
        """As after a start."""
        parts = self.composition
        return Schedule(parts.config.warm, self.warmer, parts.store.records, parts.clock)

    def holds(self, image: Image, name: str = NAME) -> bool:
        store = self.composition.store
        return all(
            store.holds(Digest(each)) and store.records.get(f"link {name} {each}") is not None
            for each in (image.config, *image.layers)
        )

    @property
    def records(self) -> list[str]:
        return [key for key, _ in self.composition.store.records.scan("warmed ")]


Open = Callable[..., Awaitable[Kitchen]]


@pytest.fixture
async def opened(tmp_path: Path, upstream: Upstream, clock: Clock) -> AsyncIterator[Open]:
    closing = AsyncExitStack()

    async def start(*rules: dict[str, Any], **keys: Any) -> Kitchen:
        tree = {
            "disk": {"path": str(tmp_path / "disk"), "min_free": 0},
            "namespaces": {
                "docker.io": {"upstream": {"url": upstream.url, "header_timeout": "2s", **keys}},
                "local": {"store": {}},
            },
            "warm": list(rules),
        }
        composition = compose(configuration(tmp_path, tree), clock)
        closing.push_async_callback(composition.close)
        return Kitchen(composition)

    async with closing:
        yield start


@pytest.fixture
async def kitchen(opened: Open) -> Kitchen:
    return await opened()


def told(events: LogCapture, name: str) -> list[dict[str, Any]]:
    return [dict(each) for each in events.entries if each["event"] == name]


# One image


async def test_a_whole_index_comes_with_what_refers_to_it(kitchen: Kitchen, upstream: Upstream) -> None:
    amd = upstream.image("library/app", None, [b"base", b"amd"])
    arm = upstream.image("library/app", None, [b"base", b"arm"], "linux/arm64")
    index = upstream.index("library/app", "1", [amd, arm])
    bill = upstream.artifact("library/app", index, "application/sbom")
    signature = upstream.image("library/app", f"{amd.digest.replace(':', '-')}.sig", [b"signed"])
    row = await kitchen.warmer.warm("app:1")
    assert row == WarmRow(
        asked="app:1",
        repository=NAME,
        reference="1",
        digest=index.digest,
        here=True,
        manifests=5,
        referrers=2,
        blobs=8,
        fetched=8,
        bytes=row.bytes,
    )
    assert all(map(kitchen.holds, (amd, arm, signature)))
    assert kitchen.composition.store.records.get(f"manifest {NAME} {bill.digest}") is not None
    upstream.clear()
    again = await kitchen.warmer.warm("app:1")
    assert (again.here, again.fetched, again.bytes) == (True, 0, 0)
    assert not [each for each in upstream.log if each.startswith("GET blob")]


async def test_only_what_was_asked_for(kitchen: Kitchen, upstream: Upstream) -> None:
    amd = upstream.image("library/app", None, [b"amd"])
    arm = upstream.image("library/app", None, [b"arm"], "linux/arm64")
    upstream.artifact("library/app", upstream.index("library/app", "1", [amd, arm]), "application/sbom")
    row = await kitchen.warmer.warm("app:1", ["linux/arm64"], referrers=False)
    assert (row.here, row.manifests, row.referrers) == (True, 2, 0)
    assert (kitchen.holds(amd), kitchen.holds(arm)) == (False, True)
    assert not [each for each in upstream.log if "referrers" in each or ".sig" in each]


async def test_what_is_not_made_for_a_platform_is_not_here(kitchen: Kitchen, upstream: Upstream) -> None:
    amd = upstream.image("library/app", None, [b"amd"])
    upstream.index("library/app", "1", [amd])
    row = await kitchen.warmer.warm("app:1", ["linux/arm64", "linux/s390x"])
    assert (row.here, row.code) == (False, "INCOMPLETE")
    assert row.error == "there is no image for linux/arm64, there is no image for linux/s390x"


async def test_of_several_platforms_those_that_there_are(kitchen: Kitchen, upstream: Upstream) -> None:
    amd = upstream.image("library/app", None, [b"amd"])
    upstream.index("library/app", "1", [amd])
    row = await kitchen.warmer.warm("app:1", ["linux/amd64", "linux/s390x"])
    assert (row.here, row.lacking, row.error) == (True, ["linux/s390x"], None)
    assert kitchen.holds(amd)


@pytest.mark.parametrize(
    ("reference", "code", "says"),
    [
        ("app:2", "MANIFEST_UNKNOWN", "docker.io answered 404"),
        (f"app@{Digest.of(b'')}", "MANIFEST_UNKNOWN", "docker.io answered 404"),
        ("elsewhere.example/x:1", "FIELD_INVALID", "'elsewhere.example' is not a configured namespace"),
        ("Nonsense", "FIELD_INVALID", "is not a repository name"),
        ("local/app:1", "UNSUPPORTED", "local is not a cache: it has no upstream to refresh from"),
    ],
)
async def test_what_fails_is_named(
    kitchen: Kitchen, upstream: Upstream, reference: str, code: str, says: str
) -> None:
    upstream.image("library/app", "1")
    row = await kitchen.warmer.warm(reference)
    assert (row.asked, row.here, row.code) == (reference, False, code)
    assert says in (row.error or "")


async def test_a_layer_that_upstream_lost(kitchen: Kitchen, upstream: Upstream) -> None:
    image = upstream.image("library/app", "1", [b"lost", b"there"])
    del upstream.repositories["library/app"].blobs[image.layers[0]]
    row = await kitchen.warmer.warm("app:1")
    assert (row.here, row.code, row.digest) == (False, "BLOB_UNKNOWN", image.digest)
    assert kitchen.composition.store.holds(Digest(image.layers[1]))


async def test_what_is_here_is_here_though_upstream_is_not(kitchen: Kitchen, upstream: Upstream) -> None:
    upstream.image("library/app", "1")
    await kitchen.warmer.warm("app:1")
    await upstream.stop()
    row = await kitchen.warmer.warm("app:1")
    assert (row.here, row.code, row.manifests) == (True, "UNAVAILABLE", 0)
    assert row.error
    row = await kitchen.warmer.warm("app:2")
    assert (row.here, row.code) == (False, "UNAVAILABLE")


async def test_what_was_not_there_a_moment_ago_is_asked_for_anew(
    kitchen: Kitchen, upstream: Upstream
) -> None:
    upstream.image("library/app", "other")
    assert not (await kitchen.warmer.warm("app:1")).here
    upstream.image("library/app", "1")
    assert (await kitchen.warmer.warm("app:1")).here
    assert kitchen.forgotten == [NAME, NAME]


async def test_the_reserve_of_the_rate_limit_is_for_clients(opened: Open, upstream: Upstream) -> None:
    upstream.ratelimit = 100, 21600, 12
    images = [upstream.image("library/app", str(number), [b"%d" % number]) for number in range(4)]
    kitchen = await opened(reserve=10)
    rows = [await kitchen.warmer.warm(f"app:{number}", referrers=False) for number in range(4)]
    assert [row.here for row in rows] == [True, True, True, False]
    assert rows[3].code == "TOOMANYREQUESTS"
    assert "reserved for clients" in (rows[3].error or "")
    # Clients go on.
    found = await kitchen.composition.namespaces.get_manifest(NAME, Digest(images[3].digest))
    assert found.content == images[3].content


# The schedule


def image(upstream: Upstream, tag: str) -> Image:
    return upstream.image("library/app", tag, [tag.encode() * 10])


async def test_every_so_often(
    opened: Open, upstream: Upstream, clock: Clock, tmp_path: Path, events: LogCapture
) -> None:
    made = [image(upstream, tag) for tag in ("1", "2", "3")]
    listed = tmp_path / "images.txt"
    listed.write_text("app:2\napp:1\n")
    kitchen = await opened({"images": ["app:1"], "list": str(listed), "every": "6h"})
    assert [row.asked for row in await kitchen.schedule.run_once()] == ["app:1", "app:2"]
    assert all(map(kitchen.holds, made[:2]))
    (event,) = told(events, "warm.done")
    assert (event["images"], event["failed"], event["blobs"], event["again_in"]) == (2, 0, 4, None)
    clock.advance(6 * HOUR - 1)
    assert await kitchen.schedule.run_once() == []
    listed.write_text("app:3\n")  # it is read each time
    clock.advance(1)
    assert [row.asked for row in await kitchen.schedule.run_once()] == ["app:1", "app:3"]
    assert kitchen.holds(made[2])


async def test_a_start_between_changes_nothing(opened: Open, upstream: Upstream, clock: Clock) -> None:
    image(upstream, "1")
    kitchen = await opened({"images": ["app:1"], "every": "6h"})
    await kitchen.schedule.run_once()
    clock.advance(5 * HOUR)
    restarted = kitchen.planned()
    assert await restarted.run_once() == []
    clock.advance(HOUR)
    assert len(await restarted.run_once()) == 1


@pytest.fixture
def utc() -> Any:
    before = os.environ.get("TZ")
    os.environ["TZ"] = "UTC"
    time.tzset()
    yield
    if before is None:
        del os.environ["TZ"]
    else:
        os.environ["TZ"] = before
    time.tzset()


async def test_daily(opened: Open, upstream: Upstream, clock: Clock, utc: None) -> None:
    image(upstream, "1")
    midnight = clock.now - clock.now % DAY
    clock.now = midnight + 2 * HOUR
    kitchen = await opened({"images": ["app:1"], "at": "03:30"})
    assert await kitchen.schedule.run_once() == []
    clock.now = midnight + 3.5 * HOUR
    assert len(await kitchen.schedule.run_once()) == 1
    clock.now = midnight + 23 * HOUR
    assert await kitchen.schedule.run_once() == []
    # It was not running at half past three: then it is made up for.
    clock.now = midnight + DAY + 9 * HOUR
    assert len(await kitchen.planned().run_once()) == 1
    assert await kitchen.schedule.run_once() == []


def test_the_latest_time_of_day(utc: None) -> None:
    midnight = 1_700_006_400.0
    assert midnight % DAY == 0
    assert latest((3, 30), midnight + 3 * HOUR) == midnight - DAY + 3.5 * HOUR
    assert latest((3, 30), midnight + 3.5 * HOUR) == midnight + 3.5 * HOUR
    assert latest((3, 30), midnight + 4 * HOUR) == midnight + 3.5 * HOUR


async def test_what_failed_is_tried_again_less_and_less_often(
    opened: Open, upstream: Upstream, clock: Clock, events: LogCapture
) -> None:
    image(upstream, "1")
    kitchen = await opened({"images": ["app:1", "app:2"], "every": "2w"})
    assert [row.here for row in await kitchen.schedule.run_once()] == [True, False]
    (failed,) = told(events, "warm.failed")
    assert (failed["reference"], failed["here"]) == ("app:2", False)
    waits = []
    for _ in range(8):
        waits.append(told(events, "warm.done")[-1]["again_in"])
        clock.advance(waits[-1] - 1)
        assert await kitchen.schedule.run_once() == []
        clock.advance(1)
        assert len(await kitchen.schedule.run_once()) == 2
    assert waits == [BACKOFF * 2**n for n in range(6)] + [LONGEST_BACKOFF] * 2
    image(upstream, "2")
    # Whoever starts anew does not wait for it.
    assert [row.here for row in await kitchen.planned().run_once()] == [True, True]
    assert await kitchen.planned().run_once() == []


async def test_a_list_that_cannot_be_read_does_not_hinder_the_rest(
    opened: Open, upstream: Upstream, tmp_path: Path, events: LogCapture
) -> None:
    made = image(upstream, "1")
    kitchen = await opened({"images": ["app:1"], "list": str(tmp_path / "absent"), "every": "6h"})
    await kitchen.schedule.run_once()
    assert kitchen.holds(made)
    (failed,) = told(events, "warm.failed")
    assert failed["error"] == f"{tmp_path / 'absent'}: cannot be read: No such file or directory"
    assert told(events, "warm.done")[0]["failed"] == 1


async def test_each_rule_has_its_own_time_and_those_that_are_gone_leave_nothing(
    opened: Open, upstream: Upstream, clock: Clock
) -> None:
    for tag in ("1", "2"):
        image(upstream, tag)
    rules = [{"images": ["app:1"], "every": "6h"}, {"images": ["app:2"], "every": "1h"}]
    kitchen = await opened(*rules)
    assert len(await kitchen.schedule.run_once()) == 2
    clock.advance(HOUR)
    assert [row.asked for row in await kitchen.schedule.run_once()] == ["app:2"]
    assert len(kitchen.records) == 2
    other = await opened(rules[0])
    assert await other.schedule.run_once() == []
    assert len(other.records) == 1


async def test_a_clock_set_back_and_a_damaged_record_put_nothing_off(
    opened: Open, upstream: Upstream, clock: Clock
) -> None:
    image(upstream, "1")
    kitchen = await opened({"images": ["app:1"], "every": "6h"})
    await kitchen.schedule.run_once()
    clock.advance(-DAY)
    assert len(await kitchen.schedule.run_once()) == 1
    (key,) = kitchen.records
    kitchen.composition.store.records.put(key, b"\xff")
    assert len(await kitchen.schedule.run_once()) == 1
    assert msgspec.json.decode(kitchen.composition.store.records.get(key) or b"")["begun"] == clock.now


async def test_several_images_come_at_once_but_not_all(opened: Open, upstream: Upstream) -> None:
    tags = [str(number) for number in range(JOBS + 2)]
    for tag in tags:
        image(upstream, tag)
    gate = asyncio.Event()
    holds = [Hold(gate, after=None) for _ in range(JOBS)]
    for hold in holds:
        upstream.next("GET", "manifest", hold)
    kitchen = await opened({"images": [f"app:{tag}" for tag in tags], "every": "6h"})
    running = asyncio.create_task(kitchen.schedule.run_once())
    await asyncio.gather(*(hold.reached.wait() for hold in holds))
    assert len(upstream.log) == JOBS
    gate.set()
    assert len(await running) == len(tags)


async def test_what_is_gone_on_with_is_what_was_not_here(opened: Open, upstream: Upstream) -> None:
    """Stopped in the middle, a blob in the middle of it: the next run goes on there."""
    made = upstream.image("library/app", "1", [b"first" * 1000, b"second" * 50_000])
    upstream.next("GET", made.layers[1], hold := Hold(asyncio.Event(), after=100_000))
    kitchen = await opened({"images": ["app:1"], "every": "6h"})
    running = asyncio.create_task(kitchen.schedule.run_once())
    await hold.reached.wait()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await kitchen.composition.close()
    assert kitchen.records == []
    upstream.clear()
    other = await opened({"images": ["app:1"], "every": "6h"})
    (row,) = await other.schedule.run_once()
    assert row.here
    (asked,) = [each for each in upstream.requests if each.kind == "blob" and made.layers[1] in each.target]
    assert asked.range is not None
    assert upstream.bytes_sent < 300_000

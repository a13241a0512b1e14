"""Which tags the retention rules keep: by number, by age, by pull; and when nothing is known of pulls."""

from __future__ import annotations

import asyncio
import re

import pytest

from storage.disk.records import SQLiteRecords
from storage.errors import ManifestUnknown
from storage.keys import PULLED, WATCHED
from storage.maintenance.collection import CollectionReport
from storage.maintenance.pins import Pin
from storage.maintenance.pulls import RENEWED, Pulls
from storage.maintenance.retention import KeepTags, RetentionRules
from storage.maintenance.watched_time import GAP, GAPS, Watch
from storage.oci import Digest, Tag
from tests.collecting import APP, DAY, GONE, Interruption, Place, place

__all__ = ["place"]  # the fixture

SLACK = 0.5 * DAY  # for which a use may not be recorded: half of the grace period


def kept(
    *tags: str, last: int | None = None, pushed: float | None = None, pulled: float | None = None
) -> KeepTags:
    return KeepTags(tuple(map(re.compile, tags)), last, pushed, pulled)


def use(place: Place, *rules: KeepTags, pins: tuple[Pin, ...] = ()) -> None:
    place.rules = RetentionRules(keep_tags=rules, pins=pins)


def pass_days(place: Place, days: float) -> None:
    """Let time pass that is observed, as by a server that runs."""
    watch = Watch(place.store, place.clock)
    watch.observe()
    for _ in range(int(2 * days)):
        place.clock.advance(DAY / 2)
        watch.observe()


async def pull(place: Place, tag: str) -> None:
    await Pulls(place.store, place.clock).pulled(APP, tag)


def reasons(report: CollectionReport) -> dict[str, str]:
    return {each.tag: each.reason for row in report.rows for each in row.expired}


# The rules


async def test_any_rule_that_matches_may_keep_a_tag(place: Place) -> None:
    for tag in ("a-1", "a-2", "a-3", "b-1", "other"):
        await place.image(tag, await place.blob(tag.encode()))
        pass_days(place, 10)
    # 50, 40, 30, 20 and 10 days old.
    use(place, kept("a-.*", last=1), kept("[ab]-.*", pushed=45 * DAY), kept("b-.*", pushed=15 * DAY))
    assert reasons(place.collect(dry_run=True)) == {
        "a-1": "not one of the last 1 pushed; not pushed within 45d",
    }
    assert place.tags() == {"a-1", "a-2", "a-3", "b-1", "other"}
    report = place.collect()
    assert (report.tags, report.manifests, report.bytes) == (1, 1, 3)
    assert place.tags() == {"a-2", "a-3", "b-1", "other"}


async def test_a_tag_counts_for_the_first_rule_that_counts(place: Place) -> None:
    for tag in ("a-1", "a-2", "b-1", "b-2"):
        place.clock.advance(60)
        await place.image(tag)
    pass_days(place, 3)
    use(place, kept("a-1", pulled=DAY), kept("a-.*", last=1), kept(last=1))
    assert set(reasons(place.collect())) == {"a-1", "b-1"}


async def test_without_a_condition_that_holds_a_tag_goes_once_its_grace_is_over(place: Place) -> None:
    use(place, kept(pushed=3600.0))
    await place.image("v1")
    pass_days(place, 1)
    assert reasons(place.collect()) == {}
    pass_days(place, 1)
    assert reasons(place.collect()) == {"v1": "not pushed within 1h"}


@pytest.mark.parametrize("pinned", ["local/app:v1", "local/*:v?", "local/app@{}"])
async def test_what_is_pinned_stays_and_does_not_count(place: Place, pinned: str) -> None:
    digest = await place.image("v1", await place.blob(b"1"))
    for tag in ("w2", "w3"):
        place.clock.advance(60)
        await place.image(tag, await place.blob(tag.encode()))
    use(place, kept(last=1), pins=(Pin(pinned.format(digest)),))
    place.clock.advance(GONE)
    assert set(reasons(place.collect())) == {"w2"}
    assert place.tags() == {"v1", "w3"}


async def test_an_untagged_manifest_that_is_pinned_stays(place: Place) -> None:
    pinned, other = await place.image(None, await place.blob(b"a")), await place.image(None)
    place.rules = RetentionRules(keep_untagged_for=DAY, pins=(Pin(f"local/app@{pinned}"),))
    place.clock.advance(GONE)
    place.collect()
    assert place.manifests() == {pinned}
    assert other not in place.manifests()


@pytest.mark.parametrize("name", ["sha256-{}", "sha256-{}.sig", "sha256-{}.att", "sha256-{}.sbom"])
async def test_a_tag_of_signatures_goes_only_after_its_image(place: Place, name: str) -> None:
    image = await place.image("v1", await place.blob(b"1"))
    tag = name.format(image.encoded)
    await place.image(tag, await place.blob(b"signature"))
    for number in (2, 3):
        place.clock.advance(60)
        await place.image(f"v{number}", await place.blob(b"%d" % number))
    use(place, kept(last=2))
    place.clock.advance(GONE)
    assert set(reasons(place.collect())) == {"v1"}  # it does not count
    use(place, kept(pushed=3600.0))
    assert set(reasons(place.collect())) == {tag, "v2", "v3"}


async def test_referrers_go_with_the_image_that_expires(place: Place) -> None:
    image = await place.image("v1", await place.blob(b"1"))
    await place.image(None, await place.blob(b"signature"), subject=image)
    use(place, kept(pushed=DAY))
    pass_days(place, 3)
    assert place.collect().manifests == 2
    assert place.manifests() == set()


# Pulls


async def test_what_is_pulled_stays_for_its_time(place: Place) -> None:
    use(place, kept(pulled=30 * DAY))
    for tag in ("used", "unused"):
        await place.image(tag, await place.blob(tag.encode()))
    pass_days(place, 29)
    await pull(place, "used")
    pass_days(place, 3)
    report = place.collect()
    assert reasons(report) == {"unused": "not pulled within 30d"}
    assert place.tags() == {"used"}
    pass_days(place, 27)
    assert reasons(place.collect()) == {}
    pass_days(place, 1)
    (row,) = place.collect(dry_run=True).rows
    (expired,) = row.expired
    assert place.clock.now - expired.pulled_at == 31 * DAY
    assert set(reasons(place.collect())) == {"used"}
    assert not place.records.holds(PULLED.key(APP, "used"))


@pytest.mark.parametrize("child", [False, True])
async def test_a_pull_by_digest_counts_for_the_tags_that_hold_it(place: Place, child: bool) -> None:
    use(place, kept(pulled=30 * DAY))
    image = await place.image(None, await place.blob(b"1"))
    index = await place.index("v1", image)
    await place.store.push_manifest(APP, Tag("v2"), await place.store.get_manifest(APP, index))
    pass_days(place, 29)
    await place.leases.manifest(APP, image if child else index, 0.0)
    pass_days(place, 29)
    assert reasons(place.collect()) == {}
    pass_days(place, 2)
    assert set(reasons(place.collect())) == {"v1", "v2"}


async def test_a_signature_that_is_pushed_or_pulled_is_no_pull_of_its_image(place: Place) -> None:
    use(place, kept(pulled=30 * DAY))
    image = await place.image("v1", await place.blob(b"1"))
    pass_days(place, 29)
    signature = await place.image(None, await place.blob(b"signature"), subject=image)
    await place.leases.manifest(APP, signature, 0.0)
    pass_days(place, 2)
    assert set(reasons(place.collect())) == {"v1"}


async def test_pulls_are_recorded_now_and_then(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    await place.image("v1")
    written = Interruption(monkeypatch, 10**9, lambda: None)
    one, other = Pulls(place.store, place.clock), Pulls(place.store, place.clock)

    def writes() -> int:
        return 10**9 - written.number

    for _ in range(3):
        await one.pulled(APP, "v1")
        await other.pulled(APP, "v1")
    assert writes() == 1
    place.clock.advance(RENEWED + 1)
    await other.pulled(APP, "v1")
    await one.pulled(APP, "v1")
    assert writes() == 2
    place.clock.advance(-DAY)  # the clock is set back: it counts from now on
    await one.pulled(APP, "v1")
    assert writes() == 3
    assert float(place.records.get(PULLED.key(APP, "v1")) or 0) == place.clock.now


async def test_a_process_remembers_a_bounded_number_of_pulls(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.maintenance.pulls.REMEMBERED", 3)
    pulls = Pulls(place.store, place.clock)
    for number in range(8):
        await place.image(f"v{number}")
        await pulls.pulled(APP, f"v{number}")
        assert len(pulls._recorded) <= 3
    assert len([*place.records.keys(PULLED.prefix(APP))]) == 8


async def test_a_pull_of_a_tag_that_is_gone_is_refused(place: Place) -> None:
    with pytest.raises(ManifestUnknown):
        await pull(place, "v1")
    assert [*place.records.keys(PULLED.prefix())] == []


@pytest.mark.parametrize("record", [b"", b"nan", b"inf", b"x", b"\xff"])
async def test_a_damaged_record_of_a_pull_counts_as_none(place: Place, record: bytes) -> None:
    use(place, kept(pulled=30 * DAY))
    await place.image("v1")
    place.records.put(PULLED.key(APP, "v1"), record)
    pass_days(place, 31)
    assert set(reasons(place.collect())) == {"v1"}


@pytest.mark.parametrize("by", ["tag", "digest", "digest of what another tag holds"])
async def test_what_is_pulled_between_mark_and_sweep_stays(
    place: Place, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    use(place, kept("v.*", pulled=30 * DAY))
    digest = await place.image("v1", await place.blob(b"1"))
    if by.endswith("holds"):
        await place.store.push_manifest(APP, Tag("held"), await place.store.get_manifest(APP, digest))
    pass_days(place, 31)

    def pulled() -> None:
        if by == "tag":
            Pulls(place.store, place.clock)._record(APP, "v1")
        else:
            place.leases._manifest(APP, digest)

    interruption = Interruption(monkeypatch, 1, pulled)
    assert reasons(place.collect()) == {}
    assert interruption.number < 1
    assert "v1" in place.tags()


# What is known of the time


async def test_pulls_count_only_from_when_they_are_recorded(place: Place) -> None:
    """A store of a former version, whose tags are old, and of whose pulls nothing is known."""
    await place.image("v1", await place.blob(b"1"))
    place.clock.advance(400 * DAY)
    use(place, kept(pulled=30 * DAY))
    assert reasons(place.collect()) == {}
    pass_days(place, 30)
    assert reasons(place.collect()) == {}
    pass_days(place, 1)
    assert set(reasons(place.collect())) == {"v1"}


@pytest.mark.parametrize("rule", [kept(pulled=30 * DAY), kept(pushed=30 * DAY)])
@pytest.mark.parametrize("years", [1, 10])
async def test_a_jump_of_the_clock_makes_nothing_older(place: Place, rule: KeepTags, years: int) -> None:
    use(place, rule)
    await place.image("v1", await place.blob(b"1"))
    pass_days(place, 10)
    before = place.clock.now
    place.clock.advance(years * 365 * DAY)
    assert reasons(place.collect(dry_run=True)) == reasons(place.collect()) == {}
    pass_days(place, 19)
    assert reasons(place.collect()) == {}
    place.clock.advance(before + 19 * DAY - place.clock.now)  # it is set right: that were 29 days in all
    assert reasons(place.collect()) == {}
    pass_days(place, 2)
    assert set(reasons(place.collect())) == {"v1"}


async def test_time_in_which_no_server_runs_makes_nothing_older(place: Place) -> None:
    use(place, kept(pulled=30 * DAY))
    await place.image("v1", await place.blob(b"1"))
    pass_days(place, 20)
    place.clock.advance(300 * DAY)
    pass_days(place, 10)
    assert reasons(place.collect()) == {}
    pass_days(place, 1)
    assert set(reasons(place.collect())) == {"v1"}


async def test_many_gaps_become_one(place: Place) -> None:
    watch = Watch(place.store, place.clock)
    begun = place.clock.now
    for _ in range(GAPS + 5):
        watch.observe()
        place.clock.advance(2 * GAP)
    found = watch.observe()
    assert len(found.gaps) == GAPS
    assert found.age(begun) == 0.0
    assert found.age(found.now + 60) == -60


@pytest.mark.parametrize("record", [b"", b"[]", b"{}", b'{"since": "a"}', b"\xff"])
async def test_a_damaged_record_of_the_time_begins_again(place: Place, record: bytes) -> None:
    use(place, kept(pulled=30 * DAY))
    await place.image("v1")
    pass_days(place, 31)
    place.records.put(WATCHED.key(), record)
    assert reasons(place.collect()) == {}


async def test_records_that_were_damaged_may_have_been_pulls(place: Place) -> None:
    use(place, kept(pulled=30 * DAY))
    await place.image("v1")
    pass_days(place, 29)
    aside = place.files.root / "records.damaged-1"
    aside.mkdir()
    Watch(place.store, place.clock).observe()
    aside.rmdir()
    pass_days(place, 29)
    assert reasons(place.collect()) == {}
    pass_days(place, 2)
    assert set(reasons(place.collect())) == {"v1"}


async def test_a_report_holds_so_many_tags(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.maintenance.collection.ROWS", 3)
    for number in range(5):
        await place.image(f"v{number}")
    use(place, kept(pushed=DAY))
    pass_days(place, 3)
    report = place.collect()
    assert report.tags == 5
    assert len(reasons(report)) == 3


async def test_records_are_read_by_pulls_in_several_threads(place: Place) -> None:
    digests: list[Digest] = [await place.image(f"v{number}") for number in range(20)]
    pulls = Pulls(place.store, place.clock)
    await asyncio.gather(*(pulls.pulled(APP, f"v{number % 20}") for number in range(100)))
    assert len([*place.records.keys(PULLED.prefix(APP))]) == 20
    assert len(set(digests)) == 1
    assert isinstance(place.records, SQLiteRecords)

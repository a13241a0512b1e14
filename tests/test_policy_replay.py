"""Who pulled what, and what another policy would have refused of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from proxy.cli.main import main
from proxy.policy.replay import replay
from storage.disk.records import SQLiteRecords
from storage.keys import ASKED
from storage.maintenance import pull_journal
from storage.maintenance.pull_journal import PulledReference, PullJournal
from storage.oci import Digest
from tests.configuring import read
from tests.conftest import Clock, Serve, Site
from tests.test_policed import LATEST, RELEASES, policy, status
from tests.test_policy_moves import api
from tests.test_resolutions import day, moved
from tests.upstream import Upstream

A, B = Digest.of(b"a"), Digest.of(b"b")
DAY = 86400.0


@pytest.fixture
def records(tmp_path: Path) -> Iterator[SQLiteRecords]:
    found = SQLiteRecords(tmp_path / "records")
    yield found
    found.close()


# The journal


def test_pulls_are_counted_by_day_and_caller(records: SQLiteRecords, clock: Clock) -> None:
    journal = PullJournal(records, 7 * DAY, clock)
    first = clock.now
    journal.record({("x/y", "1", A, "ann"): (2, first), ("x/y", "1", A, "10.0.0.7"): (1, first)})
    journal.record({("x/y", "1", B, "ann"): (3, first + 5), ("x/z", A, A, "ann"): (1, first + 1)})
    clock.advance(DAY)
    journal.record({("x/y", "1", B, "ann"): (1, clock.now)})
    assert list(journal.since(2 * DAY)) == [
        PulledReference("x/y", "1", B, "ann", 5, first + 5),
        PulledReference("x/y", "1", A, "10.0.0.7", 1, first),
        PulledReference("x/z", A, A, "ann", 1, first + 1),
        PulledReference("x/y", "1", B, "ann", 1, clock.now),
    ]
    assert [each.last for each in journal.since(DAY - 5)] == [first + 5, clock.now]


def test_old_pulls_are_removed(records: SQLiteRecords, clock: Clock) -> None:
    journal = PullJournal(records, 2 * DAY, clock)
    for number in range(5):
        journal.record({("x/y", str(number), A, "ann"): (1, clock.now)})
        clock.advance(DAY)
    assert [each.reference for each in journal.since(99 * DAY)] == ["2", "3", "4"]


def test_the_journal_is_bounded(
    records: SQLiteRecords, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull_journal, "CALLERS", 2)
    monkeypatch.setattr(pull_journal, "REFERENCES", 3)
    journal = PullJournal(records, DAY, clock)
    callers = {("x/y", "1", str(A), f"user-{number}"): (1, clock.now) for number in range(4)}
    journal.record(callers)
    journal.record({("x/y", str(number), str(A), "ann"): (1, clock.now) for number in range(2, 9)})
    journal.record(callers)
    found = [(each.reference, each.who, each.count) for each in journal.since(DAY)]
    assert found == [("1", "user-0", 2), ("1", "user-1", 2), ("2", "ann", 1), ("3", "ann", 1)]
    records.put(ASKED.key("20231114", "x/y", "1"), b"damaged")
    assert [each.reference for each in journal.since(DAY)] == ["2", "3"]


# What would have been refused


def pull(repository: str, reference: str, digest: Digest = A, who: str = "ann") -> PulledReference:
    return PulledReference(repository, reference, digest, who, 1, 5.0)


def test_what_another_policy_would_have_refused() -> None:
    proposed = read(
        json.dumps(policy(LATEST, {**RELEASES, "repositories": ["a/*"]}, allow_list=["a/*"]))
    ).policy
    pulls = [
        pull("a/b", "latest", A),
        pull("a/b", "latest", A),
        pull("a/b", "v1", B),
        pull("a/b", "edge", B, "bob"),
        pull("a/b", A, A),  # by the tag latest
        pull("a/b", B, B),  # v1 is enough
        pull("a/b", Digest.of(b"c"), Digest.of(b"c")),  # what leads to it is not known
        pull("b/c", "1", A),
    ]
    found = [(each.image, each.who, each.count, each.rule, each.outcome) for each in replay(proposed, pulls)]
    assert found == [
        ("a/b:edge", "bob", 1, "allow_list", "deny"),
        ("a/b:latest", "ann", 2, "moving", "deny"),
        (f"a/b@{A}", "ann", 1, "moving", "deny"),
    ]


def test_a_repository_that_is_refused_as_a_whole_needs_no_tags() -> None:
    rule = {"name": "bad", "action": "deny", "repositories": ["a/*"], "reason": "it is bad"}
    (found,) = replay(read(json.dumps(policy(rule))).policy, [pull("a/b", A), pull("b/c", A)])
    assert (found.image, found.rule, found.reason) == (f"a/b@{A}", "bad", "it is bad")


def test_what_would_have_been_verified(tmp_path: Path) -> None:
    (tmp_path / "images.lock").write_text("")
    rule = {"name": "locked", "action": "allow", "locked": str(tmp_path / "images.lock")}
    (found,) = replay(read(json.dumps(policy(rule))).policy, [pull("a/b", "1")])
    assert (found.outcome, found.rule) == ("verify", "locked")


async def replayed(site: Site, tmp_path: Path, proposed: object, *words: str) -> Result:
    path = tmp_path / "proposed.yml"
    path.write_text(json.dumps(proposed))
    words = ("policy", "replay", str(path), "--server", str(site.app.admin_url), *words)
    return await asyncio.to_thread(CliRunner().invoke, main, words)


async def test_the_command(serve: Serve, upstream: Upstream, tmp_path: Path, clock: Clock) -> None:
    for tag in ("latest", "1"):
        upstream.image("a/b", tag)
    site = await serve(upstream, top=policy(journal="7d"))
    for tag in ("latest", "latest", "latest", "1"):
        assert await status(site, tag) == 200
    assert await status(site, "nowhere") == 404
    found = await api(site, path="pulled")
    assert [(each["reference"], each["who"], each["count"]) for each in found] == [
        ("1", "127.0.0.1", 1),
        ("latest", "127.0.0.1", 3),
    ]
    result = await replayed(site, tmp_path, policy(LATEST), "--json")
    assert result.exit_code == 1, result.output
    (row,) = json.loads(result.stdout)
    assert (row["image"], row["who"], row["count"], row["rule"]) == (
        "docker.io/a/b:latest", "127.0.0.1", 3, "moving",
    )  # fmt: skip
    other = {**LATEST, "tags": ["edge"]}
    result = await replayed(site, tmp_path, policy(other))
    assert (result.exit_code, "nothing would have been refused" in result.stdout) == (0, True)
    clock.advance(3600)
    result = await replayed(site, tmp_path, policy(LATEST), "--last", "30min")
    assert (result.exit_code, "nothing would have been refused" in result.stdout) == (0, True)
    result = await replayed(site, tmp_path, {"policy": {"mode": "x"}})
    assert (result.exit_code, "policy.mode" in result.stderr) == (2, True)


async def test_without_a_journal_there_is_nothing_to_replay(
    serve: Serve, upstream: Upstream, tmp_path: Path
) -> None:
    upstream.image("a/b", "1")
    site = await serve(upstream)
    await status(site, "1")
    await site.app.composition.recorder.flush()
    assert list(site.app.composition.store.records.keys(ASKED.prefix())) == []
    result = await replayed(site, tmp_path, policy(LATEST))
    assert result.exit_code == 1
    assert "who pulls what is not recorded: set policy.journal, such as 7d" in result.stderr


async def test_a_pull_of_the_past_is_no_use_of_the_tag(
    serve: Serve, upstream: Upstream, clock: Clock
) -> None:
    site = await serve(upstream, top=policy(journal="7d"))
    old, before, after = await moved(site, upstream, clock)
    for _ in range(3):
        assert (await site.get(f"/v2/@{before}/a/b/manifests/latest"))[2] == old.content
    await site.app.composition.recorder.flush()
    assert day(clock) == after
    new = upstream.repositories["a/b"].tags["latest"]
    assert (await site.get(f"/v2/@{after}/a/b/manifests/latest"))[1]["Docker-Content-Digest"] == new
    found = await api(site, path="pulled")
    assert {(each["reference"], each["digest"]) for each in found} == {
        ("latest", old.digest), ("latest", new), (old.digest, old.digest), (new, new),
    }  # fmt: skip

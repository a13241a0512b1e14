"""Tags that their upstream moves, and that the policy holds until the move is old enough or approved."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from structlog.testing import LogCapture

from proxy.cli.main import main
from proxy.config.policy import RELEASES, MoveRule
from proxy.policy.moves import HeldTag
from storage.disk.records import SQLiteRecords
from storage.keys import HELD, MANIFEST
from storage.oci import Digest, Tag
from tests.configuring import fault, read
from tests.conftest import Clock, Serve, Site
from tests.receiver import Receiver, receiver
from tests.test_admin import conforms
from tests.test_disk import disk, read_only  # noqa: F401  a fixture
from tests.test_policed import LATEST, policy
from tests.upstream import Image, Upstream

__all__ = ["receiver"]  # a fixture

DAY = 86400.0
COOLDOWN = {"name": "cooldown", "min_age": "3d", "tags": ["latest"]}
APPROVED = {"name": "releases", "approval": True}
MOVES = policy(moves=[COOLDOWN, APPROVED])
A, B, C = (Digest.of(each) for each in (b"a", b"b", b"c"))


async def at(site: Site, tag: str, method: str = "GET") -> str:
    """The digest that a tag stands for."""
    async with site.request(method, f"/v2/a/b/manifests/{tag}") as response:
        assert response.status == 200, await response.text()
        body = await response.read()
        digest = str(response.headers["Docker-Content-Digest"])
        assert method == "HEAD" or Digest.of(body) == digest
        return digest


async def api(site: Site, method: str = "GET", path: str = "held", status: int = 200, **fields: Any) -> Any:
    url, given = f"/api/v1/{path}", {"json": fields} if fields else {}
    async with site.session.request(method, f"{site.app.admin_url}".rstrip("/") + url, **given) as response:
        found = await response.json()
        assert response.status == status, found
    conforms(method, url, status, found)
    return found


def image(upstream: Upstream, tag: str, content: bytes) -> Image:
    return upstream.image("a/b", tag, [content])


# What a record becomes


def rule(**keys: Any) -> MoveRule:
    (found,) = read(json.dumps(policy(moves=[{"name": "x", **keys}]))).policy.moves
    return found


def test_a_move_waits_until_it_was_known_for_so_long() -> None:
    three_days = rule(min_age="3d")
    first = HeldTag(str(A))
    assert first.offered(A, three_days, 0.0) == first
    known = first.offered(B, three_days, 100.0)
    assert known == HeldTag(str(A), str(B), 100.0)
    assert known.moves_at(three_days) == 100 + 3 * DAY
    assert known.offered(B, three_days, 99 + 3 * DAY) == known
    # What is newer waits again, and what was taken back is forgotten.
    assert known.offered(C, three_days, 200.0) == HeldTag(str(A), str(C), 200.0)
    assert known.offered(A, three_days, 200.0) == first
    assert known.offered(B, three_days, 100 + 3 * DAY) == HeldTag(str(B))


def test_without_an_approval_a_release_never_moves() -> None:
    approval = rule(approval=True)
    known = HeldTag(str(A)).offered(B, approval, 100.0)
    assert known.offered(B, approval, 1e12) == known
    waiting = HeldTag(str(A), approved=str(C)).offered(B, approval, 100.0)
    assert (waiting.digest, waiting.approved) == (A, C)
    assert waiting.offered(C, approval, 200.0) == HeldTag(str(C))


def test_what_is_rejected_does_not_grow_old() -> None:
    known = HeldTag(str(A), rejected=(str(B),))
    assert known.offered(B, rule(min_age="3d"), 1.0).offered(B, rule(min_age="3d"), 9 * DAY).digest == A
    later = known.offered(C, rule(min_age="3d"), 1.0).offered(C, rule(min_age="3d"), 9 * DAY)
    assert later == HeldTag(str(C), rejected=(str(B),))


@pytest.mark.parametrize("tag", ["1.2.3", "v1.2.3", "1.2.3-alpine", "2024.10.1_2", "1.2.3.4", "v10.20.30+x"])
def test_what_is_a_release(tag: str) -> None:
    assert RELEASES.fullmatch(tag)


@pytest.mark.parametrize("tag", ["1", "1.2", "latest", "v1", "1.2.x", "stable-1.2.3", "1.2.3x", ""])
def test_what_is_no_release(tag: str) -> None:
    assert not RELEASES.fullmatch(tag)


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ("name: a", "policy.moves[0]: a needs one of min_age, such as 3d, and approval: true"),
        ("name: a, min_age: 3d, approval: true", "policy.moves[0]: a needs one of min_age"),
        ("name: a, min_age: 0", "policy.moves[0].min_age: must be more than 0"),
        ("approval: true", "policy.moves[0].name: is required"),
    ],
)
def test_what_is_no_rule_about_moves(members: str, says: str) -> None:
    assert fault(f"policy: {{moves: [{{{members}}}]}}").startswith(says)


def test_no_rule_has_the_name_of_another() -> None:
    both = policy(LATEST, moves=[{**COOLDOWN, "name": "moving"}])
    assert fault(json.dumps(both)).startswith("policy: two rules have the name moving")


# What is served


async def test_a_tag_is_held_until_the_move_is_old_enough(
    serve: Serve, upstream: Upstream, clock: Clock, events: LogCapture
) -> None:
    old = image(upstream, "latest", b"old")
    site = await serve(upstream, top=MOVES)
    assert await at(site, "latest") == old.digest
    new = image(upstream, "latest", b"new")
    clock.advance(3600)
    for method in ("GET", "HEAD", "GET"):
        assert await at(site, "latest", method) == old.digest
    (found,) = await api(site)
    assert (found["repository"], found["tag"], found["rule"]) == ("docker.io/a/b", "latest", "cooldown")
    assert (found["digest"], found["candidate"]) == (old.digest, new.digest)
    assert (found["seen"], found["moves_at"]) == (clock.now, clock.now + 3 * DAY)
    clock.advance(3 * DAY - 1)
    assert await at(site, "latest") == old.digest
    clock.advance(1)
    assert await at(site, "latest") == new.digest
    assert await api(site) == []
    told = [each for each in events.entries if each["event"] in ("tag.held", "tag.released")]
    assert [(each["event"], each["rule"]) for each in told] == [
        ("tag.held", "cooldown"),
        ("tag.released", "cooldown"),
    ]
    assert 'entrepot_policy_held_total{namespace="docker.io",rule="cooldown"} 1.0' in await site.metrics()


async def test_tags_without_a_rule_move_at_once(serve: Serve, upstream: Upstream, clock: Clock) -> None:
    image(upstream, "1.2", b"old")
    site = await serve(upstream, top=MOVES)
    await at(site, "1.2")
    new = image(upstream, "1.2", b"new")
    clock.advance(3600)
    assert await at(site, "1.2") == new.digest


async def test_what_was_cached_before_there_was_a_rule_is_what_is_held(
    serve: Serve, upstream: Upstream, clock: Clock
) -> None:
    old = image(upstream, "1.2.3", b"old")
    site = await serve(upstream)
    assert await at(site, "1.2.3") == old.digest
    await site.app.stop()
    image(upstream, "1.2.3", b"new")
    clock.advance(3600)
    site = await serve(upstream, top=MOVES)
    assert await at(site, "1.2.3") == old.digest
    await site.app.stop()
    site = await serve(upstream, top=MOVES)  # a restart changes nothing
    assert await at(site, "1.2.3") == old.digest


@pytest.mark.errors("disk.failed")
async def test_a_disk_that_cannot_be_written_to_holds_tags_all_the_same(
    serve: Serve,
    upstream: Upstream,
    clock: Clock,
    disk: Path,  # noqa: F811
) -> None:
    old = {tag: image(upstream, tag, tag.encode()).digest for tag in ("1.2.3", "latest")}
    site = await serve(upstream, directory=disk / "d")
    for tag in old:
        assert await at(site, tag) == old[tag]
    await site.app.stop()
    with read_only(disk):
        site = await serve(upstream, directory=disk / "d", top=MOVES)
        for tag in old:
            assert await at(site, tag) == old[tag]
            image(upstream, tag, b"new")
        clock.advance(3600)
        for tag in old:
            assert [await at(site, tag, method) for method in ("GET", "HEAD")] == [old[tag]] * 2
        await site.app.stop()


async def test_a_moved_release_is_approved_or_rejected(
    serve: Serve, upstream: Upstream, clock: Clock
) -> None:
    old = image(upstream, "1.2.3", b"old")
    site = await serve(upstream, top=MOVES)
    assert await at(site, "1.2.3") == old.digest
    bad = image(upstream, "1.2.3", b"bad")
    clock.advance(3600)
    assert await at(site, "1.2.3") == old.digest
    found = await api(site, "DELETE", reference=f"a/b:1.2.3@{bad.digest}")
    assert (found["digest"], found["rejected"], found["moves_at"]) == (old.digest, [bad.digest], None)
    clock.advance(30 * DAY)
    assert await at(site, "1.2.3") == old.digest
    good = image(upstream, "1.2.3", b"good")
    found = await api(site, "POST", reference=f"a/b:1.2.3@{good.digest}")  # before it is seen here
    assert (found["digest"], found["approved"]) == (old.digest, good.digest)
    clock.advance(3600)
    assert await at(site, "1.2.3") == good.digest
    newer = image(upstream, "1.2.3", b"newer")
    clock.advance(3600)
    assert await at(site, "1.2.3") == good.digest
    assert (await api(site, "POST", reference=f"a/b:1.2.3@{newer.digest}"))["digest"] == newer.digest
    assert await at(site, "1.2.3") == newer.digest


async def test_a_cooldown_ends_by_command(serve: Serve, upstream: Upstream, clock: Clock) -> None:
    image(upstream, "latest", b"old")
    site = await serve(upstream, top=MOVES)
    await at(site, "latest")
    new = image(upstream, "latest", b"new")
    clock.advance(3600)
    await at(site, "latest")
    words = "policy", "approve", f"a/b:latest@{new.digest}", "--server", str(site.app.admin_url)
    result = await asyncio.to_thread(CliRunner().invoke, main, words)
    assert result.exit_code == 0, result.output
    assert await at(site, "latest") == new.digest


async def test_the_commands_say_when_a_tag_moves(serve: Serve, upstream: Upstream, clock: Clock) -> None:
    old = image(upstream, "latest", b"old"), image(upstream, "1.2.3", b"old release")
    site = await serve(upstream, top=MOVES)
    for tag in ("latest", "1.2.3"):
        await at(site, tag)
    new = image(upstream, "latest", b"new"), image(upstream, "1.2.3", b"new release")
    clock.advance(3600)
    for tag in ("latest", "1.2.3"):
        await at(site, tag)
    found = await api(site, path="why?ref=a/b:latest")
    assert (found["held"]["digest"], found["held"]["candidate"]) == (old[0].digest, new[0].digest)
    assert found["held"]["moves_at"] == clock.now + 3 * DAY
    assert (await api(site, path=f"why?ref=a/b@{old[0].digest}"))["held"] is None

    async def said(*words: str) -> str:
        result = await asyncio.to_thread(
            CliRunner().invoke, main, [*words, "--server", str(site.app.admin_url), "--wide"]
        )
        assert result.exit_code == 0, result.output
        return result.stdout

    assert f"at {old[1].digest} by releases, moves when approved" in await said("why", "a/b:1.2.3")
    rows = (await said("policy", "held")).splitlines()
    assert [row.split()[0] for row in rows[-2:]] == ["docker.io/a/b:1.2.3", "docker.io/a/b:latest"]
    await said("policy", "reject", f"a/b:1.2.3@{new[1].digest}")
    assert "never: rejected" in await said("policy", "held")


@pytest.mark.parametrize(
    ("reference", "status", "says"),
    [
        ("a/b:1.2.3", 400, "reference: expected a tag and a digest"),
        (f"a/b@{A}", 400, "reference: expected a tag and a digest"),
        (f"a/b:edge@{A}", 400, "reference: no rule of policy.moves is about this tag"),
        ("a/b:1.2.3@sha256:00", 400, "reference: 'sha256:00' is not sha256:"),
        (f"a/b:1.2.4@{A}", 404, "docker.io/a/b:1.2.4 is not held"),
    ],
)
async def test_what_cannot_be_decided(
    serve: Serve, upstream: Upstream, reference: str, status: int, says: str
) -> None:
    site = await serve(upstream, top=MOVES)
    for method in ("POST", "DELETE"):
        found = await api(site, method, status=status, reference=reference)
        assert found["error"].startswith(says)


async def test_what_a_tag_stands_for_cannot_be_rejected(serve: Serve, upstream: Upstream) -> None:
    old = image(upstream, "1.2.3", b"old")
    site = await serve(upstream, top=MOVES)
    await at(site, "1.2.3")
    found = await api(site, "DELETE", status=400, reference=f"a/b:1.2.3@{old.digest}")
    assert "stands for" in found["error"]


async def test_a_held_tag_is_served_while_the_upstream_fails(
    serve: Serve, upstream: Upstream, clock: Clock
) -> None:
    old = image(upstream, "latest", b"old")
    site = await serve(upstream, top=MOVES)
    await at(site, "latest")
    for digest in (old.config, *old.layers):
        assert (await site.get(f"/v2/a/b/blobs/{digest}"))[0] == 200
    image(upstream, "latest", b"new")
    clock.advance(3600)
    assert await at(site, "latest") == old.digest
    await upstream.stop()
    clock.advance(3600)
    # What it would move to is not here as a whole: podman must not be given that, but what it stands for.
    answer, headers, _ = await site.get("/v2/a/b/manifests/latest", User_Agent="containers/5.0 (github.com)")
    assert (answer, headers["Docker-Content-Digest"]) == (200, old.digest)


async def test_what_a_tag_is_held_at_may_be_lost(
    serve: Serve, upstream: Upstream, clock: Clock, tmp_path: Path
) -> None:
    old = image(upstream, "1.2.3", b"old")
    site = await serve(upstream, top=MOVES)
    await at(site, "1.2.3")
    image(upstream, "1.2.3", b"new")
    upstream.delete_manifest("a/b", old.digest)
    records = SQLiteRecords(tmp_path / "disk" / "cache" / "records")
    records.delete(MANIFEST.key("docker.io/a/b", old.digest))
    records.close()
    clock.advance(3600)
    answer, _, body = await site.get("/v2/a/b/manifests/1.2.3")
    assert answer == 404
    assert f"docker.io/a/b:1.2.3 is held at {old.digest}, which is neither stored nor" in body.decode()


async def test_refreshing_does_not_move_what_is_held(serve: Serve, upstream: Upstream, clock: Clock) -> None:
    old = image(upstream, "latest", b"old")
    site = await serve(upstream, top=MOVES)
    await at(site, "latest")
    new = image(upstream, "latest", b"new")
    await api(site, "POST", "refresh", reference="a/b:latest")
    assert [each["candidate"] for each in await api(site)] == [new.digest]
    assert await at(site, "latest") == old.digest
    upstream.clear()
    clock.advance(3 * DAY)
    assert await at(site, "latest") == new.digest
    assert (await site.get(f"/v2/a/b/blobs/{new.layers[0]}"))[0] == 200
    assert [each for each in upstream.log if "GET" in each] == []  # it was fetched in advance


async def test_a_server_forgets_tags_that_no_rule_is_about(
    serve: Serve, upstream: Upstream, clock: Clock, tmp_path: Path
) -> None:
    image(upstream, "1.2.3", b"old")
    site = await serve(upstream, top=MOVES)
    await at(site, "1.2.3")
    await site.app.stop()
    site = await serve(upstream)
    await site.app.composition.guard.holds.forget()  # as its housekeeping does when it starts
    between = image(upstream, "1.2.3", b"between")
    clock.advance(3600)
    assert await at(site, "1.2.3") == between.digest
    await site.app.stop()
    records = SQLiteRecords(tmp_path / "disk" / "cache" / "records")
    assert list(records.keys(HELD.prefix())) == []
    records.close()
    site = await serve(upstream, top=MOVES)
    image(upstream, "1.2.3", b"new")
    clock.advance(3600)
    assert await at(site, "1.2.3") == between.digest  # and not what it was before


async def test_many_at_once_hold_a_tag_once(
    serve: Serve, upstream: Upstream, clock: Clock, events: LogCapture
) -> None:
    old = image(upstream, "1.2.3", b"old")
    site = await serve(upstream, top=MOVES)
    assert set(await asyncio.gather(*(at(site, "1.2.3") for _ in range(20)))) == {old.digest}
    image(upstream, "1.2.3", b"new")
    clock.advance(3600)
    assert set(await asyncio.gather(*(at(site, "1.2.3") for _ in range(20)))) == {old.digest}
    assert len([each for each in events.entries if each["event"] == "tag.held"]) == 1


@pytest.mark.housekeeping
async def test_receivers_of_events_hear_of_it(
    serve: Serve, upstream: Upstream, clock: Clock, receiver: Receiver
) -> None:
    old = image(upstream, "1.2.3", b"old")
    hook = {"name": "a", "url": receiver.url, "actions": ["hold"]}
    site = await serve(upstream, top={**MOVES, "webhooks": [hook]})
    await at(site, "1.2.3")
    new = image(upstream, "1.2.3", b"new")
    clock.advance(3600)
    await at(site, "1.2.3")
    (event,) = await receiver.took(1)
    assert (event["action"], event["target"]["tag"]) == ("hold", "1.2.3")
    assert (event["target"]["fromDigest"], event["target"]["digest"]) == (old.digest, new.digest)
    assert site.app.composition.guard.holds.rule("docker.io/a/b", Tag("1.2.3")) is not None

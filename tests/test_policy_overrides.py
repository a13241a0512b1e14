"""Exceptions from the policy that an operator makes for some time."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from click.testing import CliRunner, Result
from structlog.testing import LogCapture

from proxy.cli.main import main
from storage.keys import OVERRIDE
from tests.conftest import Clock, Serve, Site
from tests.processes import Place, place
from tests.test_hits import hits
from tests.test_policed import LATEST, LISTED, policy, refusal, served, status
from tests.test_policy_moves import MOVES, api, at
from tests.upstream import OCI_MANIFEST, Upstream

__all__ = ["hits", "place"]  # fixtures

HOUR = 3600.0


async def begin(site: Site, reference: str, seconds: float = HOUR, reason: str = "hotfix 4711") -> None:
    await api(site, "POST", "overrides", reference=reference, seconds=seconds, reason=reason)


async def run(site: Site, *words: str) -> Result:
    words = ("policy", *words, "--server", str(site.app.admin_url))
    return await asyncio.to_thread(CliRunner().invoke, main, words)


async def test_an_override_ends_by_itself(
    serve: Serve, upstream: Upstream, clock: Clock, events: LogCapture, hits: Counter[bool]
) -> None:
    child = upstream.image("a/b", None, [b"child"])
    upstream.index("a/b", "latest", [child])
    other = upstream.image("a/b", "edge", [b"other"])
    site = await serve(upstream, top=policy({**LATEST, "tags": ["latest", "edge"]}), fresh_for="30d")
    await refusal(site, "latest")
    await begin(site, "a/b:latest")
    until = "2023-11-14T23:13:20+00:00"
    told = f'299 - "served against policy rule moving, by an override until {until}: hotfix 4711"'
    for _ in range(3):
        answer, headers, _ = await site.get("/v2/a/b/manifests/latest")
        assert (answer, headers["Warning"], headers["Cache-Control"]) == (200, told, "no-cache")
    for kind, digest in served(child):
        answer, headers, _ = await site.get(f"/v2/a/b/{kind}/{digest}")
        assert (answer, headers["Warning"]) == (200, told)
        assert headers["Cache-Control"] == "no-cache"  # another cache must not keep it for longer
    await refusal(site, "edge")  # it is for one image alone
    await refusal(site, other.digest)
    clock.advance(HOUR - 1)
    assert await status(site, "latest") == 200
    clock.advance(1)
    await refusal(site, "latest")
    for kind, digest in served(child):
        await refusal(site, digest, kind)
    told_of = [each for each in events.entries if each["event"] == "policy.overridden"]
    assert {(each["rule"], each["override"]) for each in told_of} == {("moving", "docker.io/a/b:latest")}
    assert len(told_of) == 7
    counted = 'entrepot_policy_refused_total{mode="override",namespace="docker.io",rule="moving"} 7.0'
    assert counted in await site.metrics()


async def test_an_override_of_a_digest(serve: Serve, upstream: Upstream) -> None:
    image = upstream.image("a/b", "edge")
    site = await serve(upstream, top={"policy": LISTED})
    await refusal(site, image.digest)
    await begin(site, f"a/b@{image.digest}")
    for kind, digest in served(image):
        assert await status(site, digest, kind) == 200
    assert await status(site, "edge") == 200  # it is the same image
    await api(site, "DELETE", "overrides", reference=f"a/b@{image.digest}")
    for kind, digest in served(image):
        await refusal(site, digest, kind)


async def test_an_override_of_a_repository_that_is_refused_as_a_whole(
    serve: Serve, upstream: Upstream
) -> None:
    image = upstream.image("a/b", "v1", [b"one"])
    upstream.image("a/b", "v2", [b"two"])
    rule = {"name": "bad", "action": "deny", "repositories": ["docker.io/a/*"], "reason": "it is malware"}
    site = await serve(upstream, top=policy(rule))
    await begin(site, "a/b:v1")
    assert await status(site, "v1") == 200
    for kind, digest in served(image):
        assert await status(site, digest, kind) == 200
    await refusal(site, "v2")


async def test_what_is_allowed_anyway_is_served_without_a_word(
    serve: Serve, upstream: Upstream, hits: Counter[bool]
) -> None:
    upstream.image("a/b", "v1")
    site = await serve(upstream, top=policy(LATEST))
    await begin(site, "a/b:v1")
    for _ in range(3):
        answer, headers, _ = await site.get("/v2/a/b/manifests/v1")
        assert (answer, headers.get("Warning")) == (200, None)


async def test_an_override_lets_a_held_tag_move(serve: Serve, upstream: Upstream, clock: Clock) -> None:
    old = upstream.image("a/b", "1.2.3", [b"old"])
    site = await serve(upstream, top=MOVES)
    assert await at(site, "1.2.3") == old.digest
    new = upstream.image("a/b", "1.2.3", [b"new"])
    clock.advance(HOUR)
    assert await at(site, "1.2.3") == old.digest
    await begin(site, "a/b:1.2.3")
    for _ in range(3):
        answer, headers, _ = await site.get("/v2/a/b/manifests/1.2.3")
        assert (answer, headers["Docker-Content-Digest"]) == (200, new.digest)
        assert "served against policy rule releases, by an override" in headers["Warning"]
    clock.advance(HOUR)
    assert await at(site, "1.2.3") == old.digest


async def test_a_private_registry_has_overrides_too(serve: Serve, upstream: Upstream) -> None:
    image = upstream.image("a/b", "latest")
    site = await serve(upstream, top=policy(LATEST), more={"local": {"store": {"sparse": True}}})
    url, typed = "/v2/local/a/b/manifests/latest", {"Content-Type": OCI_MANIFEST}
    async with site.request("PUT", url, data=image.content, headers=typed) as done:
        assert done.status == 201
    await refusal(site, "latest", repository="local/a/b")
    await begin(site, "local/a/b:latest")
    assert await status(site, "latest", repository="local/a/b") == 200


async def test_the_commands(serve: Serve, upstream: Upstream, clock: Clock, events: LogCapture) -> None:
    upstream.image("a/b", "latest")
    site = await serve(upstream, top=policy(LATEST))
    result = await run(site, "override", "a/b:latest", "--for", "2h", "--reason", "hotfix 4711")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].startswith("docker.io/a/b:latest")
    assert "hotfix 4711" in (await run(site, "overrides")).stdout
    found = await api(site, path="policy?ref=a/b:latest")
    assert found["allowed"] is True
    assert found["reason"].startswith("latest moves, but there is an override until 2023-")
    assert (await run(site, "override", "a/b:latest", "--end")).exit_code == 0
    assert "there is no override" in (await run(site, "overrides")).stdout
    failed = await run(site, "override", "a/b:latest", "--end")
    assert (failed.exit_code, "there is no override for docker.io/a/b:latest" in failed.stderr) == (1, True)
    audited = [each for each in events.entries if each["event"].startswith("override.")]
    assert [(each["event"], each["image"]) for each in audited] == [
        ("override.begun", "docker.io/a/b:latest"),
        ("override.ended", "docker.io/a/b:latest"),
    ]
    assert (audited[0]["seconds"], audited[0]["reason"]) == (2 * HOUR, "hotfix 4711")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--for", "2h"], "give --for and --reason, or --end"),
        (["--reason", "x"], "give --for and --reason, or --end"),
        (["--for", "8d", "--reason", "x"], "must be more than 0, and at most 604800"),
        (["--for", "2h", "--reason", " "], "--reason: must be a text of one line"),
        (["--for", "2h", "--reason", "a\nb"], "--reason: must be a text of one line"),
        (["--end", "--reason", "x"], "--end takes neither --for nor --reason"),
    ],
)
async def test_what_is_no_override(serve: Serve, upstream: Upstream, words: list[str], says: str) -> None:
    site = await serve(upstream, top=policy(LATEST))
    result = await run(site, "override", "a/b:latest", *words)
    assert (result.exit_code, says in result.stderr) == (2, True), result.stderr


async def test_those_that_ended_are_removed(serve: Serve, upstream: Upstream, clock: Clock) -> None:
    site = await serve(upstream, top=policy(LATEST))
    await begin(site, "a/b:1", seconds=10)
    await begin(site, "a/b:2", seconds=20)
    clock.advance(15)
    assert [each["image"] for each in await api(site, path="overrides")] == ["docker.io/a/b:2"]
    await begin(site, "a/b:3")
    kept = list(site.app.composition.store.records.keys(OVERRIDE.prefix()))
    assert kept == [OVERRIDE.key("docker.io/a/b:2"), OVERRIDE.key("docker.io/a/b:3")]


@pytest.mark.clients
async def test_all_workers_know_of_it_at_once(place: Place, upstream: Upstream) -> None:
    image = upstream.image("a/b", "latest")
    place.tree["policy"] = {"rules": [LATEST]}
    server = await place.start()
    path, workers = "/v2/a/b/manifests/latest", await server.workers()
    for worker in workers * 2:
        await worker.get(path, status=403)

    async def run(*words: str) -> None:
        words = ("policy", "override", "a/b:latest", *words, "--server", server.admin_url)
        result = await asyncio.to_thread(CliRunner().invoke, main, words)
        assert result.exit_code == 0, result.output

    await run("--for", "1h", "--reason", "hotfix")
    for worker in workers * 2:
        assert await worker.get(path) == image.content
    await run("--end")
    for worker in workers * 2:
        await worker.get(path, status=403)

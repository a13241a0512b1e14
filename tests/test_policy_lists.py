"""What a policy leaves out of lists, and how often content is verified that many ask for at once."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from proxy.policy.listing import AT_LEAST, shown
from tests.conftest import Serve, Site
from tests.test_policed import LATEST, LISTED, SIGNED, Allowing, condition, policy, status
from tests.upstream import Upstream

__all__ = ["condition"]  # a fixture


async def listed(site: Site, repository: str = "a/b", query: str = "") -> list[str]:
    answer, _, body = await site.get(f"/v2/{repository}/tags/list{query}")
    assert answer == 200
    return list(json.loads(body)["tags"])


async def catalog(site: Site, query: str = "") -> list[str]:
    answer, _, body = await site.get(f"/v2/_catalog{query}")
    assert answer == 200
    return list(json.loads(body)["repositories"])


@pytest.fixture
def tagged(upstream: Upstream) -> list[str]:
    image = upstream.image("a/b", "latest")
    tags = ["edge", "latest", "v1", "v2", f"{image.digest.replace(':', '-')}.sig"]
    upstream.repositories["a/b"].tags.update(dict.fromkeys(tags, image.digest))
    return sorted(tags)


@pytest.mark.parametrize(
    ("given", "hidden"),
    [
        (policy(LATEST), {"latest"}),
        (policy({**LATEST, "mode": "warn"}), set()),
        (policy(LATEST, mode="audit"), set()),
        (policy({**LATEST, "repositories": ["docker.io/other/*"]}), set()),
        ({"policy": LISTED}, {"edge", "latest"}),
        (policy({"name": "first", "action": "allow"}, LATEST), set()),
    ],
)
async def test_tags_that_are_refused_are_not_listed(
    serve: Serve, upstream: Upstream, tagged: list[str], given: Any, hidden: set[str]
) -> None:
    site = await serve(upstream, top=given)
    expected = [each for each in tagged if each not in hidden]
    assert await listed(site) == expected
    for tag in ("edge", "latest", "v1"):
        assert await status(site, tag) == (403 if tag in hidden else 200)
    found, last = [], ""
    while page := await listed(site, query=f"?n=1&last={last}"):
        found += page
        last = page[-1]
    assert found == expected


async def test_a_list_verifies_nothing(
    serve: Serve, upstream: Upstream, tagged: list[str], condition: Allowing
) -> None:
    site = await serve(upstream, top=policy(SIGNED))
    assert await listed(site) == tagged
    assert not condition.asked


async def test_lists_of_a_repository_that_is_refused(serve: Serve, upstream: Upstream) -> None:
    bad, good = upstream.image("bad/tool", "v1"), upstream.image("good/tool", "v1")
    before = await serve(upstream)
    for repository in ("bad/tool", "good/tool"):
        assert await status(before, "v1", repository=repository) == 200
    assert await catalog(before) == ["docker.io/bad/tool", "docker.io/good/tool"]
    await before.app.stop()
    rule = {"name": "bad", "action": "deny", "repositories": ["docker.io/bad/*"], "reason": "it is malware"}
    site = await serve(upstream, top=policy(rule))
    assert await catalog(site) == ["docker.io/good/tool"]
    assert await catalog(site, "?n=1") == ["docker.io/good/tool"]
    for path in ("tags/list", f"referrers/{bad.digest}"):
        answer, _, body = await site.get(f"/v2/bad/tool/{path}")
        (error,) = json.loads(body)["errors"]
        assert (answer, error["code"]) == (403, "DENIED")
        assert error["message"].startswith("policy rule bad refuses docker.io/bad/tool: it is malware")
    assert await listed(site, "good/tool") == ["v1"]
    assert (await site.get(f"/v2/good/tool/referrers/{good.digest}"))[0] == 200


async def test_an_override_shows_its_repository(serve: Serve, upstream: Upstream, tagged: list[str]) -> None:
    site = await serve(upstream, top=policy(LATEST))
    assert "latest" not in await listed(site)
    body = {"reference": "docker.io/a/b:latest", "seconds": 60, "reason": "hotfix"}
    async with site.session.post(f"{site.app.admin_url}/api/v1/overrides", json=body) as response:
        assert response.status == 200, await response.text()
    assert await listed(site) == tagged


@pytest.mark.parametrize("limit", [None, 0, 1, 7, 250, 1000])
async def test_pages_are_full(limit: int | None) -> None:
    names = [f"{number:04}" for number in range(600)]
    asked: list[int | None] = []

    async def read(last: str, size: int | None) -> list[str]:
        asked.append(size)
        return [each for each in names if each > last][:size]

    found = await shown(read, lambda each: each.endswith("7"), "0010", limit)
    assert found == [each for each in names if each > "0010" and each.endswith("7")][:limit]
    assert all(size is None or size >= AT_LEAST for size in asked)


# At once


async def test_content_is_verified_once_for_all_who_ask_at_once(
    serve: Serve, upstream: Upstream, condition: Allowing
) -> None:
    image = upstream.image("a/b", "v1")
    condition.met = {image.digest}
    condition.gate = asyncio.Event()
    site = await serve(upstream, top=policy(SIGNED))
    asked = [asyncio.create_task(status(site, "v1")) for _ in range(20)]
    await condition.begun.wait()
    condition.gate.set()
    assert await asyncio.gather(*asked) == [200] * 20
    assert condition.asked == [image.digest]


async def test_who_leaves_does_not_take_the_others_along(
    serve: Serve, upstream: Upstream, condition: Allowing
) -> None:
    image = upstream.image("a/b", "v1")
    condition.met = {image.digest}
    condition.gate = asyncio.Event()
    site = await serve(upstream, top=policy(SIGNED))
    first = asyncio.create_task(status(site, "v1"))
    await condition.begun.wait()
    second = asyncio.create_task(status(site, image.digest))
    first.cancel()
    condition.gate.set()
    assert await second == 200
    assert condition.asked == [image.digest]


async def test_a_server_that_stops_meanwhile(serve: Serve, upstream: Upstream, condition: Allowing) -> None:
    upstream.image("a/b", "v1")
    condition.gate = asyncio.Event()
    site = await serve(upstream, top={**policy(SIGNED), "drain": "0s"})
    asked = asyncio.create_task(status(site, "v1"))
    await condition.begun.wait()
    await site.app.stop()
    (ended,) = await asyncio.gather(asked, return_exceptions=True)
    assert ended != 200

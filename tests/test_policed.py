"""What a server with a policy serves and refuses, and what it says."""

from __future__ import annotations

import asyncio
import json
import math
import re
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from structlog.testing import LogCapture

from proxy.policy import rules
from proxy.policy.condition import Condition, Evidence, Subject
from proxy.policy.graph import ReachedContent
from proxy.policy.policed import PolicedRegistry
from storage.errors import Denied, StorageFailed, Unavailable
from storage.keys import MOVES
from storage.oci import Tag
from storage.registry import Registry
from tests.conftest import Clock, Serve, Site
from tests.processes import Place, place
from tests.test_hits import hits
from tests.upstream import OCI_MANIFEST, Image, Manifest, Upstream, digest_of
from tests.wire import connect

__all__ = ["hits", "place"]  # fixtures

LATEST = {"name": "moving", "action": "deny", "tags": ["latest"], "reason": "latest moves"}
RELEASES = {"name": "releases", "action": "allow", "tags": ["v*"]}
LISTED = {"rules": [RELEASES], "allow_list": ["docker.io/*"]}
SIGNED = {"name": "signed", "action": "allow", "repositories": ["docker.io/a/*"]}


def policy(*given: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"policy": {"rules": list(given), **keys}}


async def status(site: Site, reference: str, kind: str = "manifests", repository: str = "a/b") -> int:
    return (await site.get(f"/v2/{repository}/{kind}/{reference}"))[0]


async def refusal(site: Site, reference: str, kind: str = "manifests", repository: str = "a/b") -> str:
    """The message of a refusal."""
    answer, _, body = await site.get(f"/v2/{repository}/{kind}/{reference}")
    (error,) = json.loads(body)["errors"]
    assert (answer, error["code"]) == (403, "DENIED")
    async with site.request("HEAD", f"/v2/{repository}/{kind}/{reference}") as response:
        assert response.status == 403
    return str(error["message"])


def served(image: Image) -> list[tuple[str, str]]:
    """The digests of all its content, each with the kind of its endpoint."""
    return [("manifests", image.digest), *(("blobs", each) for each in (image.config, *image.layers))]


# Rules about names


async def test_a_refusal_names_the_rule_and_asks_no_upstream(
    serve: Serve, upstream: Upstream, events: LogCapture
) -> None:
    upstream.image("a/b", "latest")
    site = await serve(upstream, top=policy(LATEST))
    assert await refusal(site, "latest") == (
        "policy rule moving refuses docker.io/a/b:latest: latest moves."
        " Pull what the policy allows, or ask the operator of this server"
    )
    assert upstream.log == []
    told = [each for each in events.entries if each["event"] == "policy.refused"]
    assert [(each["rule"], each["mode"], each["image"]) for each in told] == [
        ("moving", "enforce", "docker.io/a/b:latest")
    ] * 2
    counted = 'entrepot_policy_refused_total{mode="enforce",namespace="docker.io",rule="moving"} 2.0'
    assert counted in await site.metrics()


async def test_verdicts_are_counted_by_what_is_done(serve: Serve, upstream: Upstream) -> None:
    image = upstream.image("a/b", "v1")
    upstream.image("a/b", "latest")
    site = await serve(upstream, top=policy(LATEST))
    assert await status(site, "v1") == await status(site, image.layers[0], "blobs") == 200
    assert await status(site, "latest") == 403
    assert await status(site, "absent") == 404  # nothing is judged
    url = f"{site.app.admin_url}/api/v1/overrides"
    body = {"reference": "a/b:latest", "seconds": 60, "reason": "hotfix"}
    async with site.session.post(url, json=body) as response:
        assert response.status == 200
    assert await status(site, "latest") == 200
    sample = r'entrepot_policy_verdicts_total{namespace="docker.io",result="(\w+)"} ([0-9.]+)'
    found = re.findall(sample, await site.metrics())
    assert dict(found) == {"allowed": "2.0", "refused": "1.0", "overridden": "1.0"}


async def test_a_repository_is_refused_as_a_whole(serve: Serve, upstream: Upstream) -> None:
    image = upstream.image("a/b", "v1")
    rule = {"name": "bad", "action": "deny", "repositories": ["docker.io/a/*"], "reason": "it is malware"}
    site = await serve(upstream, top=policy(rule))
    for kind, digest in served(image):
        assert "bad refuses docker.io/a/b@" in await refusal(site, digest, kind)
    assert "bad refuses docker.io/a/b:v1" in await refusal(site, "v1")
    assert upstream.log == []


async def test_what_was_cached_before_there_was_a_rule_is_judged_by_it(
    serve: Serve, upstream: Upstream
) -> None:
    first = upstream.image("a/b", "latest", [b"one"])
    both = upstream.image("a/b", "v1", [b"two"])
    upstream.repositories["a/b"].tags["edge"] = both.digest
    child = upstream.image("a/b", None, [b"three"])
    upstream.index("a/b", "nightly", [child])
    before = await serve(upstream)
    for reference in ("latest", "v1", "edge", "nightly", child.digest):
        assert await status(before, reference) == 200
    for image in (first, both, child):
        for digest in (image.config, *image.layers):
            assert await status(before, digest, "blobs") == 200
    await before.app.stop()
    deny = {**LATEST, "tags": ["latest", "edge", "nightly"]}
    site = await serve(upstream, top=policy(deny))
    # What only refused tags lead to is refused, by digest too, and so are the blobs of that.
    for image in (first, child):
        for kind, digest in served(image):
            assert "moving refuses" in await refusal(site, digest, kind)
    assert await status(site, "v1") == 200
    for kind, digest in served(both):  # one tag that is allowed is enough
        assert await status(site, digest, kind) == 200
    assert "moving refuses" in await refusal(site, "edge")


async def test_a_blob_of_two_manifests_is_served_on_account_of_either(
    serve: Serve, upstream: Upstream
) -> None:
    good = upstream.image("a/b", "v1", [b"shared", b"good"])
    bad = upstream.image("a/b", "latest", [b"shared", b"bad"])
    before = await serve(upstream)
    for reference in ("v1", "latest"):
        assert await status(before, reference) == 200
    await before.app.stop()
    site = await serve(upstream, top=policy(LATEST))
    assert good.layers[0] == bad.layers[0]
    assert await status(site, good.layers[0], "blobs") == 200
    assert await status(site, good.layers[1], "blobs") == 200
    await refusal(site, bad.layers[1], "blobs")


async def test_of_an_allow_list_only_what_a_rule_allows_is_served(serve: Serve, upstream: Upstream) -> None:
    children = [upstream.image("a/b", None, [each]) for each in (b"amd64", b"arm64")]
    index = upstream.index("a/b", "v1", children)
    other = upstream.image("a/b", "edge", [b"other"])
    site = await serve(upstream, top={"policy": LISTED}, more={"local": {"store": {}}})
    assert await refusal(site, "edge") == (
        "policy rule allow_list refuses docker.io/a/b:edge: no rule allows it."
        " Pull what the policy allows, or ask the operator of this server"
    )
    for kind, digest in served(other):
        await refusal(site, digest, kind)
    # No client may have what a tag allows before the tag is known to lead there.
    await refusal(site, children[0].digest)
    assert await status(site, "v1") == 200
    assert await status(site, index.digest) == 200
    for child in children:
        for kind, digest in served(child):
            assert await status(site, digest, kind) == 200


async def test_what_a_tag_led_to_is_served_when_it_has_moved(
    serve: Serve, upstream: Upstream, clock: Clock
) -> None:
    old = upstream.image("a/b", "v1", [b"old"])
    site = await serve(upstream, top={"policy": LISTED})
    assert await status(site, "v1") == 200
    new = upstream.image("a/b", "v1", [b"new"])
    clock.advance(3600)
    assert await status(site, "v1") == 200
    await site.app.stop()  # what is remembered in memory is gone
    site = await serve(upstream, top={"policy": LISTED})
    for image in (new, old):
        for kind, digest in served(image):
            assert await status(site, digest, kind) == 200


@pytest.mark.parametrize("before", [{}, policy(LATEST)], ids=["no policy before", "as before"])
async def test_what_a_tag_of_a_private_registry_led_to_is_judged_by_it(
    serve: Serve, upstream: Upstream, before: dict[str, Any]
) -> None:
    site = await serve(upstream, top=before, more={"local": {"store": {}}})
    pushed = [await push(site, "latest", content) for content in (b"one", b"two")]
    await site.app.stop()  # what is known in memory is gone
    site = await serve(upstream, top=policy(LATEST), more={"local": {"store": {}}})
    for each in pushed:
        for kind, digest in each.items():
            await refusal(site, digest, kind, "local/app")
    await push(site, "v1", b"one")  # another tag that leads to it
    for kind, digest in pushed[0].items():
        assert await status(site, digest, kind, "local/app") == 200
    await refusal(site, pushed[1]["manifests"], repository="local/app")
    private = site.app.composition.private
    assert private is not None
    assert list(private.records.keys(MOVES.prefix("local/app")))
    async with site.request("DELETE", "/v2/local/app/manifests/latest") as response:
        assert response.status == 202
    assert not list(private.records.keys(MOVES.prefix("local/app")))  # they go with the tag


async def push(site: Site, tag: str, content: bytes) -> dict[str, str]:
    """Push an image of one layer to a private registry; the digests of both."""
    layer = digest_of(content)
    for each in (content, b"{}"):
        path = f"/v2/local/app/blobs/uploads/?digest={digest_of(each)}"
        async with site.request("POST", path, data=each) as response:
            assert response.status == 201
    config = "application/vnd.oci.image.config.v1+json"
    body = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {"mediaType": config, "digest": digest_of(b"{}"), "size": 2},
        "layers": [{"mediaType": "application/x", "digest": layer, "size": len(content)}],
    }
    headers = {"Content-Type": OCI_MANIFEST}
    path = f"/v2/local/app/manifests/{tag}"
    async with site.request("PUT", path, data=json.dumps(body).encode(), headers=headers) as response:
        assert response.status == 201
        return {"manifests": response.headers["Docker-Content-Digest"], "blobs": layer}


async def test_artifacts_may_be_had_with_what_they_are_about(serve: Serve, upstream: Upstream) -> None:
    image = upstream.image("a/b", "v1")
    other = upstream.image("a/b", "edge", [b"other"])
    signature = upstream.artifact("a/b", image, "application/vnd.example.signature")
    refused = upstream.artifact("a/b", other, "application/vnd.example.signature")
    tag = image.digest.replace(":", "-") + ".sig"
    classic = _manifest(upstream, tag, "application/vnd.dev.cosign.simplesigning.v1+json")
    runs = _manifest(
        upstream, image.digest.replace(":", "-") + ".att", "application/vnd.oci.image.layer.v1.tar"
    )
    site = await serve(upstream, top={"policy": LISTED})
    assert await status(site, "v1") == 200
    assert await status(site, signature.digest) == 200
    assert await status(site, tag) == 200
    assert await status(site, classic.digest) == 200
    assert await status(site, digest_of(b"{}"), "blobs") == 200
    await refusal(site, refused.digest)
    # Whoever can push there must not have an image served by calling it a signature.
    await refusal(site, runs.digest)
    await refusal(site, image.digest.replace(":", "-") + ".att")


def _manifest(upstream: Upstream, tag: str, layer: str) -> Manifest:
    config = upstream.blob("a/b", b"{}")
    body = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": 2},
        "layers": [{"mediaType": layer, "digest": upstream.blob("a/b", tag.encode()), "size": len(tag)}],
    }
    content = json.dumps(body).encode()
    upstream.manifest("a/b", content, tag=tag)
    return Manifest(digest_of(content), OCI_MANIFEST, content)


# Modes


@pytest.mark.parametrize("mode", ["warn", "audit"])
async def test_what_is_not_enforced_is_served_and_counted(
    serve: Serve, upstream: Upstream, events: LogCapture, mode: str
) -> None:
    rule = {**LATEST, "reason": 'latest "moves" → pin it'}
    image = upstream.image("a/b", "latest")
    site = await serve(upstream, top=policy(rule, mode=mode))
    told = (
        ('299 - "policy rule moving refuses docker.io/a/b{}: latest \\"moves\\" ? pin it"')
        if mode == "warn"
        else None
    )
    for _ in range(4):  # the second one is remembered, if any is
        answer, headers, body = await site.get("/v2/a/b/manifests/latest")
        assert (answer, body) == (200, image.content)
        assert headers.get("Warning") == (told and told.format(":latest"))
    for kind, digest in served(image):
        answer, headers, _ = await site.get(f"/v2/a/b/{kind}/{digest}")
        assert answer == 200
        assert headers.get("Warning") == (told and told.format(f"@{digest}"))
    assert [each["mode"] for each in events.entries if each["event"] == "policy.refused"] == [mode] * 7
    counted = await site.metrics()
    assert f'{{mode="{mode}",namespace="docker.io",rule="moving"}} 7.0' in counted
    result = {"warn": "warned", "audit": "audited"}[mode]
    assert f'entrepot_policy_verdicts_total{{namespace="docker.io",result="{result}"}} 7.0' in counted


async def test_the_mode_of_a_rule_comes_before_that_of_the_policy(serve: Serve, upstream: Upstream) -> None:
    upstream.image("a/b", "latest")
    site = await serve(upstream, top=policy({**LATEST, "mode": "audit"}, mode="enforce"))
    assert await status(site, "latest") == 200


# Conditions


class Allowing:
    """A condition that the digests in `met` meet, until a time."""

    def __init__(self) -> None:
        self.met: set[str] = set()
        self.until = math.inf
        self.asked: list[str] = []
        self.failure: Exception | None = None
        self.begun = asyncio.Event()
        self.gate: asyncio.Event | None = None  # closed, nothing is judged

    async def judge(self, subject: Subject) -> Evidence:
        self.asked.append(subject.manifest.digest)
        self.begun.set()
        if self.gate is not None:
            await self.gate.wait()
        assert subject.repository == f"docker.io/{subject.name}"
        stored = await subject.registry.get_manifest(subject.name, subject.manifest.digest)
        assert stored.content == subject.manifest.content
        if self.failure is not None:
            raise self.failure
        met = subject.manifest.digest in self.met
        return Evidence(met, "is good" if met else "has no signature", self.until)


@pytest.fixture
def condition(monkeypatch: pytest.MonkeyPatch) -> Iterator[Allowing]:
    """The condition of every rule with the name `signed`."""
    found = Allowing()

    def conditions_of(rule: Any, *_: Any) -> tuple[Condition, ...]:
        return (found,) if rule.name == "signed" else ()

    monkeypatch.setattr(rules, "conditions_of", conditions_of)
    yield found


async def test_a_condition_decides_about_a_manifest_and_its_blobs(
    serve: Serve, upstream: Upstream, condition: Allowing
) -> None:
    good, bad = upstream.image("a/b", "good", [b"good"]), upstream.image("a/b", "bad", [b"bad"])
    condition.met = {good.digest}
    site = await serve(upstream, top=policy(SIGNED))
    assert "signed refuses docker.io/a/b@" in await refusal(
        site, good.layers[0], "blobs"
    )  # nothing is known of it
    for kind, digest in served(good):
        assert await status(site, digest, kind) == 200
    assert await refusal(site, "bad") == (
        "policy rule signed refuses docker.io/a/b:bad: it has no signature."
        " Pull what the policy allows, or ask the operator of this server"
    )
    for kind, digest in served(bad):
        await refusal(site, digest, kind)
    assert await status(site, "good") == 200
    assert condition.asked == [good.digest, bad.digest]  # each was looked at once


async def test_a_good_index_vouches_for_its_children(
    serve: Serve, upstream: Upstream, condition: Allowing
) -> None:
    children = [upstream.image("a/b", None, [each]) for each in (b"amd64", b"arm64")]
    index = upstream.index("a/b", "v1", children)
    alone = upstream.index("a/b", "v2", [upstream.image("a/b", None, [b"other"])])
    condition.met = {index.digest}
    site = await serve(upstream, top=policy(SIGNED))
    await refusal(site, children[0].digest)
    assert await status(site, "v1") == 200
    for child in children:
        for kind, digest in served(child):
            assert await status(site, digest, kind) == 200
    await refusal(site, "v2")
    await refusal(site, alone.digest)


async def test_a_condition_is_judged_again_when_its_time_has_come(
    serve: Serve, upstream: Upstream, condition: Allowing, clock: Clock, hits: Counter[bool]
) -> None:
    image = upstream.image("a/b", "v1")
    site = await serve(upstream, top=policy(SIGNED), fresh_for="30d")
    await refusal(site, "v1")
    condition.met, condition.until = {image.digest}, clock.now + 100
    await refusal(site, "v1")  # a refusal is remembered for seconds
    clock.advance(10)
    async with connect(site.url) as wire:
        head = f"GET /v2/a/b/manifests/{image.digest} HTTP/1.1\r\nHost: x\r\n\r\n".encode()

        async def ask() -> bytes:
            await wire.send(head)
            said = await wire.reader.readuntil(b"\r\n\r\n")
            length = int(said.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await wire.read(length)
            return said[9:12]

        assert [await ask() for _ in range(3)] == [b"200"] * 3
        assert hits[True] == 1
        condition.met = set()
        clock.advance(89)
        assert await ask() == b"200"
        assert hits[True] == 2
        clock.advance(1)
        assert await ask() == b"403"
        assert hits[True] == 2


async def test_what_cannot_be_verified_now_is_not_refused_for_good(
    serve: Serve, upstream: Upstream, condition: Allowing
) -> None:
    image = upstream.image("a/b", "v1")
    condition.met, condition.failure = {image.digest}, Unavailable("no answer")
    site = await serve(upstream, top=policy(SIGNED))
    assert await status(site, "v1") == 503
    condition.failure = None
    assert await status(site, "v1") == 200


async def test_what_cannot_be_verified_is_served_where_nothing_is_enforced(
    serve: Serve, upstream: Upstream, condition: Allowing
) -> None:
    upstream.image("a/b", "v1")
    site = await serve(upstream, top=policy({**SIGNED, "mode": "warn"}))
    # What an upstream says is in the header as far as a header can hold it.
    for said, told in (("no answer", "no answer"), ('a\r\nb\0 é \\ "c"', 'a??b? ? \\\\ \\"c\\"')):
        condition.failure = Unavailable(said)
        answer, headers, _ = await site.get("/v2/a/b/manifests/v1")
        assert answer == 200
        assert f'it cannot be verified now: {told}"' in headers["Warning"]


async def test_what_clients_read_differently_is_never_good(
    serve: Serve, upstream: Upstream, condition: Allowing
) -> None:
    image = upstream.image("a/b", "v1")
    body = {**json.loads(image.content), "Layers": []}
    digest = upstream.manifest("a/b", body, tag="v2")
    condition.met = {digest}
    site = await serve(upstream, top=policy(SIGNED))
    assert "is no manifest that all clients read alike" in await refusal(site, "v2")
    assert condition.asked == []


async def test_what_leads_to_content_is_read_again_only_where_it_is_needed(
    serve: Serve, upstream: Upstream, condition: Allowing, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = upstream.image("a/b", "v1", [b"one", b"two", b"three"])
    bad = upstream.image("a/b", "v2", [b"bad"])
    condition.met = {image.digest}
    site = await serve(upstream, top=policy(SIGNED))
    reads: list[str] = []
    read = ReachedContent._read

    def counting(self: ReachedContent, *arguments: Any) -> Any:
        reads.append(self.repository)
        return read(self, *arguments)

    monkeypatch.setattr(ReachedContent, "_read", counting)
    assert await status(site, "v1") == 200
    before = len(reads)
    for digest in (image.config, *image.layers):  # each changes the records
        assert await status(site, digest, "blobs") == 200
    assert len(reads) == before
    await refusal(site, "v2")
    for digest in bad.layers:
        await refusal(site, digest, "blobs")
    assert len(reads) > before


async def test_what_another_worker_has_learned_counts(
    serve: Serve, upstream: Upstream, tmp_path: Path
) -> None:
    image = upstream.image("a/b", "latest")
    other = await serve(upstream)
    site = await serve(upstream, top=policy(LATEST))
    assert await status(site, digest_of(b"else"), "blobs") == 404  # what is known now is not enough later
    assert await status(other, "latest") == 200
    for kind, digest in served(image):
        await refusal(site, digest, kind)


@pytest.mark.parametrize(
    ("rule", "answer"),
    [
        (LATEST, 500),  # whether `latest` leads to it is not known
        ({**LATEST, "mode": "warn"}, 200),
        ({**LATEST, "repositories": ["docker.io/else/*"]}, 200),
        (RELEASES, 200),
        ({**RELEASES, "tags": ["latest"], "signed_by": ["key"]}, 500),
    ],
)
async def test_what_cannot_be_known_is_not_allowed_for_that(
    serve: Serve, upstream: Upstream, monkeypatch: pytest.MonkeyPatch, rule: dict[str, Any], answer: int
) -> None:
    image = upstream.image("a/b", "latest")
    before = await serve(upstream)
    assert await status(before, "latest") == 200
    await before.app.stop()
    signers = {"key": {"key": str(Path(__file__).parent / "data" / "signatures" / "ecdsa.pub")}}
    site = await serve(upstream, top=policy(rule, **({"signers": signers} if "signed_by" in rule else {})))

    def failing(*_: Any) -> None:
        raise StorageFailed("the disk is broken")

    with monkeypatch.context() as broken:
        broken.setattr(ReachedContent, "_read", failing)
        for kind, digest in served(image):
            assert await status(site, digest, kind) == answer
    for kind, digest in served(image):
        assert await status(site, digest, kind) == (403 if answer == 500 else 200)


# In the way of requests


async def test_without_a_policy_nothing_stands_in_the_way(serve: Serve, upstream: Upstream) -> None:
    site = await serve(upstream, more={"local": {"store": {}}})
    parts = site.app.composition
    members = parts.namespaces._members
    assert members["docker.io"].registry is parts.caches["docker.io"]
    assert members["local"].registry is parts.hosted["local"]


@pytest.mark.parametrize(
    "top",
    [
        {"policy": LISTED},
        {"policy": {**LISTED, "moves": [{"name": "cooldown", "min_age": "3d"}]}},
        policy(LATEST),
        policy(SIGNED),
        policy({**SIGNED, "name": "plain"}),
    ],
)
async def test_what_is_allowed_is_not_judged_again(
    serve: Serve, upstream: Upstream, hits: Counter[bool], condition: Allowing, top: dict[str, Any]
) -> None:
    image = upstream.image("a/b", "v1")
    condition.met = {image.digest}
    site = await serve(upstream, top=top, fresh_for="30d")
    for reference in ("v1", image.digest):
        hits.clear()
        for _ in range(5):
            assert await status(site, reference) == 200
        assert hits[True] >= 2  # the first may be a miss, and what came once is not remembered


async def test_a_private_registry_and_any_host_are_judged_too(serve: Serve, upstream: Upstream) -> None:
    image = upstream.image("a/b", "latest")
    rule = {**LATEST, "repositories": ["local/*", "other.example/*"]}
    site = await serve(
        upstream,
        top=policy(rule),
        more={
            "local": {"store": {}},
            "*": {"upstream": {"hosts": ["other.example"], "connect_timeout": "1s"}},
        },
    )
    for digest in (image.config, *image.layers):
        content = upstream.repositories["a/b"].blobs[digest]
        async with site.request(
            "POST", f"/v2/local/a/b/blobs/uploads/?digest={digest}", data=content
        ) as done:
            assert done.status == 201
    for tag in ("latest", "v1"):
        url, typed = f"/v2/local/a/b/manifests/{tag}", {"Content-Type": OCI_MANIFEST}
        async with site.request("PUT", url, data=image.content, headers=typed) as done:
            assert done.status == 201
    await refusal(site, "latest", repository="local/a/b")
    assert await status(site, "v1", repository="local/a/b") == 200
    await refusal(site, "latest", repository="other.example/a/b")
    assert upstream.log == []


async def test_what_is_refused_is_not_refreshed(serve: Serve, upstream: Upstream) -> None:
    upstream.image("a/b", "latest")
    upstream.image("a/b", "v1")
    site = await serve(upstream, top=policy(LATEST))
    namespaces = site.app.composition.namespaces
    with pytest.raises(Denied, match="moving refuses"):
        await namespaces.revalidate("docker.io/a/b", Tag("latest"))
    result, _, _ = await namespaces.revalidate("docker.io/a/b", Tag("v1"))
    assert result == "miss"


async def test_a_blob_is_not_mounted_out_of_what_is_refused(serve: Serve, upstream: Upstream) -> None:
    image = upstream.image("a/b", "v1")
    rule = {"name": "secret", "action": "deny", "repositories": ["docker.io/a/*"], "reason": "no"}
    site = await serve(upstream, top=policy(rule), more={"local": {"store": {}}})
    mount = f"/v2/local/x/blobs/uploads/?mount={image.layers[0]}&from=docker.io/a/b"
    async with site.request("POST", mount) as response:
        assert response.status == 202  # as if it were not there: the client uploads it
        async with site.request("DELETE", response.headers["Location"]) as cancelled:
            assert cancelled.status == 204
    assert upstream.log == []


async def test_many_clients_at_once_are_judged_alike(
    serve: Serve, upstream: Upstream, condition: Allowing
) -> None:
    good = upstream.image("a/b", "good", [b"good"])
    upstream.image("a/b", "bad", [b"bad"])
    condition.met = {good.digest}
    site = await serve(upstream, top=policy(SIGNED))
    answers = await asyncio.gather(*(status(site, tag) for tag in ("good", "bad") * 20))
    assert answers == [200, 403] * 20


@pytest.mark.clients
async def test_a_new_rule_holds_for_all_workers_and_their_connections(
    place: Place, upstream: Upstream
) -> None:
    image = upstream.image("a/b", "latest")
    server = await place.start()
    path, blob = "/v2/a/b/manifests/latest", f"/v2/a/b/blobs/{image.layers[0]}"
    kept = await server.workers()
    for worker in kept * 3:  # what comes again is remembered
        assert await worker.get(path) == image.content
        await worker.get(blob)
    place.tree["policy"] = {"rules": [LATEST]}
    place.configure()
    old = server.pids()
    server.send(signal.SIGHUP)
    await server.heard("config.reloaded")
    await server.gone(*old)
    for worker in kept:
        with pytest.raises((aiohttp.ClientError, AssertionError)):  # its connection is closed
            await worker.get(path)
    for worker in await server.workers():
        assert b"moving refuses docker.io/a/b:latest" in await worker.get(path, status=403)
        await worker.get(f"/v2/a/b/manifests/{image.digest}", status=403)
        await worker.get(blob, status=403)
    assert await server.metric("entrepot_policy_refused_total", rule="moving") >= 6


def test_every_method_of_a_registry_is_judged_or_passed_on() -> None:
    methods = {name for name, each in vars(Registry).items() if callable(each) and not name.startswith("_")}
    assert methods - set(vars(PolicedRegistry)) == set()

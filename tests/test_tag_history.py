"""What a tag stood for, and what the difference is."""

from __future__ import annotations

import json
from typing import Any

import pytest

from proxy.admin.tag_reports import ImageDiff
from proxy.namespaces.references import FieldInvalid
from storage.errors import ManifestUnknown
from storage.maintenance.usage import Move, Use
from storage.oci import OCI_MANIFEST, Digest, Manifest, Tag
from tests.conftest import Clock
from tests.test_operations import ALPINE, Site, describe, on, settings, site

__all__ = ["settings", "site"]  # fixtures

HOSTED = "local/team/app"


def record(site: Site, tag: str, *resolved: tuple[float, str], moves: list[Move] | None = None) -> None:
    """What clients were served, and moves."""
    uses = {(ALPINE, tag): Use(1, 1.0, 1.0)} if resolved else {}
    named = [(ALPINE, Tag(tag), each) for each in moves or []]
    found = [(at, Digest(digest)) for at, digest in resolved]
    site.composition.usage.record(uses, named, {}, {(ALPINE, tag): found} if found else {})


async def spans(site: Site, ref: str) -> list[tuple[str, float, float | None]]:
    return [(each.digest, each.since, each.until) for each in (await site.operations.history(ref)).rows]


async def test_what_clients_were_served(site: Site, clock: Clock) -> None:
    old = await site.image(ALPINE, None, b"old")
    new = await site.image(ALPINE, "3", b"new")
    record(site, "3", (10.0, old["digest"]), (20.0, old["digest"]), (30.0, new["digest"]))
    found = await site.operations.history("alpine:3")
    assert (found.repository, found.tag) == (ALPINE, "3")
    assert await spans(site, "alpine:3") == [(new["digest"], 30.0, None), (old["digest"], 10.0, 30.0)]
    assert [(each.stored, each.complete) for each in found.rows] == [(True, True)] * 2
    assert found.rows[1].bytes_whole == old["size"] + len(b"{}old") + len(b"old")


async def test_moves_that_no_client_asked_for(site: Site) -> None:
    a, b, c = (Digest.of(each) for each in (b"a", b"b", b"c"))
    moves = [Move(20.0, a, b), Move(30.0, b, c)]
    record(site, "3", moves=moves)
    assert await spans(site, "alpine:3") == [(c, 30.0, None), (b, 20.0, 30.0), (a, 20.0, 20.0)]
    record(site, "3", (5.0, a), (31.0, c))
    assert await spans(site, "alpine:3") == [(c, 30.0, None), (b, 20.0, 30.0), (a, 5.0, 20.0)]
    assert not (await site.operations.history("alpine:3")).rows[0].stored


async def test_what_is_stored_though_nobody_pulled_it(site: Site, clock: Clock) -> None:
    first = await site.image(ALPINE, "3", b"first")
    assert await spans(site, "alpine:3") == [(first["digest"], clock.now, None)]
    record(site, "3", (clock.now + 1, Digest.of(b"served")))
    assert [digest for digest, _, _ in await spans(site, "alpine:3")] == [
        first["digest"],
        Digest.of(b"served"),
    ]


async def test_what_is_not_known_has_no_history(site: Site) -> None:
    with pytest.raises(ManifestUnknown, match="was never pulled"):
        await site.operations.history("alpine:3")
    with pytest.raises(FieldInvalid, match="ref: name a tag"):
        await site.operations.history(f"alpine@{Digest.of(b'')}")
    with pytest.raises(ManifestUnknown, match="not known to have moved"):
        await site.operations.diff("alpine:3")


# The difference


def config(layers: int, *, env: list[str] = [], labels: dict[str, str] = {}, **more: Any) -> bytes:  # noqa: B006
    steps = [{"created_by": f"RUN step {number}"} for number in range(layers)]
    inner = {"Env": env, "Labels": labels, **more}
    return json.dumps(
        {
            "os": "linux",
            "architecture": "amd64",
            "config": inner,
            "history": [*steps, {"created_by": "CMD", "empty_layer": True}],
        }
    ).encode()


async def image(site: Site, repository: str, tag: str | None, said: bytes, *layers: bytes) -> dict[str, Any]:
    named = [await site.blob(repository, each) for each in layers]
    body = {"config": await site.blob(repository, said), "layers": named}
    return await site.manifest(repository, {"mediaType": OCI_MANIFEST, **body}, tag)


def changes(found: ImageDiff, number: int = 0) -> list[tuple[str, str, str]]:
    return [(each.change, each.digest, each.created_by) for each in found.platforms[number].layers]


def values(found: ImageDiff) -> list[tuple[str, str, str | None, str | None]]:
    (platform,) = found.platforms
    return [(each.kind, each.name, each.old, each.new) for each in platform.values]


async def test_layers_and_values(site: Site) -> None:
    before = config(2, env=["A=1", "B=2"], labels={"v": "1"}, Entrypoint=["sh", "-c", "a b"], User="x")
    after = config(3, env=["A=1", "B=3", "C="], Cmd=["run"], User="x", ExposedPorts={"80/tcp": {}})
    old = await image(site, ALPINE, None, before, b"base", b"of old")
    new = await image(site, ALPINE, "3", after, b"base", b"new", b"newer")
    found = await site.operations.diff(f"alpine@{old['digest']}", "alpine:3")
    assert (found.old, found.new) == (f"{ALPINE}@{old['digest']}", f"{ALPINE}@{new['digest']}")
    assert changes(found) == [
        ("same", Digest.of(b"base"), "RUN step 0"),
        ("removed", Digest.of(b"of old"), "RUN step 1"),
        ("added", Digest.of(b"new"), "RUN step 1"),
        ("added", Digest.of(b"newer"), "RUN step 2"),
    ]
    (platform,) = found.platforms
    assert (platform.platform, platform.change, platform.unknown) == ("linux/amd64", "changed", [])
    assert (platform.bytes_same, platform.bytes_removed, platform.bytes_added) == (4, 6, 8)
    assert values(found) == [
        ("config", "entrypoint", "sh -c 'a b'", None),
        ("env", "B", "2", "3"),
        ("label", "v", "1", None),
        ("config", "command", None, "run"),
        ("config", "port 80/tcp", None, "yes"),
        ("env", "C", None, ""),
        ("history", "3", None, "RUN step 2"),
    ]


async def test_what_the_tag_was_before_and_is_now(site: Site) -> None:
    old = await image(site, ALPINE, None, config(1), b"old")
    new = await image(site, ALPINE, "3", config(1), b"new")
    record(site, "3", (10.0, old["digest"]), (30.0, new["digest"]))
    found = await site.operations.diff("alpine:3")
    assert (found.old, found.new) == (f"{ALPINE}@{old['digest']}", f"{ALPINE}@{new['digest']}")
    for other in (new["digest"], f"@{new['digest']}", f"alpine@{new['digest']}", f"{ALPINE}:3"):
        assert await site.operations.diff(f"alpine@{old['digest']}", other) == found
    again = await site.operations.diff("alpine:3", "alpine:3")
    assert again.same
    assert [(each.change, each.layers, each.bytes_same) for each in again.platforms] == [("same", [], 3)]


async def test_platforms_that_come_and_go(site: Site) -> None:
    amd, arm = [await image(site, ALPINE, None, config(1), each) for each in (b"amd", b"arm")]
    later = await image(site, ALPINE, None, config(1), b"later")
    seal = on("unknown/unknown", await image(site, ALPINE, None, config(1), b"an attestation"))
    old = await site.manifest(ALPINE, {"manifests": [on("linux/amd64", amd), on("linux/arm64", arm), seal]})
    new = await site.manifest(ALPINE, {"manifests": [on("linux/s390x", amd), on("linux/arm64", later)]}, "3")
    found = await site.operations.diff(f"alpine@{old['digest']}", new["digest"])
    assert [(each.platform, each.change) for each in found.platforms] == [
        ("linux/s390x", "added"),
        ("linux/arm64", "changed"),
        ("linux/amd64", "removed"),
    ]
    assert [each.bytes_added for each in found.platforms] == [3, 5, 0]


async def test_an_index_and_the_image_for_one_of_its_platforms(site: Site) -> None:
    amd, arm = [await image(site, ALPINE, None, config(1), each) for each in (b"amd", b"arm")]
    index = await site.manifest(ALPINE, {"manifests": [on("linux/amd64", amd), on("linux/arm64", arm)]}, "3")
    found = await site.operations.diff(f"alpine@{amd['digest']}", index["digest"])
    assert [(each.platform, each.change) for each in found.platforms] == [
        ("linux/amd64", "same"),
        ("linux/arm64", "added"),
    ]


async def test_what_is_not_stored_is_named(site: Site) -> None:
    old = await image(site, ALPINE, None, config(1), b"old")
    said = describe(Digest.of(b"elsewhere"), 9)
    layer = describe(Digest.of(b"far"), 3)
    body = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": said, "layers": [layer]}
    new = Manifest.of(OCI_MANIFEST, json.dumps(body).encode())
    await site.store.push_manifest(ALPINE, Tag("3"), new)
    found = await site.operations.diff(f"alpine@{old['digest']}", "alpine:3")
    (platform,) = found.platforms
    assert platform.unknown == [
        f"the configuration {Digest.of(b'elsewhere')} is not stored, or cannot be read"
    ]
    assert [(each.change, each.stored) for each in platform.layers] == [("removed", True), ("added", False)]
    far = describe(Digest.of(b"child"), 100, OCI_MANIFEST)
    index = await site.manifest(ALPINE, {"manifests": [on("linux/amd64", far)]})
    found = await site.operations.diff(f"alpine@{old['digest']}", index["digest"])
    (platform,) = found.platforms
    assert platform.unknown == [f"{far['digest']} is not stored, or cannot be read"]
    assert platform.layers == []
    with pytest.raises(ManifestUnknown):
        await site.operations.diff("alpine:nothing", "alpine:3")
    with pytest.raises(FieldInvalid, match="other"):
        await site.operations.diff("alpine:3", "sha256:abc")


async def test_images_of_different_stores(site: Site) -> None:
    cached = await image(site, ALPINE, "3", config(1), b"same", b"cached")
    private = site.composition.private
    assert private is not None
    store, site.store = site.store, private
    pushed = await image(site, HOSTED, "1", config(1), b"same", b"pushed")
    site.store = store
    found = await site.operations.diff("alpine:3", f"{HOSTED}:1")
    assert (found.old, found.new) == (f"{ALPINE}@{cached['digest']}", f"{HOSTED}@{pushed['digest']}")
    assert [(each.change, each.stored) for each in found.platforms[0].layers] == [
        ("same", True),
        ("removed", True),
        ("added", True),
    ]


async def test_a_configuration_that_both_lack_is_named_once(site: Site) -> None:
    elsewhere = describe(Digest.of(b"elsewhere"), 9)
    made = []
    for content in (b"old", b"new"):
        body = {"config": elsewhere, "layers": [await site.blob(ALPINE, content)]}
        made.append(await site.manifest(ALPINE, {"mediaType": OCI_MANIFEST, **body}))
    found = await site.operations.diff(f"alpine@{made[0]['digest']}", made[1]["digest"])
    assert len(found.platforms[0].unknown) == 1

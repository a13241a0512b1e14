"""What pins match, and what they keep: all that a reference means, for the platforms that are asked for."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from storage.disk.blobs import BlobFiles
from storage.disk.records import SQLiteRecords
from storage.graph import selected, walk
from storage.maintenance.pins import Pin, PinnedContent, Pins
from storage.oci import OCI_INDEX, OCI_MANIFEST, Digest, Manifest, Tag, parse_manifest
from storage.store import Store
from tests.conftest import Clock

ALPINE = "docker.io/library/alpine"
ENCODED = "sha256:" + "a" * 64
CONFIG, LAYER = "application/vnd.oci.image.config.v1+json", "application/vnd.oci.image.layer.v1.tar"


@pytest.fixture
async def store(tmp_path: Path, clock: Clock) -> AsyncIterator[Store]:
    found = Store(BlobFiles(tmp_path, clock), SQLiteRecords(tmp_path / "records"), clock)
    yield found
    await found.close()


def described(content: bytes, media_type: str, **more: Any) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": str(Digest.of(content)), "size": len(content), **more}


def image(name: str, *layers: bytes, subject: Manifest | None = None) -> Manifest:
    config = f'{{"name": "{name}"}}'.encode()
    body = {
        "schemaVersion": 2,
        "config": described(config, CONFIG),
        "layers": [described(each, LAYER) for each in layers],
    }
    if subject is not None:
        body["subject"] = described(subject.content, subject.media_type)
    return Manifest.of(OCI_MANIFEST, json.dumps(body).encode())


def index(*children: tuple[Manifest, str | None]) -> Manifest:
    manifests = []
    for child, platform in children:
        named = described(child.content, child.media_type)
        if platform is not None:
            fields = ("os", "architecture", "variant")
            named["platform"] = dict(zip(fields, platform.split("/"), strict=False))
        manifests.append(named)
    return Manifest.of(OCI_INDEX, json.dumps({"schemaVersion": 2, "manifests": manifests}).encode())


async def put(store: Store, repository: str, tag: str | None, *manifests: Manifest) -> Manifest:
    """The manifests, and the tag for the last one."""
    for each in manifests:
        await store.push_manifest(repository, each.digest, each)
    if tag is not None:
        await store.push_manifest(repository, Tag(tag), manifests[-1])
    return manifests[-1]


def blobs(manifest: Manifest) -> set[Digest]:
    return {each.digest for each in parse_manifest(manifest.content).blobs}


def kept(store: Store, *pins: Pin) -> PinnedContent:
    return Pins(store, pins).pinned()


# Patterns


@pytest.mark.parametrize(
    ("pattern", "repository", "reference"),
    [
        ("docker.io/library/alpine:3.19", ALPINE, "3.19"),
        ("docker.io/library/alpine", ALPINE, "3.19"),
        ("docker.io/library/alpine:3*", ALPINE, "3.19"),
        ("docker.io/library/alpine:3.?9", ALPINE, "3.19"),
        ("docker.io/library/alpine:3.[12]9", ALPINE, "3.19"),
        ("docker.io/*", ALPINE, "3.19"),
        ("docker.io/*:3.19", ALPINE, "3.19"),
        ("*/alpine", ALPINE, "3.19"),
        ("*", ALPINE, "3.19"),
        ("docker.io*", ALPINE, "3.19"),
        ("localhost:5000/app", "localhost:5000/app", "latest"),
        ("localhost:5000/app:1", "localhost:5000/app", "1"),
        (f"{ALPINE}@{ENCODED}", ALPINE, ENCODED),
        (f"{ALPINE}@*", ALPINE, ENCODED),
        (f"{ALPINE}@sha256:a*", ALPINE, ENCODED),
    ],
)
def test_what_a_pattern_matches(pattern: str, repository: str, reference: str) -> None:
    assert Pin(pattern).matches(repository, reference)


@pytest.mark.parametrize(
    ("pattern", "repository", "reference"),
    [
        ("docker.io/library/alpine:3.19", ALPINE, "3.19.1"),
        ("docker.io/library/alpine:3.19", ALPINE, "3x19"),
        ("docker.io/library/alpine", f"{ALPINE}/x", "3.19"),
        ("docker.io/library/alpine:V*", ALPINE, "v1"),
        ("library/alpine", ALPINE, "3.19"),
        ("docker.io/*", ALPINE, ENCODED),
        (f"{ALPINE}:*", ALPINE, ENCODED),
        (f"{ALPINE}@*", ALPINE, "3.19"),
        ("localhost:5000/app", "localhost", "5000"),
    ],
)
def test_what_a_pattern_does_not_match(pattern: str, repository: str, reference: str) -> None:
    assert not Pin(pattern).matches(repository, reference)


@pytest.mark.parametrize(
    ("pattern", "exact"),
    [
        ("docker.io/library/alpine:3.19", (ALPINE, "3.19")),
        ("localhost:5000/app:1", ("localhost:5000/app", "1")),
        (f"{ALPINE}@{ENCODED}", (ALPINE, ENCODED)),
        ("docker.io/library/alpine", None),
        ("docker.io/*/alpine:3.19", None),
        ("docker.io/library/alpine:3.?", None),
    ],
)
def test_what_is_exact(pattern: str, exact: tuple[str, str] | None) -> None:
    assert Pin(pattern).exact == exact


@pytest.mark.parametrize("pattern", ["", "docker.io/library/alpine: 3", "a\tb", "docker.io/x y:1"])
def test_a_pattern_holds_no_space(pattern: str) -> None:
    with pytest.raises(ValueError, match="must not contain spaces"):
        Pin(pattern)


@pytest.mark.parametrize("platform", ["linux", "", "linux/", "linux/arm64/v8/x", "linux /amd64"])
def test_a_platform_names_system_and_architecture(platform: str) -> None:
    with pytest.raises(ValueError, match="not a platform such as"):
        Pin("a/b", platforms=(platform,))


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_keep_fresh_is_a_time(seconds: float) -> None:
    with pytest.raises(ValueError, match="keep_fresh"):
        Pin("a/b", seconds)


@pytest.mark.parametrize("pattern", ["a/b:!", "a/-b:1", "a/b@sha256:1", "alpine:3"])
def test_what_could_match_nothing_is_not_commanded(store: Store, pattern: str) -> None:
    with pytest.raises(ValueError, match="nothing can match"):
        Pins(store).add(Pin(pattern))
    assert list(Pins(store).list()) == []


# By configuration and by command


def test_configured_and_commanded_live_side_by_side(store: Store, clock: Clock) -> None:
    configured = Pin(ALPINE, 60.0, ("linux/amd64",))
    pins = Pins(store, [configured], clock)
    pins.add(Pin(ALPINE, 30.0, ("linux/arm64/v8",)))
    pins.add(Pin("quay.io/*"))
    commanded = Pin(ALPINE, 30.0, ("linux/arm64/v8",), clock.now)
    assert pins.list() == [configured, commanded, Pin("quay.io/*", since=clock.now)]
    assert pins.of(ALPINE, "3.19") == configured
    assert pins.remove(ALPINE)
    assert not pins.remove(ALPINE)
    assert pins.list() == [configured, Pin("quay.io/*", since=clock.now)]
    assert pins.of("quay.io/a/b", "1") == Pin("quay.io/*", since=clock.now)
    assert pins.of("ghcr.io/a/b", "1") is None


def test_a_pin_commanded_again_replaces_the_former(store: Store) -> None:
    pins = Pins(store)
    pins.add(Pin(ALPINE, 30.0, since=1.0))
    pins.add(Pin(ALPINE, 60.0, since=2.0))
    assert pins.list() == [Pin(ALPINE, 60.0, since=2.0)]


def test_a_damaged_pin_is_as_none(store: Store) -> None:
    for record in (b"", b"{", b"\xff", b'{"keep_fresh": "x"}', b'{"keep_fresh": -1}', b"[]"):
        store.records.put("pin a/b", record)
        assert Pins(store).list() == []


# What is kept


async def test_what_a_tag_means_is_kept(store: Store) -> None:
    found = await put(store, ALPINE, "3.19", image("a", b"base", b"top"))
    await put(store, ALPINE, "3.20", image("b", b"base", b"other"))
    assert kept(store, Pin(f"{ALPINE}:3.19")) == PinnedContent(
        frozenset({(ALPINE, "3.19"), (ALPINE, found.digest)}), frozenset({found.digest, *blobs(found)})
    )


async def test_shared_layers_are_kept_for_whoever_is_pinned(store: Store) -> None:
    one = await put(store, ALPINE, "1", image("a", b"base", b"one"))
    two = await put(store, "quay.io/x", "2", image("b", b"base", b"two"))
    assert kept(store, Pin("quay.io/*")).digests == {two.digest, *blobs(two)}
    assert Digest.of(b"base") in blobs(one) & blobs(two)
    assert kept(store, Pin("quay.io/*"), Pin(ALPINE)).digests == {
        one.digest,
        two.digest,
        *blobs(one),
        *blobs(two),
    }


@pytest.mark.parametrize(
    ("pattern", "tags"),
    [
        (f"{ALPINE}:3*", {"3", "3.1", "30"}),
        (f"{ALPINE}:3", {"3"}),
        (f"{ALPINE}:?", {"3", "4"}),
        (ALPINE, {"3", "3.1", "30", "4"}),
        ("*:3.1", {"3.1"}),
        ("docker.io/library/alp*:30", {"30"}),
        ("docker.io/library/alpin:*", set()),
    ],
)
async def test_the_tags_that_a_pattern_finds(store: Store, pattern: str, tags: set[str]) -> None:
    for tag in ("3", "3.1", "30", "4"):
        await put(store, ALPINE, tag, image("a"))
    await put(store, f"{ALPINE}-x", "latest", image("a"))
    pin = Pin(pattern)
    assert {reference for _, reference in Pins(store).matching(pin)} == tags


async def test_a_manifest_is_pinned_by_digest(store: Store) -> None:
    found = await put(store, ALPINE, None, image("a", b"base"))
    await put(store, ALPINE, "4", image("b"))
    for pattern in (f"{ALPINE}@{found.digest}", f"{ALPINE}@{found.digest[:20]}*"):
        assert kept(store, Pin(pattern)) == PinnedContent(
            frozenset({(ALPINE, found.digest)}), frozenset({found.digest, *blobs(found)})
        )


async def test_what_was_removed_is_not_kept(store: Store) -> None:
    await put(store, ALPINE, "3", image("a"))
    pins = Pins(store)
    pins.add(Pin(ALPINE))
    assert pins.pinned().digests
    pins.remove(ALPINE)
    assert pins.pinned() == PinnedContent(frozenset(), frozenset())


async def test_a_tag_that_moved_keeps_what_it_means_now(store: Store) -> None:
    old = await put(store, ALPINE, "3", image("a", b"old"))
    new = await put(store, ALPINE, "3", image("b", b"new"))
    found = kept(store, Pin(ALPINE)).digests
    assert found == {new.digest, *blobs(new)}
    assert old.digest not in found


async def test_a_tag_whose_manifest_went_is_kept_alone(store: Store) -> None:
    found = await put(store, ALPINE, "3", image("a"))
    store.records.delete(f"manifest {ALPINE} {found.digest}")
    assert kept(store, Pin(ALPINE)) == PinnedContent(frozenset({(ALPINE, "3")}), frozenset())


async def test_what_was_never_pulled_keeps_nothing(store: Store) -> None:
    pins = [Pin(f"{ALPINE}:3"), Pin(f"{ALPINE}@{ENCODED}"), Pin("docker.io/Library/alpine:!")]
    assert kept(store, *pins) == PinnedContent(frozenset(), frozenset())


async def test_a_manifest_of_unknown_type_is_kept(store: Store) -> None:
    found = await put(store, ALPINE, "3", Manifest.of("text/plain", b"no JSON"))
    assert kept(store, Pin(ALPINE)).digests == {found.digest}


def strange(key: str, *named: Digest) -> Manifest:
    """A manifest of a type that only its makers know; or one that clients read differently, as Layers is."""
    layers = [{"mediaType": LAYER, "digest": each, "size": 1} for each in named]
    body = {"schemaVersion": 2, "mediaType": "application/vnd.strange", "layers": [], key: layers}
    return Manifest.of(OCI_MANIFEST, json.dumps(body).encode())


@pytest.mark.parametrize("key", ["parts", "Layers", "a list of lists"])
async def test_what_a_manifest_of_unknown_type_names_is_kept(store: Store, key: str) -> None:
    blob, base, signed = Digest.of(b"blob"), image("base", b"layer"), image("signed", b"layer 2")
    signature = image("signature", b"sign", subject=signed)
    other = image("other", b"other")
    found = strange(key, blob, base.digest, signed.digest)
    await put(store, ALPINE, "odd", base, signed, signature, other, found)
    pinned = kept(store, Pin(f"{ALPINE}:odd", platforms=("linux/amd64",)))
    made = (found, base, signed, signature)
    assert {each.digest for each in made} | {blob} <= pinned.digests
    assert pinned.digests >= blobs(base) | blobs(signed) | blobs(signature)
    assert {(ALPINE, each.digest) for each in made} <= pinned.references
    assert not pinned.digests & {other.digest, Digest.of(b"other")}


async def test_what_refers_to_what_is_kept_is_kept(store: Store) -> None:
    child = image("child", b"base")
    top = await put(store, ALPINE, "3", child, index((child, "linux/amd64")))
    bill = await put(store, ALPINE, None, image("sbom", b"bill", subject=child))
    signature = await put(store, ALPINE, None, image("signature", b"signed", subject=bill))
    other = await put(store, ALPINE, None, image("stray", b"stray", subject=image("other")))
    found = kept(store, Pin(ALPINE, platforms=("linux/amd64",)))
    whole = {top, child, bill, signature}
    assert found.digests == {digest for each in whole for digest in (each.digest, *blobs(each))}
    assert found.references == {(ALPINE, "3"), *((ALPINE, each.digest) for each in whole)}
    assert other.digest not in found.digests


async def test_what_is_named_more_than_once_is_kept(store: Store) -> None:
    child = image("child", b"base")
    one = image("one", b"one", subject=child)
    both = index((child, None), (one, None))
    two = await put(store, ALPINE, "3", child, one, both, index((both, None), (child, None)))
    assert kept(store, Pin(ALPINE)).digests >= {two.digest, both.digest, one.digest, child.digest}


# Platforms

CHILDREN = {
    platform: image(str(platform), str(platform).encode())
    for platform in (
        "linux/amd64",
        "linux/arm64/v8",
        "linux/arm64",
        "linux/arm/v6",
        "linux/arm/v7",
        "windows/amd64",
        "unknown/unknown",
        None,
    )
}


@pytest.mark.parametrize(
    ("platforms", "wanted"),
    [
        ([], list(CHILDREN)),
        (["linux/amd64"], ["linux/amd64", None]),
        (["linux/amd64", "windows/amd64"], ["linux/amd64", "windows/amd64", None]),
        (["linux/arm64"], ["linux/arm64/v8", "linux/arm64", None]),
        (["linux/arm64/v8"], ["linux/arm64/v8", "linux/arm64", None]),
        (["linux/arm"], ["linux/arm/v6", "linux/arm/v7", None]),
        (["linux/arm/v7"], ["linux/arm/v7", None]),
        (["linux/s390x"], [None]),
    ],
)
async def test_the_children_of_platforms(
    store: Store, platforms: Sequence[str], wanted: Sequence[str | None]
) -> None:
    top = index(*((child, platform) for platform, child in CHILDREN.items()))
    await put(store, ALPINE, "3", *CHILDREN.values(), top)
    chosen = [CHILDREN[platform] for platform in wanted]
    assert [each.digest for each in selected(parse_manifest(top.content), platforms)] == [
        each.digest for each in chosen
    ]
    expected = {top.digest, *(digest for each in chosen for digest in (each.digest, *blobs(each)))}
    assert kept(store, Pin(ALPINE, platforms=tuple(platforms))).digests == expected


async def test_two_pins_keep_the_platforms_of_both(store: Store) -> None:
    one, two = image("one", b"1"), image("two", b"2")
    await put(store, ALPINE, "3", one, two, index((one, "linux/amd64"), (two, "linux/arm64")))
    pins = [Pin(ALPINE, platforms=("linux/amd64",)), Pin("docker.io/*", platforms=("linux/arm64",))]
    assert kept(store, *pins).digests >= {one.digest, two.digest, *blobs(one), *blobs(two)}


async def test_platforms_are_chosen_within_an_index_of_indexes(store: Store) -> None:
    one, two = image("one", b"1"), image("two", b"2")
    inner = index((one, "linux/amd64"), (two, "linux/arm64"))
    outer = await put(store, ALPINE, "3", one, two, inner, index((inner, None)))
    assert walk(store, ALPINE, outer.digest, ["linux/arm64"]).manifests == {
        outer.digest,
        inner.digest,
        two.digest,
    }


async def test_children_that_are_not_stored_are_missing(store: Store) -> None:
    one, two = image("one", b"1"), image("two", b"2")
    top = await put(store, ALPINE, "3", one, index((one, "linux/amd64"), (two, "linux/arm64")))
    found = walk(store, ALPINE, top.digest)
    assert (found.manifests, found.missing) == ({top.digest, one.digest}, {two.digest})
    assert set(found.blobs) == blobs(one)
    assert kept(store, Pin(ALPINE)).digests == {top.digest, one.digest, *blobs(one)}


async def test_the_blobs_that_an_index_lists_are_kept(store: Store) -> None:
    listed = described(b"a layer", LAYER), described(b"{}", "application/vnd.buildkit.cacheconfig.v0")
    body = json.dumps({"schemaVersion": 2, "manifests": listed}).encode()
    top = await put(store, ALPINE, "cache", Manifest.of(OCI_INDEX, body))
    found = walk(store, ALPINE, top.digest, ["linux/arm64"])
    assert (found.manifests, found.missing) == ({top.digest}, set())
    assert kept(store, Pin(ALPINE)).digests == {top.digest, *(each["digest"] for each in listed)}


@pytest.mark.parametrize(
    ("platform", "found"),
    [
        ({"os": "linux", "architecture": "arm", "variant": "v7"}, "linux/arm/v7"),
        ({"os": "linux", "architecture": "amd64", "variant": ""}, "linux/amd64"),
        ({"os": "windows", "architecture": "amd64", "os.version": "10.0"}, "windows/amd64"),
        ({"os": "linux"}, None),
        ({"os": 1, "architecture": "amd64"}, None),
        ({"os": "linux", "architecture": "amd64", "variant": 8}, "linux/amd64"),
        ("linux/amd64", None),
        (None, None),
    ],
)
def test_the_platform_of_a_child(platform: object, found: str | None) -> None:
    child = described(b"1", OCI_MANIFEST, platform=platform)
    body = {"schemaVersion": 2, "manifests": [child]}
    assert [each.platform for each in parse_manifest(json.dumps(body).encode()).children] == [found]

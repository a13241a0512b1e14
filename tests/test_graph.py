"""Walks over graphs, and what the manifests in them name."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from storage.graph import Walk, attestations, fallback_tag, is_fallback_tag, missing_platforms, named_digests
from storage.oci import (
    ARTIFACTS,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    Digest,
    ManifestContent,
    parse_manifest,
)

NAMED = b'{"mediaType":"a/b", "digest":"%s", "size":1}' % Digest.of(b"1").encode()
GRAPH = {"a": "bc", "b": "d", "c": "d", "d": "a"}


def test_a_walk_reaches_each_node_once() -> None:
    order = []
    walk = Walk("a")
    for node in walk:
        order.append(node)
        walk.add(GRAPH[node])
    assert sorted(order) == list("abcd")
    assert walk.reached == set("abcd")
    walk.add("ab")
    assert list(walk) == []


def index(*platforms: str | None) -> ManifestContent:
    manifests = []
    for number, platform in enumerate(platforms):
        digest = Digest.of(b"%d" % number)
        manifests.append({"mediaType": OCI_MANIFEST, "digest": digest, "size": 1})
        if platform is not None:
            fields = ("os", "architecture", "variant")
            manifests[-1]["platform"] = dict(zip(fields, platform.split("/"), strict=False))
    return parse_manifest(json.dumps({"mediaType": OCI_INDEX, "manifests": manifests}).encode())


@pytest.mark.parametrize(
    ("platforms", "missing"),
    [
        (["linux/amd64"], ["linux/arm64"]),
        (["linux/amd64", "linux/arm64/v8"], []),
        (["linux/amd64", None], []),  # it may be for any
        ([], []),  # it lists nothing: it is no index of platforms
    ],
)
def test_the_platforms_that_an_index_is_not_for(
    platforms: Sequence[str | None], missing: Sequence[str]
) -> None:
    assert missing_platforms(index(*platforms), ["linux/amd64", "linux/arm64"]) == missing


def test_attestations_are_for_no_platform() -> None:
    content = index("linux/amd64", "unknown/unknown", None)
    assert attestations(content) == {content.children[1].digest}


@pytest.mark.parametrize(
    ("media_type", "distributable"),
    [
        ("application/vnd.oci.image.layer.v1.tar+gzip", True),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar", False),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar+zstd", False),
        ("application/vnd.docker.image.rootfs.diff.tar.gzip", True),
        ("application/vnd.docker.image.rootfs.foreign.diff.tar", False),
        ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", False),
        ("application/vnd.example.foreign-keys.v1+json", True),
        ("application/vnd.example.foreign.v1", True),
    ],
)
def test_what_a_registry_is_to_hold(media_type: str, distributable: bool) -> None:
    assert Descriptor(media_type, Digest.of(b"1"), 1).distributable == distributable


@pytest.mark.parametrize(
    ("manifest", "manifests", "blobs"),
    [
        (b'{"mediaType":"%s", "blobs":[%s]}' % (ARTIFACTS[1].encode(), NAMED), 0, 1),
        (b'{"layers":[%s]}' % NAMED, 0, 1),
        (b'{"manifests":[%s]}' % NAMED, 1, 1),  # of no manifest's type: it is a blob as well
        (b'{"mediaType":"a/b", "things":[%s]}' % NAMED, 1, 1),
        (b'{"Layers":[%s]}' % NAMED, 1, 1),
        (b"no JSON: %s" % NAMED, 1, 1),
        (b'{"subject":%s}' % NAMED, 0, 0),
        (b"no JSON", 0, 0),
    ],
)
def test_what_a_manifest_names(manifest: bytes, manifests: int, blobs: int) -> None:
    digest = {Digest.of(b"1")}
    assert named_digests(manifest) == (digest if manifests else set(), digest if blobs else set())


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_fallback_tags_are_recognised(algorithm: str) -> None:
    tag = fallback_tag(Digest.of(b"", algorithm))
    assert is_fallback_tag(tag)
    assert (
        not is_fallback_tag(f"{tag}.sig") and not is_fallback_tag("sha256-00") and not is_fallback_tag("3.20")
    )

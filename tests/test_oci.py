"""Digests, tags, names and manifests: what is one, what is not, and that all else is refused by name."""

from __future__ import annotations

import hashlib
import json
import random
import re
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from storage import oci
from storage.errors import DigestInvalid, ManifestInvalid, NameInvalid, TagInvalid
from storage.oci import (
    ARTIFACTS,
    DOCKER_LIST,
    DOCKER_MANIFEST,
    NAME_LIMIT,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    Digest,
    Manifest,
    Tag,
    key_collision,
    media_type_of,
    parse_manifest,
    parse_name,
    parse_reference,
)

SHA256, SHA512 = "sha256:" + "0a" * 32, "sha512:" + "0a" * 64
UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"


def described(media_type: str, content: bytes = b"", **more: Any) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": Digest.of(content), "size": len(content), **more}


# Digests


@pytest.mark.parametrize(("text", "algorithm", "length"), [(SHA256, "sha256", 64), (SHA512, "sha512", 128)])
def test_a_digest_is_its_algorithm_and_its_encoded_part(text: str, algorithm: str, length: int) -> None:
    digest = Digest.parse(text)
    assert (digest, digest.algorithm, digest.encoded) == (text, algorithm, "0a" * (length // 2))


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "sha256",
        "sha256:",
        SHA256[:-1],
        SHA256 + "0",
        SHA256 + "\n",
        " " + SHA256,
        SHA256.upper(),
        SHA256.replace("a", "A"),
        SHA256.replace("a", "g"),
        SHA256.replace("0", "٠"),  # a digit, but not of these
        SHA256.replace(":", "-"),
        "sha256:" + "0a" * 64,
        "sha512:" + "0a" * 32,
        "sha384:" + "0a" * 48,
        "md5:" + "0a" * 16,
        "sha256+b64:" + "0a" * 32,
        "sha256:../../../../etc/passwd",
        "sha256:" + "../" * 21 + "x",
        SHA256 + "\0",
    ],
)
def test_what_is_no_digest(text: str) -> None:
    with pytest.raises(DigestInvalid):
        Digest.parse(text)


@UNTIMED
@given(st.binary(), st.sampled_from(["sha256", "sha512"]))
def test_the_digest_of_content(content: bytes, algorithm: str) -> None:
    digest = Digest.of(content, algorithm)
    assert digest == f"{algorithm}:{hashlib.new(algorithm, content).hexdigest()}"
    assert Digest.parse(digest) == digest


# Tags and names


@pytest.mark.parametrize(
    "text", ["a", "_", "0", "latest", "v1.2.3-rc.1_x", "A" * 128, "sha256-abc.sig", "a..b"]
)
def test_what_is_a_tag(text: str) -> None:
    assert Tag.parse(text) == text


@pytest.mark.parametrize(
    "text", ["", ".", "..", "-", ".a", "-a", "A" * 129, "a b", "a/b", "a:b", "a\n", "é", "a\0", "a+b", "a%20"]
)
def test_what_is_no_tag(text: str) -> None:
    with pytest.raises(TagInvalid):
        Tag.parse(text)


def test_a_reference_with_a_colon_is_a_digest_or_nothing() -> None:
    assert isinstance(parse_reference(SHA256), Digest)
    assert isinstance(parse_reference("sha256-" + "0a" * 32), Tag)
    assert not isinstance(parse_reference("latest"), Digest)
    with pytest.raises(DigestInvalid):
        parse_reference("latest:1")
    with pytest.raises(TagInvalid):
        parse_reference("")


@pytest.mark.parametrize(
    "text",
    ["a", "0", "a/b", "a/b/c/d/e", "a.b", "a_b", "a__b", "a-b", "a---b", "a1.b2_c3__d4-e5", "x" * NAME_LIMIT],
)
def test_what_is_a_name(text: str) -> None:
    assert parse_name(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "/a",
        "a/",
        "a//b",
        "A",
        "a/B",
        "a..b",
        "a___b",
        "a_-b",
        "a.-b",
        ".a",
        "a.",
        "-a",
        "a-",
        "_a",
        "a_",
        "..",
        "../a",
        "a/../b",
        "a/./b",
        "a b",
        "a\n",
        "a:b",
        "a@b",
        "é",
        "٠",
        "a\0b",
        "x" * (NAME_LIMIT + 1),
        "a-" * 127,
    ],
)
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(NameInvalid):
        parse_name(text)


# Written apart from the source: by characters, not by grammar.
_PIECE = st.from_regex(r"[a-z0-9]{1,5}", fullmatch=True)
_COMPONENT = st.lists(_PIECE, min_size=1, max_size=3).flatmap(
    lambda pieces: st.sampled_from([".", "_", "__", "-", "--"]).map(lambda between: between.join(pieces))
)


@pytest.mark.clients
@UNTIMED
@given(st.lists(_COMPONENT, min_size=1, max_size=4).map("/".join))
def test_components_joined_by_slashes_are_a_name(text: str) -> None:
    assert parse_name(text) == text


@UNTIMED
@given(st.one_of(st.text(), st.text("ab./_-:A0 \n", max_size=20)))
def test_what_is_accepted_is_safe_as_a_key_and_in_a_path(text: str) -> None:
    """No space (records' keys), no component that a path would follow elsewhere, no other form of itself."""
    for parse in (parse_name, parse_reference):
        try:
            accepted = parse(text)
        except (NameInvalid, DigestInvalid, TagInvalid):
            continue
        assert accepted == text
        assert re.fullmatch(r"[\x21-\x7e]+", text)
        assert not {"", ".", ".."} & set(text.split("/"))


# Descriptors


@UNTIMED
@given(
    st.builds(
        Descriptor,
        st.text(),
        st.sampled_from([Digest(SHA256), Digest(SHA512)]),
        st.integers(0, 2**63 - 1),
        st.none() | st.text(min_size=1),
        st.none() | st.dictionaries(st.text(), st.text(), min_size=1),
    )
)
def test_descriptors_go_to_json_and_back(descriptor: Descriptor) -> None:
    read = Descriptor.from_json(msgspec.json.decode(msgspec.json.encode(descriptor.to_json())))
    assert read == descriptor
    assert read.annotations == descriptor.annotations  # which equality leaves out


def test_a_descriptor_in_json_has_the_specifications_members() -> None:
    descriptor = Descriptor(OCI_MANIFEST, Digest(SHA256), 7, "text/x", {"a": "b"})
    assert descriptor.to_json() == {
        "mediaType": OCI_MANIFEST,
        "digest": SHA256,
        "size": 7,
        "artifactType": "text/x",
        "annotations": {"a": "b"},
    }
    assert Descriptor(OCI_MANIFEST, Digest(SHA256), 7).to_json().keys() == {"mediaType", "digest", "size"}


def test_further_members_of_a_descriptor_are_passed_over() -> None:
    given = described(LAYER_TYPE, b"x", urls=["https://cdn.test/x"], platform={"os": "linux"}, data="eA==")
    assert Descriptor.from_json(given) == Descriptor(LAYER_TYPE, Digest.of(b"x"), 1)


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        "text",
        {},
        {"mediaType": LAYER_TYPE, "digest": SHA256},
        {"mediaType": LAYER_TYPE, "size": 1},
        {"digest": SHA256, "size": 1},
        {"mediaType": LAYER_TYPE, "digest": "sha256:0a", "size": 1},
        {"mediaType": LAYER_TYPE, "digest": SHA256, "size": "1"},
        {"mediaType": LAYER_TYPE, "digest": SHA256, "size": None},
        {"mediaType": 1, "digest": SHA256, "size": 1},
        {"mediaType": LAYER_TYPE, "digest": SHA256, "size": 1, "annotations": {"a": 1}},
    ],
)
def test_what_is_no_descriptor(value: Any) -> None:
    with pytest.raises(ManifestInvalid):
        Descriptor.from_json(value)


# Manifests


def test_a_manifest_is_described_by_its_exact_bytes() -> None:
    content = b' {"schemaVersion" : 2}\n'
    for algorithm in ("sha256", "sha512"):
        manifest = Manifest.of(OCI_MANIFEST, content, algorithm)
        assert manifest.descriptor == Descriptor(OCI_MANIFEST, Digest.of(content, algorithm), len(content))


@pytest.mark.parametrize("media_type", [OCI_MANIFEST, DOCKER_MANIFEST])
def test_parse_an_image(media_type: str) -> None:
    body = {
        "schemaVersion": 2,
        "mediaType": media_type,
        "config": described(CONFIG_TYPE, b"{}"),
        "layers": [described(LAYER_TYPE, b"1"), described(LAYER_TYPE, b"2", urls=["https://cdn.test/2"])],
        "annotations": {"a": "b"},
    }
    found = parse_manifest(json.dumps(body).encode())
    assert found.media_type == media_type
    assert found.artifact_type == CONFIG_TYPE
    assert [each.digest for each in found.blobs] == [Digest.of(each) for each in (b"{}", b"1", b"2")]
    assert (found.children, found.subject, found.annotations) == ((), None, {"a": "b"})


@pytest.mark.parametrize("media_type", [OCI_INDEX, DOCKER_LIST])
def test_parse_an_index(media_type: str) -> None:
    child = described(OCI_MANIFEST, b"1", platform={"os": "linux", "architecture": "arm", "variant": "v7"})
    body = {"schemaVersion": 2, "mediaType": media_type, "manifests": [child]}
    found = parse_manifest(json.dumps(body).encode())
    assert (found.media_type, found.artifact_type) == (media_type, None)
    assert [each.digest for each in found.children] == [Digest.of(b"1")]
    assert found.blobs == ()


def test_parse_an_artifact() -> None:
    body = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": "application/vnd.example.signature",
        "config": described("application/vnd.oci.empty.v1+json", b"{}", data="e30="),
        "layers": [described("application/vnd.oci.empty.v1+json", b"{}")],
        "subject": described(OCI_MANIFEST, b"subject"),
    }
    found = parse_manifest(json.dumps(body).encode())
    assert found.artifact_type == "application/vnd.example.signature"
    assert found.subject == Descriptor(OCI_MANIFEST, Digest.of(b"subject"), 7)
    assert found.annotations == {}


@pytest.mark.parametrize(
    ("body", "media_type"),
    [
        ({"schemaVersion": 2}, OCI_MANIFEST),
        ({"schemaVersion": 2, "layers": None, "annotations": None, "subject": None}, OCI_MANIFEST),
        ({"schemaVersion": 2, "manifests": []}, OCI_INDEX),
    ],
)
def test_the_media_type_follows_from_the_form_where_none_is_given(body: Any, media_type: str) -> None:
    assert parse_manifest(json.dumps(body).encode()).media_type == media_type


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0",
        b"null",
        b"[]",
        b"7",
        b"{",
        b"<html>",
        b'{"mediaType":"\xff"}',
        b'{"mediaType":"\\ud800"}',
        b'{"mediaType":7}',
        b'{"layers":{}}',
        b'{"layers":[null]}',
        b'{"config":[]}',
        b'{"subject":"sha256"}',
        b'{"manifests":[{"mediaType":"a/b","digest":"sha256:0a","size":1}]}',
        b'{"annotations":{"a":{}}}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"annotations":' * 100_000,
    ],
    ids=lambda content: repr(content[:30]),
)
def test_what_is_no_manifest(content: bytes) -> None:
    with pytest.raises(ManifestInvalid):
        parse_manifest(content)


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from([SHA256, OCI_INDEX]),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(
            st.text()
            | st.sampled_from(["mediaType", "digest", "size", "config", "layers", "manifests", "subject"]),
            inner,
        )
    ),
    max_leaves=12,
)


@pytest.mark.clients
@UNTIMED
@given(st.binary() | _JSON.map(lambda value: json.dumps(value).encode()))
@example(b'{"a":' * 100_000 + b"1" + b"}" * 100_000)  # too deep for Python before 3.14
def test_of_garbage_comes_a_manifest_or_a_refusal(content: bytes) -> None:
    try:
        found = parse_manifest(content)
    except ManifestInvalid:
        return
    for each in (*found.children, *found.blobs, *filter(None, [found.subject])):
        assert Digest.parse(each.digest) == each.digest


@pytest.mark.parametrize(
    ("media_type", "is_blob"),
    [
        (OCI_MANIFEST, False),
        (OCI_INDEX, False),
        ("application/vnd.docker.distribution.manifest.v2+json", False),
        ("application/vnd.docker.distribution.manifest.list.v2+json", False),
        ("application/vnd.docker.distribution.manifest.v1+prettyjws", False),
        ("application/vnd.oci.artifact.manifest.v1+json", False),
        ("application/vnd.oci.image.layer.v1.tar+gzip", True),
        ("application/vnd.oci.image.config.v1+json", True),
        ("application/vnd.buildkit.cacheconfig.v0", True),
    ],
)
def test_an_index_may_list_blobs(media_type: str, is_blob: bool) -> None:
    listed = {"mediaType": media_type, "digest": f"sha256:{'0' * 64}", "size": 1}
    content = parse_manifest(json.dumps({"schemaVersion": 2, "manifests": [listed]}).encode())
    assert [each.digest for each in content.listed] == [listed["digest"]]
    assert (content.blobs, content.children) == ((content.listed, ()) if is_blob else ((), content.listed))


@pytest.mark.parametrize("media_type", [*ARTIFACTS, None])
def test_the_blobs_of_an_artifact_manifest(media_type: str | None) -> None:
    body = {
        "artifactType": "application/vnd.example.sbom",
        "blobs": [described("application/json", b"1"), described(OCI_MANIFEST, b"2")],
        "subject": described(OCI_MANIFEST, b"subject"),
        **({"mediaType": media_type} if media_type else {}),
    }
    found = parse_manifest(json.dumps(body).encode())
    assert found.media_type == (media_type or ARTIFACTS[0])
    assert [each.digest for each in found.blobs] == [Digest.of(b"1"), Digest.of(b"2")]
    assert (found.children, found.unread) == ((), frozenset())
    assert found.subject is not None


@pytest.mark.parametrize(
    "body",
    [
        {"mediaType": ARTIFACTS[1], "blobs": [{"digest": SHA256}]},
        {"mediaType": ARTIFACTS[0], "blobs": 7},
    ],
)
def test_blobs_that_are_no_descriptors(body: Any) -> None:
    with pytest.raises(ManifestInvalid):
        parse_manifest(json.dumps(body).encode())


def test_images_have_no_field_for_further_blobs() -> None:
    for more in ({"mediaType": OCI_MANIFEST}, {}):
        body = {"schemaVersion": 2, "config": described(CONFIG_TYPE, b"{}"), "blobs": ["mine"], **more}
        assert [each.digest for each in parse_manifest(json.dumps(body).encode()).blobs] == [Digest.of(b"{}")]


@pytest.mark.parametrize(
    ("body", "unread"),
    [
        ({"schemaVersion": 1, "fsLayers": [{"blobSum": SHA256}]}, {SHA256}),
        ({"mediaType": "application/vnd.example.thing+json", "things": [SHA256]}, {SHA256}),
        (
            {"mediaType": "application/vnd.example.thing+json", "blobs": [described("a/b", b"1")]},
            {Digest.of(b"1")},
        ),
        ({"mediaType": "application/vnd.example.thing+json", "layers": [described("a/b", b"1")]}, set()),
        ({"mediaType": "application/vnd.example.thing+json", "subject": described("a/b", b"1")}, set()),
        ({"mediaType": OCI_MANIFEST, "annotations": {"base": SHA256}}, set()),
    ],
)
def test_what_else_a_manifest_of_an_unknown_type_may_name(body: Any, unread: set[str]) -> None:
    assert parse_manifest(json.dumps(body).encode()).unread == unread


def filled(content: str) -> bytes:
    """With a layer for <layer>, and for <layer one that goes on."""
    layer = json.dumps(described(LAYER_TYPE, b"1"))
    return content.replace("<layer>", layer).replace("<layer", layer[:-1]).encode()


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ('{"layers":[], "Layers":[<layer>]}', "Layers"),
        ('{"LAYERS":[<layer>]}', "LAYERS"),  # alone, some clients read it and others do not
        ('{"layers":[], "layers":[<layer>]}', "layers"),
        ('{"layers":[], "layer\\u017f":[<layer>]}', "layerſ"),  # Go folds it to s
        ('{"mediaType":"a/b", "mediatype":"c/d"}', "mediatype"),
        ('{"manifests":[], "\\u004danifests":[]}', "Manifests"),
        ('{"layers":[<layer, "Size":2}]}', "Size"),
        ('{"config":<layer, "size":2}}', "size"),
        ('{"blobs":[<layer, "Digest":"x"}]}', "Digest"),
        ('{"manifests":[<layer, "platform":{"os":"a", "OS":"b"}}]}', "OS"),
        ('{"subject":<layer, "MEDIATYPE":"c/d"}}', "MEDIATYPE"),
        ('{"mine":1, "Mine":2}', "Mine"),
        ('{"annotations":{}, "annotationS":{}}', "annotationS"),
        ('{"Layers" \n:[]}', "Layers"),
        ('{"size":1, "mediaType":"a:b:c", "Size" :":"}', "Size"),
        ('{"annotations":{"a":"\\u003a\\u003a"}, "Config":{}, "LAYERS":[]}', "Config"),
        ('{"layers":[<layer, "platform":{"os":"a", "Os":"b"}}]}', "Os"),
        ('{"config":<layer, "platform":[{"os":"a", "oS":"b"}]}}', "oS"),
        ('{"subject":<layer, "platform":{"Architecture":""}}}', "Architecture"),
        ('{"annotations":{"a":"1"}, "annotations":{"b":":"}}', "annotations"),
        ('{"schemaVersion":2, "SchemaVersion":2}', "SchemaVersion"),
    ],
)
def test_keys_that_clients_read_differently(content: str, key: str) -> None:
    assert key_collision(filled(content)) == key
    with pytest.raises(ManifestInvalid, match=key):
        parse_manifest(filled(content))


@pytest.mark.parametrize(
    "content",
    [
        '{"annotations":{"a":"1", "A":"2", "layers":"", "Layers":""}}',
        '{"layers":[<layer, "annotations":{"digest":"1", "Digest":"2"}}]}',
        '{"Mine":{"a":1, "A":2}, "count":%s}' % ("9" * 5000),
        '{"layers":[<layer>,<layer>]}',
        '{"schemaVersion":2, "config":<layer, "data":"", "urls":[]}}',
    ],
)
def test_keys_that_all_clients_read_alike(content: str) -> None:
    assert key_collision(filled(content)) is None
    parse_manifest(filled(content))


@pytest.mark.parametrize(
    "content",
    [
        '{"schemaVersion":2, "mediaType":"a/b", "config":<layer>, "layers":[<layer>], "subject":<layer>}',
        '{"manifests":[<layer, "platform":{"os":"a", "os.version":"1:2", "features":[":"]}}],'
        ' "annotations":{":":":"}}',
        '{ "schemaVersion"\n: {"a": [1, "\u00e9:"]} , "layers" : [] , "artifactType":"c:d" }',
    ],
)
def test_what_manifests_have_as_a_rule_is_not_read_twice(
    content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closer(content: bytes) -> str | None:
        raise AssertionError("the keys were read again")

    monkeypatch.setattr(oci, "key_collision", closer)
    parse_manifest(filled(content))
    with pytest.raises(AssertionError):
        parse_manifest(filled('{"layers":[<layer, "urls":[]}]}'))


def test_collisions_are_found_however_a_manifest_is_written() -> None:
    chosen = random.Random(12)
    names = [
        "layers",
        "Layers",
        "config",
        "subject",
        "size",
        "Size",
        "platform",
        "os",
        "OS",
        "annotations",
        "a:b",
    ]

    def value(depth: int) -> str:
        kind = chosen.randrange(4 if depth else 2)
        if kind < 2:
            return chosen.choice(['"x"', '":"', '"\\u003a"', "1", "null"])
        if kind == 2:
            return "[" + ",".join(value(depth - 1) for _ in range(chosen.randrange(3))) + "]"
        return members(depth - 1)

    def members(depth: int) -> str:
        gap = chosen.choice(["", " ", "\n"])
        found = [f'"{chosen.choice(names)}"{gap}:{value(depth)}' for _ in range(chosen.randrange(4))]
        if chosen.random() < 0.7:
            found += [f'"mediaType":"a/b","digest":"{SHA256}","size":{len(found)}']
        chosen.shuffle(found)
        return "{" + ",".join(found) + "}"

    refused = passed = 0
    for _ in range(4000):
        content = members(4).encode()
        try:
            parse_manifest(content)
        except ManifestInvalid as error:
            refused += "differently" in str(error)
        else:
            passed += 1
            assert key_collision(content) is None, content
    assert refused > 100 and passed > 100


@pytest.mark.parametrize("content", [b"[]", b"7", b'["Layers"]'])
def test_what_is_no_object_has_no_keys(content: bytes) -> None:
    assert key_collision(content) is None


@pytest.mark.parametrize("content", [b"", b"\xff", b'{"a":', b"[" * 1_000_000])
def test_of_what_is_not_read_it_is_unknown_whether_keys_collide(content: bytes) -> None:
    with pytest.raises((ValueError, RecursionError)):
        key_collision(content)


@pytest.mark.parametrize(
    "depth", [1, 985, 990, 993, 995, 997, 1000, 2000, 9990, 9999, 10_010, 50_000, 70_000, 200_000]
)
def test_a_collision_is_found_beside_what_is_deep(depth: int) -> None:
    """Python versions differ in how deep they read, and msgspec reads deeper than json."""
    deep = b'{"a":' * depth + b"1" + b"}" * depth
    with pytest.raises(ManifestInvalid):
        parse_manifest(b'{"x":' + deep + b',"layers":[],"Layers":[]}')


@pytest.mark.parametrize("text", [b"\xff", b"\xc0\xaf", b"\xed\xa0", b"a\x00"])
def test_a_collision_is_found_beside_text_that_is_no_UTF_8(text: bytes) -> None:
    """msgspec does not decode the members that it skips; Go replaces what it cannot decode."""
    for content in (b'{"x":"%s","layers":[],"Layers":[]}', b'{"%s":1,"layers":[],"Layers":[]}'):
        with pytest.raises(ManifestInvalid):
            parse_manifest(content % text)


def test_the_media_type_of_a_manifest_whose_keys_collide() -> None:
    assert media_type_of(b'{"mediaType":"a/b", "Layers":[]}') == "a/b"
    with pytest.raises(ManifestInvalid):
        media_type_of(b"<html>")

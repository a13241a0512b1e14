"""What a manifest must be that is pushed or imported."""

from __future__ import annotations

import json
from typing import Any

import pytest

from storage.errors import ManifestInvalid
from storage.oci import OCI_ARTIFACT, OCI_INDEX, OCI_MANIFEST, Digest, parse_manifest
from storage.validation import validate

EMPTY: dict[str, Any] = {
    "mediaType": "application/vnd.oci.empty.v1+json",
    "digest": Digest.of(b"{}"),
    "size": 2,
    "data": "e30=",
}
IMAGE: dict[str, Any] = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": EMPTY, "layers": [EMPTY]}
PLATFORM = {
    "os": "windows",
    "architecture": "amd64",
    "os.version": "10.0.26100.1",
    "os.features": ["win32k"],
    "variant": "v1",
    "features": ["sse4"],
    "example.of.another": 7,
}
SHA512 = {"digest": Digest.of(b"{}", "sha512")}


def index(*entries: dict[str, Any]) -> dict[str, Any]:
    named = [{**EMPTY, "mediaType": OCI_MANIFEST, **each} for each in entries]
    return {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": named}


def artifact(**members: Any) -> dict[str, Any]:
    return {"mediaType": OCI_ARTIFACT, "artifactType": "a/b", "blobs": [{**EMPTY, **members}]}


def layer(**members: Any) -> dict[str, Any]:
    return {**IMAGE, "layers": [EMPTY, {**EMPTY, **members}]}


@pytest.mark.parametrize(
    "manifest",
    [
        IMAGE,
        layer(data=None, urls=None, annotations=None, platform=None),
        layer(urls=[], annotations={}, data="e30="),
        layer(urls=["https://example.com/layer.tar.gz"], platform={}),
        layer(**SHA512),
        layer(size=0, digest=Digest.of(b""), data=""),
        layer(size=0, digest=Digest.of(b""), data=None),
        layer(size=(1 << 63) - 1, data=None),
        layer(other=-1.5, unknown={"size": -1}),
        {**IMAGE, "layers": []},
        {**IMAGE, "layers": None, "config": None, "subject": None},
        {**IMAGE, "subject": EMPTY, "blobs": 7, "schemaVersion": None},
        {name: value for name, value in IMAGE.items() if name not in ("schemaVersion", "config")},
        index(),
        index({"platform": PLATFORM}, {"platform": {"os": "unknown", "architecture": "unknown"}}),
        index({"platform": dict.fromkeys(PLATFORM)}),
        artifact(),
    ],
)
def test_what_clients_may_push(manifest: dict[str, Any]) -> None:
    content = json.dumps(manifest).encode()
    validate(parse_manifest(content).media_type, content)


@pytest.mark.parametrize(
    ("manifest", "says"),
    [
        (layer(size=-1), "`int` >= 0 - at `$.layers[1].size`"),
        (layer(size=-(1 << 70)), "`int` >= 0 - at `$.layers[1].size`"),
        (layer(size=1 << 63), "at `$.layers[1].size`"),
        (layer(size=2.0), "at `$.layers[1].size`"),
        (layer(size="2"), "at `$.layers[1].size`"),
        (layer(size=True), "at `$.layers[1].size`"),
        ({**IMAGE, "config": {**EMPTY, "size": -1}}, "at `$.config.size`"),
        ({**IMAGE, "subject": {**EMPTY, "size": -1}}, "at `$.subject.size`"),
        (index({"size": -1}), "at `$.manifests[0].size`"),
        (artifact(size=-1), "at `$.blobs[0].size`"),
        (layer(urls="https://example.com"), "at `$.layers[1].urls`"),
        (layer(urls=[7]), "at `$.layers[1].urls[0]`"),
        (layer(data=7), "at `$.layers[1].data`"),
        (layer(data="e30"), "at `$.layers[1].data`"),
        (layer(data="W10="), f"its descriptor of {EMPTY['digest']} is other content"),
        (layer(size=3), f"its descriptor of {EMPTY['digest']} is other content"),
        (index({"platform": "linux/amd64"}), "at `$.manifests[0].platform`"),
        (index({"platform": {"os": 7}}), "at `$.manifests[0].platform.os`"),
        (index({"platform": {"os.features": "win32k"}}), "at `$.manifests[0].platform.os.features`"),
        ({**IMAGE, "schemaVersion": "2"}, "at `$.schemaVersion`"),
    ],
)
def test_what_is_refused(manifest: dict[str, Any], says: str) -> None:
    content = json.dumps(manifest).encode()
    with pytest.raises(ManifestInvalid) as raised:
        validate(manifest["mediaType"], content)
    assert says in str(raised.value)

"""Archives of images as other tools write them: from the specifications, with nothing of ours.

An archive is a mapping of names to contents until it is written, as a directory or as a tar.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.upstream.content import OCI_CONFIG, OCI_INDEX, OCI_LAYER, OCI_MANIFEST, describe

if sys.version_info >= (3, 14):
    from compression import zstd as zstd
else:
    from backports import zstd as zstd

REF_NAME = "org.opencontainers.image.ref.name"
IMAGE_NAME = "io.containerd.image.name"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"

Files = dict[str, bytes]


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def packed(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode()


@dataclass
class Made:
    """An image, or an index of some: its manifest, and all the blobs that it takes."""

    manifest: bytes
    media_type: str = OCI_MANIFEST
    blobs: list[bytes] = field(default_factory=list)

    @property
    def digest(self) -> str:
        return digest_of(self.manifest)

    def descriptor(self, **annotations: str) -> dict[str, Any]:
        found: dict[str, Any] = describe(self.media_type, self.digest, len(self.manifest))
        return {**found, "annotations": annotations} if annotations else found


def image(*layers: bytes, subject: Made | None = None, **config: Any) -> Made:
    layers = layers or (tar({"etc/hello": b"hello"}),)
    content = packed(
        {
            "architecture": "amd64",
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [digest_of(each) for each in layers]},
            **config,
        }
    )
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": describe(OCI_CONFIG, digest_of(content), len(content)),
        "layers": [describe(OCI_LAYER, digest_of(each), len(each)) for each in layers],
        **({"subject": subject.descriptor()} if subject else {}),
    }
    manifest = packed(document)
    return Made(manifest, blobs=[content, *layers, manifest])


def index(children: Mapping[str, Made]) -> Made:
    """By platform.  Its blobs hold those of all children."""
    manifests = []
    for platform, child in children.items():
        system, architecture = platform.split("/")
        manifests.append({**child.descriptor(), "platform": {"os": system, "architecture": architecture}})
    manifest = packed({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests})
    blobs = [blob for child in children.values() for blob in child.blobs]
    return Made(manifest, OCI_INDEX, [*blobs, manifest])


def layout(named: Iterable[tuple[Made, Mapping[str, str]]]) -> Files:
    """An OCI image layout, with each image's descriptor under its annotations."""
    named = list(named)
    files = {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}'}
    manifests = [made.descriptor(**annotations) for made, annotations in named]
    files["index.json"] = packed({"schemaVersion": 2, "manifests": manifests})
    for made, _ in named:
        for blob in made.blobs:
            files[f"blobs/sha256/{digest_of(blob).removeprefix('sha256:')}"] = blob
    return files


def saved(layers: Iterable[bytes], tags: list[str] | None, suffix: str = "") -> Files:
    """What docker save wrote before it wrote layouts."""
    layers = list(layers)
    config = packed(
        {
            "architecture": "amd64",
            "os": "linux",
            "rootfs": {
                "type": "layers",
                "diff_ids": [digest_of(gzip.decompress(each) if suffix else each) for each in layers],
            },
        }
    )
    name = f"{digest_of(config).removeprefix('sha256:')}.json"
    names = [f"{number:064x}/layer.tar{suffix}" for number in range(len(layers))]
    manifest = [{"Config": name, "RepoTags": tags, "Layers": names}]
    return {
        name: config,
        **dict(zip(names, layers, strict=True)),
        "manifest.json": packed(manifest),
    }


def write(files: Mapping[str, bytes], directory: Path) -> Path:
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return directory


def tar(files: Mapping[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, content in files.items():
            archive.addfile(member(name, len(content)), io.BytesIO(content))
    return buffer.getvalue()


def member(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info


def block(info: tarfile.TarInfo) -> bytes:
    """Its header alone."""
    return info.tobuf(tarfile.GNU_FORMAT)

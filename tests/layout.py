"""A directory as Distribution fills it, written from its layout; with no code of ours."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"


def digest_of(content: bytes, algorithm: str = "sha256") -> str:
    return f"{algorithm}:{hashlib.new(algorithm, content).hexdigest()}"


def described(media_type: str, content: bytes, algorithm: str = "sha256") -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest_of(content, algorithm), "size": len(content)}


class Layout:
    """At `directory`, as its configuration would name it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.root = directory / "docker" / "registry" / "v2"
        for name in ("blobs", "repositories"):
            (self.root / name).mkdir(parents=True)

    def data(self, digest: str) -> Path:
        """Where the bytes lie."""
        algorithm, _, encoded = digest.partition(":")
        return self.root / "blobs" / algorithm / encoded[:2] / encoded / "data"

    def repository(self, name: str) -> Path:
        return self.root / "repositories" / name

    def link(self, name: str, kind: str, digest: str) -> Path:
        """`kind` is _layers or _manifests/revisions."""
        algorithm, _, encoded = digest.partition(":")
        return self.repository(name) / kind / algorithm / encoded / "link"

    def tag(self, name: str, tag: str) -> Path:
        """The link that says where it points to."""
        return self.repository(name) / "_manifests" / "tags" / tag / "current" / "link"

    def blob(self, name: str, content: bytes, algorithm: str = "sha256") -> str:
        """Its data lies by sha256, whatever it was pushed by."""
        digest = digest_of(content)
        _write(self.data(digest), content)
        asked = digest_of(content, algorithm)
        _write(self.link(name, "_layers", asked), digest.encode())
        return asked

    def manifest(self, name: str, content: bytes | Mapping[str, Any], *tags: str) -> str:
        if not isinstance(content, bytes):
            content = json.dumps(content, indent=2).encode()
        digest = digest_of(content)
        _write(self.data(digest), content)
        _write(self.link(name, "_manifests/revisions", digest), digest.encode())
        for tag in tags:
            self.point(name, tag, digest)
        return digest

    def point(self, name: str, tag: str, digest: str, at: float | None = None) -> None:
        algorithm, _, encoded = digest.partition(":")
        link = self.tag(name, tag)
        _write(link, digest.encode())
        _write(link.parent.parent / "index" / algorithm / encoded / "link", digest.encode())
        if at is not None:
            os.utime(link, (at, at))

    def image(self, name: str, *tags: str, layers: Sequence[bytes] = (b"a layer",), **more: Any) -> str:
        config = b'{"of": "%s"}' % name.encode()
        self.blob(name, config)
        for layer in layers:
            self.blob(name, layer)
        body = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": described("application/vnd.oci.image.config.v1+json", config),
            "layers": [described("application/vnd.oci.image.layer.v1.tar", each) for each in layers],
            **more,
        }
        return self.manifest(name, body, *tags)

    def index(self, name: str, children: Sequence[str], *tags: str) -> str:
        named = [
            {"mediaType": MANIFEST, "digest": each, "size": path.stat().st_size if path.exists() else 1}
            for each in children
            for path in [self.data(each)]
        ]
        return self.manifest(name, {"schemaVersion": 2, "mediaType": INDEX, "manifests": named}, *tags)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)

"""An OCI image layout on the disk, to which manifests are added (image-spec, image-layout.md)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
EMPTY = "application/vnd.oci.empty.v1+json"
NAME = "org.opencontainers.image.ref.name"

Descriptor = dict[str, Any]


class ImageLayout:
    """The layout at `directory`, which buildah has made."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def descriptors(self) -> list[Descriptor]:
        """What its index names."""
        found: list[Descriptor] = json.loads((self._directory / "index.json").read_text())["manifests"]
        return found

    def write_index(self, manifests: Sequence[Descriptor]) -> None:
        """Replace its index, and remove every blob that nothing names any more."""
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests}
        (self._directory / "index.json").write_text(json.dumps(index))
        named = {name for each in manifests for name in self._reachable(each)}
        for path in (self._directory / "blobs/sha256").iterdir():
            if f"sha256:{path.name}" not in named:
                path.unlink()

    def read(self, descriptor: Descriptor) -> dict[str, Any]:
        """The JSON that it describes."""
        found: dict[str, Any] = json.loads(self._path(descriptor["digest"]).read_text())
        return found

    def add(self, content: bytes, media_type: str) -> Descriptor:
        """Write a blob; returns its descriptor."""
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        self._path(digest).write_bytes(content)
        return {"mediaType": media_type, "digest": digest, "size": len(content)}

    def add_json(self, content: Mapping[str, Any], media_type: str) -> Descriptor:
        """Write a blob of JSON; returns its descriptor."""
        return self.add(json.dumps(content, separators=(",", ":"), sort_keys=True).encode(), media_type)

    def attach(self, subject: Descriptor, files: Mapping[str, bytes], media_type: str) -> Descriptor:
        """Write a manifest that refers to `subject` and has files; returns its descriptor, for the index."""
        layers = [
            {**self.add(content, media_type), "annotations": {"org.opencontainers.image.title": name}}
            for name, content in files.items()
        ]
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "artifactType": media_type,
            "config": self.add(b"{}", EMPTY),
            "layers": layers,
            "subject": {key: subject[key] for key in ("mediaType", "digest", "size")},
        }
        return {**self.add_json(manifest, MANIFEST), "artifactType": media_type}

    def _path(self, digest: str) -> Path:
        return self._directory / "blobs" / digest.replace(":", "/")

    def _reachable(self, descriptor: Descriptor) -> list[str]:
        found = [descriptor["digest"]]
        if descriptor["mediaType"] in (INDEX, MANIFEST):
            content = self.read(descriptor)
            parts = [*content.get("manifests", []), *content.get("layers", [])]
            parts += [content["config"]] if "config" in content else []
            found += [name for each in parts for name in self._reachable(each)]
        return found

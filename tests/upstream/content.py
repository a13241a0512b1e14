"""What a fake registry holds, and how a test puts it there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
OCI_EMPTY = "application/vnd.oci.empty.v1+json"


@dataclass(frozen=True)
class Manifest:
    digest: str
    media_type: str
    content: bytes
    platform: str | None = None  # os/architecture[/variant]

    @property
    def descriptor(self) -> dict[str, Any]:
        """image-spec, descriptor.md and, for the platform, image-index.md."""
        found: dict[str, Any] = describe(self.media_type, self.digest, len(self.content))
        if self.platform:
            names = ("os", "architecture", "variant")
            found["platform"] = dict(zip(names, self.platform.split("/"), strict=False))
        return found


@dataclass(frozen=True)
class Image(Manifest):
    config: str = ""
    layers: tuple[str, ...] = ()


class Repository:
    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, Manifest] = {}
        self.tags: dict[str, str] = {}


@lru_cache(64)  # layers of some MiB are put into many images, twice into each
def digest_of(content: bytes, algorithm: str = "sha256") -> str:
    return f"{algorithm}:{hashlib.new(algorithm, content).hexdigest()}"


def describe(media_type: str, digest: str, size: int) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest, "size": size}


class Content:
    """The repositories; one exists as soon as something is put into it."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}

    def blob(self, repository: str, content: bytes, algorithm: str = "sha256") -> str:
        digest = digest_of(content, algorithm)
        self._repository(repository).blobs[digest] = content
        return digest

    def manifest(
        self,
        repository: str,
        content: bytes | Mapping[str, Any],
        media_type: str | None = None,
        tag: str | None = None,
        algorithm: str = "sha256",
    ) -> str:
        """Puts a manifest, whatever it says; without `media_type` it is what its `mediaType` says."""
        if not isinstance(content, bytes):
            content = json.dumps(content, indent=3).encode()
        media_type = media_type or json.loads(content)["mediaType"]
        assert isinstance(media_type, str)
        return self._put(repository, Manifest(digest_of(content, algorithm), media_type, content), tag)

    def image(
        self,
        repository: str,
        tag: str | None = None,
        layers: Sequence[bytes] = (b"a layer",),
        platform: str = "linux/amd64",
    ) -> Image:
        digests = tuple(self.blob(repository, layer) for layer in layers)
        system = Manifest("", "", b"", platform).descriptor["platform"]
        diff_ids = [digest_of(layer) for layer in layers]
        config = json.dumps({**system, "rootfs": {"type": "layers", "diff_ids": diff_ids}}).encode()
        body = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": describe(OCI_CONFIG, self.blob(repository, config), len(config)),
            "layers": [
                describe(OCI_LAYER, digest, len(layer)) for digest, layer in zip(digests, layers, strict=True)
            ],
        }
        content = json.dumps(body, indent=3).encode()
        image = Image(digest_of(content), OCI_MANIFEST, content, platform, digest_of(config), digests)
        self._put(repository, image, tag)
        return image

    def index(self, repository: str, tag: str | None, manifests: Sequence[Manifest]) -> Manifest:
        """An OCI index that names them with their platforms."""
        named = [each.descriptor for each in manifests]
        content = json.dumps(
            {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": named}, indent=3
        ).encode()
        index = Manifest(digest_of(content), OCI_INDEX, content)
        self._put(repository, index, tag)
        return index

    def artifact(
        self,
        repository: str,
        subject: Manifest,
        artifact_type: str,
        annotations: Mapping[str, str] | None = None,
    ) -> Manifest:
        """An artifact that refers to `subject`.  image-spec, manifest.md, "Guidelines for Artifact Usage"."""
        empty = describe(OCI_EMPTY, self.blob(repository, b"{}"), 2)
        body = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "artifactType": artifact_type,
            "config": empty,
            "layers": [empty],
            "subject": describe(subject.media_type, subject.digest, len(subject.content)),
            "annotations": dict(annotations or {}),
        }
        content = json.dumps(body, indent=3).encode()
        artifact = Manifest(digest_of(content), OCI_MANIFEST, content)
        self._put(repository, artifact, None)
        return artifact

    def delete_tag(self, repository: str, tag: str) -> None:
        del self.repositories[repository].tags[tag]

    def delete_manifest(self, repository: str, digest: str) -> None:
        """Its tags go with it."""
        holder = self.repositories[repository]
        del holder.manifests[digest]
        holder.tags = {tag: named for tag, named in holder.tags.items() if named != digest}

    def delete_blob(self, repository: str, digest: str) -> None:
        del self.repositories[repository].blobs[digest]

    def _repository(self, name: str) -> Repository:
        return self.repositories.setdefault(name, Repository())

    def _put(self, repository: str, manifest: Manifest, tag: str | None) -> str:
        holder = self._repository(repository)
        holder.manifests[manifest.digest] = manifest
        if tag is not None:
            holder.tags[tag] = manifest.digest
        return manifest.digest


def referrer(manifest: Manifest) -> tuple[str | None, dict[str, Any]]:
    """The digest of its subject, and the descriptor under which it is listed there."""
    try:
        body = json.loads(manifest.content)
        subject = body["subject"]["digest"]
    except (ValueError, TypeError, KeyError):
        return None, {}
    listed = describe(manifest.media_type, manifest.digest, len(manifest.content))
    # An index has no config to take the artifact type from.
    if artifact_type := body.get("artifactType") or body.get("config", {}).get("mediaType"):
        listed["artifactType"] = artifact_type
    if body.get("annotations"):
        listed["annotations"] = body["annotations"]
    return subject, listed

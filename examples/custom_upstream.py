"""A registry that makes an image of each file of a directory when it is first pulled, and a cache before it.

    python examples/custom_upstream.py DIRECTORY PORT

`localhost:PORT/hub/NAME:latest` then is an image with the file NAME at its root.  The cache asks `FileImages`
as it asks a remote registry: it stores what it gets, and serves it again.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import sys
import tarfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

from cache_by_hand import serve

from proxy import Metrics
from storage import (
    Blob,
    BlobUnknown,
    Descriptor,
    Digest,
    Manifest,
    ManifestUnknown,
    NameUnknown,
    Reference,
    Registry,
    Span,
    Tag,
)

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"


class Bytes(Blob):
    """A blob in memory, which is sent from its start."""

    whole = True

    def __init__(self, content: bytes) -> None:
        self.descriptor = described("application/octet-stream", content)
        self._content = content

    async def chunks(self, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        yield self._content[start:stop]


class FileImages(Registry):
    """Each file of a directory as a repository with one tag, `latest`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    async def get_manifest(self, repository: str, reference: Reference) -> Manifest:
        manifest, _ = self._image(repository)
        if reference not in (Tag("latest"), manifest.digest):
            raise ManifestUnknown(f"{repository} has no {reference}")
        return manifest

    async def resolve_manifest(self, repository: str, reference: Reference) -> Descriptor:
        manifest = await self.get_manifest(repository, reference)
        return manifest.descriptor

    async def get_blob(self, repository: str, digest: Digest, span: Span | None = None) -> Blob:
        _, blobs = self._image(repository)
        if (content := blobs.get(digest)) is None:
            raise BlobUnknown(f"{repository} has no blob {digest}")
        return Bytes(content)

    async def resolve_blob(self, repository: str, digest: Digest) -> Descriptor:
        return (await self.get_blob(repository, digest)).descriptor

    def _image(self, repository: str) -> tuple[Manifest, dict[Digest, bytes]]:
        name = repository.removeprefix("library/")  # which the cache puts before names of one component
        path = self._directory / name
        if "/" in name or not path.is_file():
            raise NameUnknown(f"there is no file {name}")
        layer = archived(path)
        rootfs = {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]}
        config = json.dumps({"architecture": "amd64", "os": "linux", "rootfs": rootfs}).encode()
        document = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": described(CONFIG, config).to_json(),
            "layers": [described(LAYER, layer).to_json()],
        }
        blobs = {Digest.of(content): content for content in (config, layer)}
        return Manifest.of(MANIFEST, json.dumps(document).encode()), blobs


def described(media_type: str, content: bytes) -> Descriptor:
    return Descriptor(media_type, Digest.of(content), len(content))


def archived(path: Path) -> bytes:
    """The file in a tar archive, whose bytes depend on the content alone."""
    content = path.read_bytes()
    entry = tarfile.TarInfo(path.name)
    entry.size = len(content)
    found = io.BytesIO()
    with tarfile.open(fileobj=found, mode="w") as archive:
        archive.addfile(entry, io.BytesIO(content))
    return found.getvalue()


async def main(directory: str, port: str) -> None:
    async with AsyncExitStack() as closing:
        await serve(FileImages(Path(directory)), Metrics(), Path("cache"), int(port), closing)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

"""An upstream: OCI image layouts below a directory, such as a mounted share; each is a repository.

It is what `skopeo copy` writes to `oci:DIRECTORY:TAG`.  The server verifies each digest.
"""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxy.extensions.protocols import OfferedBlob, OfferedManifest, UpstreamSource

CHUNK = 1 << 20
NAME = "org.opencontainers.image.ref.name"
INDEX, MANIFEST = (f"application/vnd.oci.image.{each}.v1+json" for each in ("index", "manifest"))


@dataclass
class LayoutSettings:
    """The directory with the layouts."""

    directory: Path


class LayoutDirectory(UpstreamSource):
    protocol = 1
    Settings = LayoutSettings

    def __init__(self, settings: LayoutSettings) -> None:
        if not settings.directory.is_dir():
            raise ValueError(f"directory: {settings.directory} is not a directory")
        self._root = settings.directory

    async def manifest(self, repository: str, reference: str) -> OfferedManifest | None:
        listed = self._listed(repository)
        if listed is None:
            return None
        if ":" not in reference:
            named = [each for each in listed if each.get("annotations", {}).get(NAME) == reference]
            if not named:
                return None
            reference = named[0]["digest"]
        file = self._blob(repository, reference)
        if not file.is_file():
            return None
        content = file.read_bytes()
        found = json.loads(content)
        media_type = found.get("mediaType") or (INDEX if "manifests" in found else MANIFEST)
        return OfferedManifest(media_type, content)

    async def blob(self, repository: str, digest: str, start: int) -> OfferedBlob | None:
        file = self._blob(repository, digest)
        return OfferedBlob(file.stat().st_size, self._read(file, start)) if file.is_file() else None

    async def tags(self, repository: str) -> list[str] | None:
        listed = self._listed(repository)
        if listed is None:
            return None
        return [each["annotations"][NAME] for each in listed if NAME in each.get("annotations", {})]

    def _listed(self, repository: str) -> list[dict[str, Any]] | None:
        index = self._root / repository / "index.json"
        return list(json.loads(index.read_bytes())["manifests"]) if index.is_file() else None

    def _blob(self, repository: str, digest: str) -> Path:
        algorithm, _, encoded = digest.partition(":")
        return self._root / repository / "blobs" / algorithm / encoded

    async def _read(self, file: Path, start: int) -> AsyncIterator[bytes]:
        with file.open("rb") as opened:
            opened.seek(start)
            while chunk := opened.read(CHUNK):
                yield chunk

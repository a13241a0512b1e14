"""A private registry for tests."""

from __future__ import annotations

import gzip
import hashlib
import io
import platform
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from proxy.config.wellknown import WELL_KNOWN
from proxy.namespaces.references import ReferenceReader
from proxy.testing.serving import ServedNamespace
from proxy.transfer.bundle_import import BundleImport, ImportOptions
from storage.names import written
from storage.oci import OCI_MANIFEST, Descriptor, Digest, Manifest

__all__ = ["LocalRegistry"]

NAMESPACE = "local"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}  # other names are those of Go


class LocalRegistry(ServedNamespace):
    """A private registry that takes pushes and deletions of anybody who reaches 127.0.0.1.

    It stands for every built-in registry, too: docker.io/library/alpine is its repository library/alpine.
    So it does for `hosts`, each with its port if it has one.
    """

    def __init__(self, directory: Path, hosts: Sequence[str] = ()) -> None:
        super().__init__(directory)
        self._hosts = hosts

    def load(self, path: Path | str, name: str | None = None) -> list[str]:
        """Load the images of an OCI image layout, a directory or an archive; or of what docker save writes.

        `name` is the repository of images that have no name in it, or only a tag, and may end with a tag.
        Returns `repository:tag` of each image, or `repository@digest`.  Raises RegistryError if the content
        is not what its digests say, and ValueError for a name that does not fit.
        """
        options = ImportOptions(name=name)
        imported = self._loop.run(BundleImport(self._parts).import_(Path(path), options))
        return [
            written(each.repository.removeprefix(f"{NAMESPACE}/"), each.tag or Digest(each.digest))
            for each in imported.references
        ]

    def push_image(self, name: str, files: Mapping[str, bytes]) -> str:
        """Make an image of one layer with these files, for this machine's platform; return its digest.

        `name` is `repository:tag`.  The same files make the same image.  Raises ValueError for an invalid
        name.
        """
        return self._loop.run(self._push(name, files))

    async def _push(self, name: str, files: Mapping[str, bytes]) -> str:
        namespaces = self._parts.namespaces
        image = ReferenceReader(namespaces).reference("name", name)
        tar = _tar(files)
        machine = platform.machine()
        config = {
            "architecture": _ARCHITECTURES.get(machine, machine),
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(tar).hexdigest()}"]},
        }
        described = []
        for kind, content in ((CONFIG, msgspec.json.encode(config)), (LAYER, gzip.compress(tar, mtime=0))):
            upload = await namespaces.start_upload(image.repository, len(content))
            await upload.write(content)
            blob = await upload.commit(Digest.of(content))
            described.append(Descriptor(kind, blob.digest, blob.size).to_json())
        body = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": described[0],
            "layers": described[1:],
        }
        manifest = Manifest.of(OCI_MANIFEST, msgspec.json.encode(body))
        await namespaces.push_manifest(image.repository, image.reference, manifest)
        return str(manifest.digest)

    async def _start(self) -> None:
        await self._serve(NAMESPACE, {"store": {}, "aliases": [*dict.fromkeys([*WELL_KNOWN, *self._hosts])]})


def _tar(files: Mapping[str, bytes]) -> bytes:
    """A tar archive without times and owners."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in sorted(files.items()):
            entry = tarfile.TarInfo(name.lstrip("/"))
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return target.getvalue()

"""Images made on the spot from real files, and their push to a registry.

Written from the image and distribution specifications with nothing of ours, so that a misreading of
them cannot cancel itself out.  Layers hold files of this machine; unpacking them gives the diff_ids that
the config names, so that real clients accept them.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import sysconfig
import tarfile
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

LIBRARY = Path(sysconfig.get_path("stdlib"))
PARTS = ([LIBRARY / "json", LIBRARY / "asyncio"], [LIBRARY / "encodings"], [LIBRARY / "email"])

OCI = {
    "manifest": "application/vnd.oci.image.manifest.v1+json",
    "config": "application/vnd.oci.image.config.v1+json",
    "layer": "application/vnd.oci.image.layer.v1.tar+gzip",
}
DOCKER = {
    "manifest": "application/vnd.docker.distribution.manifest.v2+json",
    "config": "application/vnd.docker.container.image.v1+json",
    "layer": "application/vnd.docker.image.rootfs.diff.tar.gzip",
}
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_EMPTY = "application/vnd.oci.empty.v1+json"


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@dataclass(frozen=True)
class Content:
    """Bytes with a media type: a blob or a manifest."""

    media_type: str
    data: bytes

    @property
    def digest(self) -> str:
        return digest_of(self.data)

    @property
    def descriptor(self) -> dict[str, Any]:
        return {"mediaType": self.media_type, "digest": self.digest, "size": len(self.data)}


@dataclass(frozen=True)
class Image:
    """A manifest with all that it names: `blobs` (config first) or, of an index, `children`.

    `diff_ids` are the digests of the unpacked layers; empty where there is nothing to unpack.
    """

    manifest: Content
    blobs: tuple[Content, ...] = ()
    children: tuple[Image, ...] = ()
    diff_ids: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def config(self) -> Content:
        return self.blobs[0]

    @property
    def amd64(self) -> Image:
        """What a client for linux/amd64 comes to hold: itself, or the first child of an index."""
        return self.children[0] if self.children else self

    def parts(self) -> Iterator[Content]:
        """Everything that it takes to hold this image: blobs, children, itself."""
        yield from self.blobs
        for child in self.children:
            yield from child.parts()
        yield self.manifest


def image(name: str, *large: Path, architecture: str = "amd64", types: Mapping[str, str] = OCI) -> Image:
    """An image for linux/`architecture` of a layer for each of PARTS, and of one for each file of `large`.

    Each layer has a file called `name`: images of other names share no blob with it.
    """
    tars = [_tar(name, paths) for paths in (*PARTS, *([path] for path in large))]
    diff_ids = tuple(digest_of(tar) for tar in tars)
    layers = tuple(Content(types["layer"], gzip.compress(tar, compresslevel=1, mtime=0)) for tar in tars)
    config = _json(
        types["config"],
        {
            "created": "2024-01-01T00:00:00Z",
            "architecture": architecture,
            "os": "linux",
            "config": {"Cmd": ["/none"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": [{"created": "2024-01-01T00:00:00Z", "created_by": "COPY"} for _ in tars],
        },
    )
    return Image(_manifest(types["manifest"], config, layers), (config, *layers), diff_ids=diff_ids)


def index(name: str, *architectures: str) -> Image:
    """An image index with an image for each of `architectures`."""
    children = {each: image(f"{name}-{each}", architecture=each) for each in architectures}
    manifests = [
        {**child.manifest.descriptor, "platform": {"os": "linux", "architecture": architecture}}
        for architecture, child in children.items()
    ]
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}
    return Image(_json(OCI_INDEX, document), children=tuple(children.values()))


def artifact() -> Image:
    """No image: an artifact of one blob.  image-spec, manifest.md, "Guidelines for Artifact Usage"."""
    config = Content(OCI_EMPTY, b"{}")
    blob = Content("application/vnd.example.module", (LIBRARY / "argparse.py").read_bytes())
    manifest = _manifest(OCI["manifest"], config, (blob,), artifactType="application/vnd.example.module")
    return Image(manifest, (config, blob))


def push(base: str, repository: str, tag: str, image: Image, authorization: str = "") -> None:
    """Push to the registry at `base` (http://host:port): blobs, children by digest, then the tag.

    `authorization` is the header of that name.  distribution-spec, "Pushing a blob monolithically" (POST then
    PUT) and "Pushing Manifests".
    """
    send = partial(_send, authorization)
    for blob in image.blobs:
        with send("POST", f"{base}/v2/{repository}/blobs/uploads/") as answer:
            location = urllib.parse.urljoin(base, answer.headers["Location"])
        separator = "&" if "?" in location else "?"
        send("PUT", f"{location}{separator}digest={blob.digest}", blob.data).close()
    for child in image.children:
        push(base, repository, child.digest, child, authorization)
    url = f"{base}/v2/{repository}/manifests/{tag}"
    send("PUT", url, image.manifest.data, image.manifest.media_type).close()


def _send(
    authorization: str,
    method: str,
    url: str,
    data: bytes = b"",
    content_type: str = "application/octet-stream",
) -> Any:
    headers = {"Content-Type": content_type} | ({"Authorization": authorization} if authorization else {})
    request = urllib.request.Request(url, data=data, method=method, headers=headers)
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30)


def _manifest(media_type: str, config: Content, layers: tuple[Content, ...], **more: str) -> Content:
    document = {
        "schemaVersion": 2,
        "mediaType": media_type,
        **more,
        "config": config.descriptor,
        "layers": [layer.descriptor for layer in layers],
    }
    return _json(media_type, document)


def _json(media_type: str, document: dict[str, Any]) -> Content:
    # Indented on purpose: a cache that parsed and wrote it again would give another digest.
    return Content(media_type, json.dumps(document, indent=3).encode())


def _tar(mark: str, paths: list[Path]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(tarfile.TarInfo(mark))
        for path in paths:
            tar.add(path, arcname=path.name, filter=_plain)
    return buffer.getvalue()


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    if member.name.endswith("__pycache__"):
        return None
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = "root"
    return member

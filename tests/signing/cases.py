"""The cases in tests/data/signatures: images, and what signs them or pretends to."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from storage.oci import Descriptor, Digest, Manifest

LATER = 1_800_000_000.0  # when the signatures were made, and some have expired
ROOTS = {
    "keyless": "trusted_root.json",
    "timestamped": "timestamped_root.json",
    "formerly": "formerly_root.json",
}
# The options by which cosign verifies them.  Without --offline it asks the log of sigstore for entries.
VERIFYING = {"timestamped": ("--use-signed-timestamps",), "formerly": ("--offline",)}
DATA = Path(__file__).parent.parent / "data" / "signatures"


@dataclass(frozen=True)
class SignedCase:
    """A repository: see Case in make.py.  `accepted` is the verdict of the tool for signatures."""

    name: str
    signer: str
    good: bool
    image: Digest
    commands: list[str]
    accepted: bool | None
    said: str
    tags: dict[str, str]
    manifests: dict[str, str]
    blobs: list[str]

    def manifest(self, digest: str) -> Manifest:
        return Manifest(self.manifests[digest], content(digest), Digest(digest))

    @property
    def target(self) -> Descriptor:
        return self.manifest(self.image).descriptor


def content(digest: str) -> bytes:
    found = _contents()[digest]
    return found.encode() if isinstance(found, str) else base64.b64decode(found[0])


@cache
def _contents() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DATA / "content.json").read_text())
    return found


def cases() -> dict[str, SignedCase]:
    rows = json.loads((DATA / "cases.json").read_text())
    found = [SignedCase(**{**row, "image": Digest(row["image"])}) for row in rows]
    return {each.name: each for each in found}

"""What `export`, `import` and `copy` say that they did, and print with --json.

Sizes are bytes, references full names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import msgspec

DIGEST = "Entrepot-Digest"  # the header that tells that of a bundle which the admin API sends
Tick = Callable[[int, int], None]  # called with how many bytes are done, and of how many


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What a transfer came to."""


class CarriedRow(Result, frozen=True):
    """`reference` is a full name.  `platforms` of an index are those that go along, [] where none are told;
    `left_out` the digests of those that do not.
    """

    reference: str
    digest: str
    platforms: list[str]
    complete: bool
    left_out: list[str]


class IncompleteRow(Result, frozen=True):
    reference: str
    lacking: list[str]


class Exported(Result, frozen=True):
    """`digest` is that of the bundle's entrepot.json, by which a delta names it.

    `blobs` and `bytes` are of all that is in it; `spared` blobs are in the bundles that it is a delta of.
    """

    bundle: str
    digest: str
    references: list[CarriedRow]
    skipped: list[IncompleteRow]
    referrers: int
    blobs: int
    bytes: int
    spared: int
    signed: bool


class BoundRow(Result, frozen=True):
    """`tag` is None for what has only a digest.  `before` is what the tag was here, None where it was not."""

    repository: str
    tag: str | None
    digest: str
    before: str | None


class BundleImported(Result, frozen=True):
    """`blobs` and `bytes` are what was taken in; the rest was here.  `verified`: by a key."""

    archive: str
    references: list[BoundRow]
    manifests: int
    blobs: int
    bytes: int
    verified: bool
    dry_run: bool


class DamageRow(Result, frozen=True):
    """`what` is a digest or a tag of `repository`, or nothing where it is the repository itself."""

    repository: str
    what: str
    why: str


class Migrated(Result, frozen=True):
    """What was new; `present` manifests were here already.  Of the blobs `linked` take no room of their own.

    `kept` are tags that were left as they are here.  What is `damaged`, or missing, was not taken, nor what
    cannot be whole without it.
    """

    namespace: str
    repositories: int
    tags: int
    manifests: int
    blobs: int
    bytes: int
    linked: int
    present: int
    kept: list[DamageRow]
    damaged: list[DamageRow]
    seconds: float
    dry_run: bool


Outcome: TypeAlias = Literal["copied", "present", "failed"]


class CopyRow(Result, frozen=True):
    """`digest` is None where it was not even found, `error` None where it is there now."""

    source: str
    destination: str
    digest: str | None
    outcome: Outcome
    error: str | None


class Copied(Result, frozen=True):
    """So many `manifests`, `tags` and `blobs`, of `bytes`, had to come.

    Of the other blobs `mounted` were in another repository of the destination, `present` in the same.
    """

    images: list[CopyRow]
    manifests: int
    tags: int
    blobs: int
    bytes: int
    mounted: int
    present: int
    seconds: float
    dry_run: bool

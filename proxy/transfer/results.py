"""The results of export, import, migration and copy, which the commands print.

Sizes are bytes; references are full names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import msgspec

DIGEST = "Entrepot-Digest"  # the header with the digest of an exported bundle
Tick = Callable[[int, int], None]  # is called with the bytes done, and their total


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """The base of all results."""


class CarriedRow(Result, frozen=True):
    """An image in a bundle.

    `platforms` are those of an index that are in the bundle, empty if it names none; `left_out` are the
    digests of the others.  `lacking` are platforms that were asked for and that the index does not have.
    """

    reference: str
    digest: str
    platforms: list[str]
    complete: bool
    left_out: list[str]
    lacking: list[str] = msgspec.field(default_factory=list)


class IncompleteRow(Result, frozen=True):
    """An image or a referrer that was left out; `lacking` are the digests that are not stored.

    `platform` is that of an image for none of the platforms that were asked for, else None.
    """

    reference: str
    lacking: list[str]
    platform: str | None = None


class Exported(Result, frozen=True):
    """The result of an export.  `digest` is that of entrepot.json, by which later bundles refer to this one.

    `blobs` and `bytes` count what is in the bundle; `spared` counts blobs that are left out since earlier
    bundles contain them.  The `skipped` images and referrers are not stored completely, and
    not in the bundle.
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
    """An imported image; `tag` is None if it has only a digest.

    `before` is the previous digest of the tag, None if it is new.
    """

    repository: str
    tag: str | None
    digest: str
    before: str | None


class BundleImported(Result, frozen=True):
    """The result of an import.  `blobs` and `bytes` count what was not stored before.

    `verified` means that a key has verified the signature.  `notes` say what of the archive was not
    imported as it is there.
    """

    archive: str
    references: list[BoundRow]
    manifests: int
    blobs: int
    bytes: int
    verified: bool
    dry_run: bool
    notes: list[str]


class DamageRow(Result, frozen=True):
    """Content that was not migrated: `what` is a digest or a tag, or empty for the repository itself."""

    repository: str
    what: str
    why: str


class Migrated(Result, frozen=True):
    """The result of a migration.  The counts are of new content; `present` manifests were stored before.

    `linked` blobs are hard links, which need no space.  `kept` tags were not replaced.  `damaged` content,
    or missing content, was not imported, and neither was what cannot be complete without it.
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


class MovedPart(Result, frozen=True):
    """What was moved of the private registry, or of the caches; in a dry run, what would be.

    `paused` is the number of seconds for which pushes had to wait.  `expected` is how many seconds a dry run
    expects, None if there is nothing to measure that by.
    """

    name: str
    blobs: int
    bytes: int
    records: int
    paused: float = 0.0
    expected: float | None = None


class EngineMoved(Result, frozen=True):
    """The result of a move to `shared` or `local` engines.

    Nothing was left of the source, and the server goes on with it, if anything is `damaged`.  `reloaded` is
    whether a server was told to use the new place.
    """

    to: str
    parts: list[MovedPart]
    damaged: list[DamageRow]
    seconds: float
    dry_run: bool
    reloaded: bool


class BackupRow(Result, frozen=True):
    """A store in a backup: how many blobs its records name, and of how many bytes."""

    store: str
    blobs: int
    bytes: int


class BackedUp(Result, frozen=True):
    """The result of a backup.

    Of its blobs, `new` ones of `new_bytes` were not in it before, `linked` of them as hard links.  `damaged`
    content is not in it; `left_out` says what it does not cover.
    """

    directory: str
    made: float
    stores: list[BackupRow]
    new: int
    new_bytes: int
    linked: int
    damaged: list[DamageRow]
    left_out: list[str]
    seconds: float


class Restored(Result, frozen=True):
    """The result of a restore into `path`, of a backup that was `made` then by `version`.

    `restored` is false if nothing was, because of `damaged` content.
    """

    path: str
    restored: bool
    made: float
    version: str
    stores: list[BackupRow]
    linked: int
    damaged: list[DamageRow]
    seconds: float


Outcome: TypeAlias = Literal["copied", "present", "failed"]


class CopyRow(Result, frozen=True):
    """An image that was copied, or not; `digest` is None if it was not found, `error` None after success."""

    source: str
    destination: str
    digest: str | None
    outcome: Outcome
    error: str | None


class Copied(Result, frozen=True):
    """The result of a copy.  `manifests`, `tags`, `blobs` and `bytes` count what was transferred.

    Of the other blobs, `mounted` were in another repository of the destination, and `present` in the same.
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

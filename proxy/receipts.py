"""What `export` and `import` say that they did, and print with --json.

Sizes are bytes, references full names.
"""

from __future__ import annotations

from proxy.answers import Answer


class CarriedRow(Answer, frozen=True):
    """`reference` is a full name.  `platforms` of an index are those that go along, [] where none are told;
    `left_out` the digests of those that do not.
    """

    reference: str
    digest: str
    platforms: list[str]
    complete: bool
    left_out: list[str]


class LackingRow(Answer, frozen=True):
    reference: str
    lacking: list[str]


class Exported(Answer, frozen=True):
    """`digest` is that of the bundle's entrepot.json, by which a delta names it.

    `blobs` and `bytes` are of all that is in it; `spared` blobs are in the bundles that it is a delta of.
    """

    bundle: str
    digest: str
    references: list[CarriedRow]
    skipped: list[LackingRow]
    referrers: int
    blobs: int
    bytes: int
    spared: int
    signed: bool


class BoundRow(Answer, frozen=True):
    """`tag` is None for what has only a digest.  `before` is what the tag was here, None where it was not."""

    repository: str
    tag: str | None
    digest: str
    before: str | None


class Landed(Answer, frozen=True):
    """`blobs` and `bytes` are what was taken in; the rest was here.  `verified`: by a key."""

    archive: str
    references: list[BoundRow]
    manifests: int
    blobs: int
    bytes: int
    verified: bool
    dry_run: bool

"""What the admin API answers about the history of a tag, and about the difference of two images.

Units and names are those of models.py.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from proxy.processes.rows import Model, ReplicaModel

Change: TypeAlias = Literal["added", "removed", "changed", "same"]


class HistoryRow(ReplicaModel, frozen=True):
    """A digest that a tag stood for, from `since` until `until`; None if it still does, as far as is known.

    `stored` says whether the manifest is, `complete` whether all of the image is.  `bytes_whole` is the size
    of the image, None if its manifest is not stored; `platforms` are those of an index.
    """

    digest: str
    since: float
    until: float | None
    stored: bool
    complete: bool
    bytes_whole: int | None
    platforms: list[str]


class TagHistory(Model, frozen=True):
    """What a tag stood for, the latest first."""

    repository: str
    tag: str
    rows: list[HistoryRow]


class LayerChange(Model, frozen=True):
    """A layer of one of two images, or of both; `created_by` is the step of the build that made it, or ""."""

    change: Change
    digest: str
    media_type: str
    size: int
    stored: bool
    created_by: str


class ValueChange(Model, frozen=True):
    """A value of the configuration that differs: of the variable, label or key `name`.

    `kind` is env, label, config or history.  `old` is None if it was added, `new` if it was removed.
    """

    kind: str
    name: str
    old: str | None
    new: str | None


class PlatformDiff(Model, frozen=True):
    """The images for one platform, compared.

    `platform` is None if none is stated.  `old` is the digest of the former image, None if there is none for
    the platform, and `new` that of the other one.  `layers` and `values` are empty if the images are the
    same, or if `unknown` says what is not stored, so that they cannot be compared.  The sizes are those of
    the layers.
    """

    platform: str | None
    change: Change
    old: str | None
    new: str | None
    bytes_added: int
    bytes_removed: int
    bytes_same: int
    layers: list[LayerChange]
    values: list[ValueChange]
    unknown: list[str]


class ImageDiff(Model, frozen=True):
    """The difference of two images, `old` and `new`: full names with their digests."""

    old: str
    new: str
    same: bool
    platforms: list[PlatformDiff]

"""What the admin API answers about content and activity, and the commands print.

The answer is the same whether a server or a directory was asked; reports.py has what operations did.

`repository` is a full name, `<namespace>/<repository>`.  Sizes are bytes, times seconds since the epoch,
and durations seconds.  A time or duration without limit is None, since JSON has no infinity.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from proxy.processes.rows import Model, ReplicaModel, SpanRow

Sort: TypeAlias = Literal["name", "updated", "used"]


# Content


class RepositoryRow(ReplicaModel, frozen=True, gc=False):
    """One repository of a list.

    `bytes` is the size of the stored content that it may show, which it may share with others.
    `last_used` is None if none of its images was used.  `tags`, `manifests` and `bytes` are None while they
    are being counted.
    """

    repository: str
    tags: int | None
    manifests: int | None
    bytes: int | None
    last_used: float | None


class PlatformRow(Model, frozen=True):
    """The images for one platform of an index.

    `platform` is None if the index names none; `bytes_whole` is None if the manifest is not stored, or if the
    image names too much to be counted.
    """

    platform: str | None
    complete: bool
    bytes_held: int
    bytes_whole: int | None


class ImageRow(ReplicaModel, frozen=True):
    """One tag of a list, or one manifest, for which `tag` is None.

    `bytes_whole` is the size of the whole image, as far as it is known: a child of an index that is not
    stored counts with its manifest only.  It is None, and `media_type` too, if the manifest itself is not
    stored; it alone, if the image names too much to be counted.  `fresh_until` is None for a tag that never
    becomes stale.
    """

    repository: str
    tag: str | None
    digest: str
    media_type: str | None
    bytes_held: int
    bytes_whole: int | None
    complete: bool
    platforms: list[PlatformRow]
    last_used: float | None
    uses: int
    fresh_until: float | None
    pinned: bool


class Listed(Model, frozen=True):
    """A list of repositories, or one page of images.

    `next` is the `last` of the request for the next page, None on the last page.  `notes` are sentences about
    the caches, such as that an upstream refuses credentials.
    """

    repositories: list[RepositoryRow] = msgspec.field(default_factory=list)
    images: list[ImageRow] = msgspec.field(default_factory=list)
    next: str | None = None
    notes: list[str] = msgspec.field(default_factory=list)


class ImageNode(Model, frozen=True):
    """A manifest or blob in the tree of an image; `role` is manifest, config, layer or referrer.

    Content that is named several times has its children at the first place only.  `replicas` are the URLs of
    those of a fleet that store it, empty if all or none do.
    """

    role: str
    digest: str
    media_type: str
    size: int
    present: bool
    platform: str | None
    artifact_type: str | None
    children: list[ImageNode]
    replicas: list[str] = msgspec.field(default_factory=list)


class Found(ReplicaModel, frozen=True):
    """A part of the tags that match a pattern; `matched` is the number of all."""

    images: list[ImageRow]
    matched: int


class BuildStep(Model, frozen=True):
    """A step of the build of an image; one that is `empty` made no layer."""

    created: float | None
    created_by: str
    comment: str
    empty: bool


class ConfigReport(Model, frozen=True):
    """The configuration of an image, `config` being its digest; what it does not say is empty.

    `annotations` are those of its manifest, whose digest is `digest`.
    """

    digest: str
    config: str
    created: float | None
    author: str
    os: str
    architecture: str
    variant: str
    user: str
    directory: str
    entrypoint: list[str]
    command: list[str]
    environment: list[str]
    ports: list[str]
    volumes: list[str]
    stop_signal: str
    labels: dict[str, str]
    annotations: dict[str, str]
    history: list[BuildStep]


class FileRow(Model, frozen=True):
    """A file of a layer: `kind` is file, directory, symlink, hardlink, device or pipe; `link` its target."""

    path: str
    kind: str
    size: int
    mode: int
    uid: int
    gid: int
    modified: float
    link: str | None


class LayerFiles(Model, frozen=True):
    """A part of the files of a layer that `matched`, of a `total`; in their order in the layer.

    The layer has `size` bytes, of which `unpacked` came out.  If `cut` is not empty, it says why the rest was
    not read.
    """

    repository: str
    digest: str
    compression: str
    size: int
    unpacked: int
    files: list[FileRow]
    matched: int
    total: int
    cut: str


class MoveRow(Model, frozen=True):
    """The move of a tag from one digest to another."""

    at: float
    old: str
    new: str


class UseRow(Model, frozen=True):
    """How often an image was used, and when first and last."""

    count: int
    last: float
    first: float


class ReplicaDigest(Model, frozen=True):
    """The digest that a tag has at a replica."""

    replica: str
    digest: str


class ImageTree(Model, frozen=True):
    """An image with all that it names.

    `moves` are those of the tag, the oldest first; `pins` are the patterns that match it.  In a fleet, the
    tag has other digests `elsewhere`.  It is `cut` if the image names more than is shown.
    """

    repository: str
    reference: str
    digest: str
    node: ImageNode
    referrers: list[ImageNode]
    moves: list[MoveRow]
    uses: UseRow | None
    pins: list[str]
    elsewhere: list[ReplicaDigest] = msgspec.field(default_factory=list)
    cut: bool = False


class PinRow(ReplicaModel, frozen=True):
    """A pin, and what it matches now.

    `since` is None for a pin of the configuration.
    """

    pattern: str
    keep_fresh: float | None
    platforms: list[str]
    since: float | None
    references: int
    manifests: int
    blobs: int
    bytes: int


# Activity


class FillRow(ReplicaModel, frozen=True):
    """A transfer from an upstream into the cache.

    `size` is -1 until upstream has sent it.  `eta` is in seconds, None while the size or speed is unknown.
    `own` is False if another process does the transfer.  `extents` are the bytes that are there; those that
    are less than a thousandth of the blob apart are one.  `coming` is what each connection is to bring, and
    `repeated` the number of bytes that came and were dropped, as they were there or another connection
    brings them.

    With `idle`, nothing is being transferred: parts of the blob are kept since they were last used, which is
    `started`, and until `expires`, None if they are kept without limit.
    """

    digest: str
    namespace: str
    repository: str
    bytes: int
    size: int
    started: float
    followers: int
    pid: int
    own: bool
    extents: list[SpanRow]
    coming: list[SpanRow]
    repeated: int
    speed: float
    eta: float | None
    idle: bool = False
    expires: float | None = None


class StatsRow(Model, frozen=True):
    """The counters of a namespace, or of all: see storage.maintenance.usage.Counters.

    A ratio is a fraction, None without any request to count.  Of what upstreams sent, `ahead_bytes` were
    fetched before a client asked: by warming, pins and refreshes.  A store saves nothing.
    """

    namespace: str
    requests: int
    hits: int
    misses: int
    revalidated: int
    stale: int
    negative: int
    errors: int
    hit_bytes: int
    sent_bytes: int
    received_bytes: int
    upstream_requests: int
    hit_ratio: float | None
    byte_hit_ratio: float | None
    bytes_saved: int
    requests_saved: int
    pushed_bytes: int
    ahead_bytes: int
    ahead_requests: int


class DayRow(Model, frozen=True):
    """The traffic of all caches on a day, `YYYY-MM-DD` in UTC."""

    day: str
    requests: int
    sent_bytes: int
    received_bytes: int
    upstream_requests: int
    ahead_bytes: int
    bytes_saved: int
    requests_saved: int


class ReplicaStats(Model, frozen=True):
    """What Stats are at one replica of a fleet."""

    replica: str
    total: StatsRow
    stored_bytes: int
    limit: int | None


class Stats(Model, frozen=True):
    """The counters of the last `period` seconds: of `namespaces`, which are caches, and of `stores`.

    `total` is that of all caches.  `days` are the last fourteen, without those before the first traffic.
    `limit` is disk.cache_limit, None without limit.  In a fleet all of them are sums over its `replicas`.
    """

    period: float
    since: float
    namespaces: list[StatsRow]
    stores: list[StatsRow]
    total: StatsRow
    days: list[DayRow]
    stored_bytes: int
    limit: int | None
    replicas: list[ReplicaStats] = msgspec.field(default_factory=list)


class WebhookRow(ReplicaModel, frozen=True):
    """A webhook, the number of its `pending` events, and the state of its deliveries.

    `url` has no path and query, which may hold a secret.  `failing_since` is None while deliveries succeed;
    `error` is that of the last failure, at `failed_at`.
    """

    name: str
    url: str
    format: str
    actions: list[str]
    pending: int
    oldest: float | None
    delivered_at: float | None
    failing_since: float | None
    failed_at: float | None
    error: str | None


# The fleet


class OwnerRow(Model, frozen=True):
    """The replica of a fleet that owns an image, and is asked for it before the upstream; `own`: this one.

    While `open`, it is left out because it failed with `error`, `until` the next attempt.
    """

    url: str
    own: bool
    open: bool
    until: float | None
    error: str | None

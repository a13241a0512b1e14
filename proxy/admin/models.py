"""What the admin API answers, and the commands print; the same whether a server was asked or a directory.

`repository` is a full name, `<namespace>/<repository>`.  Sizes are bytes, times seconds since the epoch,
and durations seconds; a time or duration that is for ever is None, as JSON has no infinity.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec


class Model(msgspec.Struct, frozen=True, kw_only=True):
    pass


# What is stored


class RepositoryRow(Model, frozen=True):
    """`bytes` are those that lie here of what the repository may show; others may show the same ones."""

    repository: str
    tags: int
    manifests: int
    bytes: int


class PlatformRow(Model, frozen=True):
    """`platform` is None where none is told, `bytes_whole` None where its manifest is not here."""

    platform: str | None
    complete: bool
    bytes_held: int
    bytes_whole: int | None


class ImageRow(Model, frozen=True):
    """`tag` is None for a manifest listed by its digest.

    `bytes_whole` is of all that is known: a child of an index that is not here counts with its manifest
    only.  It is None, and `media_type` too, where the manifest itself is not here.  `fresh_until` None is
    for ever.
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
    """Repositories, or images.  With `next`, there are more: it is what to give as `last`."""

    repositories: list[RepositoryRow] = []
    images: list[ImageRow] = []
    next: str | None = None


class Node(Model, frozen=True):
    """`role` is manifest, config, layer or referrer.

    What is named twice has its children where it is named first.
    """

    role: str
    digest: str
    media_type: str
    size: int
    present: bool
    platform: str | None
    artifact_type: str | None
    children: list[Node]


class MoveRow(Model, frozen=True):
    at: float
    old: str
    new: str


class UseRow(Model, frozen=True):
    count: int
    last: float
    first: float


class Tree(Model, frozen=True):
    """`moves` are of the tag, the oldest first; `pins` the patterns that match it."""

    repository: str
    reference: str
    digest: str
    node: Node
    referrers: list[Node]
    moves: list[MoveRow]
    uses: UseRow | None
    pins: list[str]


# What goes on


class FillRow(Model, frozen=True):
    """`size` is -1 where it is not told yet; then `eta`, in seconds, is None, and while nothing comes."""

    digest: str
    namespace: str
    repository: str
    bytes: int
    size: int
    started: float
    followers: int
    pid: int
    own: bool
    speed: float
    eta: float | None


class StatsRow(Model, frozen=True):
    """Counters of a namespace, or of all: see storage.usage.Counters.

    The ratios are fractions, None where there was nothing to be one of.
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


class Stats(Model, frozen=True):
    """Of the last `period` seconds.  `limit` is that of the configuration, None for none."""

    period: float
    since: float
    namespaces: list[StatsRow]
    total: StatsRow
    stored_bytes: int
    limit: int | None


# What was done


class Purged(Model, frozen=True):
    """`references` are the tags and manifests that were named, `kept` those that were not since pinned.

    Then what went with them: `manifests`, `links` of repositories to blobs, and `blobs` of so many `bytes`.
    """

    references: list[str]
    kept: list[str]
    manifests: int
    links: int
    blobs: int
    bytes: int
    dry_run: bool


class Refreshed(Model, frozen=True):
    """`moved` is what the tag was before, None where that is what it is.

    It consists of so many `manifests` and `blobs`, of which `fetched` had to come, of `bytes`.
    """

    repository: str
    reference: str
    digest: str
    new: bool
    moved: str | None
    manifests: int
    blobs: int
    fetched: int
    bytes: int


class PinRow(Model, frozen=True):
    """`since` is None for a pin of the configuration.  `references` is how many it matches here now."""

    pattern: str
    keep_fresh: float | None
    platforms: list[str]
    since: float | None
    references: int
    manifests: int
    blobs: int
    bytes: int


class Unpinned(Model, frozen=True):
    pattern: str


class WebhookRow(Model, frozen=True):
    """`url` without path and query, which may hold a secret.  So many events are `pending`, since `oldest`.

    While deliveries fail, `failing_since` tells since when.  `error` is what the last one that failed, at
    `failed_at`, has failed with.
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


class Evicted(Model, frozen=True):
    """`short` is how many bytes are still too many."""

    blobs: int
    bytes: int
    manifests: int
    tags: int
    links: int
    seconds: float
    short: int
    dry_run: bool


class ScrubRow(Model, frozen=True):
    """A pass over blobs and manifests; `begun` is 0 before the first.

    So many were `checked`, of `bytes` out of `total_bytes`, an estimate.  What was `damaged` was set aside,
    and `healed` where upstream had it.  `foreign` is how many files are none of ours.  `digest` is that of
    the blob that is being read, or empty.
    """

    begun: float
    running: bool
    checked: int
    bytes: int
    total_bytes: int
    damaged: int
    healed: int
    foreign: int
    digest: str


class Scrubbing(Model, frozen=True):
    """The slow pass of the server's own, and the last that was `asked` for; `error` is what ended that."""

    background: ScrubRow
    asked: ScrubRow
    error: str | None


class CollectedRow(Model, frozen=True):
    """What went of a repository, or would; `refused` is why nothing could, or empty.

    So much is `young`: it stays for no other reason.
    """

    repository: str
    tags: int
    manifests: int
    links: int
    young: int
    refused: str


class Collected(Model, frozen=True):
    """A collection that `begun` then; 0: there was none yet.

    Of so many `repositories` these tags, manifests and links of blobs went, and then so many `blobs` of so
    many `bytes`.  `rows` are of repositories of which there is something to say, a thousand at most.  See
    CollectedRow for the others.
    """

    begun: float
    seconds: float
    dry_run: bool
    repositories: int
    tags: int
    manifests: int
    links: int
    blobs: int
    bytes: int
    young: int
    refused: str
    rows: list[CollectedRow]


# What would be done

Verdict: TypeAlias = Literal["hit", "revalidate", "miss", "stale", "refused"]


class HostRow(Model, frozen=True):
    """See proxy.live.UpstreamState; of all processes the one that fares worst."""

    url: str
    host: str
    open: bool
    until: float | None
    error: str | None
    ratelimit_limit: int | None
    ratelimit_remaining: int | None
    limited_until: float | None


class Why(Model, frozen=True):
    """What a pull of `reference` would do now: `verdict` says it in a word, `because` in a sentence.

    `verdict` is hit (served from here, nobody is asked), revalidate (one HEAD decides), miss (fetched),
    stale (served from here since upstream is let alone), refused (answered with an error).  `complete` is
    whether all of it is here; what is not is fetched when a client asks for it.

    `qualified` tells how the namespace was found, `fresh_rule`, `keep_rule` and `pin` which rule applies.
    """

    asked: str
    namespace: str
    repository: str
    reference: str
    qualified: str
    fresh_rule: str | None
    fresh_for: float | None
    keep_rule: str
    keep_for: float | None
    pin: str | None
    digest: str | None
    stored: bool
    complete: bool
    validated_at: float | None
    age: float | None
    fresh_until: float | None
    last_used: float | None
    offline: bool
    upstreams: list[HostRow]
    verdict: Verdict
    because: str


# What is prepared for upstreams being away


class WarmRow(Model, frozen=True):
    """`here`: all of it is, for the platforms that were asked for.

    `error` tells why it is not, or, where it is, what kept upstream from vouching for it; `code` is for
    programs.  It consists of so many `manifests`, of which `referrers` refer to others, and `blobs`, of which
    `fetched` had to come, of `bytes`; nothing is counted where upstream did not serve.
    """

    asked: str
    repository: str
    reference: str
    digest: str | None
    here: bool
    manifests: int = 0
    referrers: int = 0
    blobs: int = 0
    fetched: int = 0
    bytes: int = 0
    error: str | None = None
    code: str | None = None


class MissingRow(Model, frozen=True):
    """What is not here, of `size` bytes, -1 where that is not told.

    `kind` is manifest, blob or referrer; `platforms` are those of the images that need it.
    """

    digest: str
    kind: str
    size: int
    platforms: list[str]


Completeness: TypeAlias = Literal["complete", "partial", "absent"]


class ReadyRow(Model, frozen=True):
    """Whether `asked` can be pulled while no upstream answers, whole.

    `lacking` are platforms that were asked for and that the image is not made for.  `referrers` is how many
    are here of the `referrers_known`, those that upstream was heard to list.  `error` tells why it cannot be
    judged.
    """

    asked: str
    repository: str
    reference: str
    digest: str | None
    state: Completeness
    missing: list[MissingRow] = []
    lacking: list[str] = []
    referrers: int = 0
    referrers_known: int = 0
    error: str | None = None


class MissedRow(Model, frozen=True):
    """What a client asked for `count` times in vain; `kind` is manifest, blob, tags or referrers."""

    client: str
    kind: str
    repository: str
    reference: str
    count: int
    first: float
    last: float


class Drilling(Model, frozen=True):
    """The drill that goes on, for `left` seconds more, or else the last one; `begun` is 0 before the first.

    No `namespaces` are all.  `missed` is what was asked for and is not here, the first first; `untold` is how
    many requests more there were when these had become too many.
    """

    running: bool
    begun: float
    seconds: float
    left: float
    namespaces: list[str]
    missed: list[MissedRow]
    untold: int

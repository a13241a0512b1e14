"""What the admin API answers about operations: what was done, or would be, and what was found.

Units and names are those of models.py.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from proxy.admin.models import OwnerRow
from proxy.admin.policy_reports import HeldRow, PolicyRow
from proxy.processes.rows import Model, RefusalRow, ReplicaModel

Verdict: TypeAlias = Literal["hit", "revalidate", "miss", "stale", "refused"]
Completeness: TypeAlias = Literal["complete", "partial", "absent"]


# Deletion


class Purged(Model, frozen=True):
    """The result of a purge.

    `references` are the tags and manifests that were purged, and `kept` those that are pinned.  The counts
    are of all that was deleted with them: `links` are records that a repository shows a blob, and `absences`
    records that the upstream did not have something of the repositories.
    """

    references: list[str]
    kept: list[str]
    manifests: int
    links: int
    blobs: int
    bytes: int
    dry_run: bool
    absences: int = 0


class KeptRow(Model, frozen=True):
    """A tag or manifest that matches and was kept; `reason` says why."""

    reference: str
    reason: str


class Deleted(Model, frozen=True):
    """The result of a deletion from private registries.

    `references` are the tags and manifests that were deleted, `manifests` is the number of all manifests
    that were deleted with them.  The next collection can remove so many `blobs` because of it, with `bytes`.
    """

    references: list[str]
    kept: list[KeptRow]
    manifests: int
    blobs: int
    bytes: int
    dry_run: bool


class Tagged(Model, frozen=True):
    """A tag that was set.  `former` is the digest that it had before, None if it is new or unchanged.

    `copied` is how many manifests and blobs were copied to another repository for it.
    """

    repository: str
    tag: str
    digest: str
    former: str | None
    copied: int


class Unpinned(Model, frozen=True):
    """The pattern of the pin that was removed."""

    pattern: str


class Evicted(Model, frozen=True):
    """The result of an eviction.  `short` is the number of bytes still over the limit."""

    blobs: int
    bytes: int
    manifests: int
    tags: int
    links: int
    seconds: float
    short: int
    dry_run: bool


class ExpiredRow(Model, frozen=True):
    """A tag that the retention rules delete; `pulled_at` is 0 if no pull is known."""

    tag: str
    digest: str
    pushed_at: float
    pulled_at: float
    reason: str


class CollectedRow(ReplicaModel, frozen=True):
    """What a collection deleted of one repository.

    `young` content is unreachable but too recent.  `refused` says why nothing could be collected, or is
    empty.  `expired` are the tags, of all rows together at most a thousand.
    """

    repository: str
    tags: int
    manifests: int
    links: int
    young: int
    refused: str
    expired: list[ExpiredRow]


class Collected(Model, frozen=True):
    """The result of a collection; `begun` is 0 if there has been none.

    The counts are of all `repositories`; `rows`, at most a thousand, are of those with something to report.
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


# Renewal and verification


class Refreshed(Model, frozen=True):
    """The result of a refresh.

    `moved` is the previous digest of a tag that has moved, else None.  The image has so many `manifests`
    and `blobs`; `fetched` is how many of them were fetched, with `bytes`.
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


class ScrubRow(Model, frozen=True):
    """A pass over all blobs and manifests; `begun` is 0 before the first.

    `bytes` of about `total_bytes` have been read.  `damaged` content was set aside, and `healed` is how
    much of it was fetched again.  `foreign` counts files that the store does not know.  `digest` is that of
    the blob being read, or empty.
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


class Scrubbing(ReplicaModel, frozen=True):
    """The slow background scrub of the server, and the last scrub that an operator `asked` for.

    `error` is what ended the latter early, or None.
    """

    background: ScrubRow
    asked: ScrubRow
    error: str | None


# Explanation


class HostRow(ReplicaModel, frozen=True):
    """A host of an upstream, as reported by the process in which its state is the worst.

    See proxy.processes.state.UpstreamState.
    """

    url: str
    host: str
    open: bool
    until: float | None
    error: str | None
    ratelimit_limit: int | None
    ratelimit_remaining: int | None
    limited_until: float | None
    refused: list[RefusalRow]


class UpstreamRow(HostRow, frozen=True):
    """A host of the upstream of a namespace."""

    namespace: str


class ReplicaVerdict(Model, frozen=True):
    """What a pull from another replica of the fleet would do now."""

    replica: str
    verdict: Verdict
    because: str
    digest: str | None


class AbsenceRow(Model, frozen=True):
    """What the upstream answered when it was last asked, with an error of this `code`.

    The same is answered while it cannot be asked, `until` then; None: for as long as it is kept.
    """

    code: str
    since: float
    until: float | None


class Why(Model, frozen=True):
    """What a pull of `reference` would do now: `verdict` is one word, `because` a sentence.

    The verdict is hit (served from the cache without asking upstream), revalidate (one HEAD decides), miss
    (fetched), stale (served from the cache because upstream is paused) or refused (answered with an
    error).  `complete` says whether all content is stored; what is not is fetched on demand.

    `qualified` says how the namespace was found; `fresh_rule`, `keep_rule` and `pin` name the rules that
    apply.  `access` says who may pull it, None if everybody may.  `policy` is what the rules say of its
    names.  What is not stored may be `absent` from the upstream.  A tag that is `held` stands for another
    digest than its upstream gives.  In a fleet, `owner` is asked before the upstream; all is what this
    replica would do, and `elsewhere` is what those would do that differ.
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
    policy: PolicyRow | None = None
    held: HeldRow | None = None
    owner: OwnerRow | None = None
    elsewhere: list[ReplicaVerdict] = msgspec.field(default_factory=list)
    access: str | None = None
    absent: AbsenceRow | None = None


# Preparation for an outage


class WarmRow(Model, frozen=True):
    """The result of warming one image.  `here` means that all of it is stored, for the platforms asked for.

    `error` says why the image is not complete, or if it is, why upstream could not confirm it; `code` is
    for programs.  The image has so many `manifests`, of which `referrers` refer to others, and `blobs`;
    `fetched` is how many of them were fetched, with `bytes`.  All counts are 0 if upstream failed.  `lacking`
    are platforms that were asked for and that the image does not have.
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
    lacking: list[str] = msgspec.field(default_factory=list)
    error: str | None = None
    code: str | None = None


class MissingRow(Model, frozen=True):
    """Content that is not stored.

    `kind` is manifest, blob or referrer, or unreadable for a stored manifest of an unknown form, which may
    name content that is not stored.  `size` is -1 if unknown; `platforms` are those of the images that
    need it.
    """

    digest: str
    kind: str
    size: int
    platforms: list[str]


class ReadyRow(ReplicaModel, frozen=True):
    """Whether the image `asked` for can be pulled while no upstream answers.

    `lacking` are platforms that were asked for and that the image does not have.  `referrers` is how many
    of the `referrers_known`, those that upstream has listed, are stored.  `error` says why the image cannot
    be judged.
    """

    asked: str
    repository: str
    reference: str
    digest: str | None
    state: Completeness
    missing: list[MissingRow] = msgspec.field(default_factory=list)
    lacking: list[str] = msgspec.field(default_factory=list)
    referrers: int = 0
    referrers_known: int = 0
    error: str | None = None


class MissedRow(ReplicaModel, frozen=True):
    """Content that a client requested `count` times in vain; `kind` is manifest, blob, tags or referrers."""

    client: str
    kind: str
    repository: str
    reference: str
    count: int
    first: float
    last: float


class Drilling(Model, frozen=True):
    """The drill that is running, with `left` seconds left, or else the last one; `begun` is 0 without any.

    `namespaces` is empty for all.  `missed` are the requests that failed, in the order of their first time;
    `untold` is the number of failed requests beyond that list.
    """

    running: bool
    begun: float
    seconds: float
    left: float
    namespaces: list[str]
    missed: list[MissedRow]
    untold: int


class Reloading(Model, frozen=True):
    """The process that reads the configuration again, and replaces the others if it is valid."""

    pid: int

"""What the admin API answers about the policy.  Times are seconds since the epoch."""

from __future__ import annotations

from proxy.config.policy import NameVerdict
from proxy.processes.rows import Model, ReplicaModel


class PolicyLead(Model, frozen=True):
    """What leads to content: a manifest by its `digest`, and the `tag` that leads to it, None without one.

    `allowed` and `reason` are what the `rule` about it says of the content.
    """

    digest: str
    tag: str | None
    rule: str
    allowed: bool
    reason: str


class PolicyExplained(Model, frozen=True):
    """What the policy says of a reference: whether it is `allowed`, by which `rule`, and the `reason`.

    What is not allowed is refused in `mode` enforce, and served in warn and audit.  `rule` is empty if none
    matches.  Without a `digest` the names alone decide.
    """

    asked: str
    repository: str
    reference: str
    digest: str | None
    allowed: bool
    rule: str
    mode: str
    reason: str
    leads: list[PolicyLead]


class PolicyRow(Model, frozen=True):
    """What the policy says of an image by its names alone: the `rule` that decides, and its `reason`.

    `verdict` is allow, deny, which in the mode enforce refuses it, or verify: the rule allows content that
    meets its conditions.  `rule` is empty if none matches.
    """

    rule: str
    verdict: NameVerdict
    mode: str
    reason: str


class OverrideRow(ReplicaModel, frozen=True):
    """An exception from the policy for an image, by its full name: from `since` until `until`."""

    image: str
    since: float
    until: float
    reason: str


class HeldRow(ReplicaModel, frozen=True):
    """A tag that a `rule` holds at `digest`, though its upstream has moved it to `candidate`.

    `seen` is when the upstream first gave that, `moves_at` when the tag follows by itself; None if an
    operator has to approve it.  `approved` is a digest to which it moves as soon as the upstream gives it.
    """

    repository: str
    tag: str
    rule: str
    digest: str
    candidate: str | None
    seen: float | None
    moves_at: float | None
    approved: str | None
    rejected: list[str]


class PulledRow(ReplicaModel, frozen=True):
    """Pulls of a tag or digest by one caller on one day, who was given `digest` at `last`.

    `who` is a user, or the address of a client without one.
    """

    repository: str
    reference: str
    digest: str
    who: str
    count: int
    last: float

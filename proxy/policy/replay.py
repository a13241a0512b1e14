"""What a policy would have refused of pulls that were made."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Literal

import msgspec

from proxy.config.policy import PolicyConfig
from proxy.policy.rules import RuleBook, ServingRule
from storage.maintenance.pull_journal import PulledReference
from storage.names import written


class ReplayedPull(msgspec.Struct, frozen=True):
    """Pulls of an image by one caller that a rule would have refused, or would have had to verify."""

    image: str
    who: str
    count: int
    last: float
    rule: str
    reason: str
    outcome: Literal["deny", "verify"]


def replay(policy: PolicyConfig, pulls: Iterable[PulledReference]) -> list[ReplayedPull]:
    """Judge pulls by names alone, in the order of images and callers.

    A digest is judged by the tags that stood for it in these pulls; one that no tag stood for, such as the
    image of one platform, only where the rules do not depend on tags.
    """
    book, pulled = RuleBook(policy), list(pulls)
    tags: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for each in pulled:
        if ":" not in each.reference:
            tags[each.repository, each.digest].add(each.reference)
    found: dict[tuple[str, str], ReplayedPull] = {}
    for each in pulled:
        rule = _rule(book, each, tags[each.repository, each.reference])
        if rule is None or (rule.allows and not rule.conditions):
            continue
        image = written(each.repository, each.reference)
        known = found.get((image, each.who))
        count, last = (known.count, known.last) if known is not None else (0, 0.0)
        found[image, each.who] = ReplayedPull(
            image,
            each.who,
            count + each.count,
            max(last, each.last),
            rule.name,
            rule.reason,
            "verify" if rule.allows else "deny",
        )
    return [found[key] for key in sorted(found)]


def _rule(book: RuleBook, pull: PulledReference, tags: set[str]) -> ServingRule | None:
    """The rule that decides about a pull; None if that depends on what is not known."""
    if ":" not in pull.reference:
        return book.find(pull.repository, pull.reference)
    if (plain := book.plain(pull.repository)) is not None or not tags:
        return plain
    # One tag that is allowed is enough.
    return min((book.find(pull.repository, tag) for tag in sorted(tags)), key=lambda rule: not rule.allows)

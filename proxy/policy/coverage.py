"""Which rules of a policy can never decide, because a rule before them matches all that they match."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from proxy.config.policy import NamePattern, PolicyRule

# What no name and no tag holds: it stands for all that `*`, and `?`, of another pattern match.
_ANYTHING, _ANY_CHARACTER = "\0", "\1"


def unreachable(rules: Sequence[PolicyRule]) -> Iterator[tuple[PolicyRule, PolicyRule]]:
    """Each rule that surely never decides, and the one before it that does instead."""
    for number, rule in enumerate(rules):
        for before in rules[:number]:
            if _cover(before.repositories, rule.repositories) and _cover(before.tags, rule.tags):
                yield rule, before
                break


def _cover(these: Sequence[NamePattern], those: Sequence[NamePattern]) -> bool:
    """Whether `these` surely match whatever `those` do; none of them are all."""
    if not these:
        return True
    if not those:
        return False  # they are also about content without a tag, which no pattern matches
    return all(any(covers(each, other) for each in these) for other in those)


def covers(pattern: NamePattern, other: NamePattern) -> bool:
    """Whether `pattern` surely matches whatever `other` does; False where that cannot be told.

    A glob without brackets is compared as a text in which its wildcards are characters of their own.
    """
    if pattern.text == other.text:
        return True
    if any(each.text.startswith("re:") or "[" in each.text for each in (pattern, other)):
        return other.is_literal and pattern.fullmatch(other.text)
    text = other.text.replace("*", _ANYTHING).replace("?", _ANY_CHARACTER)
    wildcards = {"*": ".*", "?": f"[^{_ANYTHING}]"}
    parts = (wildcards.get(each) or re.escape(each) for each in pattern.text)
    return re.fullmatch("".join(parts), text, re.DOTALL) is not None

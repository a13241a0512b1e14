"""The section `policy` of the configuration."""

from __future__ import annotations

import re
from typing import Annotated, Literal, TypeAlias

from proxy.config.fields import Section, Text
from proxy.config.values import parse_label, parse_pattern, parse_where

PolicyMode: TypeAlias = Literal["enforce", "warn", "audit"]


class PolicyRule(Section, frozen=True):
    """A rule about what may be served: the first one that matches decides.

    `repositories` are patterns of full names; without them all match.  A rule with `tags` is about tags that
    match one of them.  If `mode` is None, that of the policy applies.
    """

    name: Annotated[str, parse_label]
    action: Literal["allow", "deny"]
    repositories: tuple[Annotated[re.Pattern[str], parse_where], ...] = ()
    tags: tuple[Annotated[re.Pattern[str], parse_pattern], ...] = ()
    reason: Text | None = None
    mode: PolicyMode | None = None

    def __post_init__(self) -> None:
        if self.action == "deny" and self.reason is None:
            raise ValueError(f"rule {self.name} needs a reason, which clients are told when it refuses")


class PolicyConfig(Section, frozen=True):
    """What may be served.

    In repositories that match one of `allow_list`, only what a rule allows is served; in all others,
    everything that no rule denies.
    """

    mode: PolicyMode = "enforce"
    rules: tuple[PolicyRule, ...] = ()
    allow_list: tuple[Annotated[re.Pattern[str], parse_where], ...] = ()

    def __post_init__(self) -> None:
        names = [each.name for each in self.rules]
        if twice := next((each for each in names if names.count(each) > 1), None):
            raise ValueError(f"two rules have the name {twice}, by which refusals name them")

    @property
    def active(self) -> bool:
        """Whether there is anything to judge."""
        return bool(self.rules or self.allow_list)

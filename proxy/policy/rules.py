"""The rules of a policy: which one is about a tag, or about content without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from proxy.config.policy import NamePattern, NameVerdict, PolicyConfig, PolicyMode, PolicyRule
from proxy.extensions.extension import Extensions
from proxy.policy.condition import Condition
from proxy.policy.signers import signers_of
from proxy.policy.verification import Unjudged, conditions_of

ALLOW_LIST = "allow_list"  # the rule, by name, that refuses what no rule of an allow-list allows


@dataclass(frozen=True, slots=True)
class ServingRule:
    """A rule, with what it needs to judge.

    conditions: what content has to meet, all of them, for a rule that allows to allow it
    """

    name: str
    allows: bool
    reason: str
    mode: PolicyMode
    repositories: tuple[NamePattern, ...] = ()
    tags: tuple[NamePattern, ...] = ()
    conditions: tuple[Condition, ...] = ()

    @property
    def verdict(self) -> NameVerdict:
        """What it decides by names alone."""
        if not self.allows:
            return "deny"
        return "verify" if self.conditions else "allow"

    def concerns(self, repository: str) -> bool:
        """Whether it is about some of the content of a repository, given by its full name."""
        return not self.repositories or any(each.fullmatch(repository) for each in self.repositories)

    def matches(self, repository: str, tag: str | None) -> bool:
        """Whether it is about a tag; None is content that no tag leads to."""
        if not self.concerns(repository):
            return False
        return not self.tags or (tag is not None and any(each.fullmatch(tag) for each in self.tags))


class RuleBook:
    """The rules of a policy in their order: the first that matches decides.

    `rules` come before those of the policy.

    Without a `clock` only names can be judged, and no files are read.  Raises StartError if a file that a
    condition needs cannot be read.  `extensions` has those that are conditions.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        clock: Callable[[], float] | None = None,
        rules: tuple[ServingRule, ...] = (),
        extensions: Extensions | None = None,
    ) -> None:
        self.rules = (*rules, *_rules(policy, clock, extensions or Extensions({})))
        self._allow_list = policy.allow_list
        self.allowing = ServingRule("", True, "no rule denies it", policy.mode)
        self._refusing = ServingRule(ALLOW_LIST, False, "no rule allows it", policy.mode)
        self.plain = lru_cache(maxsize=4096)(self._plain)

    def find(self, repository: str, tag: str | None) -> ServingRule:
        """The rule that decides about a tag of a repository, given by its full name.

        For None, which is content that no tag leads to, rules with tags do not count.
        """
        found = next((each for each in self.rules if each.matches(repository, tag)), None)
        return found or self._unmatched(repository)

    def refuses_by_tag(self, repository: str) -> bool:
        """Whether content of a repository may be refused because a tag leads to it."""
        return any(
            each.tags and each.concerns(repository) and each.mode == "enforce"
            for each in self.rules
            if each.conditions or not each.allows
        )

    def refusing(self, repository: str) -> ServingRule | None:
        """The rule that refuses all of a repository by its name alone; None if it is not refused so."""
        rule = self.plain(repository)
        return None if rule is None or rule.allows or rule.mode != "enforce" else rule

    def _unmatched(self, repository: str) -> ServingRule:
        listed = any(each.fullmatch(repository) for each in self._allow_list)
        return self._refusing if listed else self.allowing

    def _plain(self, repository: str) -> ServingRule | None:
        """The rule that decides about all of a repository by its name alone; None if there is none."""
        rule = next((each for each in self.rules if each.concerns(repository)), None)
        if rule is None:
            return self._unmatched(repository)
        return None if rule.tags or rule.conditions else rule


def _rules(
    policy: PolicyConfig, clock: Callable[[], float] | None, extensions: Extensions
) -> Iterator[ServingRule]:
    signers = {} if clock is None else signers_of(policy.signers)
    for each in policy.rules:
        demands = each.signers or each.locked is not None or each.conditions
        unjudged = (Unjudged(),) if demands else ()
        conditions = unjudged if clock is None else conditions_of(each, signers, clock, extensions)
        yield _rule(each, policy.mode, conditions)


def _rule(rule: PolicyRule, mode: PolicyMode, conditions: tuple[Condition, ...]) -> ServingRule:
    return ServingRule(
        rule.name,
        rule.action == "allow",
        rule.reason or "the rule allows it",
        rule.mode or mode,
        rule.repositories,
        rule.tags,
        conditions,
    )

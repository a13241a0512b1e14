"""The section `policy` of the configuration."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

import msgspec

from proxy.config.fields import File, Flag, Section, Text, Timeout
from proxy.config.signers import AttestationConfig, SignerConfig
from proxy.config.values import parse_label, parse_pattern, parse_where
from storage.names import is_glob

PolicyMode: TypeAlias = Literal["enforce", "warn", "audit"]
# What a rule decides by names alone; verify: it allows content that meets its conditions.
NameVerdict: TypeAlias = Literal["allow", "deny", "verify"]


@dataclass(frozen=True, slots=True)
class NamePattern:
    """A pattern of names or tags: a glob, or a regular expression after `re:`."""

    text: str
    regex: re.Pattern[str]

    def fullmatch(self, name: str) -> bool:
        return self.regex.fullmatch(name) is not None

    @property
    def is_literal(self) -> bool:
        """Whether it matches nothing but its own text."""
        return not self.text.startswith("re:") and not is_glob(self.text)


def parse_repositories(value: object) -> NamePattern:
    """A pattern of the full names of repositories."""
    return NamePattern(str(value), parse_where(value))


def parse_tags(value: object) -> NamePattern:
    """A pattern of tags."""
    return NamePattern(str(value), parse_pattern(value))


class PolicyRule(Section, frozen=True):
    """A rule about what may be served: the first one that matches decides.

    `repositories` are patterns of full names; without them all match.  A rule with `tags` is about tags that
    match one of them.  If `mode` is None, that of the policy applies.

    What a rule allows is served only if it is signed by one of `signed_by` and by all of `signed_by_all`, as
    far as there are any, and has all that is `attested`; only if the lock file `locked` has it; and only if
    it meets all `conditions`, which are extensions.
    """

    name: Annotated[str, parse_label]
    action: Literal["allow", "deny"]
    repositories: tuple[Annotated[NamePattern, parse_repositories], ...] = ()
    tags: tuple[Annotated[NamePattern, parse_tags], ...] = ()
    reason: Text | None = None
    mode: PolicyMode | None = None
    signed_by: tuple[Text, ...] = ()
    signed_by_all: tuple[Text, ...] = ()
    attested: tuple[AttestationConfig, ...] = ()
    locked: File | None = None
    conditions: tuple[Annotated[str, parse_label], ...] = ()

    def __post_init__(self) -> None:
        if self.action == "deny" and self.reason is None:
            raise ValueError(f"rule {self.name} needs a reason, which clients are told when it refuses")
        if self.action == "deny" and (self.signers or self.attested):
            raise ValueError(f"rule {self.name} denies, whatever is signed: let it allow what is signed")
        if self.action == "deny" and self.locked is not None:
            raise ValueError(f"rule {self.name} denies, whatever is locked: let it allow what is locked")
        if self.action == "deny" and self.conditions:
            raise ValueError(f"rule {self.name} denies, and conditions are what it must meet to be allowed")

    @property
    def signers(self) -> tuple[str, ...]:
        """All signers that it names."""
        attesting = (name for each in self.attested for name in each.signed_by)
        return (*self.signed_by, *self.signed_by_all, *attesting)


# Tags that name one release, such as 1.2.3, v1.2.3 and 1.2.3-alpine.
RELEASES = parse_tags(r"re:v?[0-9]+(\.[0-9]+){2,}([-+._].*)?")


class MoveRule(Section, frozen=True):
    """When tags may move of which the upstream of a cache says that they have: the first rule that matches.

    Until the move was known for `min_age` seconds, or until an operator approves it if `approval` is set.
    Without `tags` it is about all, or about RELEASES if they need an approval.
    """

    name: Annotated[str, parse_label]
    repositories: tuple[Annotated[NamePattern, parse_repositories], ...] = ()
    tags: tuple[Annotated[NamePattern, parse_tags], ...] = ()
    min_age: Timeout | None = None
    approval: Flag = False

    def __post_init__(self) -> None:
        if (self.min_age is not None) == self.approval:
            raise ValueError(f"{self.name} needs one of min_age, such as 3d, and approval: true")

    def matches(self, repository: str, tag: str) -> bool:
        """Whether it is about a tag of a repository, which is given by its full name."""
        tags = self.tags or ((RELEASES,) if self.approval else ())
        return (not self.repositories or any(each.fullmatch(repository) for each in self.repositories)) and (
            not tags or any(each.fullmatch(tag) for each in tags)
        )


class PolicyConfig(Section, frozen=True):
    """What may be served.

    In repositories that match one of `allow_list`, only what a rule allows is served; in all others,
    everything that no rule denies.  `moves` hold tags that their upstreams move.  `signers` are those that
    rules name.  For `journal` seconds it is recorded who pulled what; None for not at all.
    """

    mode: PolicyMode = "enforce"
    rules: tuple[PolicyRule, ...] = ()
    allow_list: tuple[Annotated[NamePattern, parse_repositories], ...] = ()
    moves: tuple[MoveRule, ...] = ()
    journal: Timeout | None = None
    signers: dict[str, SignerConfig] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [*(each.name for each in self.rules), *(each.name for each in self.moves)]
        if twice := next((each for each in names if names.count(each) > 1), None):
            raise ValueError(f"two rules have the name {twice}, by which refusals name them")
        for rule in self.rules:
            if unknown := [each for each in rule.signers if each not in self.signers]:
                raise ValueError(f"rule {rule.name} names the signer {unknown[0]}, which is not in signers")

    @property
    def libraries(self) -> tuple[str, ...]:
        """The modules of libraries that only what it asks for needs, and that take long to import."""
        signers, rules = self.signers.values(), self.rules
        needed = {
            "sigstore.verify": any(each.trusted_root for each in signers),
            "cel": any(each.when for rule in rules for each in rule.attested),
        }
        return tuple(name for name, wanted in needed.items() if wanted)

    @property
    def active(self) -> bool:
        """Whether there is anything to judge."""
        return bool(self.rules or self.allow_list or self.moves)

"""Which rule of a policy decides, and what the configuration refuses."""

from __future__ import annotations

import pytest

from proxy.policy.rules import RuleBook
from tests.configuring import fault, read

RULES = """
policy:
  mode: warn
  allow_list: ["ghcr.io/*", "docker.io/team/*"]
  rules:
  - {name: ours, action: allow, repositories: ["docker.io/team/*"], tags: ["v*", "re:[0-9]+"]}
  - {name: moving, action: deny, repositories: ["docker.io/*"], tags: [latest, "*-dev"], reason: it moves}
  - {name: bad, action: deny, repositories: ["docker.io/evil/*", "*/miner"], reason: malware, mode: enforce}
"""


@pytest.mark.parametrize(
    ("repository", "tag", "rule", "allows", "mode"),
    [
        ("docker.io/team/app", "v1", "ours", True, "warn"),
        ("docker.io/team/app", "17", "ours", True, "warn"),
        ("docker.io/team/app", "17a", "allow_list", False, "warn"),
        ("docker.io/team/app", None, "allow_list", False, "warn"),
        ("docker.io/team/app", "latest", "moving", False, "warn"),
        ("docker.io/library/alpine", "latest", "moving", False, "warn"),
        ("docker.io/library/alpine", "3-dev", "moving", False, "warn"),
        ("docker.io/library/alpine", "3", "", True, "warn"),
        ("docker.io/library/alpine", None, "", True, "warn"),
        ("docker.io/evil/a", "latest", "moving", False, "warn"),
        ("docker.io/evil/a", "1", "bad", False, "enforce"),
        ("docker.io/evil/a", None, "bad", False, "enforce"),
        ("quay.io/x/miner", "1", "bad", False, "enforce"),
        ("ghcr.io/x/y", "1", "allow_list", False, "warn"),
        ("quay.io/x/y", "latest", "", True, "warn"),
    ],
)
def test_the_first_rule_that_matches_decides(
    repository: str, tag: str | None, rule: str, allows: bool, mode: str
) -> None:
    found = RuleBook(read(RULES).policy).find(repository, tag)
    assert (found.name, found.allows, found.mode) == (rule, allows, mode)


@pytest.mark.parametrize(
    ("repository", "rule"),
    [
        ("quay.io/x/y", ""),  # nothing is about it
        ("quay.io/x/miner", "bad"),
        ("ghcr.io/x/y", "allow_list"),
        ("docker.io/evil/a", None),  # that depends on the tag
        ("docker.io/team/app", None),
    ],
)
def test_what_a_name_alone_decides(repository: str, rule: str | None) -> None:
    found = RuleBook(read(RULES).policy).plain(repository)
    assert (None if found is None else found.name) == rule


def test_without_a_policy_there_is_nothing_to_judge() -> None:
    assert not read("").policy.active
    assert not read("policy: {mode: audit}").policy.active
    assert read("policy: {allow_list: ['docker.io/*']}").policy.active
    assert read("policy: {rules: [{name: a, action: allow}]}").policy.active


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ("mode: block", "policy.mode: expected one of enforce, warn, audit"),
        ("rules: [{action: allow}]", "policy.rules[0].name: is required"),
        ("rules: [{name: a b, action: allow}]", "policy.rules[0].name: expected a lower-case word"),
        ("rules: [{name: a}]", "policy.rules[0].action: is required"),
        ("rules: [{name: a, action: block}]", "policy.rules[0].action: expected one of allow, deny"),
        (
            "rules: [{name: a, action: deny}]",
            "policy.rules[0]: rule a needs a reason, which clients are told when it refuses",
        ),
        (
            "rules: [{name: a, action: allow, repositories: [local]}]",
            "policy.rules[0].repositories[0]: expected a glob over namespace/repository",
        ),
        (
            "rules: [{name: a, action: allow, tags: ['re:(']}]",
            "policy.rules[0].tags[0]: is not a valid regular expression",
        ),
        (
            "rules: [{name: a, action: allow}, {name: b, action: allow}, {name: a, action: allow}]",
            "policy: two rules have the name a, by which refusals name them",
        ),
        (
            "rules: [{name: a, action: allow, tag: [x]}]",
            "policy.rules[0].tag: unknown key; did you mean tags?",
        ),
        ("allow_list: ['docker.io']", "policy.allow_list[0]: expected a glob over namespace/repository"),
    ],
)
def test_what_is_no_policy(members: str, says: str) -> None:
    assert fault(f"policy: {{{members}}}").startswith(says)

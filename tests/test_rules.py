"""What the rules let whom do, from plain data."""

from __future__ import annotations

import ipaddress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.access.rules import AccessRules, Grant, Principal, Rule, default_rules
from proxy.config.access import ACTIONS, Action
from proxy.config.hosts import parse_network
from proxy.config.values import parse_client, parse_where

ANYBODY = Principal()
HERE = Principal(address=ipaddress.ip_address("127.0.0.1"))
ALICE = Principal("alice", "password", frozenset({"ops"}), address=ipaddress.ip_address("10.1.2.3"))
BOB = Principal("bob", "certificate")
PIPELINE = Principal(
    "alice", "token", claims={"project": "team/app", "roles": ["ci", "dev"], "protected": True}
)
APP = "local/team/app"


def rules(*who: str, may: tuple[Action, ...] = ("pull",), sources: str = "", where: str = "") -> AccessRules:
    rule = Rule(
        tuple(map(parse_client, who)),
        may,
        tuple(map(parse_network, sources.split())),
        tuple(map(parse_where, where.split())),
    )
    return AccessRules([rule], ["local", "other"])


def allowed(rules: AccessRules, principal: Principal, repository: str = APP) -> list[Action]:
    return [action for action in ACTIONS if rules.allow(principal, action, repository)]


@pytest.mark.parametrize(
    ("who", "granted"),
    [
        ("anonymous", [ANYBODY, ALICE, BOB, PIPELINE]),
        ("authenticated", [ALICE, BOB]),
        ("user:alice", [ALICE]),
        ("user:bob", [BOB]),
        ("user:carol", []),
        ("group:ops", [ALICE]),
        ("group:dev", []),
        ("claim:project=team/*", [PIPELINE]),
        ("claim:project=team", []),
        ("claim:roles=dev", [PIPELINE]),
        ("claim:protected=true", [PIPELINE]),
        ("claim:absent=*", []),
    ],
)
def test_who(who: str, granted: list[Principal]) -> None:
    found = [each for each in (ANYBODY, ALICE, BOB, PIPELINE) if allowed(rules(who), each)]
    assert found == granted


def test_one_of_several_will_do() -> None:
    ruled = rules("user:bob", "group:ops", sources="192.168.0.0/16 10.0.0.0/8", where="other/* local/team/*")
    assert allowed(ruled, ALICE) == ["pull"]


def test_all_conditions_must_hold() -> None:
    ruled = rules("user:alice", may=("push",), sources="10.0.0.0/8", where="local/team/*")
    assert allowed(ruled, ALICE) == ["push"]
    assert allowed(ruled, ALICE, "local/else/app") == []
    assert allowed(ruled, replace(ALICE, address=ipaddress.ip_address("11.0.0.1"))) == []
    assert allowed(ruled, replace(ALICE, address=ipaddress.ip_address("::1"))) == []
    assert allowed(ruled, replace(ALICE, user="bob")) == []


def test_who_has_no_address_is_in_no_range() -> None:
    assert allowed(rules("anonymous", sources="0.0.0.0/0 ::/0"), ANYBODY) == []
    assert allowed(rules("anonymous"), ANYBODY) == ["pull"]


def test_where_is_about_full_names() -> None:
    assert allowed(rules("anonymous", where="team/*"), ANYBODY) == []
    assert allowed(rules("anonymous", where="re:local/.+/app"), ANYBODY) == ["pull"]
    assert allowed(rules("anonymous", where="local/*"), ANYBODY, "localhost/app") == []


def test_rules_add_up() -> None:
    pull, push = rules("anonymous"), rules("user:alice", may=("push",))
    both = AccessRules([*pull._rules, *push._rules], ["local"])
    assert allowed(both, ANYBODY) == ["pull"]
    assert allowed(both, ALICE) == ["pull", "push"]
    assert allowed(AccessRules([], ["local"]), ALICE) == []


def test_stores_without_rules() -> None:
    ruled = AccessRules(default_rules(["local", "a.b"]), ["local", "a.b", "docker.io"])
    assert allowed(ruled, ANYBODY) == []
    assert allowed(ruled, HERE) == ["pull"]
    assert allowed(ruled, HERE, "a.b/x") == ["pull"]
    assert allowed(ruled, HERE, "aXb/x") == []
    assert allowed(ruled, HERE, "docker.io/x") == []
    assert allowed(ruled, ALICE) == allowed(ruled, BOB) == ["pull", "push", "delete"]
    assert allowed(ruled, PIPELINE) == []
    assert default_rules([]) == []


# Tokens


def token(name: str, *actions: str) -> Principal:
    return Principal("alice", "token", grants=(Grant(name, frozenset(actions)),))


def test_a_token_gets_what_its_scope_says() -> None:
    ruled = AccessRules([], ["local"])
    assert allowed(ruled, token(APP, "pull")) == ["pull"]
    assert allowed(ruled, token(APP, "*")) == ["pull", "push", "delete"]
    assert allowed(ruled, token(APP)) == []
    assert allowed(ruled, token("local/team/ap", "*")) == []
    assert allowed(ruled, token("team/app", "*")) == []
    assert allowed(ruled, token("local/*", "*")) == []


@pytest.mark.parametrize(
    ("written", "named", "scope"),
    [
        ("team/app", False, "team/app"),
        ("team/app", True, APP),  # by ?ns= or a prefix
        (APP, False, APP),  # by its first component
        ("other/app", False, "local/other/app"),  # which may be read as another's full name
        ("app", False, "app"),
    ],
)
def test_scope_of_the_one_namespace_that_may_go_without_its_name(
    written: str, named: bool, scope: str
) -> None:
    ruled = AccessRules([], ["local", "other"], short="local")
    repository = written if written == APP else f"local/{written}"
    assert ruled.scope(repository, written, named) == scope


def test_scope_of_others_is_the_full_name() -> None:
    ruled = AccessRules([], ["local", "other"], short="local")
    assert ruled.scope("other/app", "app", False) == "other/app"
    assert AccessRules([], ["local"]).scope("local/app", "app", False) == "local/app"


def test_scope_with_library() -> None:
    ruled = AccessRules([], ["docker.io"], short="docker.io")
    assert ruled.scope("docker.io/library/alpine", "alpine", False) == "alpine"
    assert ruled.scope("docker.io/library/alpine", "docker.io:443/library/alpine", False).startswith(
        "docker.io/"
    )


# Tokens of this server


names = st.sampled_from(["local/team/app", "local/team/other", "local/public/app", "other/app"])
acts = st.sets(st.sampled_from(ACTIONS), max_size=3).map(frozenset)
grants = st.lists(st.builds(Grant, names, acts), max_size=3).map(tuple)
ruled = st.builds(
    rules,
    st.sampled_from(["anonymous", "authenticated", "user:alice", "group:ops", "claim:project=team/*"]),
    may=st.sets(st.sampled_from(ACTIONS), min_size=1).map(lambda found: tuple(sorted(found))),
    sources=st.sampled_from(["", "10.0.0.0/8"]),
    where=st.sampled_from(["", "local/*", "local/team/*", "*/app"]),
)


@given(ruled, ruled, st.sampled_from([ANYBODY, HERE, ALICE, BOB, PIPELINE]), grants, grants, names)
def test_a_scope_only_takes_away(
    one: AccessRules,
    two: AccessRules,
    who: Principal,
    held: tuple[Grant, ...],
    within: tuple[Grant, ...],
    name: str,
) -> None:
    """Whatever the rules and the token say: it grants what both do, and what everybody may."""
    both = AccessRules([*one._rules, *two._rules], ["local", "other"])
    whole = replace(who, grants=held)
    narrow = replace(whole, within=within)
    for action in ACTIONS:
        everybody = both.allow(Principal(address=who.address), action, name)
        inside = any(each.name == name and action in each.actions for each in within)
        expected = everybody or (inside and both.allow(whole, action, name))
        assert both.allow(narrow, action, name) is expected
        assert not both.allow(narrow, action, name) or both.allow(whole, action, name)
        if both.allow(narrow, action, name):
            assert any(name.startswith(start) for start in both.starts(narrow, action))

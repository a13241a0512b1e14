"""What a token is granted of what its client asks for: never more than the rules grant the client."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.access.authentication import Authenticator
from proxy.access.authorization import Authorizer, Guard, GuardedNamespaces
from proxy.access.rules import AccessRules, Grant, Principal, Rule
from proxy.access.scopes import CATALOG, requested_scopes
from proxy.access.visibility import Visibility
from proxy.config.access import ACTIONS
from proxy.config.values import parse_client, parse_where
from storage.errors import NameUnknown

GUARDS = {
    "docker.io": Guard.PUBLIC,
    "cached": Guard.RULES,
    "theirs": Guard.CALLER,
    "local": Guard.STORE,
}
ALICE = Principal("alice", "password", frozenset({"ops"}))
KEY = Principal("key:ci", "key", grants=(Grant("", frozenset({"pull"}), re.compile("local/.*")),))


async def visibility(namespace: str) -> Visibility:
    raise AssertionError(namespace)


def full_name(name: str) -> str:
    """That of a name which begins with its namespace, or belongs to `local`."""
    if name.startswith("unknown/"):
        raise NameUnknown(name)
    return name if name.partition("/")[0] in GUARDS else f"local/{name}"


def authorizer(rules: AccessRules) -> Authorizer:
    guarded = GuardedNamespaces(GUARDS, visibility, lambda *, ns, host, prefix: None, None)
    return Authorizer(guarded, rules, Authenticator())


rules = st.builds(
    Rule,
    st.sampled_from(["anonymous", "authenticated", "user:alice", "user:bob", "group:ops"]).map(
        lambda text: (parse_client(text),)
    ),
    st.sets(st.sampled_from(ACTIONS), min_size=1).map(lambda found: tuple(sorted(found))),
    st.just(()),
    st.sampled_from([(), ("local/team/*",), ("*/app",), ("cached/*",), ("theirs/*", "docker.io/*")]).map(
        lambda texts: tuple(map(parse_where, texts))
    ),
)
names = st.sampled_from(
    ["team/app", "local/team/app", "app", "cached/x/app", "theirs/app", "docker.io/library/app", "unknown/a"]
)
actions = st.sets(st.sampled_from([*ACTIONS, "*", "sign"]), min_size=1).map(
    lambda found: ",".join(sorted(found))
)
scopes = st.lists(
    st.builds("repository:{}:{}".format, names, actions)
    | st.sampled_from(
        ["registry:catalog:*", "registry:catalog:pull", "nonsense", "artifact:local/team/app:pull"]
    ),
    max_size=4,
)


@pytest.mark.clients
@given(st.lists(rules, max_size=3), st.sampled_from([Principal(), ALICE, KEY]), scopes)
def test_a_token_is_granted_what_is_asked_for_and_what_the_rules_grant(
    given_rules: list[Rule], principal: Principal, asked: list[str]
) -> None:
    ruled = AccessRules(given_rules, GUARDS)
    found = authorizer(ruled).grants(principal, requested_scopes([" ".join(asked)]), full_name)
    granted = {(grant.name, action) for grant in found for action in grant.actions}
    expected = {(CATALOG, "*")} if "registry:catalog:*" in asked else set()
    for each in asked:
        kind, _, rest = each.partition(":")
        name, _, wanted = rest.rpartition(":")
        if kind != "repository" or name.startswith("unknown/"):
            continue
        full = full_name(name)
        for action in ACTIONS:
            if not {action, "*"} & set(wanted.split(",")):
                continue
            guard = GUARDS[full.partition("/")[0]]
            if guard is Guard.PUBLIC:
                allowed = action == "pull"
            else:
                allowed = guard is not Guard.CALLER and ruled.allow(principal, action, full)
            if allowed:
                expected.add((full, action))
    assert granted == expected
    # And what the token is good for afterwards is within that, and what everybody may.
    for name in GUARDS:
        for action in ACTIONS:
            repository = f"{name}/team/app"
            if ruled.allow(replace(principal, within=tuple(found)), action, repository):
                assert (repository, action) in granted or ruled.allow(Principal(), action, repository)

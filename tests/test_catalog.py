"""What the catalog reads to show what a client may see."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.access.catalog import visible_repositories
from proxy.access.rules import AccessRules, Grant, Principal, Rule
from proxy.config.values import ClientMatcher, parse_where
from storage.registry import Registry

BOB = Principal("bob", "password")
SOME = st.text("abz/.-", max_size=5)


class Names(Registry):
    """Lists these names, and counts how many it has listed."""

    def __init__(self, names: list[str]) -> None:
        self._names = sorted(names)
        self.read = 0

    async def repositories(self, last: str = "", limit: int | None = None) -> list[str]:
        found = [each for each in self._names if each > last][:limit]
        self.read += len(found)
        return found


def ruled(*where: str) -> AccessRules:
    rule = Rule((ClientMatcher("user", "bob"),), ("pull",), (), tuple(map(parse_where, where)))
    return AccessRules([rule], ["local"], "local")


async def listed(names: Names, rules: AccessRules, last: str = "", limit: int | None = None) -> list[str]:
    starts = rules.starts(BOB, "pull")
    return await visible_repositories(names, starts, lambda each: rules.allow(BOB, "pull", each), last, limit)


@given(
    st.sets(SOME, max_size=40),
    st.sets(st.text("abz/.-*?", min_size=1, max_size=4), min_size=1, max_size=4),
    SOME,
    st.none() | st.integers(1, 9),
)
@example({f"a/b{number}" for number in range(50)} | {"a.b/z"}, {"a/*", "a/b4*"}, "a/b2", 30)
async def test_it_lists_what_all_names_hold_that_may_be_seen(
    names: set[str], globs: set[str], last: str, limit: int | None
) -> None:
    rules = ruled(*(f"{each}/*" for each in globs), *(f"re:{re.escape(each)}" for each in globs))
    expected = [each for each in sorted(names) if each > last and rules.allow(BOB, "pull", each)]
    assert await listed(Names([*names]), rules, last, limit) == expected[:limit]


@pytest.mark.parametrize(
    ("where", "starts"),
    [
        (["local/team/*"], {"local/team/"}),
        (["local/a.b/app", "local/x?"], {"local/a.b/app", "local/x"}),
        (["re:local/team/app(0|5)"], {""}),
        (["re:local/team/app[05]"], {"local/team/app"}),
        (["re:local/apps?/x"], {"local/app"}),
        (["re:local/ap{0,2}"], {"local/a"}),
        ([r"re:local\.*x"], {"local"}),
        ([r"re:local\.x+"], {"local.x"}),
        (["re:(?i)local/x"], {""}),
        (["re:(?x)local /x"], {""}),
        ([r"re:(?s:local)?(x)"], {""}),
        ([r"re:(?s:lo)*(x)\Z"], {""}),
        (["re:local(?#not here)*/x"], {""}),
        ([r"re:\w+/x"], {""}),
        (["*/app"], {""}),
        ([], {""}),
    ],
)
def test_what_the_names_begin_with_that_rules_grant(where: list[str], starts: set[str]) -> None:
    assert ruled(*where).starts(BOB, "pull") == starts
    assert ruled(*where).starts(BOB, "push") == ruled(*where).starts(Principal(), "pull") == set()


def test_what_the_names_begin_with_that_tokens_grant() -> None:
    token = Principal(
        scheme="token", grants=(Grant("app", frozenset({"pull"})), Grant("b", frozenset({"push"})))
    )
    assert ruled().starts(token, "pull") == {"app", "local/app"}
    assert AccessRules([], ["local"]).starts(token, "pull") == {"app"}


async def test_names_that_may_not_be_seen_are_passed_over() -> None:
    names = Names([f"local/{team}/{app}" for team in "abcdefgh" for app in range(1000)] + ["local/c/my/app"])
    rules = ruled("local/c/my/*", "local/zz/*", "re:local/e/99.")
    shown = await listed(names, rules)
    assert shown == ["local/c/my/app", *(f"local/e/{number}" for number in range(990, 1000))]
    assert names.read < 100
    assert await listed(names, ruled("local/*"), limit=30) == sorted(names._names)[:30]
    assert names.read < 200


@pytest.mark.parametrize("odd", ["\0", "local/\ue000", "local/\ud800x", "\n", " "])
async def test_a_token_may_grant_what_is_no_name(odd: str) -> None:
    names, after = Names(["local/a"]), list[str]()

    class Strict(Registry):
        async def repositories(self, last: str = "", limit: int | None = None) -> list[str]:
            after.append(last)
            last.encode()
            return await names.repositories(last, limit)

    assert await visible_repositories(Strict(), {odd, "local/a"}, lambda name: True, "", None) == ["local/a"]
    assert "local/`~" in after

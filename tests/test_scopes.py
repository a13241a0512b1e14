"""The grammar of scopes: what is one, what it asks for, and what is none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.access.scopes import MOST, Scope, parse_scope, requested_scopes


def scope(kind: str, name: str, *actions: str) -> Scope:
    return Scope(kind, name, frozenset(actions))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("repository:alpine:pull", scope("repository", "alpine", "pull")),
        ("repository:team/app:pull,push", scope("repository", "team/app", "pull", "push")),
        ("repository:a/b/c:delete", scope("repository", "a/b/c", "delete")),
        ("repository:app:*", scope("repository", "app", "*")),
        ("repository:app:pull,pull", scope("repository", "app", "pull")),
        ("repository(plugin):sshfs:pull", scope("repository", "sshfs", "pull")),
        ("repository:host.example:5000/app:pull", scope("repository", "host.example:5000/app", "pull")),
        ("repository:[::1]:5000/app:pull", scope("repository", "[::1]:5000/app", "pull")),
        ("registry:catalog:*", scope("registry", "catalog", "*")),
        ("artifact:x:sign", scope("artifact", "x", "sign")),
    ],
)
def test_a_scope(text: str, expected: Scope) -> None:
    assert parse_scope(text) == expected
    assert requested_scopes([text]) == [expected]


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "::",
        "repository",
        "repository:app",
        "repository:app:",
        "repository::pull",
        ":app:pull",
        "repository:app:pull,",
        "repository:app:,pull",
        "repository:app:PULL",
        "repository:app:pull push",
        "repository:an app:pull",
        "repository:äpp:pull",
        "Repository:app:pull",
        "repository(:app:pull",
        "repository():app:pull",
        "repository(a)(b):app:pull",
        "repository:app:**",
        "repository:app:pull\n",
    ],
)
def test_what_is_no_scope(text: str) -> None:
    with pytest.raises(ValueError, match="expected type:name:actions"):
        parse_scope(text)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ([], []),
        (["", "   "], []),
        (
            ["repository:a:pull repository:b:push"],
            [scope("repository", "a", "pull"), scope("repository", "b", "push")],
        ),
        (
            ["repository:b:pull,push", "repository:a:pull"],
            [scope("repository", "b", "pull", "push"), scope("repository", "a", "pull")],
        ),
        (["repository:a:pull", "repository:a:push"], [scope("repository", "a", "pull", "push")]),
        (["repository(plugin):a:pull repository:a:push"], [scope("repository", "a", "pull", "push")]),
        (["nonsense repository:a:pull :::"], [scope("repository", "a", "pull")]),
    ],
)
def test_what_a_client_asks_for(parameters: list[str], expected: list[Scope]) -> None:
    assert requested_scopes(parameters) == expected


def test_the_number_of_scopes_is_bounded() -> None:
    found = requested_scopes([" ".join(f"repository:a{number}:pull" for number in range(MOST + 10))])
    assert len(found) == MOST


@pytest.mark.parametrize(
    ("actions", "wanted"),
    [
        (("pull",), ("pull",)),
        (("push", "pull"), ("pull", "push")),
        (("*",), ("pull", "push", "delete")),
        (("sign",), ()),
        (("sign", "delete"), ("delete",)),
    ],
)
def test_the_actions_that_there_are(actions: tuple[str, ...], wanted: tuple[str, ...]) -> None:
    assert scope("repository", "a", *actions).wanted == wanted


def test_the_catalog_is_listed_by_one_scope() -> None:
    assert scope("registry", "catalog", "*").is_catalog
    for other in (scope("registry", "catalog", "pull"), scope("registry", "other", "*")):
        assert not other.is_catalog
    assert not scope("repository", "catalog", "*").is_catalog


@given(st.text())
def test_any_text_is_a_scope_or_none(text: str) -> None:
    try:
        found = parse_scope(text)
    except ValueError:
        return
    assert found.actions
    assert found.name in text

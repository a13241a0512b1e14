"""The scopes of tokens: what a client asks for, and what an API key may do.

The grammar is that of Distribution, "Token Scope Documentation":

    scope          := resourcescope [ ' ' resourcescope ]*
    resourcescope  := type [ '(' class ')' ] ':' name ':' action [ ',' action ]*

A name may begin with a host and its port, so that it may hold colons.  Of the types, `repository` with the
actions pull, push and delete, and `registry:catalog` mean something here; `*` stands for every action.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from proxy.config.access import ACTIONS, Action

REPOSITORY, CATALOG = "repository", "registry:catalog"
MOST = 100  # scopes of one request; more are ignored
_TYPE = re.compile(r"[a-z0-9]+(?:\([a-z0-9]+\))?")
_NAME = re.compile(r"[!-~]+")  # what it names may be none; a key's is a pattern
_ACTIONS = re.compile(r"(?:[a-z]+|\*)(?:,(?:[a-z]+|\*))*")


@dataclass(frozen=True, slots=True)
class Scope:
    """Actions on one resource.  `type` is without a class."""

    type: str
    name: str
    actions: frozenset[str]

    @property
    def wanted(self) -> tuple[Action, ...]:
        """Those of the actions on a repository that there are here."""
        every = "*" in self.actions
        return tuple(each for each in ACTIONS if every or each in self.actions)

    @property
    def is_catalog(self) -> bool:
        return f"{self.type}:{self.name}" == CATALOG and "*" in self.actions


def parse_scope(text: str) -> Scope:
    """Parse one resource scope.  Raises ValueError with half a sentence."""
    start, _, actions = text.rpartition(":")
    kind, _, name = start.partition(":")
    if not (_TYPE.fullmatch(kind) and _NAME.fullmatch(name) and _ACTIONS.fullmatch(actions)):
        raise ValueError("expected type:name:actions, such as repository:team/app:pull,push")
    return Scope(kind.partition("(")[0], name, frozenset(actions.split(",")))


def requested_scopes(parameters: Iterable[str]) -> list[Scope]:
    """What a client asks for by its parameters `scope`, each of several scopes with spaces between them.

    One for each resource.  What is no scope asks for nothing: the client learns by its next request what is
    missing.
    """
    found: dict[tuple[str, str], frozenset[str]] = {}
    for each in _parsed(parameters):
        key = each.type, each.name
        if key in found or len(found) < MOST:
            found[key] = found.get(key, frozenset()) | each.actions
    return [Scope(*key, actions) for key, actions in found.items()]


def _parsed(parameters: Iterable[str]) -> Iterator[Scope]:
    for text in parameters:
        for each in text.split():
            try:
                yield parse_scope(each)
            except ValueError:
                continue

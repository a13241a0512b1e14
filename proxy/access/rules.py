"""Principals, and the rules that decide what they may do.  Nothing is verified here, and nothing is read.

Rules add up, and what no rule grants is refused.  Without configured rules, these hold for stores: clients on
this machine may pull, and authenticated users may pull, push and delete.  On a server for this machine alone,
its programs may do all without a login.

A token is not a user: it may have been given away for one purpose.  It gets what its scope, rules with
`claim:` and rules for everybody grant, but not what rules grant to the user whom it was issued to.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from proxy.access.claims import claim_texts
from proxy.config.access import ACTIONS, Action
from proxy.config.hosts import Network
from proxy.config.values import ClientMatcher
from proxy.telemetry.exchange import KeyLock
from storage.names import untranslated

IPAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

LOOPBACK: tuple[Network, ...] = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1"))


@dataclass(frozen=True, slots=True)
class Grant:
    """A permission in a token: `actions` on the repository `name`.  Token specification, "access".

    That of an API key is for the repositories that match `pattern`, by their full names.
    """

    name: str
    actions: frozenset[str]
    pattern: re.Pattern[str] | None = None

    def allows(self, action: Action) -> bool:
        return action in self.actions or "*" in self.actions

    def covers(self, repository: str, scope: str) -> bool:
        """Whether it is for a repository, by its full name or by what it is called in scopes."""
        if self.pattern is not None:
            return self.pattern.fullmatch(repository) is not None
        return self.name in (repository, scope)

    @property
    def start(self) -> str:
        """What the name of each repository begins with that it is for."""
        return self.name if self.pattern is None else _literal_start(self.pattern)


@dataclass(frozen=True, slots=True)
class Principal:
    """The client that sent a request.

    user: "" for an anonymous client
    scheme: how the client authenticated itself: "" for an anonymous client
    until: when its credential expires, in seconds since the epoch
    proof: what its verifier recognizes the credential by, without being it
    within: the scope of the token that the client has exchanged its credential for: of what it may do, it may
        do that, and what everybody may; None if it may do all
    lock: the images that are all it may pull; None without a lock
    address: None if it is unknown
    local: whether it is a program on this machine that connects without a proxy
    """

    user: str = ""
    scheme: str = ""
    groups: frozenset[str] = frozenset()
    claims: Mapping[str, Any] = field(default_factory=dict)
    grants: tuple[Grant, ...] = ()
    until: float = math.inf
    proof: str = ""
    within: tuple[Grant, ...] | None = None
    lock: KeyLock | None = None
    address: IPAddress | None = None
    local: bool = False

    @property
    def anonymous(self) -> bool:
        return not self.scheme

    @property
    def known(self) -> bool:
        """Whether this is a user, not a token or an anonymous client."""
        return self.scheme in ("password", "certificate", "oidc")

    def matches(self, who: ClientMatcher) -> bool:
        match who.kind:
            case "anonymous":
                return True
            case "authenticated":
                return self.known
            case "user":
                return self.known and self.user == who.name
            case "group":
                return self.known and who.name in self.groups
            case _:
                assert who.glob is not None
                return any(who.glob.fullmatch(each) for each in claim_texts(self.claims, who.name))


@dataclass(frozen=True, slots=True)
class Rule:
    """Grants `who` the actions `may`, from networks `sources`, on repositories that match `where`.

    Empty `sources` and `where` match everything.  A `local` rule is for programs on this machine.
    """

    who: tuple[ClientMatcher, ...]
    may: tuple[Action, ...]
    sources: tuple[Network, ...] = ()
    where: tuple[re.Pattern[str], ...] = ()
    local: bool = False

    def grants(self, principal: Principal, action: Action, repository: str) -> bool:
        return (
            action in self.may
            and any(principal.matches(who) for who in self.who)
            and (not self.where or any(each.fullmatch(repository) for each in self.where))
            and (not self.sources or _within(principal.address, self.sources))
            and (not self.local or principal.local)
        )

    def starts(self, principal: Principal, action: Action) -> set[str]:
        """What each repository begins with, one or the other, on which it grants the action."""
        if not replace(self, where=()).grants(principal, action, ""):
            return set()
        return set(map(_literal_start, self.where)) or {""}


def default_rules(stores: Collection[str], trusts_this_machine: bool = False) -> list[Rule]:
    """The rules that hold if none are configured."""
    if not stores:
        return []
    where = tuple(re.compile(f"{re.escape(each)}/.*") for each in stores)
    return [
        Rule((ClientMatcher("anonymous"),), ("pull",), LOOPBACK, where),
        Rule((ClientMatcher("authenticated"),), ACTIONS, (), where),
        *(
            [Rule((ClientMatcher("anonymous"),), ACTIONS, LOOPBACK, where, True)]
            if trusts_this_machine
            else []
        ),
    ]


class AccessRules:
    """All rules of a server.

    `namespaces` are the names of all namespaces; `short` is the one that tokens may leave out, if any.
    """

    def __init__(self, rules: Sequence[Rule], namespaces: Collection[str], short: str | None = None) -> None:
        self._rules = list(rules)
        self._namespaces = frozenset(namespaces)
        self._short = short

    def allow(self, principal: Principal, action: Action, repository: str, scope: str = "") -> bool:
        """Whether the principal may perform the action on the repository of that full name.

        `scope` is the name that a token may use instead: see scope().
        """
        if principal.lock is not None and action != "pull":
            return False  # also not what everybody may
        if principal.within is None:
            return self._allow(principal, action, repository, scope)
        if self._allow(_everybody(principal), action, repository, scope):
            return True
        inside = any(each.allows(action) and each.covers(repository, repository) for each in principal.within)
        return inside and self._allow(principal, action, repository, scope)

    def _allow(self, principal: Principal, action: Action, repository: str, scope: str) -> bool:
        return any(rule.grants(principal, action, repository) for rule in self._rules) or any(
            grant.allows(action) and grant.covers(repository, scope or repository)
            for grant in principal.grants
        )

    def starts(self, principal: Principal, action: Action) -> set[str]:
        """What each repository begins with, one or the other, on which the principal may do that."""
        if principal.within is not None:
            inside = {each.start for each in principal.within if each.allows(action)}
            return inside | self.starts(_everybody(principal), action)
        found = {start for rule in self._rules for start in rule.starts(principal, action)}
        granted = {grant.start for grant in principal.grants if grant.allows(action)}
        left_out = {f"{self._short}/{name}" for name in granted if self._short}
        return found | granted | left_out

    def scope(self, repository: str, written: str, named: bool) -> str:
        """The name of a repository in the scope of a token, where the client has `written` its name.

        This is the full name.  If the request has not `named` the namespace, it is the name that the client
        wrote, because its requests for tokens contain that.  To be unambiguous, this holds for one namespace
        only, and a name that begins with the name of a namespace is a full name.
        """
        namespace, _, relative = repository.partition("/")
        left_out = relative in (written, f"library/{written}") and not named
        if not left_out or namespace != self._short or written.partition("/")[0] in self._namespaces:
            return repository
        return written


def _everybody(principal: Principal) -> Principal:
    """An anonymous client in its place."""
    return Principal(address=principal.address, local=principal.local)


def _literal_start(pattern: re.Pattern[str]) -> str:
    """Text that all matches of the pattern begin with; "" in doubt."""
    text = untranslated(pattern.pattern)
    translated = text != pattern.pattern
    if "|" in text or "(?#" in text or pattern.flags & (re.IGNORECASE | re.VERBOSE):
        return ""
    found = re.match(r"(?:[A-Za-z0-9_/:@-]|\\[^A-Za-z0-9])*", text)
    assert found is not None
    start, rest = found[0], text[found.end() :]
    if translated and rest.startswith(")"):
        return ""  # no glob, and what is in the brackets may be optional
    if rest.startswith(("*", "?", "{")):
        start = start[:-2] if start[-2:-1] == "\\" else start[:-1]  # it may be left out
    return re.sub(r"\\(.)", r"\1", start, flags=re.DOTALL)


def _within(address: IPAddress | None, networks: Sequence[Network]) -> bool:
    return address is not None and any(address in each for each in networks)

"""Who a client is, and what the rules let it do.  Pure: what was verified elsewhere is decided upon here.

Rules add up, and what none grants is refused.  Where none are given, stores have these: whoever is at this
machine may pull, and whoever has proved who it is may pull, push and delete.

A token is no user.  It may have been given away for one purpose, so it gets what its scope says, what rules
with `claim:` say, and what everybody gets; never what rules say of the user whom it was issued to.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from proxy.config.access import ACTIONS, Action
from proxy.config.hosts import Network
from proxy.config.values import Who

IPAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

LOOPBACK: tuple[Network, ...] = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1"))


@dataclass(frozen=True, slots=True)
class Grant:
    """Of a token: `actions` in the repository `name`.  Token specification, "access"."""

    name: str
    actions: frozenset[str]

    def allows(self, action: Action) -> bool:
        return action in self.actions or "*" in self.actions


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks.  `user` is empty for nobody in particular, `scheme` how it proved who it is.

    `address` is None where it cannot be told.
    """

    user: str = ""
    scheme: Literal["", "password", "certificate", "token"] = ""
    groups: frozenset[str] = frozenset()
    claims: Mapping[str, Any] = field(default_factory=dict)
    grants: tuple[Grant, ...] = ()
    address: IPAddress | None = None

    @property
    def anonymous(self) -> bool:
        return not self.scheme

    @property
    def known(self) -> bool:
        """Whether it is a user, by name."""
        return self.scheme in ("password", "certificate")

    def is_one(self, who: Who) -> bool:
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
                return any(who.glob.fullmatch(each) for each in _texts(self.claims.get(who.name)))


@dataclass(frozen=True, slots=True)
class Rule:
    """Empty `sources` and `where` mean every one."""

    who: tuple[Who, ...]
    may: tuple[Action, ...]
    sources: tuple[Network, ...] = ()
    where: tuple[re.Pattern[str], ...] = ()

    def grants(self, principal: Principal, action: Action, repository: str) -> bool:
        return (
            action in self.may
            and any(principal.is_one(who) for who in self.who)
            and (not self.where or any(each.fullmatch(repository) for each in self.where))
            and (not self.sources or _within(principal.address, self.sources))
        )


def of_stores(stores: Collection[str]) -> list[Rule]:
    """What holds where no rules are given."""
    if not stores:
        return []
    where = (re.compile("(?:" + "|".join(map(re.escape, stores)) + ")/.*"),)
    return [
        Rule((Who("anonymous"),), ("pull",), LOOPBACK, where),
        Rule((Who("authenticated"),), ACTIONS, (), where),
    ]


class AccessRules:
    """`namespaces` are all that there are; of them `short` is the one that tokens may leave out, if any."""

    def __init__(self, rules: Sequence[Rule], namespaces: Collection[str], short: str | None = None) -> None:
        self._rules = list(rules)
        self._namespaces = frozenset(namespaces)
        self._short = short

    def allow(self, principal: Principal, action: Action, repository: str, scope: str = "") -> bool:
        """Whether it may do that with the repository of that full name.

        `scope` is the name that a token may hold instead: see scope().
        """
        return any(rule.grants(principal, action, repository) for rule in self._rules) or any(
            grant.allows(action) and grant.name in (repository, scope or repository)
            for grant in principal.grants
        )

    def scope(self, repository: str, written: str, named: bool) -> str:
        """What a token's scope is to call the repository that a client has `written` so.

        The full name; but where the request has not `named` the namespace, what the client wrote, since its
        own requests for tokens say that.  It must be clear what is meant: so there is one namespace only of
        which this holds, and a name that begins with a namespace's is a full one.
        """
        namespace, _, relative = repository.partition("/")
        left_out = relative in (written, f"library/{written}") and not named
        if not left_out or namespace != self._short or written.partition("/")[0] in self._namespaces:
            return repository
        return written


def _within(address: IPAddress | None, networks: Sequence[Network]) -> bool:
    return address is not None and any(address in each for each in networks)


def _texts(claim: object) -> list[str]:
    """What a claim says; one that is a list says several things."""
    values = claim if isinstance(claim, list) else [claim]
    return [
        str(each).lower() if isinstance(each, bool) else str(each)
        for each in values
        if isinstance(each, str | int)
    ]

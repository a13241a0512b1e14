"""Authorization: decides who may pull, push and delete where, by the rules or by an upstream's answer.

- A public cache is open to everybody and never challenges; credentials that a client sends there are ignored.
- A client is challenged only if an anonymous client may not do what it wants: a challenge makes clients send
  credentials.
- Decisions depend on the request alone: a refusal does not show whether the requested content exists.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import Literal, Protocol

import structlog
from aiohttp import web

from proxy.access.authentication import Authenticator, authorization
from proxy.access.catalog import visible_repositories
from proxy.access.rules import AccessRules, Grant, Principal
from proxy.access.scopes import CATALOG, REPOSITORY, Scope
from proxy.access.visibility import Probe, Visibility
from proxy.config.access import Action
from proxy.config.registry_hosts import EVERY
from proxy.telemetry.exchange import Exchange
from storage.errors import Denied, OriginDenied, RegistryError, Unauthorized
from storage.registry import Registry

log = structlog.get_logger()

TOKEN = "token"  # the action of a client that asks for a token


class ChooseNamespace(Protocol):
    """The namespace that a request without a repository means: see Namespaces.chosen()."""

    def __call__(self, *, ns: str | None, host: str | None, prefix: str) -> str | None: ...


class Guard(Enum):
    """What decides on access to a namespace; for a cache, the value of `visibility` in its configuration."""

    PUBLIC = "public"  # a cache that everybody may pull from
    RULES = "rules"  # a cache: the rules decide
    CALLER = "caller"  # a cache: its upstream decides, by the caller's credentials
    STORE = "store"  # a store: the rules decide


@dataclass(frozen=True)
class GuardedNamespaces:
    """How each namespace is guarded.

    guards: by the key of a namespace
    visibility: finds what callers may see of a namespace whose guard is CALLER
    chosen: finds the namespace of a request without a repository; `default` is used if it finds none
    alone: the only namespace that the listener serves, whose name clients leave out; "" if it serves all
    key_of: finds the key of a namespace: its name, or another one that stands for several
    """

    guards: Mapping[str, Guard]
    visibility: Callable[[str], Awaitable[Visibility]]
    chosen: ChooseNamespace
    default: str | None
    alone: str = ""
    key_of: Callable[[str], str] = str

    def of(self, repository: str) -> Guard | None:
        """The guard of the namespace of a repository; None if the namespace is no longer configured."""
        return self.guards.get(self.key_of(repository.partition("/")[0]))

    def starts(self, *guards: Guard) -> set[str]:
        """What each repository begins with, one or the other, that one of these guards has; "" for any."""
        return {"" if key == EVERY else f"{key}/" for key, guard in self.guards.items() if guard in guards}

    @property
    def of_none(self) -> Guard:
        """The guard of a request that means no namespace.

        It is public on a server that has a public cache: a mirror that asks for a login is sent the passwords
        that clients have for the registry that it mirrors.
        """
        return Guard.PUBLIC if Guard.PUBLIC in self.guards.values() else Guard.STORE


@dataclass(frozen=True, slots=True)
class AccessRequest:
    """An action on a repository that a request wants to perform.

    name: the full name of the repository
    written: the name as the client wrote it
    named: whether the client also named the registry
    content: names the requested content, without the namespace
    probe: asks an upstream for that content
    """

    action: Action
    name: str
    written: str
    named: bool
    content: str
    probe: Probe


class Authorizer:
    """Decides whether requests are permitted.  Every method may raise Unauthorized, Denied and Throttled.

    `ping` says how pings are answered: with 200, with a challenge, or as fits the namespace that is meant.
    """

    def __init__(
        self,
        guarded: GuardedNamespaces,
        rules: AccessRules,
        authenticator: Authenticator,
        ping: Literal["auto", "challenge", "open"] = "auto",
    ) -> None:
        self._guarded = guarded
        self._rules = rules
        self._authenticator = authenticator
        self._ping = ping

    def alone(self, namespace: str) -> Authorizer:
        """The Authorizer of a listener that serves this namespace alone."""
        guarded = replace(self._guarded, alone=namespace)
        return Authorizer(guarded, self._rules, self._authenticator, self._ping)

    def is_public(self, name: str) -> bool:
        """Whether the repository of that full name belongs to a public cache."""
        return self._guarded.of(name) is Guard.PUBLIC

    async def permit(self, request: web.BaseRequest, access: AccessRequest, exchange: Exchange) -> None:
        """Return if the request is permitted; records in `exchange` who the client is and what it may see."""
        guard = self._guarded.of(access.name)
        if guard in (Guard.PUBLIC, Guard.CALLER):
            exchange.lock = await self._authenticator.lock(request)
        if guard is Guard.PUBLIC:
            return
        exchange.shared = False
        if guard is not Guard.STORE and access.action != "pull":
            return  # a cache refuses it to everybody
        try:
            if guard is Guard.CALLER:
                await self._permit_caller(request, access, exchange)
            else:
                await self._permit_by_rules(request, access, exchange)
        except RegistryError as error:
            self.refused(request, exchange, access.action, error)
            raise

    async def renewal(self, request: web.BaseRequest, name: str) -> Callable[[], bool]:
        """Whether a request that permit() has just permitted still is, if its client sends it again.

        The same bytes from the same address, without a client certificate.  What this returns neither waits
        nor has effects, and false means that permit() has to be asked.
        """
        guard = self._guarded.of(name)
        if guard is Guard.PUBLIC:
            return always
        if guard is not Guard.CALLER:
            return self._authenticator.renewal(request)
        namespace, _, repository = name.partition("/")
        visibility = await self._guarded.visibility(namespace)
        return partial(visibility.remembers, repository, self._authenticator.foreign(request))

    async def _permit_by_rules(
        self, request: web.BaseRequest, access: AccessRequest, exchange: Exchange
    ) -> None:
        action, name = access.action, access.name
        repository = self._rules.scope(name, access.written, access.named)
        scope = f"repository:{repository}:{'pull,push' if action == 'push' else action}"
        principal = await self._authenticator.identify(request, scope)
        exchange.user = principal.user
        exchange.visible = partial(self._may_see, principal, access.named)
        if not self._rules.allow(principal, action, name, repository):
            full = replace(principal, within=None)
            lacking = principal.within is not None and self._rules.allow(full, action, name, repository)
            raise self._refusal(request, principal, f"{action} {name}", scope, lacking)
        exchange.lock = principal.lock

    def _refusal(
        self, request: web.BaseRequest, principal: Principal, what: str, scope: str, lacking: bool = False
    ) -> RegistryError:
        """Why the client may not do that; `lacking` if its token alone is too narrow."""
        authenticator = self._authenticator
        if principal.scheme not in ("", "token") and not lacking:
            return Denied(f"{principal.user} is not allowed to {what}")
        if not authenticator.accepts_credentials:
            return Denied(
                f"anonymous clients are not allowed to {what}, and no login is configured (access.htpasswd)"
            )
        if principal.anonymous and not lacking:
            error = "" if principal.within is None else "insufficient_scope"
            return authenticator.unauthorized(request, f"log in to {what}", scope, error)
        # Not 403: this error makes a client ask for another token.  RFC 6750, section 3.1.
        message = f"the token does not allow to {what}"
        return authenticator.unauthorized(request, message, scope, "insufficient_scope")

    def grants(
        self, principal: Principal, scopes: Iterable[Scope], full_name: Callable[[str], str]
    ) -> list[Grant]:
        """What of the scopes that a client asks for it may do: with the full names of repositories.

        `full_name` finds that of what a client calls a repository, and raises RegistryError.
        """
        found = []
        for each in scopes:
            if each.is_catalog:  # which shows a client what it may see
                found.append(Grant(CATALOG, frozenset("*")))
            elif each.type == REPOSITORY:
                try:
                    name = full_name(each.name)
                except RegistryError:
                    continue
                may = frozenset(action for action in each.wanted if self._may(principal, action, name))
                if may:
                    found.append(Grant(name, may))
        return found

    def _may(self, principal: Principal, action: Action, name: str) -> bool:
        guard = self._guarded.of(name)
        if guard is Guard.PUBLIC:
            return action == "pull"
        return guard in (Guard.STORE, Guard.RULES) and self._rules.allow(principal, action, name)

    def _may_see(self, principal: Principal, named: bool, repository: str) -> bool:
        guard = self._guarded.of(repository)
        if guard not in (Guard.STORE, Guard.RULES):
            return guard is Guard.PUBLIC
        scope = self._rules.scope(repository, repository.partition("/")[2], named)
        return self._rules.allow(principal, "pull", repository, scope)

    async def _permit_caller(
        self, request: web.BaseRequest, access: AccessRequest, exchange: Exchange
    ) -> None:
        namespace, _, repository = access.name.partition("/")
        visibility = await self._guarded.visibility(namespace)
        shown = self._authenticator.foreign(request)
        exchange.visible = nothing

        visible = True

        async def right() -> bool:
            """Whether the credentials are right: they can be, and the repository be hidden all the same."""
            nonlocal visible
            try:
                await visibility.check(repository, shown, access.content, access.probe)
            except OriginDenied:
                visible = False
                return shown is not None and visibility.knows(shown)
            return True

        if shown is None:
            await right()
        elif not visibility.remembers(repository, shown):
            await self._authenticator.throttle.attempt(
                self._authenticator.source_address(request),
                f"{namespace}/{shown.username}",
                right,
                visibility.identify(shown),
            )
        if not visible:
            whom = "anonymous clients" if shown is None else "you"
            raise Unauthorized(
                f"{namespace} does not show {repository} to {whom}: log in with an account of {namespace}",
                challenges=[self._authenticator.basic],
            )
        exchange.user = shown.username if shown else ""

    # Requests without a repository

    async def ping(self, request: web.BaseRequest, prefix: str, exchange: Exchange) -> tuple[str, ...]:
        """Return challenges to be sent with a response of 200."""
        chosen, namespace, guard = self._meant(request, prefix)
        if chosen and guard is Guard.PUBLIC:
            return ()
        if guard is Guard.CALLER:
            if not authorization(request) and self._ping != "open":
                raise Unauthorized(f"{namespace} requires a login", challenges=[self._authenticator.basic])
            return ()  # the credentials are verified with the first repository
        if not self._authenticator.accepts_credentials:
            return ()
        try:
            principal = await self._authenticator.identify(request)
        except RegistryError as error:
            self.refused(request, exchange, "ping", error)
            raise
        exchange.user = principal.user
        if not principal.anonymous or self._ping == "open":
            return ()
        if self.asks(request, prefix):
            raise self._authenticator.unauthorized(request, "authentication is required", "")
        # podman and its relatives also take a challenge from a response of 200, and log in by it.  Not for
        # tokens of a token server: they would fetch one for every pull, and would not pull without one.
        return (self._authenticator.basic,) if self._authenticator.tokens is None else ()

    def asks(self, request: web.BaseRequest, prefix: str = "") -> bool:
        """Whether a ping without credentials is challenged at this address, so that docker can log in."""
        chosen, namespace, guard = self._meant(request, prefix)
        if self._ping == "open" or (chosen and guard is Guard.PUBLIC):
            return False
        if guard is Guard.CALLER:
            return True
        open_to_all = guard is Guard.PUBLIC or self._is_open(namespace)
        return self._authenticator.accepts_credentials and (self._ping == "challenge" or not open_to_all)

    def _meant(self, request: web.BaseRequest, prefix: str) -> tuple[bool, str | None, Guard]:
        """Whether a request without a repository names a namespace, which one it means, and its guard."""
        chosen = self._guarded.alone or self._guarded.chosen(
            ns=request.query.get("ns"), host=request.headers.get("Host"), prefix=prefix
        )
        namespace = chosen or self._guarded.default
        guard = self._guarded.of(namespace) if namespace else None
        return bool(chosen), namespace, guard or self._guarded.of_none

    def _is_open(self, namespace: str | None) -> bool:
        """Whether pings of a guarded namespace, or of all, go well: if everybody may pull all of it.

        docker sends credentials only if the ping was challenged, and pulls nothing after a Basic challenge
        that it cannot meet.  With a token server the challenge is harmless: every client can get a token.
        """
        if self._authenticator.sends_for_tokens:
            return False
        # No repository has this name: only a rule for all of them matches it.
        return (
            self._sees_everything(Principal())
            if namespace is None
            else self._rules.allow(Principal(), "pull", f"{namespace}/*")
        )

    async def repositories(
        self, request: web.BaseRequest, registry: Registry, last: str, limit: int | None, exchange: Exchange
    ) -> list[str]:
        """List the repositories that the client may pull from, without those whose upstream decides.

        An anonymous client that sees nothing is challenged if it could see more by logging in.  The rules
        decide that, not what is stored: otherwise pages would reveal the names of hidden repositories.
        """
        exchange.shared = False
        scope = f"{CATALOG}:*"
        principal = await self._authenticator.identify(request, scope)
        exchange.user = principal.user
        if principal.within is not None:
            if not any(each.name == CATALOG for each in principal.within):
                raise self._refusal(request, principal, "list repositories", scope, lacking=True)
            principal = replace(principal, within=None)
        visible: Callable[[str], bool] = partial(self._may_see, principal, False)
        starts = self._rules.starts(principal, "pull") | self._guarded.starts(Guard.PUBLIC)
        if self._rules.allow(principal, "pull", CATALOG):
            visible, starts = self._listed, self._guarded.starts(Guard.PUBLIC, Guard.RULES, Guard.STORE)
        prefix = f"{self._guarded.alone}/" if self._guarded.alone else ""
        found = await visible_repositories(registry, starts, visible, prefix + last, limit)
        may_log_in = principal.anonymous and self._authenticator.accepts_credentials
        if may_log_in and not found and not last and not self._sees_everything(principal):
            raise self._refusal(request, principal, "list repositories", scope)
        return [each.removeprefix(prefix) for each in found]

    def _sees_everything(self, principal: Principal) -> bool:
        """Whether the rules let the client pull from every repository that is listed to anybody."""
        guarded = (
            name for name, guard in self._guarded.guards.items() if guard in (Guard.STORE, Guard.RULES)
        )
        # No repository has this name: only a rule for all of them matches it.
        return all(self._rules.allow(principal, "pull", f"{name}/*") for name in guarded)

    def _listed(self, repository: str) -> bool:
        return self._guarded.of(repository) not in (Guard.CALLER, None)

    def refused(
        self, request: web.BaseRequest, exchange: Exchange, action: str, error: RegistryError
    ) -> None:
        """Log a refusal, without an unverified user name: it may be a password in the wrong field."""
        if not isinstance(error, Unauthorized | Denied) and error.status != 429:
            return
        shown = authorization(request) or action == TOKEN
        write = log.info if shown else log.debug  # a first request without credentials
        write(
            "access.refused",
            id=exchange.id,
            client=str(self._authenticator.source_address(request)),
            user=exchange.user,
            action=action,
            namespace=exchange.namespace,
            repository=exchange.repository,
            reason=str(error),
        )


def nothing(repository: str) -> bool:
    return False


def always() -> bool:
    return True

"""Who may pull, push and delete where: what a request shows is verified, and the rules decide.

- A public cache is open to everybody and asks nobody who it is; what a client shows of itself there is not
  even looked at.
- A client is challenged only where nobody in particular may not do what it wants: a challenge draws
  credentials.
- All that is decided on is the request: a refusal does not tell whether there is what it asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Literal, Protocol

import structlog
from aiohttp import web

from proxy.access.authentication import Authenticator, authorization, credential
from proxy.access.rules import AccessRules, Principal
from proxy.access.visibility import Probe, Visibility
from proxy.config.access import Action
from proxy.telemetry.exchange import Exchange
from storage.errors import Denied, OriginDenied, RegistryError, Unauthorized
from storage.registry import Registry

log = structlog.get_logger()

CATALOG = "registry:catalog"
PAGE = 1000  # names that are looked through at once


class ChooseNamespace(Protocol):
    """See Namespaces.chosen()."""

    def __call__(self, *, ns: str | None, host: str | None, prefix: str) -> str | None: ...


class Guard(Enum):
    """How a namespace is guarded."""

    PUBLIC = "public"  # a cache for everybody
    RULES = "rules"  # a cache, by the rules
    CALLER = "caller"  # a cache, by what its upstream says
    STORE = "store"  # by the rules


@dataclass(frozen=True)
class GuardedNamespaces:
    """The namespaces by name, and who tells what callers may see of those that are guarded by that.

    `chosen` tells which one a request about no repository is about, `default` is meant where that is none.
    """

    guards: Mapping[str, Guard]
    visibilities: Mapping[str, Visibility]
    chosen: ChooseNamespace
    default: str | None

    def of(self, repository: str) -> Guard | None:
        """None where the namespace is none any more."""
        return self.guards.get(repository.partition("/")[0])


@dataclass(frozen=True, slots=True)
class AccessRequest:
    """What a request wants to do with a repository.

    `name` is the repository's full name, `written` the name as the client wrote it, `named` whether the
    client also named its registry.  `probe` asks an upstream for `content`, without the namespace.
    """

    action: Action
    name: str
    written: str
    named: bool
    content: str
    probe: Probe


class Authorizer:
    """Every method may raise Unauthorized, Denied and Throttled.

    `ping` is how a ping is answered: open, by a challenge, or as it suits the namespace that it is about.
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

    def is_public(self, name: str) -> bool:
        """Whether everybody may pull from the repository of that full name, and nobody push to it."""
        return self._guarded.of(name) is Guard.PUBLIC

    async def permit(self, request: web.BaseRequest, wanted: AccessRequest, now: Exchange) -> None:
        """Return if the request may go on.

        Tells `now` who the client is and what it may see.
        """
        guard = self._guarded.of(wanted.name)
        if guard is Guard.PUBLIC:
            return
        now.shared = False
        if guard is not Guard.STORE and wanted.action != "pull":
            return  # which a cache refuses to everybody
        try:
            if guard is Guard.CALLER:
                await self._permit_caller(request, wanted, now)
            else:
                await self._permit_by_rules(request, wanted, now)
        except RegistryError as error:
            self._refused(request, now, wanted.action, error)
            raise

    async def _permit_by_rules(self, request: web.BaseRequest, wanted: AccessRequest, now: Exchange) -> None:
        action, name = wanted.action, wanted.name
        repository = self._rules.scope(name, wanted.written, wanted.named)
        scope = f"repository:{repository}:{'pull,push' if action == 'push' else action}"
        principal = await self._authenticator.identify(request, scope)
        now.user = principal.user
        now.visible = partial(self._may_see, principal, wanted.named)
        if not self._rules.allow(principal, action, name, repository):
            raise self._refusal(principal, f"{action} {name}", scope)

    def _refusal(self, principal: Principal, what: str, scope: str) -> RegistryError:
        authenticator = self._authenticator
        if principal.known:
            return Denied(f"{principal.user} may not {what}")
        if not authenticator.taken:
            return Denied(f"not everybody may {what}, and no way to log in is configured (access.htpasswd)")
        if principal.anonymous:
            return Unauthorized(
                f"you may not {what} without logging in", challenges=authenticator.challenges(scope)
            )
        # Not 403: by this a client knows that it has to ask for another token.  RFC 6750, section 3.1.
        return authenticator.wrong(f"the token does not allow to {what}", scope, "insufficient_scope")

    def _may_see(self, principal: Principal, named: bool, repository: str) -> bool:
        guard = self._guarded.of(repository)
        if guard not in (Guard.STORE, Guard.RULES):
            return guard is Guard.PUBLIC
        scope = self._rules.scope(repository, repository.partition("/")[2], named)
        return self._rules.allow(principal, "pull", repository, scope)

    async def _permit_caller(self, request: web.BaseRequest, wanted: AccessRequest, now: Exchange) -> None:
        namespace, _, repository = wanted.name.partition("/")
        visibility = self._guarded.visibilities[namespace]
        shown = credential(request)
        now.visible = nothing

        async def visible() -> bool:
            try:
                await visibility.check(repository, shown, wanted.content, wanted.probe)
            except OriginDenied:
                return False
            return True

        if visibility.remembers(repository, shown):
            right = True
        elif shown is None:
            right = await visible()
        else:
            user = f"{namespace}/{shown.username}"
            right = await self._authenticator.attempts.make(self._authenticator.place(request), user, visible)
        if not right:
            whom = "everybody" if shown is None else "you"
            raise Unauthorized(
                f"{namespace} does not show {repository} to {whom}", challenges=[self._authenticator.basic]
            )
        now.user = shown.username if shown else ""

    # What is about no repository

    async def ping(self, request: web.BaseRequest, prefix: str, now: Exchange) -> tuple[str, ...]:
        """Challenges for an answer that goes well all the same."""
        chosen = self._guarded.chosen(
            ns=request.query.get("ns"), host=request.headers.get("Host"), prefix=prefix
        )
        namespace = chosen or self._guarded.default
        guard = self._guarded.guards.get(namespace or "", Guard.PUBLIC)
        if chosen and guard is Guard.PUBLIC:
            return ()
        if guard is Guard.CALLER:
            if not authorization(request) and self._ping != "open":
                raise Unauthorized(f"{namespace} asks who you are", challenges=[self._authenticator.basic])
            return ()  # whether it is right shows with the first repository
        if not self._authenticator.taken:
            return ()
        try:
            principal = await self._authenticator.identify(request)
        except RegistryError as error:
            self._refused(request, now, "ping", error)
            raise
        now.user = principal.user
        if not principal.anonymous or self._ping == "open":
            return ()
        if self._ping == "challenge" or (guard is not Guard.PUBLIC and not self._is_open(namespace)):
            raise Unauthorized("who are you?", challenges=self._authenticator.challenges())
        # podman and its like take a challenge from a good answer too, and log in by it.  Not for tokens: they
        # would fetch one for every pull, and not pull if they got none.
        return (self._authenticator.basic,) if self._authenticator.tokens is None else ()

    def _is_open(self, namespace: str | None) -> bool:
        """Whether its pings are best left unchallenged, though it is guarded.

        docker shows who it is only if the ping has asked, and pulls nothing after a Basic challenge that it
        cannot meet.  So it is open if everybody may pull all of it; a token everybody can get.
        """
        # No repository is called so: what covers all of them covers it.
        return self._authenticator.tokens is None and self._rules.allow(Principal(), "pull", f"{namespace}/*")

    async def repositories(
        self, request: web.BaseRequest, registry: Registry, last: str, limit: int | None, now: Exchange
    ) -> list[str]:
        """Those that the client may pull from; of caches that ask their upstream, none."""
        now.shared = False
        scope = f"{CATALOG}:*"
        principal = await self._authenticator.identify(request, scope)
        now.user = principal.user
        visible: Callable[[str], bool] = partial(self._may_see, principal, False)
        if self._rules.allow(principal, "pull", CATALOG):
            visible = self._listed
        found: list[str] = []
        hidden = False
        while limit is None or len(found) < limit:
            names = await registry.repositories(last, None if limit is None else max(limit, PAGE))
            seen = [name for name in names if visible(name)]
            hidden = hidden or len(seen) < len(names)
            found += seen
            if limit is None or len(names) < max(limit, PAGE):
                break
            last = names[-1]
        if hidden and not found and principal.anonymous and self._authenticator.taken:
            raise self._refusal(principal, "list repositories", scope)
        return found if limit is None else found[:limit]

    def _listed(self, repository: str) -> bool:
        return self._guarded.of(repository) not in (Guard.CALLER, None)

    def _refused(self, request: web.BaseRequest, now: Exchange, action: str, error: RegistryError) -> None:
        """Without the user name of somebody unknown: it may be a password, put into the wrong field."""
        if not isinstance(error, Unauthorized | Denied) and error.status != 429:
            return
        told = log.info if authorization(request) else log.debug  # else it is but asked who it is
        told(
            "access.refused",
            id=now.id,
            client=str(self._authenticator.place(request)),
            user=now.user,
            action=action,
            namespace=now.namespace,
            repository=now.repository,
            reason=str(error),
        )


def nothing(repository: str) -> bool:
    return False

"""The Authorizer of a configuration: made of `access:` and of each namespace's `visibility:` or `store:`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from proxy.access.authentication import Authenticator
from proxy.access.authorization import Authorizer, Guard, GuardedNamespaces
from proxy.access.client_address import ClientAddresses
from proxy.access.rules import AccessRules, Rule, default_rules
from proxy.access.throttle import LoginThrottle
from proxy.access.visibility import Visibility
from proxy.config.access import AccessConfig, TokenService
from proxy.config.errors import StartError
from proxy.config.schema import Config
from proxy.namespaces.composition import Composition
from storage.errors import StorageFailed

if TYPE_CHECKING:  # each is imported where it is needed: most configurations need none of them
    from proxy.access.bearer import TokenVerifier
    from proxy.access.htpasswd import Htpasswd
    from proxy.access.oidc import OIDCTokens
    from proxy.access.records import AccessRecords
    from proxy.access.token_exchange import TokenExchange


def needed(config: Config) -> bool:
    """Whether any request needs a decision.  Public caches without `access:` are open to everybody."""
    guards = _guards(config).values()
    return config.access != AccessConfig() or any(each is not Guard.PUBLIC for each in guards)


def access_control(
    composition: Composition, closing: AsyncExitStack
) -> tuple[Authorizer, TokenExchange | None]:
    """Make the Authorizer, and what the token endpoint needs if there is one; `closing` closes their parts.

    Raises StartError for a file that cannot be used.
    """
    config = composition.config
    keys = config.access
    visibilities = _Visibilities(composition)
    closing.push_async_callback(visibilities.close)
    guarded = GuardedNamespaces(
        _guards(config),
        visibilities.of,
        composition.namespaces.chosen,
        config.default_namespace,
        key_of=lru_cache(maxsize=4096)(config.key_of),
    )
    throttle = LoginThrottle(table=composition.shared.logins)
    authenticator, tokens = _authenticator(composition, throttle, closing)
    return Authorizer(guarded, _rules(config), authenticator, keys.ping), tokens


class _Visibilities:
    """What callers may see of each namespace, made when the first one asks."""

    def __init__(self, composition: Composition) -> None:
        self._composition = composition
        self._made: dict[str, tuple[object, Visibility]] = {}  # with the upstream that is asked

    async def of(self, namespace: str) -> Visibility:
        parts = self._composition
        if namespace not in parts.upstreams:  # a host of the namespace `*`
            parts.namespaces.prepare(namespace)
        upstream = parts.upstreams[namespace]
        former, found = self._made.get(namespace, (None, None))
        if found is not None and former is upstream:
            return found
        made = Visibility(
            namespace,
            upstream,
            parts.config.access.remember,
            parts.clock,
            cut=partial(_is_cut_off, parts, namespace),
            secret=parts.shared.secret,
        )
        self._made[namespace] = upstream, made
        # All are out of the table before the first is closed: others may come meanwhile.
        gone = [self._made.pop(name)[1] for name in self._made.keys() - parts.upstreams.keys()]
        for each in [*gone, *([] if found is None else [found])]:
            await each.close()
        return made

    async def close(self) -> None:
        for _, each in self._made.values():
            await each.close()


def _is_cut_off(composition: Composition, name: str) -> bool:
    config = composition.config
    namespace = config.namespaces[config.key_of(name)]
    return config.offline or namespace.offline or composition.drill.cuts(name)


def _guards(config: Config) -> dict[str, Guard]:
    return {
        name: Guard.STORE if each.store is not None else Guard(each.visibility)
        for name, each in config.namespaces.items()
    }


def _rules(config: Config) -> AccessRules:
    configured = config.access.rules
    rules = (
        default_rules(list(config.hosted()), config.trusts_this_machine())
        if configured is None
        else [Rule(each.who, each.may, each.sources, each.where) for each in configured]
    )
    named = [name for key, each in config.namespaces.items() for name in (key, *each.aliases)]
    unnamed = config.unnamed()
    return AccessRules(rules, named, unnamed[0] if len(unnamed) == 1 else None)


def _authenticator(
    composition: Composition, throttle: LoginThrottle, closing: AsyncExitStack
) -> tuple[Authenticator, TokenExchange | None]:
    keys, clock = composition.config.access, composition.clock
    groups = _groups(keys)
    passwords = password_file(keys.htpasswd, closing) if keys.htpasswd else None
    endpoint = keys.token_endpoint
    made = Authenticator(
        passwords=passwords,
        tokens=token_verifier(keys.token, clock) if keys.token else None,
        verifiers=[_identity_tokens(composition, groups, closing)] if keys.oidc else [],
        service=(keys.token.realm, keys.token.service) if keys.token else ("", ""),
        endpoint=None if endpoint is None else (endpoint.service, endpoint.realm),
        realm=keys.realm,
        groups=groups,
        addresses=ClientAddresses(keys.trusted_proxies),
        throttle=throttle,
    )
    if endpoint is None and not keys.api_keys:
        return made, None
    records = _records(composition, closing)
    if keys.api_keys:  # first: an issuer's verifier takes every token for one of its own
        from proxy.access.api_keys import ApiKeys

        api_keys = ApiKeys(records, clock)
        closing.push_async_callback(api_keys.close)
        made = replace(made, verifiers=[api_keys, *made.verifiers])
    if endpoint is None:
        return made, None
    from proxy.access.issuing import TokenIssuer  # here: its library is needed for tokens alone
    from proxy.access.token_exchange import TokenExchange

    renewals = {"password": made.renewed_user} | {each.scheme: each.renew for each in made.verifiers}
    issuer = TokenIssuer(records, endpoint.service, endpoint.lifetime, endpoint.refresh, renewals, clock)
    made = replace(made, verifiers=[issuer, *made.verifiers])
    return made, TokenExchange(made, issuer)


def _records(composition: Composition, closing: AsyncExitStack) -> AccessRecords:
    """Raises StartError."""
    from proxy.access.records import AccessRecords
    from proxy.namespaces.access_records import access_records

    try:
        keep = composition.config.shared.remember_for
        records = AccessRecords(access_records(composition, closing), keep=keep)
    except StorageFailed as error:
        raise StartError(f"cannot store in {composition.config.disk.path} (disk.path): {error}") from error
    closing.push_async_callback(records.close)
    return records


def _groups(keys: AccessConfig) -> Mapping[str, frozenset[str]]:
    """The groups of each user."""
    groups: defaultdict[str, set[str]] = defaultdict(set)
    for group, users in keys.groups.items():
        for user in users:
            groups[user].add(group)
    return {user: frozenset(each) for user, each in groups.items()}


def _identity_tokens(
    composition: Composition, groups: Mapping[str, frozenset[str]], closing: AsyncExitStack
) -> OIDCTokens:
    from proxy.access.key_sources import key_sources  # here: what it needs is needed for nothing else
    from proxy.access.oidc import OIDCTokens

    issuers = composition.config.access.oidc
    sources = key_sources(issuers, composition.clock, composition.shared)
    for each in sources.values():
        closing.push_async_callback(each.close)
    # A token of another issuer may be for the token server, or a password of an upstream.
    guards = _guards(composition.config).values()
    alone = composition.config.access.token is None and Guard.CALLER not in guards
    return OIDCTokens(issuers, sources, composition.clock, groups, alone=alone)


def password_file(path: Path, closing: AsyncExitStack) -> Htpasswd:
    """The users of a file, closed by `closing`.  Raises StartError."""
    from proxy.access.htpasswd import Htpasswd  # here: its library is needed for nothing else

    try:
        passwords = Htpasswd(path)
    except FileNotFoundError:
        raise StartError(f"{path} (access.htpasswd) does not exist: entrepot user add NAME") from None
    except (OSError, ValueError) as error:
        raise StartError(f"{path} (access.htpasswd): {_cause(error)}") from None
    closing.push_async_callback(passwords.close)
    return passwords


def token_verifier(service: TokenService, clock: Callable[[], float]) -> TokenVerifier:
    """The verifier of a token server's tokens.  Raises StartError."""
    from proxy.access.bearer import TokenVerifier

    try:
        return TokenVerifier(service.service, service.issuer, service.keys, clock)
    except OSError as error:
        raise StartError(f"{error.filename} (access.token.keys): {_cause(error)}") from None
    except ValueError as error:
        raise StartError(f"{error} (access.token.keys)") from None


def _cause(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)

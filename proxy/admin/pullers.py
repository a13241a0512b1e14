"""Who may pull from a repository that is not open to everybody, in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from proxy.config.access import AccessRule
from proxy.config.schema import Config
from proxy.config.values import ClientMatcher


def pullers(config: Config, repository: str, keys: Sequence[str]) -> str | None:
    """Who may pull from the repository of that full name; None if everybody may, as from a public cache.

    `keys` are the names of the API keys that may.
    """
    namespace = config.namespace(repository.partition("/")[0])
    if namespace is None or (namespace.store is None and namespace.visibility == "public"):
        return None
    if namespace.visibility == "caller":
        return "whom the upstream lets, by the credentials that the client has there"
    found = [*_by_rules(config, repository, namespace.store is not None)]
    if config.access.token is not None:
        found.append("tokens of the token server with this scope")
    if keys:
        found.append(f"API key{'s' if len(keys) > 1 else ''} {', '.join(keys)}")
    return "; ".join(found) or "nobody"


def _by_rules(config: Config, repository: str, store: bool) -> Iterable[str]:
    if config.access.rules is None:
        if store:
            yield "clients on this machine"
            yield "users"
        return
    for each in config.access.rules:
        if "pull" in each.may and _matches(each, repository):
            sources = f" from {', '.join(map(str, each.sources))}" if each.sources else ""
            yield f"{', '.join(map(_written, each.who))}{sources}"


def _matches(rule: AccessRule, repository: str) -> bool:
    return not rule.where or any(each.fullmatch(repository) for each in rule.where)


def _written(who: ClientMatcher) -> str:
    if who.kind == "anonymous":
        return "everybody"
    return f"{who.kind}:{who.name}" if who.name else who.kind

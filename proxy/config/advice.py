"""What a valid configuration does that its operator may not expect."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from proxy.config.hosts import Address
from proxy.config.schema import Config


@dataclass(frozen=True, slots=True)
class Advice:
    """A surprise, and the remedy for it.  `path` is that of the key that it concerns."""

    path: str
    surprise: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.path}: {self.surprise}: {self.remedy}"


def advise(config: Config) -> list[Advice]:
    """All that is worth saying about a configuration."""
    return [*_pushes(config), *_logins(config)]


def _pushes(config: Config) -> Iterator[Advice]:
    """The stores that nobody may push to."""
    certified = config.tls is not None and config.tls.client_ca is not None
    if config.trusts_this_machine() or config.access.has_users or certified:
        return
    for name in config.hosted():
        if not any("push" in rule.may for rule in config.access.rules or ()):
            remedy = "add users (access.htpasswd) or a rule (access.rules)"
            yield Advice(f"namespaces.{name}", "nobody may push", remedy)


def _logins(config: Config) -> Iterator[Advice]:
    """The stores that docker cannot push to, since it sends credentials only if its ping was challenged."""
    access = config.access
    if not access.has_users or access.ping == "challenge":
        return
    public = any(each.visibility == "public" for each, _ in config.cached().values())
    for name in config.hosted():
        namespace = config.namespaces[name]
        path = f"namespaces.{name}"
        if access.ping == "open":
            yield Advice(path, "docker cannot log in to push", "set access.ping: auto")
        elif access.token is None and access.opens(name):
            remedy = "set access.ping: challenge; then docker cannot pull without a login either"
            yield Advice(path, "docker cannot log in to push, since everybody may pull", remedy)
        elif public and not (namespace.listen or namespace.hosts or config.default_namespace == name):
            remedy = f"give it a listener of its own, such as listen: {_free(config)}"
            yield Advice(path, f"docker cannot log in at {config.listen} to push", remedy)


def _free(config: Config) -> Address:
    """The first address beside `listen` that no listener has."""
    used = config.listeners().values()
    found = config.listen
    while not found.port or any(found.overlaps(each) for each in used):
        found = Address(found.host, found.port + 1 if found.port else 5001)
    return found

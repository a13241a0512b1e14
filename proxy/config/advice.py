"""What a valid configuration does that its operator may not expect."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass

from proxy.config.hosts import Address
from proxy.config.schema import Config

# The patterns that match everything, as a glob and as regular expressions.
_EVERYTHING = (fnmatch.translate("*"), ".*", ".+")


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
    return [*_pushes(config), *_logins(config), *_plain(config), *_admin(config), *_rules(config)]


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


def _plain(config: Config) -> Iterator[Advice]:
    """The listeners where others can read what clients send and receive."""
    access = config.access
    if config.tls is not None or access.trusted_proxies:
        return
    for key, address in config.listeners().items():
        # Every address of a machine may be a public one or not; passwords are safe on neither.
        if key != "admin" and (address.public or (address.everywhere and access.has_users)):
            what = "passwords cross the network in plain text" if access.has_users else "speaks plain HTTP"
            yield Advice(key, f"{what} at {address}", "set tls, or listen on an address of a private network")


def _admin(config: Config) -> Iterator[Advice]:
    if config.admin is not None and not config.admin.loopback and config.admin_token is None:
        remedy = "set admin_token, or listen on 127.0.0.1"
        yield Advice("admin", f"without a token {config.admin} refuses all other machines", remedy)


def _rules(config: Config) -> Iterator[Advice]:
    """The rules that never apply: no tag can match them, or an earlier one matches all that they do."""
    for name, namespace in config.namespaces.items():
        lists = {
            "tags": [rule.match for rule in namespace.tags],
            "repositories": [rule.match for rule in namespace.repositories],
            "store.keep_tags": [rule.match for rule in namespace.store.keep_tags] if namespace.store else [],
        }
        for key, patterns in lists.items():
            for number, pattern in enumerate(patterns):
                place = f"namespaces.{name}.{key}[{number}].match"
                sign = "" if key == "repositories" else _impossible(pattern.pattern)
                if sign:
                    surprise = f"never matches, since no tag has a {sign} in it"
                    yield Advice(place, surprise, "give a pattern of the tag alone, without its repository")
                earlier = [each.pattern for each in patterns[:number]]
                first = next((each for each in earlier if each in (pattern.pattern, *_EVERYTHING)), None)
                if first is not None:
                    surprise = f"never applies, since {key}[{earlier.index(first)}] comes first"
                    yield Advice(place, surprise, "move it up, or remove it")


def _impossible(pattern: str) -> str:
    """A sign that a match of the pattern has and no tag does; empty if there is none, or in doubt."""
    text = re.sub(r"\[[^]]*\]|\\.", "", pattern.removeprefix("(?s:").removesuffix(r")\Z"))
    found = None if "|" in text or "(" in text else re.search(r"[/:@](?![?*{])", text)
    return found[0] if found else ""


def _free(config: Config) -> Address:
    """The first address beside `listen` that no listener has."""
    used = config.listeners().values()
    found = config.listen
    while not found.port or any(found.overlaps(each) for each in used):
        found = Address(found.host, found.port + 1 if found.port else 5001)
    return found

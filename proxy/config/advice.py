"""What a valid configuration does that its operator may not expect."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from proxy.config.hosts import Address, host_of, is_loopback
from proxy.config.schema import EVERYTHING, Config, Hosting
from storage.names import untranslated


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
    return [
        *_pushes(config),
        *_logins(config),
        *_issuers(config),
        *_endpoint(config),
        *_replicas(config),
        *_plain(config),
        *_admin(config),
        *_peers(config),
        *_rules(config),
    ]


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
        elif not access.sends_for_tokens and access.opens(name):
            remedy = "set access.ping: challenge; then docker cannot pull without a login either"
            yield Advice(path, "docker cannot log in to push, since everybody may pull", remedy)
        elif public and not (namespace.listen or namespace.hosts or config.default_namespace == name):
            remedy = f"give it a listener of its own, such as listen: {_free(config)}"
            yield Advice(path, f"docker cannot log in at {config.listen} to push", remedy)


def _issuers(config: Config) -> Iterator[Advice]:
    """The issuers that serve everybody, and whose tokens nothing tells from those of others."""
    for name, issuer in config.access.oidc.items():
        if claims := issuer.telling:
            surprise = f"anybody can get a token of {issuer.issuer} that meets them"
            remedy = f"require one of {', '.join(claims)}, beginning with what is yours"
            yield Advice(f"access.oidc.{name}.required_claims", surprise, remedy)


def _endpoint(config: Config) -> Iterator[Advice]:
    """A token endpoint where nobody in particular gets a token."""
    access = config.access
    certified = config.tls is not None and config.tls.client_ca is not None
    if access.token_endpoint is not None and not access.has_users and not certified:
        yield Advice("access.token_endpoint", "nobody can log in there", "add users (access.htpasswd)")


def _replicas(config: Config) -> Iterator[Advice]:
    """Tokens and API keys that the other replicas of a fleet do not know."""
    shared = config.shared.caches is not None or (config.shared.records is not None and config.hosted())
    if config.peers is None or shared:
        return
    for key, there in (
        ("token_endpoint", config.access.token_endpoint is not None),
        ("api_keys", config.access.api_keys),
    ):
        if there:
            what = "the other replicas (peers) accept none that this one has made"
            yield Advice(f"access.{key}", what, "let them share a database (shared)")


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


def _peers(config: Config) -> Iterator[Advice]:
    """A replica that others cannot reach, unless all of them are on this machine."""
    if config.peers is None or not config.listen.loopback:
        return
    if config.peers.dns is not None or not all(is_loopback(host_of(each)) for each in config.peers.urls):
        remedy = "listen on an address that they reach, such as ':5000'"
        yield Advice("listen", f"other replicas (peers) cannot reach {config.listen}", remedy)


def _rules(config: Config) -> Iterator[Advice]:
    """The rules that never apply: no tag can match them, or an earlier one matches all that they do."""
    for name, namespace in config.namespaces.items():
        path = f"namespaces.{name}"
        tags = [rule.match for rule in namespace.tags]
        for number, pattern in enumerate(tags):
            yield from _never_a_tag(f"{path}.tags[{number}].match", pattern)
        yield from _shadowed(f"{path}.tags", tags)
        yield from _shadowed(f"{path}.repositories", [rule.match for rule in namespace.repositories])
        if namespace.store is not None:
            yield from _retention(name, namespace.store)


def _never_a_tag(place: str, pattern: re.Pattern[str]) -> Iterator[Advice]:
    if sign := _impossible(pattern.pattern):
        surprise = f"never matches, since no tag has a {sign} in it"
        yield Advice(place, surprise, "give a pattern of the tag alone, without its repository")


def _shadowed(path: str, patterns: list[re.Pattern[str]]) -> Iterator[Advice]:
    key = path.rpartition(".")[2]
    for number, pattern in enumerate(patterns):
        earlier = [each.pattern for each in patterns[:number]]
        first = next((each for each in earlier if each in (pattern.pattern, *EVERYTHING)), None)
        if first is not None:
            surprise = f"never applies, since {key}[{earlier.index(first)}] comes first"
            yield Advice(f"{path}[{number}].match", surprise, "move it up, or remove it")


def _retention(name: str, hosting: Hosting) -> Iterator[Advice]:
    """A tag counts for the first rule with `last` that matches; the ages of all rules apply."""
    for number, rule in enumerate(hosting.keep_tags):
        path = f"namespaces.{name}.store.keep_tags[{number}]"
        for index, pattern in enumerate(rule.tag_patterns):
            yield from _never_a_tag(f"{path}.{'match' if rule.match else f'tags[{index}]'}", pattern)
        for index, pattern in enumerate(rule.repositories):
            if _plain_text(pattern).startswith(f"{name}/"):
                surprise = f"matches only repositories of {name}/{name}"
                yield Advice(f"{path}.repositories[{index}]", surprise, f"leave out the first {name}/")
        if rule.last is None or rule.pushed_within is not None or rule.pulled_within is not None:
            continue
        for earlier, other in enumerate(hosting.keep_tags[:number]):
            if other.last is not None and other.covers(rule):
                surprise = f"never applies, since keep_tags[{earlier}] comes first"
                yield Advice(path, surprise, "move it up, or remove it")
                break


def _plain_text(pattern: re.Pattern[str]) -> str:
    """The text of a pattern without the marks of a translated glob."""
    return untranslated(pattern.pattern).replace("\\", "")


def _impossible(pattern: str) -> str:
    """A sign that a match of the pattern has and no tag does; empty if there is none, or in doubt."""
    text = re.sub(r"\[[^]]*\]|\\.", "", untranslated(pattern))
    found = None if "|" in text or "(" in text else re.search(r"[/:@](?![?*{])", text)
    return found[0] if found else ""


def _free(config: Config) -> Address:
    """The first address beside `listen` that no listener has."""
    used = config.listeners().values()
    found = config.listen
    while not found.port or any(found.overlaps(each) for each in used):
        found = Address(found.host, found.port + 1 if found.port else 5001)
    return found

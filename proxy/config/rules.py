"""Rules of the configuration that concern several keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from proxy.config.extension_rules import check_extensions
from proxy.config.faults import Fault, nearest
from proxy.config.hosts import Address, without_port
from proxy.config.registry_hosts import EVERY
from proxy.config.schema import Config, NamespaceConfig
from proxy.config.webhooks import WebhookConfig


def violations(config: Config) -> Iterator[Fault]:
    """All that is wrong with a configuration whose keys are right each."""
    yield from _check_listeners(config)
    yield from _check_owners(config.namespaces)
    yield from _check_every(config)
    yield from _check_webhooks(config.webhooks)
    yield from check_extensions(config)
    named = [each for each in config.namespaces if each != EVERY]
    if config.default_namespace not in (None, *named):
        hint = nearest(str(config.default_namespace), named)
        yield Fault("default_namespace", f"no namespace has that name{hint}")
    yield from _check_access(config)
    yield from _check_peers(config)
    if config.redirect is not None and config.shared.bucket is None:
        yield Fault("redirect", "leads clients to a bucket: set shared.bucket, or remove this key")
    if config.redirect is not None and config.shared.extension is not None:
        yield Fault("redirect", "an extension (shared.bucket) has no URLs for clients: remove this key")
    if config.shared.caches is not None and not config.cached():
        yield Fault("shared.caches", "no namespace is a cache, with an upstream: remove this key")


def _check_owners(namespaces: Mapping[str, NamespaceConfig]) -> Iterator[Fault]:
    """A fault if a name, alias or Host header belongs to two namespaces."""
    owners: dict[str, str] = {}
    for name in namespaces:
        if (owner := owners.setdefault(without_port(name), name)) != name:
            yield Fault(f"namespaces.{name}", f"is the same name as namespace {owner}")
    for name, namespace in namespaces.items():
        for key in ("aliases", "hosts"):
            for each in getattr(namespace, key):
                if (owner := owners.setdefault(without_port(each), name)) != name:
                    yield Fault(f"namespaces.{name}.{key}", f"{each} already belongs to namespace {owner}")


def _check_every(config: Config) -> Iterator[Fault]:
    """A fault if `*` is more than settings of hosts, or another namespace has a list of hosts."""
    for name, namespace in config.namespaces.items():
        path, upstream = f"namespaces.{name}", namespace.upstream
        if name != EVERY:
            if upstream is not None and upstream.hosts:
                yield Fault(f"{path}.upstream.hosts", "is for the namespace '*' only: give a url")
            continue
        if upstream is None or not upstream.hosts:
            yield Fault(path, "needs upstream.hosts, the registries that clients may ask for")
        for key in ("aliases", "hosts"):
            if getattr(namespace, key):
                yield Fault(f"{path}.{key}", "is for a namespace with a name of its own")


def default_admin(config: Config) -> Address:
    """The default of `admin`, at the first port from 5001 on that no other listener has."""
    default = Config().admin
    assert default is not None
    used = [address for key, address in config.listeners().items() if key != "admin"]
    while any(default.overlaps(each) for each in used):
        default = Address(default.host, default.port + 1)
    return default


def _check_listeners(config: Config) -> Iterator[Fault]:
    """A fault if two listeners have one port."""
    found = list(config.listeners().items())
    for number, (key, address) in enumerate(found):
        for other, taken in found[:number]:
            if address.overlaps(taken):
                yield Fault(key, f"{other} listens on {taken} already: choose another port")


def _check_webhooks(webhooks: tuple[WebhookConfig, ...]) -> Iterator[Fault]:
    """A fault if two have one name, by which the events that wait for a webhook are found."""
    names: set[str] = set()
    for number, each in enumerate(webhooks):
        if each.name in names:
            yield Fault(f"webhooks[{number}].name", f"another webhook has the name {each.name}")
        names.add(each.name)


def _check_access(config: Config) -> Iterator[Fault]:
    """A fault if access rules are missing, or the scope of a token would be ambiguous."""
    ruled = [name for name, each in config.namespaces.items() if each.visibility == "rules"]
    access = config.access
    if ruled and access.rules is None and access.token is None and not access.api_keys:
        yield Fault(
            f"namespaces.{ruled[0]}.visibility",
            "no rule grants access: set access.rules, access.token or access.api_keys",
        )
    short = config.unnamed()
    if config.access.token is not None and len(short) > 1:
        yield Fault(
            "access.token",
            f"the namespaces {' and '.join(short)} can be reached without their name, by hosts or as"
            " default_namespace, and the scope of a token cannot tell them apart: keep one of these settings",
        )


def _check_peers(config: Config) -> Iterator[Fault]:
    """A fault if other replicas could not be reached, or be told from a namespace in metrics and events."""
    if config.peers is None:
        return
    if config.tls is not None and config.tls.client_certificate == "required":
        yield Fault("peers", "other replicas show no certificate, and tls.client_certificate is required")
    if "peers" in config.namespaces:
        yield Fault(
            "namespaces.peers", "is what metrics call the other replicas of peers: choose another name"
        )

"""The schema of the configuration: a typed tree of sections, with defaults."""

from __future__ import annotations

import fnmatch
import math
import re
from typing import Annotated, Literal

import msgspec

from proxy.config.access import AccessConfig
from proxy.config.audit import AuditConfig
from proxy.config.cores import count_cores
from proxy.config.directories import default_cache_directory
from proxy.config.extensions import ExtensionConfig
from proxy.config.fields import Duration, File, Flag, Freshness, Host, Keep, Section, Size, Text, Timeout
from proxy.config.hosts import Address, parse_address, parse_admin, parse_name
from proxy.config.peers import PeersConfig
from proxy.config.policy import PolicyConfig
from proxy.config.quantities import (
    Share,
    parse_every,
    parse_grace,
    parse_memory,
    parse_percentage,
    parse_rate,
    parse_share,
)
from proxy.config.redirect import RedirectConfig
from proxy.config.registry_hosts import EVERY, find_pattern, registry_host
from proxy.config.shared import SharedConfig
from proxy.config.upstream import UpstreamConfig
from proxy.config.values import (
    Secret,
    parse_access,
    parse_admin_ui,
    parse_count,
    parse_glob,
    parse_number,
    parse_pattern,
    parse_platform,
    parse_reference,
    parse_secret,
    parse_time,
    parse_version,
    parse_workers,
)
from proxy.config.webhooks import WebhookConfig
from proxy.config.wellknown import DEFAULTS, WELL_KNOWN
from storage.keys import COPIED
from storage.oci import NameGrammar


class DiskConfig(Section, frozen=True):
    """The disk, its limits, and its upkeep.

    `scrub` is in bytes per second; None turns it off, and so it does for `collect_every`.
    """

    path: File = msgspec.field(default_factory=default_cache_directory)
    cache_limit: Size | None = None
    min_free: Annotated[Share, parse_share] = Share(percent=1)
    evict_to: Annotated[float, parse_percentage] = 0.9
    keep_for: Keep = math.inf
    evict_every: Timeout = 3600.0
    scrub: Annotated[int | None, parse_rate] = 10 << 20
    collect_every: Annotated[float | None, parse_every] = 86400.0
    collect_grace: Annotated[float, parse_grace] = 86400.0


class Log(Section, frozen=True):
    """The format and the level of the log, and which requests are logged."""

    format: Literal["auto", "console", "json"] = "auto"
    level: Literal["debug", "info", "warning", "error"] = "info"
    access: Annotated[str, parse_access] = "all"
    slow_callbacks: Annotated[float | None, parse_every] = None


class Limits(Section, frozen=True):
    """Limits on clients and on fills, over all workers; `hit_memory` is in bytes, of each worker."""

    connections_per_address: Annotated[int, parse_count] = 1000
    request_timeout: Timeout = 30.0
    idle_timeout: Timeout = 75.0
    client_timeout: Timeout = 300.0
    fills: Annotated[int, parse_count] = 64
    hit_memory: Annotated[int, parse_memory] = 16 << 20


# The patterns that match everything, as a glob and as regular expressions.
EVERYTHING = (fnmatch.translate("*"), ".*", ".+")


class TagRule(Section, frozen=True):
    """How long the tags that match are fresh."""

    match: Annotated[re.Pattern[str], parse_pattern]
    fresh_for: Freshness


class RepositoryRule(Section, frozen=True):
    """How long unused content of the repositories that match is kept."""

    match: Annotated[re.Pattern[str], parse_pattern]
    keep_for: Keep


class PinRule(Section, frozen=True):
    """Images that are never evicted.  `keep_fresh` is the time between two refreshes, None for none."""

    match: Annotated[str, parse_glob]
    keep_fresh: Timeout | None = None
    platforms: tuple[Annotated[str, parse_platform], ...] = ()


class WarmRule(Section, frozen=True):
    """Images that are fetched in full, `every` so many seconds or daily `at` an hour and minute."""

    images: tuple[Annotated[str, parse_reference], ...] = ()
    list: File | None = None
    every: Timeout | None = None
    at: Annotated[tuple[int, int], parse_time] | None = None
    platforms: tuple[Annotated[str, parse_platform], ...] = ()
    referrers: Flag = True

    def __post_init__(self) -> None:
        if not self.images and self.list is None:
            raise ValueError("needs images or list")
        if self.every is not None and self.at is not None:
            raise ValueError("has both every and at: keep one")
        if self.every is None and self.at is None:
            raise ValueError("needs every, such as 6h, or at, such as '03:30'")


class KeepRule(Section, frozen=True):
    """Which tags are kept, of those that match one of `tags`, in the repositories that match.

    Without `repositories` or `tags` all match.  `match` is one pattern of tags.  One of the conditions is
    enough: the tag is among the `last` pushed, or was pushed or pulled in so many seconds.
    """

    match: Annotated[re.Pattern[str] | None, parse_pattern] = None
    repositories: tuple[Annotated[re.Pattern[str], parse_pattern], ...] = ()
    tags: tuple[Annotated[re.Pattern[str], parse_pattern], ...] = ()
    last: Annotated[int | None, parse_count] = None
    pushed_within: Timeout | None = None
    pulled_within: Timeout | None = None

    def __post_init__(self) -> None:
        if self.match is not None and self.tags:
            raise ValueError("has both match and tags: keep one")
        if self.last is None and self.pushed_within is None and self.pulled_within is None:
            raise ValueError("needs last, such as 10, or pushed_within or pulled_within, such as 90d")

    @property
    def tag_patterns(self) -> tuple[re.Pattern[str], ...]:
        return self.tags if self.match is None else (self.match,)

    def applies_to(self, repository: str) -> bool:
        """Whether a repository, given by its name within the namespace, matches."""
        return not self.repositories or any(each.fullmatch(repository) for each in self.repositories)

    def covers(self, other: KeepRule) -> bool:
        """Whether it surely matches every tag that `other` does."""
        return _covers(self.repositories, other.repositories) and _covers(
            self.tag_patterns, other.tag_patterns
        )


def _covers(these: tuple[re.Pattern[str], ...], those: tuple[re.Pattern[str], ...]) -> bool:
    """Whether one of `these` surely matches whatever one of `those` does; none of them match all."""
    if not these or any(each.pattern in EVERYTHING for each in these):
        return True
    return bool(those) and {each.pattern for each in those} <= {each.pattern for each in these}


class Hosting(Section, frozen=True):
    """The rules of a private registry: what may be pushed, and what is collected.

    A tag is kept if one of the rules of `keep_tags` that match it keeps it, or if none matches.
    """

    sparse: Flag = False
    immutable_tags: tuple[Annotated[re.Pattern[str], parse_pattern], ...] = ()
    keep_untagged_for: Keep = math.inf
    keep_tags: tuple[KeepRule, ...] = ()


class LazyUntil(Section, frozen=True):
    """When a lazy namespace fetches the rest of a blob of which clients read parts."""

    share: Annotated[float, parse_percentage] = 0.5
    clients: Annotated[float, parse_number] = 2


class NamespaceConfig(Section, frozen=True):
    """A cache of an `upstream`, or a private registry, which has a `store`.

    A private registry may have a listener of its own, at `listen`.  If `keep_for` is None, that of the disk
    applies.  The namespace `*` has the settings of the caches of all hosts that its upstream lists.
    """

    upstream: UpstreamConfig | None = None
    store: Hosting | None = None
    listen: Annotated[Address | None, parse_address] = None
    aliases: tuple[Annotated[str, parse_name], ...] = ()
    hosts: tuple[Host, ...] = ()
    library: Flag = False
    names: NameGrammar = "specification"
    fresh_for: Freshness = 600.0
    tags: tuple[TagRule, ...] = ()
    on_upstream_delete: Literal["keep", "drop"] = "keep"
    negative_for: Duration = 10.0
    absent_for: Duration = 86_400.0
    revalidate_timeout: Timeout = 3.0
    offline: Flag = False
    lazy: Flag = False
    lazy_until: LazyUntil = LazyUntil()
    refuse_incomplete: Literal["containers", "always", "never"] = "containers"
    keep_for: Keep | None = None
    repositories: tuple[RepositoryRule, ...] = ()
    cache_limit: Size | None = None
    visibility: Literal["public", "rules", "caller"] = "public"

    def __post_init__(self) -> None:
        if self.upstream is not None and self.store is not None:
            raise ValueError("has both upstream, for a cache, and store, for a private registry: keep one")
        if self.upstream is None and self.store is None:
            raise ValueError("needs upstream, for a cache, or store: {}, for a private registry")
        if self.store is not None:
            misplaced = [each for each in _OF_CACHES if getattr(self, each) != _DEFAULTS[each]]
            if misplaced:
                raise ValueError(f"{misplaced[0]} applies only to caches, and this namespace has a store")
        elif self.listen is not None:
            raise ValueError("listen applies only to private registries (store), and this is a cache")

    def fresh_for_tag(self, tag: str) -> float:
        """For how many seconds after its validation a tag is fresh; math.inf for forever."""
        return next((rule.fresh_for for rule in self.tags if rule.match.fullmatch(tag)), self.fresh_for)


# Keys that apply only to caches.
_OF_CACHES = (
    "fresh_for",
    "tags",
    "on_upstream_delete",
    "negative_for",
    "absent_for",
    "revalidate_timeout",
    "offline",
    "lazy",
    "lazy_until",
    "refuse_incomplete",
    "keep_for",
    "repositories",
    "cache_limit",
    "visibility",
)
_DEFAULTS = {each.name: each.default for each in msgspec.structs.fields(NamespaceConfig)}


class TLS(Section, frozen=True):
    """The server's certificate, and what clients have to show.

    Without `key`, the certificate's file holds it too.  None for `client_certificate` means `optional`.
    """

    certificate: File
    key: File | None = None
    minimum: Annotated[str, parse_version] = "1.2"
    client_ca: File | None = None
    client_certificate: Literal["optional", "required"] | None = None
    kernel: Flag = False

    def __post_init__(self) -> None:
        if self.client_certificate and not self.client_ca:
            raise ValueError("client_certificate needs client_ca")


class Config(Section, frozen=True):
    """The whole configuration.  `pins` are only those of the file; commands may add others."""

    listen: Annotated[Address, parse_address] = Address("127.0.0.1", 5000)
    admin: Annotated[Address | None, parse_admin] = Address("127.0.0.1", 5001)
    admin_token: Annotated[Secret, parse_secret] | None = None
    admin_ui: Annotated[str, parse_admin_ui] = "on"
    access: AccessConfig = AccessConfig()
    policy: PolicyConfig = PolicyConfig()
    tls: TLS | None = None
    disk: DiskConfig = msgspec.field(default_factory=DiskConfig)
    shared: SharedConfig = SharedConfig()
    redirect: RedirectConfig | None = None
    peers: PeersConfig | None = None
    pins: tuple[PinRule, ...] = ()
    webhooks: tuple[WebhookConfig, ...] = ()
    extensions: dict[str, ExtensionConfig] = msgspec.field(default_factory=dict)
    warm: tuple[WarmRule, ...] = ()
    default_namespace: Text | None = None
    fallback: Literal["allow", "deny"] = "allow"
    offline: Flag = False
    drain: Duration = 30.0
    workers: Annotated[int | None, parse_workers] = None
    log: Log = Log()
    audit: AuditConfig | None = None
    limits: Limits = Limits()
    namespaces: dict[str, NamespaceConfig] = msgspec.field(default_factory=dict)

    def processes(self) -> int:
        """The number of worker processes."""
        return self.workers or count_cores()

    def admin_tls(self) -> TLS | None:
        """The TLS of the admin listener: none on a loopback address, where no token leaves the machine."""
        return None if self.admin is None or self.admin.loopback else self.tls

    def key_of(self, namespace: str) -> str:
        """The key below `namespaces` of the settings of a namespace: its name, or `*` for a host of that.

        What another namespace is called, or by which hosts this server is, is none of the hosts of `*`.
        """
        if namespace in (*self.namespaces, COPIED) or (others := self.others) is None:
            return namespace
        if find_pattern(others.hosts, namespace) is None:
            return namespace
        taken = (each for name, of in self.namespaces.items() for each in (name, *of.aliases, *of.hosts))
        return namespace if namespace in map(registry_host, taken) else EVERY

    def namespace(self, name: str) -> NamespaceConfig | None:
        """The settings of a namespace, for a host of the namespace `*` with what well-known hosts need."""
        found = self.namespaces.get(key := self.key_of(name))
        if found is None or found.upstream is None or key == name:
            return found
        needed = DEFAULTS.get(name, {}).items()
        wanted = {each: value for each, value in needed if getattr(found, each) == _DEFAULTS[each]}
        upstream = found.upstream.of_host(name, WELL_KNOWN.get(name))
        return msgspec.structs.replace(found, upstream=upstream, **wanted)

    @property
    def others(self) -> UpstreamConfig | None:
        """The upstream of the namespace `*`, if there is one."""
        return self.namespaces[EVERY].upstream if EVERY in self.namespaces else None

    def cached(self) -> dict[str, tuple[NamespaceConfig, UpstreamConfig]]:
        """The namespaces that are caches, each with its upstream; `*` is one of them."""
        return {
            name: (each, each.upstream) for name, each in self.namespaces.items() if each.upstream is not None
        }

    def hosted(self) -> dict[str, Hosting]:
        """The namespaces that are private registries."""
        return {name: each.store for name, each in self.namespaces.items() if each.store is not None}

    def trusts_this_machine(self) -> bool:
        """Whether programs on this machine may push without a login: nobody else can connect."""
        listeners = (self.listen, *self.store_listeners().values())
        return self.access == AccessConfig() and all(each.loopback for each in listeners)

    def unnamed(self) -> list[str]:
        """The namespaces under access control that a client can reach without naming them."""
        return [
            name
            for name, each in self.namespaces.items()
            if (each.store is not None or each.visibility == "rules")
            and (each.hosts or each.listen or name == self.default_namespace)
        ]

    def listeners(self) -> dict[str, Address]:
        """The addresses of all listeners, by the path of their key."""
        stores = {f"namespaces.{name}.listen": address for name, address in self.store_listeners().items()}
        return {"listen": self.listen, **({"admin": self.admin} if self.admin else {}), **stores}

    def store_listeners(self) -> dict[str, Address]:
        """The addresses of the listeners of single private registries, by namespace."""
        return {name: each.listen for name, each in self.namespaces.items() if each.listen is not None}

    def keep_for(self, repository: str) -> float:
        """For how many seconds unused content of a repository is kept; math.inf for forever.

        `repository` is a full name.
        """
        name, _, relative = repository.partition("/")
        namespace = self.namespaces.get(self.key_of(name))
        if namespace is None:
            return self.disk.keep_for
        for rule in namespace.repositories:
            if rule.match.fullmatch(relative):
                return rule.keep_for
        return self.disk.keep_for if namespace.keep_for is None else namespace.keep_for

"""YAML -> typed, validated configuration; every fault is one line that names the file and the key's path.

- Whatever is in the file is checked here, so that nothing that follows checks it again.
- A key without a value (`log:`) counts as left out; only `default_namespace: null` means something.
- `${VARIABLE}` is put into values after YAML was parsed, so what a variable holds is always text.
- No fault quotes a value that may be, or hold, a password; no `repr` shows one.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import types
import typing
from collections.abc import ItemsView, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml

from proxy.values import (
    Address,
    Network,
    Reserve,
    Secret,
    Share,
    Who,
    kind_of,
    parse_address,
    parse_admin,
    parse_count,
    parse_duration,
    parse_every,
    parse_fields,
    parse_flag,
    parse_freshness,
    parse_glob,
    parse_grace,
    parse_helper,
    parse_host,
    parse_keep,
    parse_label,
    parse_name,
    parse_network,
    parse_path,
    parse_pattern,
    parse_percentage,
    parse_platform,
    parse_proxy,
    parse_quotable,
    parse_rate,
    parse_realm,
    parse_reference,
    parse_reserve,
    parse_secret,
    parse_share,
    parse_size,
    parse_target,
    parse_text,
    parse_time,
    parse_timeout,
    parse_urls,
    parse_username,
    parse_version,
    parse_where,
    parse_who,
    parse_workers,
    without_port,
)

DOCKER_HUB = "docker.io"
DOCKER_HUB_ALIASES = ("index.docker.io", "registry-1.docker.io", "registry.hub.docker.com")
WELL_KNOWN = {
    DOCKER_HUB: "https://registry-1.docker.io",
    "ghcr.io": "https://ghcr.io",
    "quay.io": "https://quay.io",
    "registry.k8s.io": "https://registry.k8s.io",
    "gcr.io": "https://gcr.io",
    "mcr.microsoft.com": "https://mcr.microsoft.com",
    "public.ecr.aws": "https://public.ecr.aws",
}

_VARIABLE = re.compile(r"\$\$|\$\{([A-Za-z_][A-Za-z0-9_]*)\}|(\$\{)")
# Line breaks would end a fault's one line or an HTTP header; lone surrogates cannot be encoded.
_UNFIT = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class ConfigError(Exception):
    """What is wrong with a configuration, in one line for whoever wrote it."""


def default_cache_directory() -> Path:
    """The user's cache directory (XDG Base Directory); for a user without a home, the system's."""
    if (given := Path(os.environ.get("XDG_CACHE_HOME", ""))).is_absolute():
        return given / "entrepot"
    try:
        home = Path.home()
    except RuntimeError:
        home = Path("/")
    # Service users have a home that does not exist, and unknown users in a container have "/".
    if home != Path("/") and home.is_dir():
        return home / ".cache" / "entrepot"
    return Path("/var/cache/entrepot")


# The tree.  `Annotated` pairs what the program sees with what reads it.

Text = Annotated[str, parse_text]
Flag = Annotated[bool, parse_flag]
File = Annotated[Path, parse_path]
Host = Annotated[str, parse_host]
Duration = Annotated[float, parse_duration]
Timeout = Annotated[float, parse_timeout]
Freshness = Annotated[float, parse_freshness]
Keep = Annotated[float, parse_keep]
Size = Annotated[int, parse_size]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A mapping of the file.  Durations are in seconds."""


class Disk(Section, frozen=True):
    """`scrub` is bytes a second; None is not at all, as it is for `collect_every`."""

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
    format: Literal["auto", "console", "json"] = "auto"
    level: Literal["debug", "info", "warning", "error"] = "info"


class Login(Section, frozen=True):
    """Where a user name and password come from; nothing given is nobody."""

    username: Annotated[str, parse_username] | None = None
    password: Annotated[Secret, parse_secret] | None = None
    password_file: File | None = None
    docker_config: File | None = None
    credential_helper: Annotated[str, parse_helper] | None = None

    def __post_init__(self) -> None:
        given = self.sources()
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(given)} each say where the password comes from: keep one of them"
            )
        if self.username is None and given and given[0] in ("password", "password_file"):
            raise ValueError(f"{given[0]} needs username")
        if self.username is not None and (not given or given[0] not in ("password", "password_file")):
            raise ValueError("username needs password or password_file")

    def sources(self) -> list[str]:
        """The keys given of those that say where the password comes from."""
        keys = ("password", "password_file", "docker_config", "credential_helper")
        return [each for each in keys if getattr(self, each) is not None]


class Upstream(Login, frozen=True, kw_only=True):
    """How to reach a registry.  `url` holds at least one; each is asked with all else that is said here."""

    url: Annotated[tuple[str, ...], parse_urls]
    credentials: tuple[Login, ...] = ()
    reserve: Annotated[Reserve, parse_reserve] = Reserve(percent=10)
    token_realms: tuple[Host, ...] = ()
    ca_file: File | None = None
    client_certificate: File | None = None
    client_key: File | None = None
    proxy: Annotated[Secret, parse_proxy] | None = None
    plain_http: Flag = False
    private_redirects: Flag = False
    insecure_skip_verify: Flag = False
    connect_timeout: Timeout = 3.0
    header_timeout: Timeout = 10.0
    progress_timeout: Timeout = 60.0
    max_fills: Annotated[int, parse_count] = 32
    bandwidth: Size | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.credentials and (given := self.sources()):
            raise ValueError(f"{given[0]} and credentials each say who we are: keep one of them")
        for number, login in enumerate(self.credentials):
            if not login.sources():
                raise ValueError(f"credentials[{number}] gives none")
        if self.client_key and not self.client_certificate:
            raise ValueError("client_key needs client_certificate")

    def allows_http(self, url: str) -> bool:
        """Whether the upstream at `url`, one of ours, may send us on to http."""
        return self.plain_http or url.startswith("http://")

    def logins(self) -> tuple[Login, ...]:
        """At least one."""
        return self.credentials or (self,)


class Limits(Section, frozen=True):
    """Of clients in each worker; of fills over all workers, each of which has its part of them."""

    connections_per_address: Annotated[int, parse_count] = 1000
    request_timeout: Timeout = 30.0
    idle_timeout: Timeout = 75.0
    client_timeout: Timeout = 300.0
    fills: Annotated[int, parse_count] = 64


class TagRule(Section, frozen=True):
    match: Annotated[re.Pattern[str], parse_pattern]
    fresh_for: Freshness


class RepositoryRule(Section, frozen=True):
    match: Annotated[re.Pattern[str], parse_pattern]
    keep_for: Keep


class PinRule(Section, frozen=True):
    """`keep_fresh` is the time between two refreshings, None for none."""

    match: Annotated[str, parse_glob]
    keep_fresh: Timeout | None = None
    platforms: tuple[Annotated[str, parse_platform], ...] = ()


class Webhook(Section, frozen=True):
    """Who is told of what happens: see docs/events.md.

    `match` are patterns of full names, `media_types` of media types; none stands for all.
    """

    name: Annotated[str, parse_label]
    url: Annotated[Secret, parse_target]
    format: Literal["registry", "cloudevents"] = "registry"
    actions: tuple[Literal["push", "pull", "delete", "mount", "move"], ...] = (
        "push",
        "delete",
        "mount",
        "move",
    )
    match: tuple[Annotated[re.Pattern[str], parse_pattern], ...] = ()
    media_types: tuple[Annotated[re.Pattern[str], parse_pattern], ...] = ()
    headers: Annotated[dict[str, Secret], parse_fields] = {}
    secret: Annotated[Secret, parse_secret] | None = None
    ca_file: File | None = None
    timeout: Timeout = 5.0
    backoff: Timeout = 1.0
    backoff_limit: Timeout = 60.0
    keep: Keep = 604800.0

    def wants(self, action: str, repository: str, media_type: str) -> bool:
        """`media_type` is "" where none is known; that keeps nothing away."""
        return (
            action in self.actions
            and _any(self.match, repository)
            and (not media_type or _any(self.media_types, media_type))
        )


def _any(patterns: tuple[re.Pattern[str], ...], text: str) -> bool:
    return not patterns or any(each.fullmatch(text) for each in patterns)


class WarmRule(Section, frozen=True):
    """What is fetched whole, `every` so many seconds, or daily `at` an hour and minute."""

    images: tuple[Annotated[str, parse_reference], ...] = ()
    list: File | None = None
    every: Timeout | None = None
    at: Annotated[tuple[int, int], parse_time] | None = None
    platforms: tuple[Annotated[str, parse_platform], ...] = ()
    referrers: Flag = True

    def __post_init__(self) -> None:
        if not self.images and self.list is None:
            raise ValueError("needs images or list")
        if (self.every is None) == (self.at is None):
            raise ValueError("needs either every, such as 6h, or at, such as '03:30'")


class KeepRule(Section, frozen=True):
    match: Annotated[re.Pattern[str], parse_pattern]
    last: Annotated[int, parse_count]


class Hosting(Section, frozen=True):
    """What is pushed to a registry of our own: see proxy.hosted.Rules; and what of it is collected.

    Of the tags that a rule of `keep_tags` matches, the first that does, only the last pushed ones are kept.
    """

    sparse: Flag = False
    immutable_tags: tuple[Annotated[re.Pattern[str], parse_pattern], ...] = ()
    keep_untagged_for: Keep = math.inf
    keep_tags: tuple[KeepRule, ...] = ()


Action = Literal["pull", "push", "delete"]


class AccessRule(Section, frozen=True):
    """One of `who`, from one of `sources`, `may` do this with repositories that match one of `where`."""

    who: tuple[Annotated[Who, parse_who], ...]
    may: tuple[Action, ...]
    sources: tuple[Annotated[Network, parse_network], ...] = msgspec.field(default=(), name="from")
    where: tuple[Annotated[re.Pattern[str], parse_where], ...] = ()

    def __post_init__(self) -> None:
        for key in ("who", "may"):
            if not getattr(self, key):
                raise ValueError(f"{key} names none, so the rule grants nothing: remove it")


class TokenService(Section, frozen=True):
    """A server whose tokens are taken: it is at `realm`, and signs for `service` with one of `keys`."""

    realm: Annotated[str, parse_realm]
    service: Annotated[str, parse_quotable]
    issuer: Text
    keys: tuple[File, ...]

    def __post_init__(self) -> None:
        if not self.keys:
            raise ValueError(
                "keys names none: give the file with the token server's public key or certificate"
            )


class Access(Section, frozen=True):
    """Who may do what; with `rules` None the built-in ones hold.  `remember` is for visibility: caller."""

    htpasswd: File | None = None
    realm: Annotated[str, parse_quotable] = "entrepot"
    groups: dict[str, tuple[Text, ...]] = {}
    token: TokenService | None = None
    trusted_proxies: tuple[Annotated[Network, parse_network], ...] = ()
    rules: tuple[AccessRule, ...] | None = None
    ping: Literal["auto", "challenge", "open"] = "auto"
    remember: Timeout = 300.0


class Namespace(Section, frozen=True):
    """Either a cache of `upstream`, or a `store` of our own.

    `keep_for` is None where that of the disk counts.
    """

    upstream: Upstream | None = None
    store: Hosting | None = None
    aliases: tuple[Annotated[str, parse_name], ...] = ()
    hosts: tuple[Host, ...] = ()
    library: Flag = False
    fresh_for: Freshness = 600.0
    tags: tuple[TagRule, ...] = ()
    on_upstream_delete: Literal["keep", "drop"] = "keep"
    negative_for: Duration = 10.0
    offline: Flag = False
    lazy: Flag = False
    keep_for: Keep | None = None
    repositories: tuple[RepositoryRule, ...] = ()
    cache_limit: Size | None = None
    visibility: Literal["public", "rules", "caller"] = "public"

    def __post_init__(self) -> None:
        if (self.upstream is None) == (self.store is None):
            raise ValueError("needs either upstream, to be a cache of it, or store: {}, to be pushed to")
        if self.store is not None:
            given = [each for each in _OF_CACHES if getattr(self, each) != _DEFAULTS[each]]
            if given:
                raise ValueError(f"{given[0]} is for a cache, and this is a store")

    def fresh_for_tag(self, tag: str) -> float:
        """How long after its validation a tag is served unasked: seconds, math.inf for ever."""
        return next((rule.fresh_for for rule in self.tags if rule.match.fullmatch(tag)), self.fresh_for)


_OF_CACHES = (
    "fresh_for",
    "tags",
    "on_upstream_delete",
    "negative_for",
    "offline",
    "lazy",
    "keep_for",
    "repositories",
    "cache_limit",
    "visibility",
)
_DEFAULTS = {each.name: each.default for each in msgspec.structs.fields(Namespace)}


class TLS(Section, frozen=True):
    """`key` None is in the file of the certificate, `client_certificate` None is as good as `optional`."""

    certificate: File
    key: File | None = None
    minimum: Annotated[str, parse_version] = "1.2"
    client_ca: File | None = None
    client_certificate: Literal["optional", "required"] | None = None

    def __post_init__(self) -> None:
        if self.client_certificate and not self.client_ca:
            raise ValueError("client_certificate needs client_ca")


class Config(Section, frozen=True):
    """`pins` are those of the file; there may be more by command."""

    listen: Annotated[Address, parse_address] = Address("127.0.0.1", 5000)
    admin: Annotated[Address | None, parse_admin] = Address("127.0.0.1", 5001)
    admin_token: Annotated[Secret, parse_secret] | None = None
    access: Access = Access()
    tls: TLS | None = None
    disk: Disk = msgspec.field(default_factory=Disk)
    pins: tuple[PinRule, ...] = ()
    webhooks: tuple[Webhook, ...] = ()
    warm: tuple[WarmRule, ...] = ()
    default_namespace: Text | None = None
    fallback: Literal["allow", "deny"] = "allow"
    offline: Flag = False
    drain: Duration = 30.0
    workers: Annotated[int | None, parse_workers] = None
    log: Log = Log()
    limits: Limits = Limits()
    namespaces: dict[str, Namespace] = {}

    def processes(self) -> int:
        return self.workers or os.cpu_count() or 1

    def admin_tls(self) -> TLS | None:
        """For the administrator: on this machine http will do, but a token that leaves it needs more."""
        return None if self.admin is None or self.admin.loopback else self.tls

    def cached(self) -> dict[str, tuple[Namespace, Upstream]]:
        """The namespaces that are caches, each with its upstream."""
        return {
            name: (each, each.upstream) for name, each in self.namespaces.items() if each.upstream is not None
        }

    def hosted(self) -> dict[str, Hosting]:
        """The namespaces of our own."""
        return {name: each.store for name, each in self.namespaces.items() if each.store is not None}

    def unnamed(self) -> list[str]:
        """The namespaces which rules and tokens are about, and that may be meant without being named."""
        return [
            name
            for name, each in self.namespaces.items()
            if (each.store is not None or each.visibility == "rules")
            and (each.hosts or name == self.default_namespace)
        ]

    def keep_for(self, repository: str) -> float:
        """How long what nobody uses is kept of a repository, by its full name: seconds, math.inf for ever."""
        name, _, relative = repository.partition("/")
        namespace = self.namespaces.get(name)
        if namespace is None:
            return self.disk.keep_for
        for rule in namespace.repositories:
            if rule.match.fullmatch(relative):
                return rule.keep_for
        return self.disk.keep_for if namespace.keep_for is None else namespace.keep_for


def load(path: Path | None, environ: Mapping[str, str] = os.environ) -> Config:
    """The configuration in the file at `path`, or without one the defaults.  Raises ConfigError."""
    tree = {} if path is None else _read(path)
    try:
        tree = _interpolate(tree, "", environ)
        if tree.get("namespaces") is None:
            tree["namespaces"] = {name: {"upstream": url} for name, url in WELL_KNOWN.items()}
        config: Config = _build(Config, tree, "")
        _check_owners(config.namespaces)
        _check_webhooks(config.webhooks)
        if "default_namespace" not in tree and DOCKER_HUB in config.namespaces:
            config = msgspec.structs.replace(config, default_namespace=DOCKER_HUB)
        elif config.default_namespace not in (None, *config.namespaces):
            nearest = _nearest(str(config.default_namespace), config.namespaces)
            raise _Fault("default_namespace", f"there is no namespace of that name{nearest}")
        _check_access(config)
    except _Fault as fault:
        raise ConfigError(f"{path}: {fault}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply, or an alias that holds itself") from None
    return config


class _Fault(Exception):
    def __init__(self, path: str, cause: str) -> None:
        super().__init__(f"{path}: {cause}" if path else cause)


class _Loader(yaml.SafeLoader):
    """The safe loader, with duplicate keys refused and every failure a YAMLError."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here and not in construct_mapping: by then `<<` may have put in keys that ours override.
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"duplicate key {key.value!r}"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add(key.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError):  # such as for the date 2025-02-30
            kind = node.tag.rpartition(":")[2]
            problem = f"looks like a YAML {kind} and is none: put it in quotes"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from None


def _read(path: Path) -> dict[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.load(text, _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from None
    except (ValueError, OverflowError) as error:  # the scanner's, for escapes such as "\\U00110000"
        raise ConfigError(f"{path}: not YAML: {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        # An alias or a tag may be a password that begins with * or ! and lacks quotes: not shown.
        hint = r"\1: text that begins with *, & or ! needs quotes"
        problem = re.sub(r"\b(alias|anchor|handle|tag) ['\"].*", hint, error.problem or "not YAML")
        raise ConfigError(f"{path}{place}: {problem}") from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        raise ConfigError(f"{path}:{line}:{column}: this character is not allowed in YAML") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{path}: expected a mapping of keys to values, got {kind_of(tree)}")
    return tree or {}


def _interpolate(value: Any, path: str, environ: Mapping[str, str]) -> Any:
    """A copy of `value` with variables put in, and with every key and text checked for odd characters."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise _Fault(path, f"expected strings as keys, got {kind_of(key)}: put it in quotes")
            if _UNFIT.search(key):
                raise _Fault(path, "there is a control character in a key")
        return {key: _interpolate(item, _join(path, key), environ) for key, item in value.items()}
    if isinstance(value, list):
        return [_interpolate(item, f"{path}[{index}]", environ) for index, item in enumerate(value)]
    if not isinstance(value, str):
        return value

    def replace(found: re.Match[str]) -> str:
        if found[2]:
            raise _Fault(path, "${ must be followed by a variable's name and }; a literal $ is written $$")
        if found[1] and found[1] not in environ:
            raise _Fault(path, f"the environment variable {found[1]} is not set")
        return environ[found[1]] if found[1] else "$"

    text = _VARIABLE.sub(replace, value)
    if _UNFIT.search(text):
        raise _Fault(path, "there is a line break or another control character in it")
    return text


def _build(kind: Any, value: Any, path: str) -> Any:
    """`value` as the type `kind`; `path` names its key in faults."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        try:
            return arguments[1](value)
        except ValueError as error:
            raise _Fault(path, str(error)) from None
    if origin in (typing.Union, types.UnionType):
        return _build(arguments[0], value, path)  # always `… | None`, and a null has been left out
    if origin is Literal:
        if value not in arguments:
            raise _Fault(path, f"expected one of {', '.join(arguments)}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise _Fault(path, f"expected a list, got {kind_of(value)}")
        return tuple(_build(arguments[0], item, f"{path}[{index}]") for index, item in enumerate(value))
    if kind == dict[str, Namespace]:
        return _namespaces(value, path)
    if origin is dict:
        return {name: _build(arguments[1], item, _join(path, name)) for name, item in _mapping(value, path)}
    if kind is Upstream and isinstance(value, str | list):
        value = {"url": value}
    if kind is PinRule and isinstance(value, str):
        value = {"match": value}
    return _section(kind, value, path)


def _section(kind: type[Section], value: Any, path: str) -> Section:
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    for key, _ in _mapping(value, path):
        if key not in fields:
            # `password:hunter2` without a space is a key to YAML: what follows the colon is not shown.
            name, colon, _ = key.partition(":")
            hint = "; a colon needs a space after it" if colon else _nearest(name, fields)
            raise _Fault(_join(path, name), f"unknown key{hint}")
    given = {
        fields[key].name: _build(fields[key].type, item, _join(path, key))
        for key, item in value.items()
        if item is not None
    }
    for name, field in fields.items():
        if field.required and field.name not in given:
            raise _Fault(_join(path, name), "is required")
    try:
        return kind(**given)
    except ValueError as error:
        raise _Fault(path, str(error)) from None


def _mapping(value: Any, path: str) -> ItemsView[str, Any]:
    if not isinstance(value, dict):
        raise _Fault(path, f"expected a mapping of keys to values, got {kind_of(value)}")
    return value.items()


def _namespaces(value: Any, path: str) -> dict[str, Namespace]:
    items = _mapping(value, path)
    if not items:
        raise _Fault(path, "names none; leave the key out for the well-known registries")
    namespaces = {}
    for name, item in items:
        here = _join(path, name)
        if name == DOCKER_HUB and isinstance(item, dict) and item.get("library") is None:
            item = {**item, "library": True}
        namespace = _build(Namespace, item, here)
        if name == DOCKER_HUB:
            aliases = tuple(dict.fromkeys((*namespace.aliases, *DOCKER_HUB_ALIASES)))
            namespace = msgspec.structs.replace(namespace, aliases=aliases)
        namespaces[_build(Annotated[str, parse_name], name, here)] = namespace
    return namespaces


def _check_owners(namespaces: Mapping[str, Namespace]) -> None:
    """No name, alias or Host header may mean two namespaces."""
    owners: dict[str, str] = {}
    for name in namespaces:
        if (owner := owners.setdefault(without_port(name), name)) != name:
            raise _Fault(f"namespaces.{name}", f"this is namespace {owner} already")
    for name, namespace in namespaces.items():
        for key in ("aliases", "hosts"):
            for each in getattr(namespace, key):
                if (owner := owners.setdefault(without_port(each), name)) != name:
                    raise _Fault(f"namespaces.{name}.{key}", f"{each} belongs to namespace {owner} already")


def _check_webhooks(webhooks: tuple[Webhook, ...]) -> None:
    """What waits for one is found by its name."""
    names: set[str] = set()
    for number, each in enumerate(webhooks):
        if each.name in names:
            raise _Fault(f"webhooks[{number}].name", f"there is another webhook {each.name}")
        names.add(each.name)


def _check_access(config: Config) -> None:
    """Raises _Fault where nobody could be let in, or where it is not clear into what."""
    ruled = [name for name, each in config.namespaces.items() if each.visibility == "rules"]
    if ruled and config.access.rules is None and config.access.token is None:
        raise _Fault(f"namespaces.{ruled[0]}.visibility", "no rule lets anybody in: write access.rules")
    short = config.unnamed()
    if config.access.token is not None and len(short) > 1:
        raise _Fault(
            "access.token",
            f"the namespaces {' and '.join(short)} are found by Host or default_namespace, and the scope of a"
            " token does not tell them apart: let one at most have hosts or be the default",
        )


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _nearest(word: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {found[0]}?" if found else f"; known are {', '.join(known)}"

"""The loader of the configuration: from YAML to a typed and validated tree.

- Every error is one line that names the file and the path of the key.
- The whole file is validated here; no other module validates it again.
- A key without a value (`log:`) counts as left out; only `default_namespace: null` has a meaning.
- `${VARIABLE}` is replaced in values after YAML is parsed, so the value of a variable is always text.
- No error quotes a value that may be or hold a password, and no `repr` shows one.
"""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
from collections.abc import ItemsView, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml

from proxy.config.errors import ConfigError
from proxy.config.fields import Section
from proxy.config.hosts import Address, parse_name, without_port
from proxy.config.schema import Config, NamespaceConfig, PinRule
from proxy.config.upstream import UpstreamConfig
from proxy.config.values import kind_of
from proxy.config.webhooks import WebhookConfig
from proxy.config.wellknown import DOCKER_HUB, DOCKER_HUB_ALIASES, WELL_KNOWN

_VARIABLE = re.compile(r"\$\$|\$\{([A-Za-z_][A-Za-z0-9_]*)\}|(\$\{)")
# Line breaks would end an error's one line or an HTTP header; lone surrogates cannot be encoded.
_UNFIT = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def load(path: Path | None, environ: Mapping[str, str] = os.environ, stores: Iterable[str] = ()) -> Config:
    """The configuration in the file at `path`, or the defaults without a path.  Raises ConfigError.

    `stores` are private registries besides those of the file.
    """
    tree = {} if path is None else _read(path)
    try:
        tree = _interpolate(tree, "", environ)
        if tree.get("namespaces") is None:
            tree["namespaces"] = {name: {"upstream": url} for name, url in WELL_KNOWN.items()}
        if isinstance(tree["namespaces"], dict):
            tree["namespaces"].update(
                (name, {"store": {}}) for name in stores if name not in tree["namespaces"]
            )
        config: Config = _build(Config, tree, "")
        if caches := [name for name in stores if name not in config.hosted()]:
            raise _Fault("--store", f"namespace {caches[0]} is a cache: choose another name")
        if tree.get("admin") is None:
            config = msgspec.structs.replace(config, admin=_default_admin(config))
        _check_listeners(config)
        _check_owners(config.namespaces)
        _check_webhooks(config.webhooks)
        if "default_namespace" not in tree and DOCKER_HUB in config.namespaces:
            config = msgspec.structs.replace(config, default_namespace=DOCKER_HUB)
        elif config.default_namespace not in (None, *config.namespaces):
            nearest = _nearest(str(config.default_namespace), config.namespaces)
            raise _Fault("default_namespace", f"no namespace has that name{nearest}")
        _check_access(config)
    except _Fault as fault:
        raise ConfigError(f"{path}: {fault}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply, or an alias refers to itself") from None
    return config


class _Fault(Exception):
    """An error at the key with that path."""

    def __init__(self, path: str, cause: str) -> None:
        super().__init__(f"{path}: {cause}" if path else cause)


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses duplicate keys, and raises a YAMLError for every failure."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Not in construct_mapping: by then `<<` may have added keys that the mapping overrides.
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
            problem = f"looks like a YAML {kind} but is not a valid one: put it in quotes"
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
        # An alias or a tag may be a password without quotes that begins with * or !, so it is not shown.
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
    """A copy of `value` with variables replaced, whose keys and texts hold no control characters."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise _Fault(path, f"expected strings as keys, got {kind_of(key)}: put it in quotes")
            if _UNFIT.search(key):
                raise _Fault(path, "holds a control character in a key")
        return {key: _interpolate(item, _join(path, key), environ) for key, item in value.items()}
    if isinstance(value, list):
        return [_interpolate(item, f"{path}[{index}]", environ) for index, item in enumerate(value)]
    if not isinstance(value, str):
        return value

    def replace(found: re.Match[str]) -> str:
        if found[2]:
            raise _Fault(path, "${ must be followed by a variable's name and }; write $$ for a literal $")
        if found[1] and found[1] not in environ:
            raise _Fault(path, f"the environment variable {found[1]} is not set")
        return environ[found[1]] if found[1] else "$"

    text = _VARIABLE.sub(replace, value)
    if _UNFIT.search(text):
        raise _Fault(path, "holds a line break or another control character")
    return text


def _build(kind: Any, value: Any, path: str) -> Any:
    """`value` as the type `kind`; `path` is the path of its key."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        try:
            return arguments[1](value)
        except ValueError as error:
            raise _Fault(path, str(error)) from None
    if origin in (typing.Union, types.UnionType):
        return _build(arguments[0], value, path)  # always `… | None`, and null counts as left out
    if origin is Literal:
        if value not in arguments:
            raise _Fault(path, f"expected one of {', '.join(arguments)}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise _Fault(path, f"expected a list, got {kind_of(value)}")
        return tuple(_build(arguments[0], item, f"{path}[{index}]") for index, item in enumerate(value))
    if kind == dict[str, NamespaceConfig]:
        return _namespaces(value, path)
    if origin is dict:
        return {name: _build(arguments[1], item, _join(path, name)) for name, item in _mapping(value, path)}
    if kind is UpstreamConfig and isinstance(value, str | list):
        value = {"url": value}
    if kind is PinRule and isinstance(value, str):
        value = {"match": value}
    return _section(kind, value, path)


def _section(kind: type[Section], value: Any, path: str) -> Section:
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    for key, _ in _mapping(value, path):
        if key not in fields:
            # To YAML, `password:hunter2` without a space is a key: the part after the colon is not shown.
            name, colon, _ = key.partition(":")
            hint = "; a colon needs a space after it" if colon else _nearest(name, fields)
            raise _Fault(_join(path, name), f"unknown key{hint}")
    values = {
        fields[key].name: _build(fields[key].type, item, _join(path, key))
        for key, item in value.items()
        if item is not None
    }
    for name, field in fields.items():
        if field.required and field.name not in values:
            raise _Fault(_join(path, name), "is required")
    try:
        return kind(**values)
    except ValueError as error:
        raise _Fault(path, str(error)) from None


def _mapping(value: Any, path: str) -> ItemsView[str, Any]:
    if not isinstance(value, dict):
        raise _Fault(path, f"expected a mapping of keys to values, got {kind_of(value)}")
    return value.items()


def _namespaces(value: Any, path: str) -> dict[str, NamespaceConfig]:
    items = _mapping(value, path)
    if not items:
        raise _Fault(path, "is empty; leave the key out to use the well-known registries")
    namespaces = {}
    for name, item in items:
        item_path = _join(path, name)
        if name == DOCKER_HUB and isinstance(item, dict) and item.get("library") is None:
            item = {**item, "library": True}
        namespace = _build(NamespaceConfig, item, item_path)
        if name == DOCKER_HUB:
            aliases = tuple(dict.fromkeys((*namespace.aliases, *DOCKER_HUB_ALIASES)))
            namespace = msgspec.structs.replace(namespace, aliases=aliases)
        namespaces[_build(Annotated[str, parse_name], name, item_path)] = namespace
    return namespaces


def _check_owners(namespaces: Mapping[str, NamespaceConfig]) -> None:
    """Raises _Fault if a name, alias or Host header belongs to two namespaces."""
    owners: dict[str, str] = {}
    for name in namespaces:
        if (owner := owners.setdefault(without_port(name), name)) != name:
            raise _Fault(f"namespaces.{name}", f"is the same name as namespace {owner}")
    for name, namespace in namespaces.items():
        for key in ("aliases", "hosts"):
            for each in getattr(namespace, key):
                if (owner := owners.setdefault(without_port(each), name)) != name:
                    raise _Fault(f"namespaces.{name}.{key}", f"{each} already belongs to namespace {owner}")


def _default_admin(config: Config) -> Address:
    """The default of `admin`, at the first port from 5001 on that no other listener has."""
    default = Config().admin
    assert default is not None
    used = [address for key, address in config.listeners().items() if key != "admin"]
    while any(default.overlaps(each) for each in used):
        default = Address(default.host, default.port + 1)
    return default


def _check_listeners(config: Config) -> None:
    """Raises _Fault if two listeners have one port."""
    found = list(config.listeners().items())
    for number, (key, address) in enumerate(found):
        for other, taken in found[:number]:
            if address.overlaps(taken):
                raise _Fault(key, f"{other} listens on {taken} already: choose another port")


def _check_webhooks(webhooks: tuple[WebhookConfig, ...]) -> None:
    """Raises _Fault if two have one name, by which the events that wait for a webhook are found."""
    names: set[str] = set()
    for number, each in enumerate(webhooks):
        if each.name in names:
            raise _Fault(f"webhooks[{number}].name", f"another webhook has the name {each.name}")
        names.add(each.name)


def _check_access(config: Config) -> None:
    """Raises _Fault if access rules are missing, or the scope of a token would be ambiguous."""
    ruled = [name for name, each in config.namespaces.items() if each.visibility == "rules"]
    if ruled and config.access.rules is None and config.access.token is None:
        raise _Fault(
            f"namespaces.{ruled[0]}.visibility", "no rule grants access: set access.rules or access.token"
        )
    short = config.unnamed()
    if config.access.token is not None and len(short) > 1:
        raise _Fault(
            "access.token",
            f"the namespaces {' and '.join(short)} can be reached without their name, by hosts or as"
            " default_namespace, and the scope of a token cannot tell them apart: keep one of these settings",
        )


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _nearest(word: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {found[0]}?" if found else f"; known are {', '.join(known)}"

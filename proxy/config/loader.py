"""The loader of the configuration: from YAML to a typed and validated tree.

- Every error is one line that names the file and the path of the key.
- The whole file is validated here; no other module validates it again.
- A key without a value (`log:`) counts as left out; only `default_namespace: null` has a meaning.
- `${VARIABLE}` is replaced in values after YAML is parsed, so the value of a variable is always text.
- No error quotes a value that may be or hold a password, and no `repr` shows one.
"""

from __future__ import annotations

import os
import re
import types
import typing
from collections.abc import ItemsView, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from proxy.config.errors import ConfigError
from proxy.config.faults import Fault, Faults, gather, join, nearest, refuse, within
from proxy.config.fields import Section
from proxy.config.hosts import parse_name
from proxy.config.registry_hosts import EVERY
from proxy.config.rules import default_admin, violations
from proxy.config.schema import Config, NamespaceConfig
from proxy.config.settings import SHORTHANDS, Setting, apply, environment
from proxy.config.values import UNFIT, kind_of
from proxy.config.wellknown import ALIASES, DEFAULTS, DOCKER_HUB, DOCKER_HUB_ALIASES, WELL_KNOWN
from proxy.config.yaml_text import read_file

_VARIABLE = re.compile(r"\$\$|\$\{([A-Za-z_][A-Za-z0-9_]*)\}|(\$\{)")


def load(
    path: Path | None, environ: Mapping[str, str] = os.environ, settings: Sequence[Setting] = ()
) -> Config:
    """The configuration in the file at `path`, or the defaults without a path.

    Keys in the environment replace those of the file, and `settings` replace both.  Raises ConfigError, with
    all errors at once.
    """
    return load_given(path, environ, settings).config


@dataclass(frozen=True, slots=True)
class Given:
    """A configuration, and the values that it was made of.

    tree: all values that were given, as the file has them
    sources: the variable or option that gave a value, by the path of its key
    """

    config: Config
    tree: dict[str, Any]
    sources: Mapping[str, str]


def load_given(
    path: Path | None, environ: Mapping[str, str] = os.environ, settings: Sequence[Setting] = ()
) -> Given:
    """As load(), with where values come from."""
    tree = {} if path is None else read_file(path)
    sources: dict[str, str] = {}
    try:
        tree = _interpolate(tree, "", environ)
        if tree.get("namespaces") is None:
            tree["namespaces"] = {
                name: {"upstream": url, "aliases": ALIASES.get(name, [])} for name, url in WELL_KNOWN.items()
            }
        sources = apply(tree, [*environment(environ), *settings])
        return Given(_complete(tree), tree, sources)
    except Faults as error:
        lines = [_line(each, path, sources) for each in error.faults]
    except RecursionError:
        lines = [f"{path}: nested too deeply, or an alias refers to itself"]
    raise ConfigError("\n".join(lines))


def _complete(tree: dict[str, Any]) -> Config:
    """Raises Faults."""
    config: Config = build(Config, tree, "")
    if tree.get("admin") is None:
        config = msgspec.structs.replace(config, admin=default_admin(config))
    if "default_namespace" not in tree and DOCKER_HUB in config.namespaces:
        config = msgspec.structs.replace(config, default_namespace=DOCKER_HUB)
    if faults := list(violations(config)):
        raise Faults(*faults)
    return config


def _line(fault: Fault, path: Path | None, sources: Mapping[str, str]) -> str:
    """The line about a fault, which begins with what gave the value: a variable, an option, or the file."""
    around = [each for each in sources if within(fault.path, each) or within(each, fault.path)]
    source = fault.source or (sources[max(around, key=len)] if around else path)
    return f"{source}: {fault}" if source else str(fault)


def _interpolate(value: Any, path: str, environ: Mapping[str, str]) -> Any:
    """A copy of `value` with variables replaced, whose keys and texts hold no control characters."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise refuse(path, f"expected strings as keys, got {kind_of(key)}: put it in quotes")
            if UNFIT.search(key):
                raise refuse(path, "holds a control character in a key")
        calls = [partial(_interpolate, item, join(path, key), environ) for key, item in value.items()]
        return dict(zip(value, gather(calls), strict=True))
    if isinstance(value, list):
        return gather(
            partial(_interpolate, item, f"{path}[{index}]", environ) for index, item in enumerate(value)
        )
    if not isinstance(value, str):
        return value

    def replace(found: re.Match[str]) -> str:
        if found[2]:
            raise refuse(path, "${ must be followed by a variable's name and }; write $$ for a literal $")
        if found[1] and found[1] not in environ:
            raise refuse(path, f"the environment variable {found[1]} is not set")
        return environ[found[1]] if found[1] else "$"

    text = _VARIABLE.sub(replace, value)
    if UNFIT.search(text):
        raise refuse(path, "holds a line break or another control character")
    return text


def build(kind: Any, value: Any, path: str) -> Any:
    """`value` as the type `kind`; `path` is the path of its key.  Raises Faults."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        try:
            return arguments[1](value)
        except ValueError as error:
            raise refuse(path, str(error)) from None
    if origin in (typing.Union, types.UnionType):
        return build(arguments[0], value, path)  # always `… | None`, and null counts as left out
    if origin is Literal:
        if value not in arguments:
            raise refuse(path, f"expected one of {', '.join(arguments)}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise refuse(path, f"expected a list, got {kind_of(value)}")
        items = enumerate(value)
        return tuple(gather(partial(build, arguments[0], item, f"{path}[{index}]") for index, item in items))
    if kind == dict[str, NamespaceConfig]:
        return _namespaces(value, path)
    if origin is dict:
        calls = [partial(build, arguments[1], item, join(path, name)) for name, item in _mapping(value, path)]
        return dict(zip(value, gather(calls), strict=True))
    if kind in SHORTHANDS and isinstance(value, SHORTHANDS[kind][0]):
        value = {SHORTHANDS[kind][1]: value}
    return _section(kind, value, path)


def _section(kind: type[Section], value: Any, path: str) -> Section:
    fields = _fields(kind)
    given = {key: item for key, item in _mapping(value, path) if item is not None or key not in fields}
    required = [key for key, field in fields.items() if field.required and key not in given]
    calls = [partial(_member, fields, key, item, path) for key, item in given.items()]
    values = gather([*calls, *(partial(_lack, join(path, key)) for key in required)])
    try:
        return kind(**dict(values))
    except ValueError as error:
        raise refuse(path, str(error)) from None


@cache
def _fields(kind: type[Section]) -> Mapping[str, msgspec.structs.FieldInfo]:
    """The fields by the names of their keys.  To resolve their types takes long."""
    return {field.encode_name: field for field in msgspec.structs.fields(kind)}


def _member(fields: Mapping[str, Any], key: str, item: Any, path: str) -> tuple[str, Any]:
    if key in fields:
        return fields[key].name, build(fields[key].type, item, join(path, key))
    # To YAML, `password:hunter2` without a space is a key: the part after the colon is not shown.
    name, colon, _ = key.partition(":")
    hint = "; a colon needs a space after it" if colon else nearest(name, fields)
    raise refuse(join(path, name), f"unknown key{hint}")


def _lack(path: str) -> tuple[str, Any]:
    raise refuse(path, "is required")


def _mapping(value: Any, path: str) -> ItemsView[str, Any]:
    if not isinstance(value, dict):
        raise refuse(path, f"expected a mapping of keys to values, got {kind_of(value)}")
    return value.items()


def _namespaces(value: Any, path: str) -> dict[str, NamespaceConfig]:
    items = _mapping(value, path)
    if not items:
        raise refuse(path, "is empty; leave the key out to use the well-known registries")
    return dict(gather(partial(_namespace, name, item, join(path, name)) for name, item in items))


def _namespace(name: str, value: Any, path: str) -> tuple[str, NamespaceConfig]:
    if isinstance(value, dict):
        wanted = DEFAULTS.get(name, {})
        value = {**value, **{key: each for key, each in wanted.items() if value.get(key) is None}}
    namespace = build(NamespaceConfig, value, path)
    if name == DOCKER_HUB:
        aliases = tuple(dict.fromkeys((*namespace.aliases, *DOCKER_HUB_ALIASES)))
        namespace = msgspec.structs.replace(namespace, aliases=aliases)
    return EVERY if name == EVERY else build(Annotated[str, parse_name], name, path), namespace

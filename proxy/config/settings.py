"""Values of keys that are given outside of the file: in the environment, and as options.

`ENTREPOT_DISK__PATH` is the key `disk.path`: two underscores separate two keys, and in the name of a
namespace each character that a variable cannot have is an underscore, as in
`ENTREPOT_NAMESPACES__DOCKER_IO__OFFLINE`.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Annotated, Any

import msgspec

from proxy.config.faults import Fault, Faults, gather, join, nearest, refuse
from proxy.config.fields import Section
from proxy.config.quantities import Reserve, Share
from proxy.config.schema import Config, NamespaceConfig, PinRule
from proxy.config.upstream import UpstreamConfig
from proxy.config.values import UNFIT
from proxy.config.yaml_text import parse_yaml

PREFIX = "ENTREPOT_"
_KEYS = re.compile(r"[^.\[\]]+")
# What stands for a section: the key of it that is meant.
SHORTHANDS: dict[type[Section], tuple[type | tuple[type, ...], str]] = {
    UpstreamConfig: ((str, list), "url"),
    PinRule: (str, "match"),
}


@dataclass(frozen=True, slots=True)
class Setting:
    """The value of one key, and its `source`: a variable or an option, which an error names.

    A text is read as the type of the key demands, an empty one is no value.  The name of a namespace may be
    several of `keys`, since it may hold dots, except in a `variable`.  With `default`, a value that is there
    stays.
    """

    source: str
    keys: tuple[str, ...]
    value: Any
    variable: bool = False
    default: bool = False


def environment(environ: Mapping[str, str]) -> list[Setting]:
    """The settings among the variables.

    One that names neither a key nor a part of one is none: others use the prefix too, such as Kubernetes for
    a Service called entrepot.  Raises Faults about one that names a key but for the number of underscores.
    """
    known = _top_keys()
    found, faults = [], []
    for name, value in environ.items():
        if name.startswith(PREFIX):
            keys = tuple(name.removeprefix(PREFIX).split("__"))
            if len(keys) > 1 or keys[0].lower() in known:
                found.append(Setting(name, keys, value, variable=True))
            elif meant := _with_more_underscores(keys[0]):
                faults.append(Fault("", f"is no key; did you mean {PREFIX}{meant}?", name))
    if faults:
        raise Faults(*faults)
    return sorted(found, key=lambda each: (len(each.keys), each.source))


@cache
def _top_keys() -> frozenset[str]:
    return frozenset(field.encode_name for field in msgspec.structs.fields(Config))


def _with_more_underscores(variable: str) -> str | None:
    """The variable of the key that this one would name if some of its underscores were two."""
    for field in msgspec.structs.fields(Config):
        section = field.encode_name.upper()
        if not variable.startswith(f"{section}_"):
            continue
        for key in _variables(field.type):
            form = f"{section}__{key}"
            if found := re.fullmatch(form.replace("__", "_").replace("{}", "(.+)"), variable):
                return form.format(*found.groups())
    return None


def _variables(kind: Any) -> Iterator[str]:
    """The keys in a value of that type; `{}` is the name in a mapping, or the number in a list."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType, Annotated):
        for each in inner if origin is not Annotated else inner[:1]:
            yield from _variables(each)
    elif origin in (dict, tuple):
        yield from (f"{{}}__{each}" for each in _variables(inner[origin is dict]))
    elif isinstance(kind, type) and issubclass(kind, Section):
        for field in msgspec.structs.fields(kind):
            name = field.encode_name.upper()
            yield from (name, *(f"{name}__{each}" for each in _variables(field.type)))


def parse_setting(text: str) -> Setting:
    """Read `key=value`, with the path of the key as errors print it.  Raises ValueError."""
    path, sign, value = text.partition("=")
    keys = tuple(_KEYS.findall(path))
    if not sign or not keys:
        raise ValueError("expected key=value, such as disk.path=/var/lib/entrepot")
    return Setting("--set", keys, value)


def apply(tree: dict[str, Any], settings: Iterable[Setting]) -> dict[str, str]:
    """Put the settings into the tree; the source of each key by its path.  Raises Faults."""
    sources: dict[str, str] = {}

    def put(setting: Setting) -> None:
        placement = _Placement(setting)
        try:
            placement.put(Config, tree, setting.keys, "")
        except Faults as error:
            named = (Fault(each.path, each.cause, setting.source) for each in error.faults)
            raise Faults(*named) from None
        sources[placement.path] = setting.source

    gather(partial(put, each) for each in settings)
    return sources


class _Placement:
    """Finds the place of one setting; `path` is then that of its key."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self.path = ""

    def put(self, kind: Any, node: Any, keys: tuple[str, ...], path: str) -> Any:
        """The node with the value in it.  A mapping or list that is there is changed."""
        self.path = path
        if not keys:
            kept = self._setting.default and node is not None
            return node if kept else _value(kind, self._setting.value, path)
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            return self.put(typing.get_args(kind)[0], node, keys, path)
        if isinstance(kind, type) and issubclass(kind, Section):
            return self._in_section(kind, node, keys, path)
        if typing.get_origin(kind) is tuple:
            return self._in_list(typing.get_args(kind)[0], node, keys, path)
        if any(issubclass(each, dict) for each in _plain(kind)):
            return self._in_mapping(kind, node, keys, path)
        raise refuse(path, f"has no key {keys[0]} in it")

    def _in_section(self, kind: type[Section], node: Any, keys: tuple[str, ...], path: str) -> Any:
        if kind in SHORTHANDS and isinstance(node, SHORTHANDS[kind][0]):
            node = {SHORTHANDS[kind][1]: node}
        fields = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
        key = keys[0].lower()
        if key not in fields:
            raise refuse(join(path, key), f"unknown key{nearest(key, fields)}")
        return self._within(node, key, fields[key], keys[1:], path)

    def _in_mapping(self, kind: Any, node: Any, keys: tuple[str, ...], path: str) -> Any:
        of_namespaces = kind == dict[str, NamespaceConfig]
        count = _name_length(keys) if of_namespaces and not self._setting.variable else 1
        name = ".".join(keys[:count])
        if self._setting.variable:
            known = node if isinstance(node, dict) else {}
            same = (each for each in known if _as_variable(each) == _as_variable(name))
            name = next(same, name.lower() if of_namespaces else name)
        base = typing.get_args(kind)[1] if typing.get_origin(kind) is dict else str
        return self._within(node, name, base, keys[count:], path)

    def _within(self, node: Any, key: str, kind: Any, keys: tuple[str, ...], path: str) -> Any:
        if node is not None and not isinstance(node, dict):
            raise refuse(path, f"is no mapping, so it has no key {key}")
        node = {} if node is None else node
        node[key] = self.put(kind, node.get(key), keys, join(path, key))
        return node

    def _in_list(self, kind: Any, node: Any, keys: tuple[str, ...], path: str) -> Any:
        items = list(node) if isinstance(node, list) else []
        if not keys[0].isdecimal() or int(keys[0]) > len(items):
            raise refuse(path, f"expected the number of an item from 0 to {len(items)}, got {keys[0]}")
        number = int(keys[0])
        item = self.put(kind, items[number] if number < len(items) else None, keys[1:], f"{path}[{number}]")
        items[number : number + 1] = [item]
        return items


def _name_length(keys: tuple[str, ...]) -> int:
    """How many of the keys are the name of a namespace: those before a key that a namespace has."""
    known = NamespaceConfig.__struct_fields__
    return next((number for number in range(1, len(keys)) if keys[number] in known), len(keys))


def _as_variable(name: str) -> str:
    return re.sub(r"[^A-Z0-9]", "_", name.upper())


def _value(kind: Any, value: Any, path: str) -> Any:
    """The value as YAML would give it to the type.  Raises Faults."""
    if not isinstance(value, str):
        return value
    plain = _plain(kind)
    if not value or (value == "null" and type(None) in plain):
        return None
    if UNFIT.search(value):
        raise refuse(path, "holds a line break or another control character")
    if any(issubclass(each, dict | tuple | Section) for each in plain):
        try:
            found = parse_yaml(value)
        except ValueError as error:
            raise refuse(path, error) from None
        return [found] if typing.get_origin(kind) is tuple and isinstance(found, str) else found
    if bool in plain and value in ("true", "false"):
        return value == "true"
    if value.isdecimal() and not plain.isdisjoint((int, float, Share, Reserve)):
        return int(value)
    return value


def _plain(kind: Any) -> set[type]:
    """The classes of the values of a type."""
    origin = typing.get_origin(kind)
    if origin is Annotated:
        return _plain(typing.get_args(kind)[0])
    if origin in (typing.Union, types.UnionType):
        return set().union(*map(_plain, typing.get_args(kind)))
    if origin is typing.Literal:
        return {str}
    return {origin or kind}

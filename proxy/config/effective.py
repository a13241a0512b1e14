"""Every value of a configuration, and where it comes from."""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from proxy.config.faults import join, within
from proxy.config.fields import Section
from proxy.config.loader import Given, build, load_given
from proxy.config.notation import is_secret, written
from proxy.config.schema import Config, NamespaceConfig
from proxy.config.settings import SHORTHANDS, Setting
from proxy.config.wellknown import DEFAULTS, DOCKER_HUB
from proxy.config.yaml_text import key_lines

DEFAULT = "default"
BUILT_IN = "built in"  # the well-known registries, and what they need
HIDDEN = "***"


class EffectiveValue(msgspec.Struct, frozen=True):
    """The value of the key at `key`, as the file would have it, and its `source`.

    A source is a file and line, a variable, `--set`, `default` or `built in`.  A secret is HIDDEN.
    """

    key: str
    value: Any
    source: str

    @property
    def given(self) -> bool:
        """Whether somebody has chosen it."""
        return self.source not in (DEFAULT, BUILT_IN)


@dataclass(frozen=True, slots=True)
class Difference:
    """A key whose values differ; None where it is not there.  Both are HIDDEN for a secret."""

    key: str
    old: Any
    new: Any


class AnyVariables(dict[str, str]):
    """An environment for a file that is only compared: a variable stands for itself."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> str:
        return f"${{{name}}}"


def effective(
    path: Path | None, environ: Mapping[str, str] = os.environ, settings: Sequence[Setting] = ()
) -> list[EffectiveValue]:
    """The values of all keys, in the order of the schema.  Raises ConfigError."""
    return [each.shown for each in _Values(path, load_given(path, environ, settings)).all()]


def differences(old: Path | None, new: Path | None) -> list[Difference]:
    """What differs between two files; None is a server without a configuration.  Raises ConfigError.

    The environment is left out, and values that mean the same are the same.
    """
    before, after = (
        {each.key: each for each in _Values(path, load_given(path, AnyVariables())).all()}
        for path in (old, new)
    )
    found = []
    for key in dict.fromkeys((*before, *after)):
        one, other = before.get(key), after.get(key)
        if _differ(one, other):
            found.append(
                Difference(
                    key,
                    None if one is None else one.shown.value,
                    None if other is None else other.shown.value,
                )
            )
    return found


def _differ(one: _ReadValue | None, other: _ReadValue | None) -> bool:
    """Where one has no such key, as it has no such namespace, the defaults of the other are no difference."""
    if one is not None and other is not None:
        return bool(one.meaning != other.meaning)
    there = one or other
    return there is not None and there.source != DEFAULT and there.meaning != ()


@dataclass(frozen=True, slots=True)
class _ReadValue:
    """A value as it is written, and its `meaning`: what the server makes of it."""

    key: str
    value: Any
    source: str
    meaning: Any
    secret: bool = False

    @property
    def shown(self) -> EffectiveValue:
        return EffectiveValue(self.key, HIDDEN if self.secret else self.value, self.source)


class _Values:
    """Lists the values of a configuration, in the order of the schema."""

    def __init__(self, path: Path | None, given: Given) -> None:
        self._path = path
        self._given = given
        self._lines = {} if path is None else key_lines(path)

    def all(self) -> Iterator[_ReadValue]:
        for each in self._section(Config, self._given.tree, ""):
            yield self._completed(each)

    def _completed(self, row: _ReadValue) -> _ReadValue:
        """With the value of a key that depends on others, or has more than was given."""
        config = self._given.config
        if row.key == "admin" and row.source == DEFAULT:
            return replace(row, value=str(config.admin) if config.admin else "off", meaning=config.admin)
        if row.key == "default_namespace" and row.source == DEFAULT:
            return replace(row, value=config.default_namespace, meaning=config.default_namespace)
        if row.key == f"namespaces.{DOCKER_HUB}.aliases":
            aliases = config.namespaces[DOCKER_HUB].aliases
            source = BUILT_IN if row.source == DEFAULT else row.source
            return replace(row, value=list(aliases), meaning=aliases, source=source)
        return row

    def _section(self, kind: type[Section], node: Any, path: str) -> Iterator[_ReadValue]:
        if kind in SHORTHANDS and isinstance(node, SHORTHANDS[kind][0]):
            node = {SHORTHANDS[kind][1]: node}
        needed = DEFAULTS.get(path.removeprefix("namespaces."), {}) if kind is NamespaceConfig else {}
        for field in msgspec.structs.fields(kind):
            key = field.encode_name
            inside, item = join(path, key), node.get(key)
            if item is not None:
                yield from self._value(field.type, item, inside)
            elif key in needed:
                yield _ReadValue(inside, needed[key], BUILT_IN, needed[key])
            elif not field.required:
                yield from self._default(field, inside)

    def _default(self, field: msgspec.structs.FieldInfo, path: str) -> Iterator[_ReadValue]:
        made = field.default_factory is not msgspec.NODEFAULT
        default = field.default_factory() if made else field.default
        if isinstance(default, Section):
            yield from self._section(type(default), {}, path)
        else:
            yield _ReadValue(path, written(field.type, default), DEFAULT, default)

    def _value(self, kind: Any, node: Any, path: str) -> Iterator[_ReadValue]:
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin in (typing.Union, types.UnionType):
            yield from self._value(arguments[0], node, path)
        elif isinstance(kind, type) and issubclass(kind, Section):
            if node == {}:  # such as store: {}, which says something
                yield _ReadValue(path, {}, self._source(path), {})
            yield from self._section(kind, node, path)
        elif origin is dict and node:
            for name, item in node.items():
                yield from self._value(arguments[1], item, join(path, name))
        elif origin is tuple and node and isinstance(arguments[0], type):  # of sections
            for number, item in enumerate(node):
                yield from self._value(arguments[0], item, f"{path}[{number}]")
        else:
            yield _ReadValue(path, node, self._source(path), build(kind, node, path), is_secret(kind))

    def _source(self, path: str) -> str:
        """What gave the value: the nearest of what contains it."""
        sources = self._given.sources
        if around := [each for each in sources if within(path, each)]:
            return sources[max(around, key=len)]
        if inside := [each for each in sources if within(each, path)]:  # of a list, an item
            return sources[inside[0]]
        lines = [each for each in self._lines if within(path, each)]
        return f"{self._path}:{self._lines[max(lines, key=len)]}" if lines else BUILT_IN

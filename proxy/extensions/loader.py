"""Finds extensions among the installed packages, and makes those that the configuration names.

What is wrong with one is a StartError, which names the key, the extension, its package and the cause.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import msgspec

from proxy.config.errors import StartError
from proxy.config.extensions import ExtensionConfig, ExtensionKind
from proxy.config.faults import nearest
from proxy.config.values import parse_path
from proxy.extensions.isolation import ExtensionFault, ExtensionLate, Isolation
from proxy.extensions.kinds import GROUPS
from proxy.extensions.protocols import VERSION

START = 30.0  # seconds in which an extension has to be imported and made


@dataclass(frozen=True, slots=True)
class InstalledExtension:
    """An entry point, and the package that has it."""

    kind: ExtensionKind
    entry: EntryPoint

    @property
    def package(self) -> str:
        return self.entry.dist.name if self.entry.dist else "unknown"

    @property
    def version(self) -> str:
        return self.entry.dist.version if self.entry.dist else "unknown"

    def __str__(self) -> str:
        return f"{self.entry.name} of {self.package} {self.version}"


@dataclass(frozen=True, slots=True)
class MadeExtension:
    """An extension that was made, and the thread in which its code runs."""

    installed: InstalledExtension
    isolation: Isolation
    made: Any


def installed() -> list[InstalledExtension]:
    """All that installed packages offer."""
    return [
        InstalledExtension(kind, each)
        for kind, group in GROUPS.items()
        for each in sorted(entry_points(group=group.name))
    ]


def find(name: str, config: ExtensionConfig) -> InstalledExtension:
    """Raises StartError."""
    key, wanted, group = f"extensions.{name}", config.use or name, GROUPS[config.kind].name
    offered = [InstalledExtension(config.kind, each) for each in entry_points(group=group)]
    found = [each for each in offered if each.entry.name == wanted]
    if not found:
        hint = nearest(wanted, sorted({each.entry.name for each in offered})) if offered else ""
        raise StartError(
            f"{key}: no installed package offers {wanted} in {group}{hint}: install it into the environment"
            " of the server"
        )
    if len(packages := sorted({each.package for each in found})) > 1:
        raise StartError(f"{key}: {' and '.join(packages)} both offer {wanted} in {group}: uninstall one")
    return found[0]


def make(name: str, config: ExtensionConfig) -> MadeExtension:
    """Import an extension and make it, both in its thread.  Raises StartError."""
    found, isolation = find(name, config), Isolation(name)

    async def work() -> Any:
        return _make(found, config.settings)

    try:
        return MadeExtension(found, isolation, isolation.run(work, START))
    except ExtensionFault as error:
        ending = isolation.close()
        if not isinstance(error, ExtensionLate):
            ending.join()
        key = error.key if isinstance(error, _Unusable) else ""
        raise StartError(f"extensions.{name}{key}: {found}: {error}") from None


class _Unusable(ExtensionFault):
    """`key` is the path of a key within that of the extension."""

    def __init__(self, cause: str, key: str = "") -> None:
        super().__init__(cause)
        self.key = key


def _make(found: InstalledExtension, settings: Mapping[str, Any]) -> Any:
    factory = found.entry.load()
    _check_version(found, factory)
    if not callable(factory):
        raise _Unusable(f"{found.entry.value} is {type(factory).__name__}, and makes nothing")
    kind = getattr(factory, "Settings", None)
    if kind is None:
        if settings:
            raise _Unusable("unknown key: it has no settings", f".settings.{next(iter(settings))}")
        given: tuple[Any, ...] = ()
    else:
        given = (_settings(kind, settings),)
    try:
        made = factory(*given)
    except ValueError as error:
        raise _Unusable(str(error), ".settings") from None
    _check_methods(found.kind, made)
    return made


def _check_version(found: InstalledExtension, factory: Any) -> None:
    version = getattr(factory, "protocol", None)
    if version is None:
        raise _Unusable(f"does not say which version of the protocol it keeps: it needs protocol = {VERSION}")
    if version != VERSION:
        raise _Unusable(
            f"keeps version {version} of the protocol, and this server knows {VERSION}:"
            f" install another version of {found.package}"
        )


def _check_methods(kind: ExtensionKind, made: Any) -> None:
    for method in GROUPS[kind].methods:
        if (found := getattr(made, method, None)) is None:
            raise _Unusable(f"{type(made).__name__} has no method {method}, which each {kind} has")
        if not inspect.iscoroutinefunction(found):
            raise _Unusable(f"{type(made).__name__}.{method} is not an async method")


def _settings(kind: Any, settings: Mapping[str, Any]) -> Any:
    names = _names(kind)
    for key in settings:
        if key not in names:
            raise _Unusable(f"unknown key{nearest(key, names)}", f".settings.{key}")
    try:
        # Not strictly: values from variables are text.
        return msgspec.convert(settings, kind, strict=False, dec_hook=_decode)
    except msgspec.ValidationError as error:
        text, _, place = str(error).partition(" - at `$")
        if text.startswith("Object missing required field"):
            raise _Unusable("is required", f".settings.{text.split('`')[1]}") from None
        raise _Unusable(text, f".settings{place.rstrip('`')}") from None


def _decode(kind: type, value: object) -> Any:
    """A value of a type that msgspec does not know."""
    if kind is Path:
        return parse_path(value)
    raise NotImplementedError


def _names(kind: Any) -> Iterable[str]:
    if dataclasses.is_dataclass(kind):
        return [each.name for each in dataclasses.fields(kind)]
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return [each.encode_name for each in msgspec.structs.fields(kind)]
    raise _Unusable("Settings is neither a dataclass nor a msgspec.Struct")

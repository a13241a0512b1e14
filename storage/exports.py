"""The public names of a package, each imported when it is first used: who imports one loads no other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module


def exports(package: str, modules: Mapping[str, str]) -> Callable[[str], object]:
    """The `__getattr__` of a package (PEP 562); `modules` has the names that each module defines.

    It raises AttributeError for other names.
    """
    defined = {name: module for module, names in modules.items() for name in names.split()}

    def __getattr__(name: str) -> object:
        if name not in defined:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(defined[name]), name)

    return __getattr__

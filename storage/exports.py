"""The public names of a package, each imported when it is first used: who imports one loads no other."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec


class PublicNames:
    """The names of `package`; `modules` has those that each module defines.

    needs: the library of an extra that each of these modules needs, and the extra
    """

    def __init__(
        self, package: str, modules: Mapping[str, str], needs: Mapping[str, tuple[str, str]] | None = None
    ) -> None:
        self._package = package
        self._defined = {name: module for module, names in modules.items() for name in names.split()}
        self._needs = needs or {}

    def get(self, name: str) -> object:
        """The `__getattr__` of the package (PEP 562).

        If the package has no `__all__`, that is what is installed.  Raises AttributeError for other names,
        ImportError for those whose library is not installed.
        """
        if name == "__all__":
            return self.installed()
        if name not in self._defined:
            raise AttributeError(f"module {self._package!r} has no attribute {name!r}")
        module = self._defined[name]
        try:
            return getattr(import_module(module), name)
        except ModuleNotFoundError as error:
            library, extra = self._needs.get(module, ("", ""))
            if error.name != library:
                raise
            cause = f"{self._package}.{name} needs {library}: install entrepot[{extra}]"
            raise ImportError(cause, name=library) from error

    def installed(self) -> list[str]:
        """Those whose libraries are installed, sorted."""
        libraries = {library for library, _ in self._needs.values()}
        absent = {each for each in libraries if find_spec(each) is None}
        return sorted(
            name
            for name, module in self._defined.items()
            if module not in self._needs or self._needs[module][0] not in absent
        )

    def listed(self) -> list[str]:
        """The `__dir__` of the package: help() and completion show the names before they are used."""
        return sorted({*vars(sys.modules[self._package]), *self.installed()})

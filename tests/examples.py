"""The programs of examples/."""

from __future__ import annotations

import importlib.util
from types import ModuleType

from tests.documentation import ROOT


def imported(name: str) -> ModuleType:
    """The module of a file of examples/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

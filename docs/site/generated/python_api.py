"""The Python API, of its docstrings: what packages name in __all__."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from generated.markdown import code, paragraphs

PACKAGES = (
    "storage",
    "proxy",
    "proxy.extensions.protocols",
    "proxy.testing.registry",
    "proxy.testing.mirror",
    "proxy.testing.failures",
    "proxy.testing.recording",
)
_HEAD = """\
# Python API

The classes and functions for programs, by their modules. [Use it as a library](../library.md) shows how
they are used together.
"""


class Written:
    """An annotation that shows as it is written."""

    def __init__(self, text: object) -> None:
        self._text = text if isinstance(text, str) else inspect.formatannotation(text)

    def __repr__(self) -> str:
        return self._text


def page() -> str:
    parts = [_HEAD]
    for module, names in public().items():
        parts += [f"## {code(module.__name__)}", paragraphs(inspect.getdoc(module) or "")]
        for name in names:
            parts += _entry(name, getattr(module, name))
    return "\n\n".join(parts) + "\n"


def public() -> dict[ModuleType, list[str]]:
    """The names of the API, by their modules."""
    modules = map(importlib.import_module, PACKAGES)
    return {module: [*module.__all__] for module in modules}


def _entry(name: str, value: Any) -> Iterator[str]:
    yield f"### {code(name)}"
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        yield f"```python\n{name} = {value!r}\n```"
        return
    head = "class" if inspect.isclass(value) else _keyword(value)
    yield f"```python\n{head} {name}{_signature(value)}\n```"
    yield paragraphs(inspect.getdoc(value) or "")
    if inspect.isclass(value):
        for method, function in inspect.getmembers(value, inspect.isroutine):
            if method.startswith("_") or not getattr(function, "__qualname__", "").startswith(f"{name}."):
                continue
            yield f"#### {code(f'{name}.{method}')}"
            yield f"```python\n{_keyword(function)} {method}{_signature(function)}\n```"
            yield paragraphs(inspect.getdoc(function) or "")


def _keyword(function: Any) -> str:
    return "async def" if inspect.iscoroutinefunction(function) else "def"


def _signature(value: Any) -> str:
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):  # exceptions, and what is written in C
        return "(...)"
    parameters = [_as_written(each) for each in found.parameters.values()]
    returned = found.return_annotation
    shown = returned if returned is found.empty else Written(returned)
    text = str(found.replace(parameters=parameters, return_annotation=shown))
    return text if len(text) < 90 else _broken(parameters, text)


def _as_written(parameter: inspect.Parameter) -> inspect.Parameter:
    if parameter.annotation is not parameter.empty:
        parameter = parameter.replace(annotation=Written(parameter.annotation))
    if parameter.default is parameter.empty:
        return parameter
    if callable(parameter.default):
        name = f"{parameter.default.__module__}.{parameter.default.__qualname__}"
        parameter = parameter.replace(default=Written(name))
    elif parameter.default is os.environ:  # it has the secrets of whoever builds the site
        parameter = parameter.replace(default=Written("os.environ"))
    elif "<" in repr(parameter.default):  # an object that holds functions
        parameter = parameter.replace(default=Written(f"{type(parameter.default).__name__}(...)"))
    return parameter


def _broken(parameters: list[inspect.Parameter], text: str) -> str:
    """A long signature with a line for each parameter."""
    lines = []
    starred = any(each.kind is each.VAR_POSITIONAL for each in parameters)
    for each in parameters:
        if each.kind is each.KEYWORD_ONLY and not starred:
            lines.append("    *,")
            starred = True
        lines.append(f"    {each},")
    return "\n".join(["(", *lines, ")"]) + text.rpartition(")")[2]

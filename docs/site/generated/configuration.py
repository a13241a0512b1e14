"""Every key of the configuration, of the JSON Schema that editors use."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

from generated.markdown import code, prose, table

NAME = "NAME"
_HEAD = """\
# Keys of the configuration

All keys, as the JSON Schema of the configuration has them, which `entrepot config schema` prints.
[Configuration](../configuration.md) explains them, with examples. A key of a list is written with `[]`, and
`NAME` stands for a name that you choose.
"""


def page() -> str:
    schema = json.loads(files("proxy.config").joinpath("config.schema.json").read_text())
    places = _places(schema)
    parts = [_HEAD, _section("The file", [], schema, places)]
    parts += [
        _section(code(paths[0]), paths[1:], schema["definitions"][name], places)
        for name, paths in places.items()
    ]
    return "\n\n".join(parts) + "\n"


def _places(schema: dict[str, Any]) -> dict[str, list[str]]:
    """Where each definition is used, by its name, in the order of the file."""
    found: dict[str, list[str]] = {}
    pending = [("", schema)]
    while pending:
        path, section = pending.pop(0)
        for key, value in section["properties"].items():
            for suffix, name in _references(value):
                place = f"{path}.{key}{suffix}".lstrip(".")
                known = found.setdefault(name, [])
                known.append(place)
                if len(known) == 1:
                    pending.append((place, schema["definitions"][name]))
    return found


def _references(value: Any, suffix: str = "") -> Iterator[tuple[str, str]]:
    """The definitions that a key holds, each with what is between."""
    if "$ref" in value:
        yield suffix, value["$ref"].rpartition("/")[2]
    for each in value.get("anyOf", ()):
        yield from _references(each, suffix)
    for key, more in (("items", "[]"), ("additionalProperties", f".{NAME}")):
        if isinstance(value.get(key), dict):
            yield from _references(value[key], suffix + more)


def _section(title: str, others: list[str], schema: dict[str, Any], places: dict[str, list[str]]) -> str:
    required = schema.get("required", ())
    rows = [_row(key, value, key in required, places) for key, value in schema["properties"].items()]
    also = f"\n\nAlso: {', '.join(map(code, others))}." if others else ""
    head = f"## {title}\n\n{prose(schema['description'])}{also}\n\n"
    return head + table(("Key", "Type", "Default", "Meaning"), rows)


def _row(
    key: str, value: dict[str, Any], required: bool, places: dict[str, list[str]]
) -> tuple[str, str, str, str]:
    meaning, _, kind = value["description"].rpartition("Type: ")
    default = "required" if required else code(_written(value["default"])) if "default" in value else ""
    said = "" if meaning.startswith("See below") else prose(meaning)
    for name in dict.fromkeys(name for _, name in _references(value)):
        place = places[name][0]
        said += f" See [{code(place)}](#{re.sub(r'[^a-z_]', '', place.lower())})."
    return code(key), prose(kind), default, said


def _written(value: object) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)

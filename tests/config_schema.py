"""The JSON Schema of the configuration, made of the types in proxy/config and the tables of the manual.

`python -m tests.config_schema` writes it, and what the chart has of it; a test checks that it has been done.
"""

from __future__ import annotations

import json
import re
import types
import typing
from pathlib import Path
from typing import Any

import msgspec

from proxy.config.fields import Section
from proxy.config.notation import notation_of, written
from proxy.config.schema import Config
from proxy.config.settings import SHORTHANDS

ROOT = Path(__file__).parent.parent
FILE = ROOT / "proxy" / "config" / "config.schema.json"
MANUAL = ROOT / "docs" / "configuration.md"
_ROW = re.compile(r"^\| `(?:([a-z_]+)\.)?([a-z_]+)` \|\s*(.*?)\s*\|\s*(.*?)\s*\|\s*(.*?)\s*\|$", re.MULTILINE)
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")

Table = dict[str, tuple[str, str]]  # by key: the type and the meaning


def tables() -> list[Table]:
    """The tables of keys in the manual; `caches.keep_for` in one is a key of another."""
    found = []
    for block in re.split(r"\n\n", MANUAL.read_text(encoding="utf-8")):
        parts: dict[str, Table] = {}
        for outer, key, kind, _, meaning in _ROW.findall(block):
            parts.setdefault(outer, {})[key] = _plain(kind), _plain(meaning)
        found += parts.values()
    return found


def _plain(text: str) -> str:
    return _LINK.sub(r"\1", text).removesuffix(" See below.").strip()


class _Maker:
    def __init__(self) -> None:
        self.definitions: dict[str, Any] = {}
        self._tables = tables()

    def section(self, kind: type[Section]) -> dict[str, Any]:
        fields = msgspec.structs.fields(kind)
        names = {field.encode_name for field in fields}
        table = max(self._tables, key=lambda each: (len(names & each.keys()), -len(each)))
        found: dict[str, Any] = {
            "type": "object",
            "description": " ".join((kind.__doc__ or "").partition("\n\n")[0].split()),
            "additionalProperties": False,
            "properties": {field.encode_name: self._property(field, table) for field in fields},
        }
        if required := [field.encode_name for field in fields if field.required]:
            found["required"] = required
        return found

    def _property(self, field: msgspec.structs.FieldInfo, table: Table) -> dict[str, Any]:
        schema = self._schema(field.type)
        if not field.required:  # a key without a value counts as left out
            schema = {"anyOf": [schema, {"type": "null"}]}
        kind, meaning = table[field.encode_name]
        described = f"{meaning}\n\nType: {kind}" if meaning else f"Type: {kind}"
        plain = field.default is not msgspec.NODEFAULT and not isinstance(field.default, Section)
        if plain and (default := written(field.type, field.default)) is not None:
            schema = {**schema, "default": default}
        return {"description": described, **schema}

    def _schema(self, kind: Any) -> dict[str, Any]:
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin in (typing.Union, types.UnionType):
            return self._schema(arguments[0])
        if origin is tuple:
            return {"type": "array", "items": self._schema(arguments[0])}
        if origin is dict:
            return {"type": "object", "additionalProperties": self._schema(arguments[1])}
        if isinstance(kind, type) and issubclass(kind, Section):
            return self._reference(kind)
        return dict(notation_of(kind).schema)

    def _reference(self, kind: type[Section]) -> dict[str, Any]:
        if kind.__name__ not in self.definitions:
            self.definitions[kind.__name__] = {}  # it may refer to itself
            self.definitions[kind.__name__] = self.section(kind)
        reference = {"$ref": f"#/definitions/{kind.__name__}"}
        if kind not in SHORTHANDS:
            return reference
        text, several = {"type": "string"}, {"type": "array", "items": {"type": "string"}}
        given = SHORTHANDS[kind][0]
        return {"anyOf": [reference, text, *([several] if isinstance(given, tuple) else [])]}


def made() -> str:
    """The text of the file."""
    maker = _Maker()
    whole = maker.section(Config)
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Configuration of Entrepôt",
        **whole,
        "definitions": dict(sorted(maker.definitions.items())),
    }
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    from tests import chart

    FILE.write_text(made(), encoding="utf-8")
    chart.SCHEMA.write_text(chart.schema(), encoding="utf-8")  # which has it in it

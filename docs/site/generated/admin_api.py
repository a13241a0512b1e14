"""The HTTP API of the admin listener, of its OpenAPI document."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import yaml

from generated.markdown import code, prose, table

_HEAD = """\
# Admin API

`GET /api/v1/openapi.json` of the admin listener answers this as an OpenAPI document, for generators of
clients. [Commands](../commands.md) do the same from a shell; with `--json` they print what the API answers.
"""


def document() -> dict[str, Any]:
    text = files("proxy.admin.api").joinpath("openapi.yaml").read_text()
    found: dict[str, Any] = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return found


def page() -> str:
    api = document()
    parts = [_HEAD, prose(api["info"]["description"]), "## Operations"]
    for path, item in api["paths"].items():
        for method, operation in item.items():
            parts += _operation(f"{method.upper()} {path}", operation, api["components"])
    parts.append("## Schemas")
    for name, schema in api["components"]["schemas"].items():
        parts.append(f"### {name}")
        parts += _described(schema)
    return "\n\n".join(parts) + "\n"


def _operation(title: str, operation: dict[str, Any], components: dict[str, Any]) -> Iterator[str]:
    yield f"### {code(title)}"
    yield prose(operation["summary"])
    if operation.get("parameters"):
        given = [_resolved(each, components["parameters"]) for each in operation["parameters"]]
        yield table(
            ("Parameter", "Type", "", "Meaning"),
            [
                (
                    code(each["name"]),
                    _kind(each["schema"]),
                    _presence(each["schema"], each.get("required", False)),
                    prose(each.get("description", "")),
                )
                for each in given
            ],
        )
    for kind, body in operation.get("requestBody", {}).get("content", {}).items():
        yield f"The body, {code(kind)}:"
        yield from _described(body.get("schema", {}))
    yield table(("Status", "Answer", "Content"), _answers(operation["responses"], components["responses"]))


def _answers(responses: dict[str, Any], known: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for status, response in responses.items():
        found = _resolved(response, known)
        content = [
            f"{code(kind)}: {_kind(each.get('schema', {}))}"
            for kind, each in found.get("content", {}).items()
        ]
        shown = "otherwise" if status == "default" else status
        yield shown, prose(found["description"]), "; ".join(content)


def _described(schema: dict[str, Any]) -> Iterator[str]:
    if "description" in schema:
        yield prose(schema["description"])
    if "properties" not in schema:
        yield f"{_kind(schema)}."
        return
    required = schema.get("required", ())
    rows = [
        (code(name), _kind(each), _presence(each, name in required), prose(each.get("description", "")))
        for name, each in schema["properties"].items()
    ]
    yield table(("Field", "Type", "", "Meaning"), rows)


def _resolved(value: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = known[value["$ref"].rpartition("/")[2]] if "$ref" in value else value
    return found


def _presence(schema: dict[str, Any], required: bool) -> str:
    if required:
        return "required"
    return f"default {code(json.dumps(schema['default']))}" if "default" in schema else ""


def _kind(schema: dict[str, Any]) -> str:
    """The type of a value in words, with links to what it names."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return " or ".join(map(_kind, schema[key]))
    if "enum" in schema:
        return " ".join(code(json.dumps(each)) for each in schema["enum"])
    if "const" in schema:
        return code(json.dumps(schema["const"]))
    kind = schema.get("type", "anything")
    kinds = kind if isinstance(kind, list) else [kind]
    shown = " or ".join(kinds)
    if "array" in kinds and "items" in schema:
        return shown.replace("array", f"list of {_kind(schema['items'])}")
    if isinstance(schema.get("additionalProperties"), dict):
        return f"{shown} of {_kind(schema['additionalProperties'])}"
    return shown

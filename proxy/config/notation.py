"""How values are written in the file: what each type of a key takes, and how its defaults are written.

The types are known by the functions that parse them; a new one needs a row here.  Schemas are JSON Schemas of
draft 7, and their patterns those of ECMAScript.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from proxy.config import extensions, hosts, oidc, peers, policy, quantities, registry_hosts, shared, values
from proxy.config.quantities import Reserve, Share
from proxy.config.values import Secret

Schema = Mapping[str, Any]
_VARIABLE = r"\$\{"  # in a text; what it stands for is not known
_DURATION = quantities.DURATION.replace("([0-9]{1,9})", "[0-9]{1,9}")
_SIZE = r"[0-9]{1,9} ?(?:[KMGTkmgt][Ii]?)?[Bb]|[0-9]{1,9} ?[KMGTkmgt][Ii]?"
_UNITS = ((86_400_000, "d"), (3_600_000, "h"), (60_000, "m"), (1000, "s"), (1, "ms"))
_SIZES = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "B"))


@dataclass(frozen=True, slots=True)
class Notation:
    """The `schema` of what is written, and how a parsed value is written again: None as `nothing`."""

    schema: Schema
    write: Callable[[Any], Any] = lambda value: value
    nothing: str | None = None


def text(pattern: str = "", **more: Any) -> dict[str, Any]:
    """The schema of a text that matches a pattern as a whole, or has a variable in it."""
    matching = {"pattern": f"^(?:{pattern})$|{_VARIABLE}"} if pattern else {"minLength": 1}
    return {"type": "string", **matching, **more}


def one_of(*names: object) -> dict[str, Any]:
    """The schema of a choice, which a variable may make."""
    return {"anyOf": [{"enum": list(names)}, {"type": "string", "pattern": _VARIABLE}]}


def write_duration(seconds: float) -> str | int:
    """As the file has it: `1h30m`; 0 without a unit."""
    left, parts = round(seconds * 1000), ""
    for length, unit in _UNITS:
        number, left = divmod(left, length)
        parts += f"{number}{unit}" if number else ""
    return parts or 0


def write_size(count: int) -> str:
    length, unit = next(each for each in _SIZES if count % each[0] == 0)
    return f"{count // length}{unit}"


def _or_forever(word: str) -> Callable[[float], Any]:
    return lambda seconds: word if math.isinf(seconds) else write_duration(seconds)


def _write_share(share: Share) -> str | int:
    return write_size(share.size) if share.size else f"{share.percent}%" if share.percent else 0


def _write_reserve(reserve: Reserve) -> str | int:
    return reserve.requests or f"{reserve.percent}%"


_TEXT = Notation(text())
_OFF = {"enum": ["off", False]}
_SPAN = text(f"(?=.){_DURATION}")
_BYTES = text(_SIZE)
_ZERO = {"enum": [0, "0"]}
_SECRET = Notation(text(writeOnly=True))
_TEXTS = {"type": "array", "items": text(), "minItems": 1}
_CLAIM = {"type": ["string", "integer", "boolean"]}
_CLAIMS = {
    "type": "object",
    "minProperties": 1,
    "additionalProperties": {"anyOf": [_CLAIM, {"type": "array", "items": _CLAIM, "minItems": 1}]},
}
_COUNT = {"type": "integer", "minimum": 1, "maximum": values.MAX_COUNT}
_NOTATIONS: dict[Callable[[Any], Any], Notation] = {
    extensions.parse_settings: Notation({"type": "object"}),
    hosts.parse_address: Notation(text(), str),
    hosts.parse_admin: Notation({"anyOf": [text(), _OFF]}, str, "off"),
    hosts.parse_network: Notation(text(), str),
    hosts.parse_urls: Notation({"anyOf": [text(), _TEXTS]}, list),
    hosts.parse_proxy: _SECRET,
    hosts.parse_target: _SECRET,
    oidc.parse_audiences: Notation({"anyOf": [text(), _TEXTS]}),
    oidc.parse_claims: Notation(_CLAIMS),
    peers.parse_fleet_secret: _SECRET,
    peers.parse_service: Notation(text("[^:]+:[0-9]+")),
    quantities.parse_duration: Notation({"anyOf": [_SPAN, _ZERO]}, write_duration),
    quantities.parse_timeout: Notation(_SPAN, write_duration),
    quantities.parse_grace: Notation(_SPAN, write_duration),
    quantities.parse_freshness: Notation(
        {"anyOf": [_SPAN, _ZERO, one_of("forever")]}, _or_forever("forever")
    ),
    quantities.parse_keep: Notation({"anyOf": [_SPAN, one_of("never")]}, _or_forever("never")),
    quantities.parse_every: Notation({"anyOf": [_SPAN, _OFF]}, write_duration, "off"),
    quantities.parse_size: Notation(_BYTES, write_size),
    quantities.parse_rate: Notation({"anyOf": [_BYTES, _OFF]}, write_size, "off"),
    quantities.parse_memory: Notation(
        {"anyOf": [_BYTES, _OFF]}, lambda count: write_size(count) if count else "off"
    ),
    quantities.parse_share: Notation({"anyOf": [text(f"[0-9]{{1,2}} ?%|{_SIZE}"), _ZERO]}, _write_share),
    quantities.parse_percentage: Notation(text("[0-9]{1,3} ?%"), lambda value: f"{round(value * 100)}%"),
    quantities.parse_reserve: Notation(
        {"anyOf": [text("[0-9]{1,9}%?"), {"type": "integer", "minimum": 0}]}, _write_reserve
    ),
    shared.parse_bucket: Notation(text(f"(?:{'|'.join((*shared.SCHEMES, shared.EXTENSION))})://.+")),
    shared.parse_database: Notation(text("postgres(?:ql)?://.*", writeOnly=True)),
    values.parse_access: Notation(one_of("all", "errors", "off", False)),
    values.parse_admin_ui: Notation(one_of("on", "read_only", "off", True, False)),
    values.parse_count: Notation(_COUNT),
    values.parse_number: Notation(
        {"anyOf": [_COUNT, one_of("never")]}, lambda value: "never" if math.isinf(value) else int(value)
    ),
    values.parse_fields: Notation({"type": "object", "additionalProperties": text(writeOnly=True)}),
    values.parse_flag: Notation({"type": "boolean"}),
    values.parse_label: Notation(text(values.LABEL.pattern, maxLength=values.MAX_LABEL)),
    values.parse_path: Notation(text("[^~].*"), str),
    values.parse_secret: _SECRET,
    values.parse_time: Notation(text("(?:[01][0-9]|2[0-3]):[0-5][0-9]")),
    values.parse_version: Notation(one_of("1.2", "1.3", 1.2, 1.3)),
    values.parse_workers: Notation(
        {"anyOf": [one_of("auto"), {"type": "integer", "minimum": 1, "maximum": values.MAX_WORKERS}]},
        nothing="auto",
    ),
    **dict.fromkeys(
        (
            *(hosts.parse_host, hosts.parse_name, hosts.parse_realm, hosts.parse_url),
            *(oidc.parse_claim, oidc.parse_issuer, policy.parse_repositories, policy.parse_tags),
            registry_hosts.parse_pattern_of_hosts,
            *(values.parse_client, values.parse_glob, values.parse_helper, values.parse_pattern),
            *(values.parse_platform, values.parse_quotable, values.parse_reference, values.parse_text),
            *(values.parse_username, values.parse_where),
        ),
        _TEXT,
    ),
}


def notation_of(kind: Any) -> Notation:
    """The notation of a type of a single value.  Raises LookupError for one that has no row."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _NOTATIONS[arguments[1]]
    if origin is Literal:
        return Notation(one_of(*arguments))
    raise LookupError(f"no notation of {kind}")


def written(kind: Any, value: Any) -> Any:
    """A value of a type as the file has it; None if it is left out there."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return None if value is None else written(typing.get_args(kind)[0], value)
    if isinstance(value, tuple | dict) and not value:
        return {} if isinstance(value, dict) else []
    if typing.get_origin(kind) is tuple:
        return [written(typing.get_args(kind)[0], each) for each in value]
    notation = notation_of(kind)
    return notation.nothing if value is None else notation.write(value)


def is_secret(kind: Any) -> bool:
    """Whether values of a type are or hold what nobody may see."""
    return kind in (Secret, extensions.HiddenSettings) or any(
        is_secret(each) for each in typing.get_args(kind)
    )

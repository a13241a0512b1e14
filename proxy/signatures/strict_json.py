"""JSON that all readers read alike; what they may read differently is refused."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from typing import Any

from proxy.signatures.errors import SignatureRefused

FREE = ("predicate",)  # members of any form, whose keys may differ in case only, as those of variables do


def decode_object(content: bytes, what: str) -> dict[str, Any]:
    """The object in `content`.  Raises SignatureRefused, which calls it `what`.

    A key that occurs twice, or twice when case is ignored, is refused: readers in Go use the last of these.
    """
    try:
        found = json.loads(
            content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        raise SignatureRefused(f"{what} is not JSON that all readers read alike: {error}") from None
    if not isinstance(found, dict):
        raise SignatureRefused(f"{what} is no JSON object")
    _check_case(found, what)
    return found


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON value")


def _check_case(found: dict[str, Any], what: str) -> None:
    pending: list[Any] = [found]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending += value
        elif isinstance(value, dict):
            if len({key.casefold() for key in value}) < len(value):
                raise SignatureRefused(f"{what} has keys that differ in case only, which readers confuse")
            pending += [member for key, member in value.items() if key not in FREE]


def text_member(found: Any, *path: str, what: str) -> str:
    """The text at `path` of a decoded object.  Raises SignatureRefused."""
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, str):
        raise SignatureRefused(f"{what} has no {'.'.join(path)}")
    return found


def decode_base64(text: str, what: str) -> bytes:
    """The bytes of standard base64.  Raises SignatureRefused."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise SignatureRefused(f"{what} is not base64") from None


def decode_base64url(text: str, what: str) -> bytes:
    """The bytes of base64url without padding: RFC 7515, section 2.  Raises SignatureRefused."""
    if not text.isascii() or set(text) & set("+/="):
        raise SignatureRefused(f"{what} is not base64url")
    return decode_base64(text.replace("-", "+").replace("_", "/") + "=" * (-len(text) % 4), what)

"""Warnings that belong to an answer: which replicas of a fleet have no part in it.

Whoever sends the answer hears them; it is no part of the answer itself, which is the same with and without.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import msgspec

HEADER = "Entrepot-Warnings"  # of answers of the admin API: a JSON list of sentences, in ASCII

_heard: ContextVar[list[str] | None] = ContextVar("heard", default=None)


@contextmanager
def heard() -> Iterator[list[str]]:
    """The warnings of all that is done in the block, as they come."""
    found: list[str] = []
    token = _heard.set(found)
    try:
        yield found
    finally:
        _heard.reset(token)


def warn(sentence: str) -> None:
    """Add a warning, if anybody hears it, once."""
    found = _heard.get()
    if found is not None and sentence not in found:
        found.append(sentence)


def warnings() -> list[str]:
    """Those that were heard until now."""
    return list(_heard.get() or ())


def in_header(sentences: list[str]) -> str:
    return json.dumps(sentences)


def of_header(value: str) -> list[str]:
    """Those of an answer; none if it is malformed."""
    try:
        return msgspec.json.decode(value.encode("utf-8", "replace"), type=list[str])
    except (msgspec.DecodeError, RecursionError):
        return []

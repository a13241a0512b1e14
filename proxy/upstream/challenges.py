"""Challenges: parsed `WWW-Authenticate` headers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

# RFC 9110, sections 5.6 and 11.2.  It accepts common mistakes of servers: values without quotes, and
# parameters without a comma between them.
_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"
_PIECE = re.compile(
    rf"""(?P<name>{_TOKEN})[ \t]*=[ \t]*(?:"(?P<quoted>(?:[^"\\]|\\.)*+)"|(?P<plain>[^\s,"]+))
      |  (?P<scheme>{_TOKEN})(?=[\s,]|\Z)(?:[ \t]+(?P<token68>[A-Za-z0-9\-._~+/]+=*)(?=[ \t]*(?:,|\Z)))?
      |  [^\s,][^,]*""",
    re.DOTALL | re.VERBOSE,
)


@dataclass(frozen=True)
class Challenge:
    """One authentication that a server offers; `scheme` and names of `parameters` are in lower case."""

    scheme: str
    parameters: Mapping[str, str] = field(default_factory=dict)
    token68: str | None = None


def parse_challenges(values: Iterable[str]) -> list[Challenge]:
    """The challenges in all WWW-Authenticate `values`, in order; invalid parts are skipped.

    RFC 9110, section 11.6.1: whether a comma separates challenges or parameters depends on what follows it.
    """
    found: list[Challenge] = []
    for value in values:
        parameters: dict[str, str] = {}  # of the last challenge
        for piece in _PIECE.finditer(value):
            if name := piece["name"]:
                plain, quoted = piece["plain"], piece["quoted"]
                parameters.setdefault(name.lower(), plain or re.sub(r"(?s)\\(.)", r"\1", quoted))
            elif scheme := piece["scheme"]:
                parameters = {}
                found.append(Challenge(scheme.lower(), parameters, piece["token68"]))
    return found

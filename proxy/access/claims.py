"""Claims of tokens: RFC 7519, section 4."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from proxy.config.oidc import ClaimPattern


def claim(claims: Mapping[str, Any], name: str) -> Any:
    """The claim of that name, or what a name that is a JSON Pointer leads to (RFC 6901); None without one."""
    if not name.startswith("/"):
        return claims.get(name)
    found: Any = claims
    for part in name[1:].split("/"):
        key = part.replace("~1", "/").replace("~0", "~")
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def claim_texts(claims: Mapping[str, Any], name: str) -> list[str]:
    """The values of a claim, which may be a list; only texts, integers and truths count."""
    value = claim(claims, name)
    return [
        str(each).lower() if isinstance(each, bool) else str(each)
        for each in (value if isinstance(value, list) else [value])
        if isinstance(each, str | int)
    ]


def fits(claims: Mapping[str, Any], pattern: ClaimPattern) -> bool:
    """Whether one value of the claim matches."""
    texts = claim_texts(claims, pattern.name)
    return any(fnmatchcase(text, glob) for text in texts for glob in pattern.globs)

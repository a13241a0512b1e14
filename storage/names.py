"""Image names as text: how a repository and a reference are joined, and globs over such names.

Globs are those of fnmatch: `*` and `?` match slashes too.
"""

from __future__ import annotations

import re

_WILDCARD = re.compile(r"[*?[]")


def written(repository: str, reference: str) -> str:
    """`repository:tag` or `repository@digest`.  A digest holds a colon, which a tag cannot."""
    return f"{repository}{'@' if ':' in reference else ':'}{reference}"


def is_glob(text: str) -> bool:
    return _WILDCARD.search(text) is not None


def literal_prefix(pattern: str) -> str:
    """The part before the first wildcard, with which every match begins."""
    found = _WILDCARD.search(pattern)
    return pattern if found is None else pattern[: found.start()]

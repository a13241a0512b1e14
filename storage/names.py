"""Image names as text: how a repository and a reference are joined, and globs over such names.

Globs are those of fnmatch: `*` and `?` match slashes too.  A name may begin with an IPv6 address in brackets,
`[::1]:5000/team/app`, which is no wildcard: such an address has two colons, which no name has elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import translate
from functools import lru_cache

_IPV6 = re.compile(r"\[(?=[^:\]]*:[^:\]]*:)[0-9a-f:.]+\](?::[0-9]{1,5})?(?=/)")
_WILDCARD = re.compile(r"[*?[]")
# What fnmatch.translate() puts around a pattern.  Since Python 3.14, it ends with \z in place of \Z.
_TRANSLATED = translate("x").split("x")


def written(repository: str, reference: str) -> str:
    """`repository:tag` or `repository@digest`.  A digest holds a colon, which a tag cannot."""
    return f"{repository}{'@' if ':' in reference else ':'}{reference}"


def is_glob(text: str) -> bool:
    return _wildcard(text) is not None


def literal_prefix(pattern: str) -> str:
    """The part before the first wildcard, with which every match begins."""
    found = _wildcard(pattern)
    return pattern if found is None else pattern[: found.start()]


def _wildcard(text: str) -> re.Match[str] | None:
    host = _IPV6.match(text)
    return _WILDCARD.search(text, host.end() if host else 0)


def matches_glob(name: str, pattern: str) -> bool:
    """Whether the full name of a repository matches."""
    return glob_matcher(pattern)(name)


@lru_cache(maxsize=256)
def glob_matcher(pattern: str) -> Callable[[str], bool]:
    """Tells whether a full name matches; for many names it is several times as fast as matches_glob()."""
    if pattern == "*":
        return lambda name: True
    match = re.compile(translate(fnmatch_pattern(pattern))).match
    return lambda name: match(name) is not None


def untranslated(pattern: str) -> str:
    """A regular expression without what fnmatch.translate() puts around it, if it is of that."""
    start, end = _TRANSLATED
    translated = pattern.startswith(start) and pattern.endswith(end)
    return pattern[len(start) : -len(end)] if translated else pattern


def fnmatch_pattern(pattern: str) -> str:
    """The pattern for fnmatch, to which a bracket is always a wildcard."""
    return f"[[]{pattern[1:]}" if _IPV6.match(pattern) else pattern

"""Values of the configuration that are neither quantities nor hosts.

A `parse_` function takes a value as YAML gives it, and raises ValueError with half a sentence that follows
the name of the key.
"""

from __future__ import annotations

import fnmatch
import math
import re
from dataclasses import dataclass
from pathlib import Path

from storage.names import fnmatch_pattern
from storage.oci import PLATFORM

MAX_WORKERS = 256
MAX_COUNT = 1_000_000
MAX_LABEL = 63  # characters
# Line breaks would end an error's one line or an HTTP header; lone surrogates cannot be encoded.
UNFIT = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
LABEL = re.compile(r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*")
_TIME = re.compile(r"([0-9]{2}):([0-9]{2})", re.ASCII)
HELPER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_FIELD = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 §5.1
# Headers of a webhook's request that the server itself sets.
_OWN_FIELDS = ("content-length", "content-type", "host", "transfer-encoding", "x-hub-signature-256")


class Secret(str):
    """A string that `repr` does not show."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"


@dataclass(frozen=True, slots=True)
class ClientMatcher:
    """The clients that a rule applies to.

    `kind` is anonymous, authenticated, user, group or claim.  `name` is the name of the user, group or claim,
    and `glob` is matched against the value of the claim.
    """

    kind: str
    name: str = ""
    glob: re.Pattern[str] | None = None


# Any key


def parse_text(value: object) -> str:
    if not isinstance(value, str):
        hint = "" if isinstance(value, dict | list | None) else ": put it in quotes"
        raise ValueError(f"expected a string, got {kind_of(value)}{hint}")
    if not value:
        raise ValueError("is empty: give it a value or leave the key out")
    return value


def parse_flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, got {kind_of(value)}")
    return value


def parse_access(value: object) -> str:
    """Which requests are logged; YAML reads `off` as false."""
    name = "off" if value is False else value
    if name not in ("all", "errors", "off"):
        raise ValueError("expected one of all, errors, off")
    return str(name)


def parse_admin_ui(value: object) -> str:
    """What the web page may do; YAML reads `on` and `off` as true and false."""
    name = {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value
    if name not in ("on", "read_only", "off"):
        raise ValueError("expected one of on, read_only, off")
    return str(name)


def parse_count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_COUNT:
        raise ValueError(f"expected a number from 1 to {MAX_COUNT}")
    return value


def parse_number(value: object) -> float:
    """A number from 1 on; infinity for `never`."""
    return math.inf if value == "never" else parse_count(value)


def parse_path(value: object) -> Path:
    text = parse_text(value)
    if text.startswith("~"):
        raise ValueError("~ is not expanded: use ${HOME}")
    return Path(text)


def parse_label(value: object) -> str:
    """A name that the operator chooses."""
    text = parse_text(value)
    if not LABEL.fullmatch(text) or len(text) > MAX_LABEL:
        raise ValueError(
            f"expected a lower-case word of letters, digits, '.', '_' and '-', at most {MAX_LABEL} characters"
        )
    return text


def parse_secret(value: object) -> Secret:
    return Secret(parse_text(value))


def kind_of(value: object) -> str:
    """What YAML calls a value of that type, with its article."""
    names = {"dict": "a mapping", "list": "a list", "str": "a string", "NoneType": "nothing"}
    names |= {"int": "a number", "float": "a number", "bool": "true or false"}
    return names.get(type(value).__name__, f"a {type(value).__name__}")


# The server


def parse_workers(value: object) -> int | None:
    """A number of processes, or None for `auto`."""
    if value == "auto":
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_WORKERS:
        raise ValueError(f"expected auto, or a number of processes from 1 to {MAX_WORKERS}")
    return value


def parse_version(value: object) -> str:
    """A version of TLS; without quotes, YAML reads a number."""
    text = str(value) if isinstance(value, float) else value
    if text not in ("1.2", "1.3"):
        raise ValueError('expected "1.2" or "1.3"')
    return str(text)


# Images


def parse_glob(value: object) -> str:
    """A pin's pattern, such as `docker.io/library/alpine:3*`."""
    text = parse_text(value)
    if text.split() != [text] or "/" not in text:
        raise ValueError("expected namespace/repository:tag, such as docker.io/library/alpine:3*")
    return text


def parse_pattern(value: object) -> re.Pattern[str]:
    """A glob, or a regular expression after `re:`; use it with fullmatch."""
    text = parse_text(value)
    try:
        return re.compile(text[3:] if text.startswith("re:") else fnmatch.translate(fnmatch_pattern(text)))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is not a valid regular expression: {error}") from None


def parse_reference(value: object) -> str:
    """An image name as clients write it: `alpine:3`, `ghcr.io/team/app@sha256:…`.

    The namespaces, which are not known here, give it its meaning when it is used.
    """
    text = parse_text(value)
    if text.split() != [text]:
        raise ValueError("expected a reference such as alpine:3 or ghcr.io/team/app:1")
    return text


def parse_platform(value: object) -> str:
    text = parse_text(value)
    if not PLATFORM.fullmatch(text):
        raise ValueError("expected os/architecture or os/architecture/variant, such as linux/arm64/v8")
    return text


def parse_time(value: object) -> tuple[int, int]:
    """The hour and the minute of a time of day, such as `03:30`."""
    found = _TIME.fullmatch(value) if isinstance(value, str) else None
    if not found or int(found[1]) > 23 or int(found[2]) > 59:
        raise ValueError("expected a time of day in quotes, from '00:00' to '23:59'")
    return int(found[1]), int(found[2])


# Access rules


def parse_client(value: object) -> ClientMatcher:
    text = parse_text(value)
    kind, colon, name = text.partition(":")
    claim, equals, glob = name.partition("=")
    if kind in ("anonymous", "authenticated") and not colon:
        return ClientMatcher(kind)
    if kind in ("user", "group") and name:
        return ClientMatcher(kind, name)
    if kind == "claim" and claim and equals:
        return ClientMatcher(kind, claim, re.compile(fnmatch.translate(glob)))
    raise ValueError(
        "expected anonymous, authenticated, user:NAME, group:NAME, or claim:NAME=GLOB for a claim of a token"
    )


def parse_where(value: object) -> re.Pattern[str]:
    """A pattern of full repository names: a glob, or a regular expression after `re:`."""
    text = parse_text(value)
    if not text.startswith("re:") and not any(mark in text for mark in "/*?["):
        raise ValueError("expected a glob over namespace/repository, such as local/team/*")
    return parse_pattern(text)


def parse_quotable(value: object) -> str:
    """Text that can be a quoted string in a header."""
    text = parse_text(value)
    if not (text.isascii() and text.isprintable()) or '"' in text or "\\" in text:
        raise ValueError("expected printable ASCII without quotes and backslashes")
    return text


# Requests to other servers


def parse_username(value: object) -> str:
    text = parse_text(value)
    if ":" in text:  # RFC 7617, section 2
        raise ValueError("must not hold a colon")
    return text


def parse_helper(value: object) -> str:
    text = parse_text(value)
    if not HELPER.fullmatch(text):
        raise ValueError("expected what follows docker-credential- in a program's name, such as ecr-login")
    return text


def parse_fields(value: object) -> dict[str, Secret]:
    """The headers of a request, by name."""
    if not isinstance(value, dict):
        raise ValueError(f"expected a mapping of header names to values, got {kind_of(value)}")
    fields: dict[str, Secret] = {}
    for name, each in value.items():
        if not _FIELD.fullmatch(name):
            raise ValueError("holds a name that is not a valid header name")
        if name.lower() in _OWN_FIELDS:
            raise ValueError(f"{name} is set by the server and cannot be changed")
        try:
            fields[name] = parse_secret(each)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
    if len({name.lower() for name in fields}) < len(fields):
        raise ValueError("holds the same header twice")
    return fields

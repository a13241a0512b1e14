"""The images that a Dockerfile builds on or copies from: https://docs.docker.com/reference/dockerfile/."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import PurePath

from proxy.admin.image_files import interpolate

_INSTRUCTION = re.compile(r"\s*(ARG|FROM|COPY)\s+(.*)", re.IGNORECASE | re.DOTALL)
_NAMES = re.compile(r"(?:.*\.)?(?:dockerfile|containerfile)(?:\..*)?", re.IGNORECASE)
_COPIED = re.compile(r"--from=(\S+)")


def is_dockerfile(path: str) -> bool:
    """Whether a file is one, by its name: Dockerfile, Dockerfile.dev, app.Dockerfile, Containerfile."""
    return _NAMES.fullmatch(PurePath(path).name) is not None


def base_images(text: str, environ: Mapping[str, str]) -> Iterator[tuple[int, str]]:
    """Each image, and the number of its line.

    `environ` has the values of those ARG before the first FROM that have no default.  Raises ValueError if a
    variable has no value.
    """
    stages: set[str] = set()
    arguments: dict[str, str] = {}
    for number, line in _lines(text):
        found = _INSTRUCTION.fullmatch(line)
        if found is None:
            continue
        instruction, rest = found[1].upper(), found[2].strip()
        if instruction == "ARG" and not stages:
            name, given, value = rest.partition("=")
            if given:
                arguments[name] = interpolate(value.strip("'\""), arguments)
            elif name in environ:
                arguments[name] = environ[name]
        elif instruction == "FROM":
            words = [each for each in rest.split() if not each.startswith("--")]
            image = interpolate(words[0], arguments) if words else ""
            if image and image != "scratch" and image.lower() not in stages:
                yield number, image
            stages |= {str(len(stages)), words[2].lower() if len(words) > 2 else image.lower()}
        elif instruction == "COPY" and (copied := _COPIED.search(rest)):
            named = interpolate(copied[1], arguments)
            if named.lower() not in stages:
                yield number, named


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines without comments, those that a backslash continues as one; each with its number."""
    pending, start = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#"):
            continue
        start = start if pending else number
        if line.rstrip().endswith("\\"):
            pending += line.rstrip()[:-1] + " "
            continue
        yield start, pending + line
        pending = ""
    if pending:
        yield start, pending

"""Lock files: which digests a rule allows, and no others.

Each line is `namespace/repository:tag@digest`, or without a tag, as `entrepot lock` writes it.  What follows
a # is a comment.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from proxy.config.errors import StartError
from proxy.config.image_names import split
from proxy.policy.condition import Evidence, Subject
from storage.errors import DigestInvalid
from storage.names import written
from storage.oci import Digest

SHOWN = 3  # images in a message

Locked = Mapping[str, Mapping[Digest, str]]  # by the full name of the repository: images by their digests


def read_lock(path: Path) -> Locked:
    """The images of a lock file.  Raises StartError, which names the file and the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise StartError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise StartError(f"{path} is not UTF-8 at byte {error.start}") from error
    return parse_lock(text, str(path))


def parse_lock(text: str, place: str) -> Locked:
    """The images in the text of a lock file.  Raises StartError, which names the `place` and the line."""
    found: defaultdict[str, dict[Digest, str]] = defaultdict(dict)
    for number, line in enumerate(text.splitlines(), 1):
        if image := line.partition("#")[0].strip():
            name, tag, digest = split(image)
            try:
                locked = Digest.parse(digest or "")
            except DigestInvalid:
                raise StartError(f"{place}:{number}: expected namespace/repository:tag@sha256:…") from None
            found[name][locked] = written(name, tag) if tag else name
    return found


class LockedImages:
    """Content that a lock file has for its repository.  `name` is what messages call the file."""

    def __init__(self, locked: Locked, name: str) -> None:
        self._locked = locked
        self._name = name

    async def judge(self, subject: Subject) -> Evidence:
        """As Condition.judge()."""
        locked, digest = self._locked.get(subject.repository, {}), subject.manifest.digest
        if digest in locked:
            return Evidence(True, f"is locked as {locked[digest]}")
        there = [f"{image}@{each}" for each, image in locked.items()]
        more = f" and {len(there) - SHOWN} more" if len(there) > SHOWN else ""
        return Evidence(
            False,
            f"is {digest}, which is not in {self._name}: of {subject.repository} it has"
            f" {', '.join(there[:SHOWN]) or 'nothing'}{more}",
        )

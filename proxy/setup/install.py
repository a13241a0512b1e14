"""Installation of a client's configuration, without the loss of files that others have written.

- A file whose first line says that setup has written it is replaced as a whole.
- Keys are merged into a JSON file; all its other keys stay.
- A file at the same path that setup has not written is refused, unless forced.
- All files are checked before one is written: if one is refused, none is written.
- A replaced file is kept beside the new one, as `<file>.entrepot-<time>.bak`, a name that no client reads.
  A file is written atomically, and keeps its mode and owner.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from proxy.setup.renderers import MARK, with_mark
from proxy.setup.site import Piece, Setup

MODE = 0o644
_INDENT = re.compile(r"^\{\s*\n([ \t]+)\S")


class Refused(Exception):
    """A file must not be changed.  The message is half a sentence that says why."""


@dataclass(frozen=True, slots=True)
class Change:
    """The change of one file; `before` is None for a new file."""

    path: Path
    before: str | None
    after: str

    def diff(self) -> Iterator[str]:
        """The lines of a unified diff."""
        old = "/dev/null" if self.before is None else str(self.path)
        lines = (self.before or "").splitlines(), self.after.splitlines()
        yield from difflib.unified_diff(*lines, old, str(self.path), lineterm="")


@dataclass(slots=True)
class InstallPlan:
    """The changes of an installation.

    `right` are files that need no change, `refused` files that must not be changed, each with the cause,
    and `parts` are left to the operator.
    """

    changes: list[Change] = field(default_factory=list)
    right: list[Path] = field(default_factory=list)
    refused: list[tuple[Path, Piece, str]] = field(default_factory=list)
    parts: list[Piece] = field(default_factory=list)


def plan_install(setup: Setup, root: Path, *, force: bool = False) -> InstallPlan:
    """What an installation below `root` would change.  With `force`, files of others are replaced."""
    found = InstallPlan()
    for piece in setup.pieces:
        path = root / piece.path.lstrip("/")
        try:
            path = _real(path, root)
            before = _read(path)
            if piece.kind == "part":
                if not _has(piece, before):
                    found.parts.append(piece)
                continue
            after = _after(piece, before, force)
        except Refused as error:
            found.refused.append((path, piece, str(error)))
            continue
        if after == before:
            found.right.append(path)
        else:
            found.changes.append(Change(path, before, after))
    # The parts are alternatives for different versions of a client: one is enough.
    if any(each.kind == "part" for each in setup.pieces) and len(found.parts) < _parts(setup.pieces):
        found.parts.clear()
    return found


def _parts(pieces: Sequence[Piece]) -> int:
    return sum(each.kind == "part" for each in pieces)


def _real(path: Path, root: Path) -> Path:
    """The target of a symbolic link, so that the link itself stays.  Raises Refused."""
    try:
        real = path.resolve()
    except (OSError, RuntimeError):  # a loop of links
        raise Refused("its path is a loop of symbolic links") from None
    if not real.is_relative_to(root.resolve()):
        raise Refused(f"it is a symbolic link to {real}, which is not below --root")
    return real


def _read(path: Path) -> str | None:
    try:
        with path.open(encoding="utf-8", newline="") as file:  # line ends stay: it may become a backup
            return file.read()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise Refused("it is not UTF-8") from None
    except OSError as error:
        raise Refused(error.strerror or str(error)) from None


def _after(piece: Piece, before: str | None, force: bool) -> str:
    if piece.kind == "keys":
        return _merged(piece, before)
    after = with_mark(piece)
    if before is None or before.startswith(MARK) or force:
        return after
    if before.strip() == piece.content.strip():
        return before
    raise Refused("it was not written by entrepot setup")


def _merged(piece: Piece, before: str | None) -> str:
    if before is None or not before.strip():
        return piece.content
    try:
        tree = json.loads(before)
    except ValueError as error:
        raise Refused(f"it is not JSON ({error}), so no keys can be added") from None
    if not isinstance(tree, dict):
        raise Refused("it is not a JSON object, so no keys can be added")
    merged = dict(tree)
    for key, values in json.loads(piece.content).items():
        there = tree.get(key, [])
        if not isinstance(there, list):
            raise Refused(f"its {key} is not a list")
        # Clients try the first entry first.
        if not set(values) <= set(map(str, there)):
            merged[key] = [*values, *(each for each in there if each not in values)]
    if merged == tree:
        return before
    found = _INDENT.match(before)
    return json.dumps(merged, indent=found[1] if found else 2, ensure_ascii=False) + "\n"


def _has(piece: Piece, before: str | None) -> bool:
    """Whether a TOML file already contains the part; its tables may hold more keys.  Raises Refused."""
    try:
        return before is not None and _covers(tomllib.loads(before), tomllib.loads(piece.content))
    except tomllib.TOMLDecodeError as error:
        raise Refused(f"it is not TOML: {error}") from None


def _covers(whole: Any, part: Any) -> bool:
    if isinstance(part, Mapping):
        return isinstance(whole, Mapping) and all(_covers(whole.get(k), v) for k, v in part.items())
    # A path may be a list, separated by colons.
    return whole == part or (isinstance(whole, str) and part in whole.split(":"))


def install(changes: Sequence[Change], now: datetime | None = None) -> list[Path]:
    """Write the files, and return the paths of the backups.  Raises OSError."""
    moment = f"{now or datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    kept = []
    for change in changes:
        change.path.parent.mkdir(parents=True, exist_ok=True)
        if change.before is not None:
            backup = change.path.with_name(f"{change.path.name}.entrepot-{moment}.bak")
            _write(backup, change.before, like=change.path)
            kept.append(backup)
        _write(change.path, change.after, like=change.path)
    return kept


def _write(path: Path, text: str, like: Path) -> None:
    """Write a file atomically, with the mode and owner of `like` if that exists."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            try:
                status = like.stat()
            except FileNotFoundError:
                os.fchmod(file.fileno(), MODE)
            else:
                with suppress(PermissionError):  # only root may change an owner
                    os.fchown(file.fileno(), status.st_uid, status.st_gid)
                os.fchmod(file.fileno(), status.st_mode & 0o7777)
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise

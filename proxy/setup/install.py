"""A client's files in place: nothing of anybody else's is lost, and what is right already is left alone.

- A file of ours is whole, and told by its first line; it is replaced.
- Into JSON our keys are put; all others stay as they are.
- A file at our path that somebody else has written is refused, unless it is forced.
- All is looked at before anything is written: if one file is refused, none is.
- What is replaced has its content kept beside it, in `<file>.entrepot-<time>.bak`: no client reads a name
  that ends so.  A file appears whole or not at all, with the mode and owner of the one before.
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

from proxy.setup.renderers import MARK, marked
from proxy.setup.site import Piece, Setup

MODE = 0o644
_INDENT = re.compile(r"^\{\s*\n([ \t]+)\S")


class Refused(Exception):
    """Why a file is not touched, in half a sentence."""


@dataclass(frozen=True, slots=True)
class Change:
    """Of one file; `before` is None where there was none."""

    path: Path
    before: str | None
    after: str

    def diff(self) -> Iterator[str]:
        """The lines of a unified diff."""
        old = "/dev/null" if self.before is None else str(self.path)
        lines = (self.before or "").splitlines(), self.after.splitlines()
        yield from difflib.unified_diff(*lines, old, str(self.path), lineterm="")


@dataclass(slots=True)
class Plan:
    """What is to be done: `changes`; `right` already is; `refused`, and why; `parts`, by hand."""

    changes: list[Change] = field(default_factory=list)
    right: list[Path] = field(default_factory=list)
    refused: list[tuple[Path, Piece, str]] = field(default_factory=list)
    parts: list[Piece] = field(default_factory=list)


def plan(setup: Setup, root: Path, *, force: bool = False) -> Plan:
    """With `force`, what others have written is replaced."""
    found = Plan()
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
    # What one version of a client has, the others need not.
    if any(each.kind == "part" for each in setup.pieces) and len(found.parts) < _parts(setup.pieces):
        found.parts.clear()
    return found


def _parts(pieces: Sequence[Piece]) -> int:
    return sum(each.kind == "part" for each in pieces)


def _real(path: Path, root: Path) -> Path:
    """The file itself: a link to it stays one."""
    try:
        real = path.resolve()
    except (OSError, RuntimeError):  # links that lead in a circle
        raise Refused("its path cannot be followed") from None
    if not real.is_relative_to(root.resolve()):
        raise Refused(f"it is a link to {real}, which is not below --root")
    return real


def _read(path: Path) -> str | None:
    try:
        with path.open(encoding="utf-8", newline="") as file:  # to the byte: it may have to be kept
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
    after = marked(piece)
    if before is None or before.startswith(MARK) or force:
        return after
    if before.strip() == piece.content.strip():
        return before
    raise Refused("somebody else has written it")


def _merged(piece: Piece, before: str | None) -> str:
    if before is None or not before.strip():
        return piece.content
    try:
        tree = json.loads(before)
    except ValueError as error:
        raise Refused(f"it is not JSON ({error}), and nothing can be put into it") from None
    if not isinstance(tree, dict):
        raise Refused("it is not a JSON object, and nothing can be put into it")
    merged = dict(tree)
    for key, wanted in json.loads(piece.content).items():
        there = tree.get(key, [])
        if not isinstance(there, list):
            raise Refused(f"its {key} is not a list")
        # What comes first is asked first.
        if not set(wanted) <= set(map(str, there)):
            merged[key] = [*wanted, *(each for each in there if each not in wanted)]
    if merged == tree:
        return before
    found = _INDENT.match(before)
    return json.dumps(merged, indent=found[1] if found else 2, ensure_ascii=False) + "\n"


def _has(piece: Piece, before: str | None) -> bool:
    """Whether a file, in TOML, says already what the part says; tables may hold more."""
    try:
        return before is not None and _covers(tomllib.loads(before), tomllib.loads(piece.content))
    except tomllib.TOMLDecodeError as error:
        raise Refused(f"it is not TOML: {error}") from None


def _covers(whole: Any, part: Any) -> bool:
    if isinstance(part, Mapping):
        return isinstance(whole, Mapping) and all(_covers(whole.get(k), v) for k, v in part.items())
    # Paths may be several, with colons between.
    return whole == part or (isinstance(whole, str) and part in whole.split(":"))


def place(changes: Sequence[Change], now: datetime | None = None) -> list[Path]:
    """Write them; the paths of what was kept of what was there before.  Raises OSError."""
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
    """Whole or not at all, with the mode and owner of `like` where that is there."""
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
                with suppress(PermissionError):  # only root gives files away
                    os.fchown(file.fileno(), status.st_uid, status.st_gid)
                os.fchmod(file.fileno(), status.st_mode & 0o7777)
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise

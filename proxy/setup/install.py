"""Installation of a client's configuration, without the loss of files that others have written.

- A file whose first line says that setup has written it is replaced as a whole.
- Keys are merged into a JSON file; all its other keys stay, and all other entries of its lists.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from proxy.setup.renderers import MARK, with_mark
from proxy.setup.site import Piece, Setup

MODE = 0o644
BY_HAND = ("flags", "example")  # kinds of pieces that are no file
PARSERS: Mapping[str, tuple[Callable[[str], Any], str]] = {
    ".toml": (tomllib.loads, "TOML"),
    ".yaml": (yaml.safe_load, "YAML"),
}
KINDS: Mapping[type, str] = {list: "a list", dict: "an object"}
_INDENT = re.compile(r"^\{\s*\n([ \t]+)\S")


class Refused(Exception):
    """A file must not be changed.  The message is half a sentence that says why."""


@dataclass(frozen=True, slots=True)
class Change:
    """The change of one file; `before` is None for a new file, `after` for one that is deleted.

    Without `kept`, no backup is made.
    """

    path: Path
    before: str | None
    after: str | None
    kept: bool = True

    def diff(self) -> Iterator[str]:
        """The lines of a unified diff."""
        old, new = ("/dev/null" if text is None else str(self.path) for text in (self.before, self.after))
        lines = (self.before or "").splitlines(), (self.after or "").splitlines()
        yield from difflib.unified_diff(*lines, old, new, lineterm="")


@dataclass(slots=True)
class InstallPlan:
    """The changes of an installation, or of its removal.

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
    present = set()  # where a part is that has alternatives for other versions of the client
    for piece in setup.pieces:
        if piece.kind in BY_HAND:
            found.parts.append(piece)
            continue
        path = place(piece.path, root)
        try:
            path = real(path, root)
            before = read(path)
            if piece.kind == "part":
                if has(piece, before):
                    present.add(piece.path)
                else:
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
    found.parts = [each for each in found.parts if each.path not in present]
    return found


def place(path: str, root: Path) -> Path:
    """Where a file of the client is; the home directory is that of the user, also below a `root`."""
    return root / str(Path(path).expanduser()).lstrip("/")


def real(path: Path, root: Path) -> Path:
    """The target of a symbolic link, so that the link itself stays.  Raises Refused."""
    try:
        real = path.resolve()
    except (OSError, RuntimeError):  # a loop of links
        raise Refused("its path is a loop of symbolic links") from None
    if not real.is_relative_to(root.resolve()):
        raise Refused(f"it is a symbolic link to {real}, which is not below --root")
    return real


def read(path: Path) -> str | None:
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
    tree = json_object(before)
    merged = {**tree}
    for key, ours in json.loads(piece.content).items():
        merged[key] = _joined(tree.get(key), ours, key)
    return before if merged == tree else json_like(merged, before)


def json_object(text: str) -> dict[str, Any]:
    """Raises Refused if it is none."""
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise Refused(f"it is not JSON ({error}), so its keys cannot be changed") from None
    if not isinstance(tree, dict):
        raise Refused("it is not a JSON object, so it has no keys to change")
    return tree


def json_like(tree: Mapping[str, Any], before: str) -> str:
    """A JSON object, indented like the file that it replaces."""
    found = _INDENT.match(before)
    return json.dumps(tree, indent=found[1] if found else 2, ensure_ascii=False) + "\n"


def _joined(theirs: Any, ours: Any, key: str) -> Any:
    """The value of a key that has both."""
    if theirs is None:
        return ours
    if type(theirs) is not type(ours):
        raise Refused(f"its {key} is not {KINDS.get(type(ours), 'a text')}")
    if not isinstance(ours, list | dict):
        return ours
    if isinstance(ours, dict):
        return {**theirs, **{name: _joined(theirs.get(name), each, name) for name, each in ours.items()}}
    # Clients try the first entry first.
    if all(each in theirs for each in ours):
        return theirs
    return [*ours, *(each for each in theirs if each not in ours)]


def has(piece: Piece, before: str | None) -> bool:
    """Whether a file already contains the part; its tables may hold more keys.  Raises Refused."""
    parse, name = PARSERS[Path(piece.path).suffix]
    try:
        return before is not None and _covers(parse(before), parse(piece.content))
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise Refused(f"it is not {name}: {error}") from None


def _covers(whole: Any, part: Any) -> bool:
    if isinstance(part, Mapping):
        return isinstance(whole, Mapping) and all(_covers(whole.get(k), v) for k, v in part.items())
    if isinstance(part, list):
        return isinstance(whole, list) and all(any(_covers(w, p) for w in whole) for p in part)
    # A path may be a list, separated by colons.
    return bool(whole == part) or (isinstance(whole, str) and part in whole.split(":"))


def install(changes: Sequence[Change], now: datetime | None = None) -> list[Path]:
    """Write or delete the files, and return the paths of the backups.  Raises OSError."""
    moment = f"{now or datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"
    kept = []
    for change in changes:
        change.path.parent.mkdir(parents=True, exist_ok=True)
        if change.before is not None and change.kept:
            backup = change.path.with_name(f"{change.path.name}.entrepot-{moment}.bak")
            _write(backup, change.before, like=change.path)
            kept.append(backup)
        if change.after is None:
            _delete(change.path)
        else:
            _write(change.path, change.after, like=change.path)
    return kept


def _delete(path: Path) -> None:
    """Delete a file, and its directory in certs.d if nothing else is there.

    A directory that is empty goes before _default too.
    """
    path.unlink()
    if path.parent.parent.name == "certs.d":
        with suppress(OSError):
            path.parent.rmdir()


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

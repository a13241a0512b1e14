"""The removal of what setup has installed, whatever its options were: the reverse of proxy.setup.install.

- A file is deleted if its first line says that setup has written it.  A backup is kept if it was changed
  since.
- The entries that setup adds to the keys of a JSON file are taken out.
- What setup leaves to the operator is left to the operator again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from proxy.setup.install import (
    BY_HAND,
    Change,
    InstallPlan,
    Refused,
    has,
    json_like,
    json_object,
    place,
    read,
    real,
)
from proxy.setup.renderers import MARK, RENDERERS, with_mark
from proxy.setup.site import Piece, Setup, Site

_REGISTRY = re.compile(r"(?<=/certs\.d/)[^/]+(?=/)")  # there may be directories of other registries than now


def plan_removal(setup: Setup, site: Site, root: Path) -> InstallPlan:
    """What a removal below `root` would change.  `right` are the files that have nothing of setup."""
    found = InstallPlan()
    for path, pieces in _installed(setup.client, site, root).items():
        try:
            change = _undone(real(path, root), pieces)
        except Refused as error:
            found.refused.append((path, pieces[0], str(error)))
            continue
        if change is None:
            found.right.append(path)
        else:
            found.changes.append(change)
    found.parts += [
        *_parts(setup.client, site, root),
        *(each for each in setup.pieces if each.kind in BY_HAND),
    ]
    return found


def _installed(client: str, site: Site, root: Path) -> Mapping[Path, Sequence[Piece]]:
    """The files that are there, and what setup writes to each, with any options."""
    found: dict[Path, list[Piece]] = {}
    for each in _variants(site):
        for piece in RENDERERS[client](each).pieces:
            if piece.kind in ("file", "keys"):
                pattern = place(_REGISTRY.sub("*", piece.path), root).relative_to(root)
                for path in root.glob(str(pattern)):
                    found.setdefault(path, []).append(piece)
    return found


def _parts(client: str, site: Site, root: Path) -> Iterable[Piece]:
    """What is in the files of others, once for each file."""
    found: dict[str, Piece] = {}
    for each in _variants(site):
        for piece in RENDERERS[client](each).pieces:
            if piece.kind == "part" and piece.path not in found and _is_there(piece, root):
                found[piece.path] = piece
    return found.values()


def _variants(site: Site) -> Iterator[Site]:
    secure = replace(site, url=site.url.with_scheme("https"), ca=site.ca or "-")
    for each in (site, secure):
        for every in (True, False):
            for bypass in (True, False):
                yield replace(each, every=every, bypass=bypass)


def _undone(path: Path, pieces: Sequence[Piece]) -> Change | None:
    """Raises Refused."""
    before = read(path)
    if before is None or not before.strip():
        return None
    if pieces[0].kind == "keys":
        tree = left = json_object(before)
        for piece in pieces:
            left = _without(left, json.loads(piece.content))
        return None if left == tree else Change(path, before, json_like(left, before) if left else None)
    if not before.startswith(MARK):
        return None
    return Change(path, before, None, kept=before not in map(with_mark, pieces))


def _without(tree: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """An object without our entries, and without the keys that then are empty."""
    found = {}
    for key, theirs in tree.items():
        left = _less(theirs, ours[key]) if key in ours else theirs
        if left or left == theirs:
            found[key] = left
    return found


def _less(theirs: Any, ours: Any) -> Any:
    if isinstance(theirs, list) and isinstance(ours, list):
        return [each for each in theirs if each not in ours]
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return _without(theirs, ours)
    return None if theirs == ours else theirs


def _is_there(piece: Piece, root: Path) -> bool:
    try:
        return has(piece, read(real(place(piece.path, root), root)))
    except Refused:  # then nothing can be told of it, and nothing in it is changed
        return False


def former(path: Path) -> Path | None:
    """The newest backup of what others had at the path of a deleted file."""
    backups = sorted(path.parent.glob(f"{path.name}.entrepot-*.bak"), reverse=True)
    return next((each for each in backups if not (read(each) or MARK).startswith(MARK)), None)

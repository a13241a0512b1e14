"""Directories that the server uses where the configuration names none."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_directory() -> Path:
    """The user's cache directory (XDG Base Directory), or for a user without a home the system's."""
    if (directory := Path(os.environ.get("XDG_CACHE_HOME", ""))).is_absolute():
        return directory / "entrepot"
    try:
        home = Path.home()
    except RuntimeError:
        home = Path("/")
    # Service users have a home that does not exist, and unknown users in a container have "/".
    if home != Path("/") and home.is_dir():
        return home / ".cache" / "entrepot"
    return Path("/var/cache/entrepot")

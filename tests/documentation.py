"""The documentation as a site, built as `python -m mkdocs build --strict` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.commands.build import build
from mkdocs.config import load_config

ROOT = Path(__file__).parents[1]


def build_site(directory: Path, **settings: Any) -> Path:
    """Write the site into the directory; `settings` are those of mkdocs.yml that differ.

    Raises mkdocs.exceptions.Abort after a warning.
    """
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(directory), strict=True, **settings))
    return directory

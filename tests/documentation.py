"""The documentation as a site, built as `python -m mkdocs build --strict` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

from tests.once import built_once

ROOT = Path(__file__).parents[1]
SECRET = "of-whoever-builds-it"


def build_site(directory: Path, **settings: Any) -> Path:
    """Write the site into the directory; `settings` are those of mkdocs.yml that differ.

    Raises mkdocs.exceptions.Abort after a warning.
    """
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(directory), strict=True, **settings))
    return directory


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, which no test changes."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HOME", str(tmp_path_factory.mktemp(SECRET)))
        return built_once(tmp_path_factory, "site", build_site)

"""The linter, the formatter and the type checker, as pyproject.toml sets them, have nothing to say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.clients


@pytest.mark.parametrize("command", ["ruff check", "ruff format --check", "mypy"])
def test_quality(command: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr

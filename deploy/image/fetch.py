"""Download what the image is made of: packages of Debian 12, and the libraries of requirements.txt.

Nothing else of the build needs a network.  `DIRECTORY/ARCHITECTURE` gets `debian/` with the packages and
`libraries/` with the installed libraries.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
PLATFORMS = {"amd64": "x86_64-manylinux_2_36", "arm64": "aarch64-manylinux_2_36"}  # glibc of Debian 12
NATIVE = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
SOURCES = (Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list"))
SOURCE_ONLY = ("envparse",)  # it has no wheel; a new one that has none fails


def fetch(directory: Path, architectures: Sequence[str]) -> None:
    """Download all that is not there: files are kept while the lists are what they were.

    Also for this machine, whose Python compiles, and makes the documentation by the libraries.  Raises
    CalledProcessError and OSError.

    directory: absolute, for apt runs elsewhere
    """
    parts = {"debian": ("debian.txt", _fetch_debian), "libraries": ("requirements.txt", _fetch_libraries)}
    for each in dict.fromkeys([NATIVE, *architectures]):
        for name, (list_, download) in parts.items():
            wanted = hashlib.sha256((HERE / list_).read_bytes()).hexdigest()
            mark = directory / each / f"{name}.complete"
            if not (mark.exists() and mark.read_text() == wanted):
                shutil.rmtree(directory / each / name, ignore_errors=True)
                download(directory / each, each)
                mark.write_text(wanted)


def _fetch_debian(place: Path, architecture: str) -> None:
    """Packages of any architecture, by the machine's sources, with lists and keys checked as apt does."""
    debian, state, cache = place / "debian", place / "apt" / "state", place / "apt" / "cache"
    for each in (debian, state / "lists" / "partial", cache / "archives" / "partial"):
        each.mkdir(parents=True, exist_ok=True)
    options = {
        "APT::Architecture": architecture,
        "APT::Architectures::": architecture,
        "APT::Sandbox::User": "root",
        "Acquire::Retries": "3",
        "Dir::Cache": cache,
        "Dir::Etc::sourcelist": next(each for each in SOURCES if each.exists()),
        "Dir::Etc::sourceparts": "-",
        "Dir::State": state,
        "Dir::State::status": "/dev/null",
    }
    apt = ["apt-get", "-qq", *(f"-o{key}={value}" for key, value in options.items())]
    _run([*apt, "update"])
    _run([*apt, "download", *package_names()], cwd=debian)
    shutil.rmtree(place / "apt")


def package_names() -> list[str]:
    """The names in debian.txt."""
    lines = (HERE / "debian.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _fetch_libraries(place: Path, architecture: str) -> None:
    """Exactly the files whose SHA-256 requirements.txt has."""
    python = ["--python-version=3.11", f"--python-platform={PLATFORMS[architecture]}"]
    binary = ["--only-binary=:all:", *(f"--no-binary={each}" for each in SOURCE_ONLY)]
    words = ["--quiet", "--no-config", "--no-deps", "--require-hashes", "--link-mode=copy", *python, *binary]
    files = [f"--target={place / 'libraries'}", f"--requirements={HERE / 'requirements.txt'}"]
    _run([sys.executable, "-m", "uv", "pip", "install", *words, *files])


def _run(command: Sequence[str | Path], cwd: Path | None = None) -> None:
    subprocess.run(list(map(str, command)), cwd=cwd, check=True)

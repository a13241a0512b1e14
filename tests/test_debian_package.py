"""The Debian package is built twice; tests/clients/test_installation.py installs it."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.clients.processes import require
from tests.documentation import site
from tests.test_distributions import needed
from tests.test_docs import ROOT

__all__ = ["site"]  # a fixture
pytestmark = [pytest.mark.clients, pytest.mark.timeout(900)]


def build(target: Path, libraries: Path, umask: int, *options: str | Path) -> Path:
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(target.parent),
        "SOURCE_DATE_EPOCH": "1700000000",
        "DPKG_DEB_COMPRESSOR_TYPE": "none",  # to be quick
    }
    words = [sys.executable, ROOT / "deploy/debian/build.py", target, "--libraries", libraries, *options]
    done = subprocess.run(
        list(map(str, words)), env=environment, umask=umask, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [package] = target.glob("*.deb")
    return package


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those that are needed, as they are here: another Python than Debian's has others."""
    if sys.version_info[:2] != (3, 11):
        pytest.skip("needs Python 3.11, for the libraries of this Python are those of the package")
    place = tmp_path_factory.mktemp("libraries")
    # redis needs async-timeout on the Python of Debian, 3.11.2.
    for distribution in [*needed(), metadata.distribution("async-timeout")]:
        for part in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            source = Path(str(distribution.locate_file(part)))
            if source.is_dir():
                shutil.copytree(source, place / part, dirs_exist_ok=True)
            else:
                shutil.copy2(source, place)
    return place


@pytest.fixture(scope="module")
def package(libraries: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    require("dpkg-buildpackage", "dh", root=False)
    return build(tmp_path_factory.mktemp("one"), libraries, 0o022)


def test_the_same_source_makes_the_same_package(
    package: Path, libraries: Path, site: Path, tmp_path: Path
) -> None:
    """The documentation in the second was built by this Python."""
    again = build(tmp_path / "elsewhere" / "two", libraries, 0o077, "--site", site)
    assert hashlib.sha256(again.read_bytes()).digest() == hashlib.sha256(package.read_bytes()).digest()


def test_what_it_has(package: Path) -> None:
    listed = subprocess.run(["dpkg-deb", "--contents", package], capture_output=True, text=True, check=True)
    lines = [line.split(maxsplit=5) for line in listed.stdout.splitlines()]
    names = {name.removeprefix(".") for *_, name in lines}
    assert {
        *("/usr/bin/entrepot", "/etc/entrepot/config.yml", "/usr/share/man/man1/entrepot.1.gz"),
        *(f"/lib/systemd/system/{each}" for each in ("entrepot.service", "entrepot.socket")),
        *("/lib/systemd/system/entrepot-admin.socket", "/usr/lib/sysusers.d/entrepot.conf"),
        *("/usr/share/bash-completion/completions/entrepot", "/usr/share/zsh/vendor-completions/_entrepot"),
        *("/usr/share/fish/vendor_completions.d/entrepot.fish", "/usr/lib/entrepot/proxy/py.typed"),
        *("/usr/share/doc/entrepot/examples/config.example.yml", "/usr/share/doc/entrepot/copyright"),
    } <= names
    assert {owner for _, owner, *_ in lines} == {"root/root"}
    assert {mode for mode, *_ in lines} <= {"drwxr-xr-x", "-rw-r--r--", "-rwxr-xr-x", "lrwxrwxrwx"}
    assert {date for _, _, _, date, *_ in lines} == {"2023-11-14"}

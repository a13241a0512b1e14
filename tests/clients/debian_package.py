"""What a Debian package of Entrepôt has, and that its source makes no other."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.test_docs import ROOT

# As the package is built here: in no time, as far as that can be.
VARIABLES = {"SOURCE_DATE_EPOCH": "1700000000", "DPKG_DEB_COMPRESSOR_TYPE": "none"}
PLACE = Path("usr/lib/entrepot")


def check_files(package: Path) -> None:
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


def check_it_is_made_again(package: Path, site: Path, directory: Path) -> None:
    """Elsewhere, under another umask, of the same libraries, with documentation that this Python built."""
    subprocess.run(["dpkg-deb", "--extract", package, directory / "files"], check=True)
    libraries = directory / "files" / PLACE
    for ours in [libraries / "proxy", libraries / "storage", *libraries.glob("entrepot-*")]:
        shutil.rmtree(ours)
    words = [ROOT / "deploy/debian/build.py", directory / "again", "--libraries", libraries, "--site", site]
    done = subprocess.run(
        list(map(str, [sys.executable, *words])),
        env={"PATH": os.environ["PATH"], "HOME": str(directory), **VARIABLES},
        umask=0o077,
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [again] = (directory / "again").glob("*.deb")
    assert hashlib.sha256(again.read_bytes()).digest() == hashlib.sha256(package.read_bytes()).digest()

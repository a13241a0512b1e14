#!/usr/bin/env python3
"""Build the Debian package of Entrepôt, on Debian 12.

    build.py DIRECTORY        write entrepot_VERSION_ARCHITECTURE.deb there

Needs debhelper and dpkg-dev, and for this Python what deploy/image/build-requirements.txt has.  The libraries
are downloaded, exactly those that are locked for the image, and the documentation is built; --libraries and
--site name directories that have them already.  The same commit makes the same package: all times are
SOURCE_DATE_EPOCH, or else that of the commit.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from email.utils import formatdate
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
REQUIREMENTS = HERE.parent / "image" / "requirements.txt"
UNITS = HERE.parent / "systemd"
SITE = Path("proxy/ui/site")  # where the documentation is in the source
SOURCE_ONLY = "envparse"  # it has no wheel; a new one that has none fails
COMPRESSOR = {"TYPE": "zstd", "LEVEL": "9"}  # a fifth larger than by xz, in a twentieth of the time
COMPLETIONS = {"bash": "entrepot", "zsh": "_entrepot", "fish": "entrepot.fish"}


def build(target: Path, libraries: Path | None, site: Path | None) -> None:
    """Write the package into the directory `target`.  Raises CalledProcessError and OSError."""
    time = int(os.environ.get("SOURCE_DATE_EPOCH") or _output("git", "log", "-1", "--format=%ct"))
    os.environ["SOURCE_DATE_EPOCH"] = str(time)
    os.environ.setdefault("LC_ALL", "C.UTF-8")
    for name, value in COMPRESSOR.items():
        os.environ.setdefault(f"DPKG_DEB_COMPRESSOR_{name}", value)
    with tempfile.TemporaryDirectory() as temporary:
        tree = Path(temporary) / "entrepot"
        for part in ("debian", "program", "entrepot.1"):
            _copy(HERE / part, tree / part)
        version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
        (tree / "debian" / "changelog").write_text(_changelog(version, time))
        _lay_out_libraries(tree / "libraries", libraries, site)
        _lay_out_units(tree)
        _lay_out_documents(tree)
        _run("dpkg-buildpackage", "--build=binary", "--no-sign", "--no-check-builddeps", cwd=tree)
        target.mkdir(parents=True, exist_ok=True)
        for package in Path(temporary).glob("*.deb"):
            print(shutil.move(package, target / package.name))


def _lay_out_libraries(place: Path, libraries: Path | None, site: Path | None) -> None:
    """Those of the requirements, and Entrepôt itself."""
    if libraries is None:
        given = ["--require-hashes", "--only-binary=:all:", f"--no-binary={SOURCE_ONLY}", f"-r{REQUIREMENTS}"]
        _pip(place, *given)
    else:
        _copy(libraries, place)
    shutil.rmtree(place / "bin", ignore_errors=True)
    with tempfile.TemporaryDirectory() as copy:  # setuptools writes beside what it builds
        for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "proxy", "storage"):
            _copy(ROOT / name, Path(copy) / name)
        if site is None:
            _build_site(Path(copy), place)
        else:
            _copy(site, Path(copy) / SITE)
        _pip(place, "--no-build-isolation", copy)
    shutil.rmtree(place / "bin", ignore_errors=True)
    for record in place.glob("*.dist-info"):
        for name in ("RECORD", "direct_url.json", "INSTALLER", "REQUESTED"):  # of an installation by pip
            (record / name).unlink(missing_ok=True)
    for path in place.rglob("*"):
        if path.name == ".gitignore":
            path.unlink()
        elif not path.is_symlink():  # whatever the umask is
            path.chmod(0o755 if path.is_dir() else 0o644)
    _run(
        "/usr/bin/python3",
        "-m",
        "compileall",
        "-q",
        "-j0",
        "--invalidation-mode=unchecked-hash",
        "-s",
        place,
        "-p",
        "/usr/lib/entrepot",
        place,
    )


def _build_site(copy: Path, libraries: Path) -> None:
    """Put the documentation into a copy of the source, by the Python and the libraries of the package."""
    words = ("-m", "mkdocs", "build", "--quiet", f"--config-file={ROOT / 'mkdocs.yml'}")
    mkdocs = sysconfig.get_path("purelib")  # all of it is plain Python
    with tempfile.TemporaryDirectory() as metadata:  # the reference says which version it is
        setup = (sys.executable, "-c", "import setuptools; setuptools.setup()", "--quiet", "egg_info")
        _run(*setup, f"--egg-base={metadata}", cwd=copy)
        path = os.pathsep.join(map(str, (copy, metadata, libraries, mkdocs)))
        environment = {**os.environ, "PYTHONPATH": path}
        site = f"--site-dir={copy / SITE}"
        _run("/usr/bin/python3", "-BsS", *words, site, cwd=copy, environment=environment)


def _lay_out_units(tree: Path) -> None:
    units = tree / "units"
    units.mkdir()
    for unit in [*UNITS.glob("*.service"), *UNITS.glob("*.socket")]:
        (units / unit.name).write_text(unit.read_text().replace("/opt/entrepot/bin/", "/usr/bin/"))
    _copy(UNITS / "entrepot.sysusers", tree / "debian" / "entrepot.sysusers")
    completions = tree / "completions"
    completions.mkdir()
    program = "import sys; sys.path.insert(0, sys.argv.pop(1)); from proxy.cli.main import main; main()"
    for shell, name in COMPLETIONS.items():
        python = ("/usr/bin/python3", "-ISc", program, tree / "libraries")
        (completions / name).write_text(_output(*python, "completion", shell))


def _lay_out_documents(tree: Path) -> None:
    (tree / "debian" / "entrepot.docs").write_text("documents/*\n")
    (tree / "debian" / "entrepot.examples").write_text("config.example.yml\n")
    _copy(ROOT / "config.example.yml", tree / "config.example.yml")
    for page in ROOT.glob("docs/**/*.md"):
        place = tree / "documents" / page.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        _copy(page, place)
    _copy(ROOT / "README.md", tree / "documents" / "README.md")


def _changelog(version: str, time: int) -> str:
    [maintainer] = [
        line.partition(": ")[2]
        for line in (HERE / "debian" / "control").read_text().splitlines()
        if line.startswith("Maintainer: ")
    ]
    date = formatdate(time)
    head = f"entrepot ({version}) unstable; urgency=medium"
    return f"{head}\n\n  * See CHANGELOG.md.\n\n -- {maintainer}  {date}\n"


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        left_out = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(source, target, symlinks=True, ignore=left_out, dirs_exist_ok=True)
    else:
        shutil.copy2(source, target)


def _pip(target: Path, *words: str) -> None:
    quietly = (
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-compile",
        "--no-warn-script-location",
    )
    _run(sys.executable, "-m", "pip", "install", *quietly, f"--target={target}", *words)


def _run(*command: str | Path, cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> None:
    subprocess.run(list(map(str, command)), cwd=cwd, env=environment, check=True)


def _output(*command: str | Path) -> str:
    return subprocess.run(
        list(map(str, command)), cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--libraries", type=Path)
    parser.add_argument("--site", type=Path)
    given = parser.parse_args(arguments)
    build(given.directory, given.libraries, given.site)


if __name__ == "__main__":
    main()

"""Make the trees of files that the image is made of, each a layer, from what fetch.py has downloaded.

`system` has Python with the libraries of Debian that it needs, `libraries` the Python packages, `application`
Entrepôt itself, and `data` what the server's user owns.  The same input makes the same trees, to the byte and
the second.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import sbom
from fetch import NATIVE

HERE = Path(__file__).parent
SOURCE = HERE.parent.parent
SITE = Path("proxy/ui/site")  # where the documentation is in the source
PACKAGES = Path("usr/local/lib/python3.11/dist-packages")
USER = "65532"
EARLIEST = 315532800  # seconds: 1980, before which a zip knows no time

# Of Debian's packages: licences, what Python needs, and no program but Python and tini.
LEFT_OUT = re.compile(
    r"etc/(?!python3\.11/)|usr/sbin/|usr/bin/(?!(python3\.11|tini)$)|var/|usr/lib/[^/]+/gconv/"
    r"|usr/lib/(init|locale|libc-bin|apt|valgrind)/"
    r"|usr/share/(?!doc/[^/]+(/copyright)?$|common-licenses/|ca-certificates/mozilla/)"
    r"|usr/lib/python3\.11/(distutils|ensurepip|idlelib|lib2to3|pydoc_data|test|tkinter|turtle\w*|venv)[/.]"
    r"|usr/lib/python3\.11/lib-dynload/(_crypt|_curses\w*|_dbm|_gdbm|nis|ossaudiodev|readline|_test\w*|_xx\w*)\."
)
# Of the libraries: what only those need who build, install or type-check them.
UNUSED = (
    "*.c",
    "*.h",
    "*.pxd",
    "*.pyi",
    "*.pyx",
    ".lock",
    "__pycache__",
    "bin",
    "share",
    "test_data",
    "tests",
)
RECORDS = ("INSTALLER", "RECORD", "REQUESTED", "WHEEL", "uv_*.json")

FILES = {
    "etc/passwd": f"root:x:0:0::/:/none\nentrepot:x:{USER}:{USER}::/var/lib/entrepot:/none\n",
    "etc/group": f"root:x:0:\nentrepot:x:{USER}:\n",
    "etc/nsswitch.conf": "hosts: files dns\n",
    "usr/bin/entrepot": "#!/usr/bin/python3.11 -I\nfrom proxy.cli.main import main\n\nmain()\n",
}
MODES = {"application/usr/bin/entrepot": 0o755, "data/var/lib/entrepot": 0o770, "system/tmp": 0o1777}
LINKS = {
    "etc/os-release": "../usr/lib/os-release",
    "usr/lib/ssl/cert.pem": "/etc/ssl/certs/ca-certificates.crt",
}


@dataclass(frozen=True)
class ImagePython:
    """The Python of the image, for this machine's architecture, with other libraries before its own.

    It runs whatever Python runs this, so that the image does not depend on that.
    """

    system: Path

    def run(self, *words: str | Path, libraries: Sequence[Path | str] = (), directory: Path = HERE) -> None:
        """Raises CalledProcessError."""
        (loader,) = self.system.glob("usr/lib/*-linux-gnu/ld-linux-*.so.*")
        python = [loader, "--library-path", loader.parent, self.system / "usr/bin/python3.11", "-B", "-s"]
        environment = {
            "PYTHONHOME": str(self.system / "usr"),
            "PYTHONHASHSEED": "0",
            "PYTHONPATH": os.pathsep.join(map(str, libraries)),
            "PYTHONUTF8": "1",
        }
        subprocess.run(list(map(str, [*python, *words])), check=True, env=environment, cwd=directory)


def make_trees(packages: Path, trees: Path, architecture: str, epoch: int, site: Path | None) -> None:
    """Make all trees in the new directory `trees`.  Raises CalledProcessError and OSError.

    packages: what fetch.py has downloaded
    epoch: the time of all files, in seconds
    site: the documentation; None to build it
    """
    system, libraries, application, data = (
        trees / each for each in ("system", "libraries", "application", "data")
    )
    _make_system(packages / architecture / "debian", system, architecture)
    ignored = shutil.ignore_patterns(*UNUSED)
    shutil.copytree(packages / architecture / "libraries", libraries / PACKAGES, ignore=ignored)
    _remove_records(libraries)
    with tempfile.TemporaryDirectory() as temporary:
        python = ImagePython(system if architecture == NATIVE else Path(temporary))
        if architecture != NATIVE:
            _make_system(packages / NATIVE / "debian", python.system, NATIVE)
        for tree in (system, libraries):  # first, for Python runs on them below
            _compile(tree, python)
        running = libraries / PACKAGES if architecture == NATIVE else packages / NATIVE / "libraries"
        _install_entrepot(application / PACKAGES, epoch, python, running, site)
        _remove_records(application)
        _compile(application, python)
    _write(application, "usr/bin/entrepot")
    (application / "etc/entrepot").mkdir(parents=True)
    shutil.copyfile(HERE / "config.yml", application / "etc/entrepot/config.yml")
    _write_sbom(packages, trees, architecture, epoch)
    (data / "var/lib/entrepot").mkdir(parents=True)
    _settle(trees, epoch)


def _make_system(debian: Path, system: Path, architecture: str) -> None:
    for name in ("bin", "lib", *(["lib64"] if architecture == "amd64" else [])):
        (system / "usr" / name).mkdir(parents=True)
        (system / name).symlink_to(f"usr/{name}")
    for package in sorted(debian.glob("*.deb")):
        _unpack(package, system)
        _declare(package, system)
    authorities = sorted((system / "usr/share/ca-certificates/mozilla").iterdir())
    bundle = system / "etc/ssl/certs/ca-certificates.crt"
    bundle.parent.mkdir(parents=True)
    bundle.write_bytes(b"".join(each.read_bytes() for each in authorities))
    shutil.rmtree(system / "usr/share/ca-certificates")
    for name in ("etc/passwd", "etc/group", "etc/nsswitch.conf"):
        _write(system, name)
    for name, target in LINKS.items():
        (system / name).parent.mkdir(parents=True, exist_ok=True)
        (system / name).symlink_to(target)
    (system / "tmp").mkdir()


def _unpack(package: Path, root: Path) -> None:
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    content = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        archive.extraction_filter = lambda member, path: member  # Debian's packages are trusted
        archive.extractall(root, members=_chosen(archive))


def _chosen(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Its files and links that the image has, with / merged into /usr."""
    for member in archive:
        name = re.sub(r"^(?=(bin|lib|lib64|sbin)/)", "usr/", member.name.removeprefix("./"))
        if not member.isdir() and not LEFT_OUT.match(name):
            member.name, member.uid, member.gid = name, os.getuid(), os.getgid()
            yield member


def _declare(package: Path, root: Path) -> None:
    """Write what it is where scanners for vulnerabilities look."""
    directory = root / "var/lib/dpkg/status.d"
    directory.mkdir(parents=True, exist_ok=True)
    control = subprocess.run(["dpkg-deb", "--field", package], check=True, stdout=subprocess.PIPE).stdout
    (directory / package.name.partition("_")[0]).write_bytes(control)


def _write(root: Path, name: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(FILES[name])


def _install_entrepot(
    target: Path, epoch: int, python: ImagePython, libraries: Path, site: Path | None
) -> None:
    """Build its wheel from a copy, for that writes to the directory, and unpack it.

    libraries: of this machine's architecture, for the reference, which is made of the code
    """
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary, "source")
        source.mkdir()
        for name in ("LICENSE", "README.md", "pyproject.toml"):
            shutil.copyfile(SOURCE / name, source / name)
        for name in ("proxy", "storage"):
            shutil.copytree(
                SOURCE / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "site")
            )
        if site is None:
            _build_site(source, python, libraries)
        else:
            shutil.copytree(site, source / SITE)
        pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps"]
        command = [*pip, "--no-build-isolation", f"--wheel-dir={temporary}", str(source)]
        time = max(epoch, EARLIEST)
        subprocess.run(command, check=True, env={**os.environ, "SOURCE_DATE_EPOCH": str(time)})
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)


def _build_site(source: Path, python: ImagePython, libraries: Path) -> None:
    """Put the documentation into a copy of the source."""
    words = ["-m", "mkdocs", "build", "--quiet", f"--config-file={SOURCE / 'mkdocs.yml'}"]
    mkdocs = sysconfig.get_path("purelib")  # all of it is plain Python
    with tempfile.TemporaryDirectory() as metadata:  # the reference says which version it is
        setup = [sys.executable, "-c", "import setuptools; setuptools.setup()", "--quiet", "egg_info"]
        subprocess.run([*setup, f"--egg-base={metadata}"], check=True, cwd=source)
        path = [source, Path(metadata), libraries, mkdocs]
        python.run(*words, f"--site-dir={source / SITE}", libraries=path, directory=source)


def _remove_records(tree: Path) -> None:
    """Remove what depends on how it was installed."""
    for information in tree.glob(f"{PACKAGES}/*.dist-info"):
        for pattern in RECORDS:
            for each in information.glob(pattern):
                each.unlink()


def _compile(tree: Path, python: ImagePython) -> None:
    """Compile everything into files that no time is in: those of one architecture are those of each."""
    options = ["-q", "--invalidation-mode=unchecked-hash", "-s", tree, "-p", "/", tree / "usr"]
    python.run("-m", "compileall", *options)


def _write_sbom(packages: Path, trees: Path, architecture: str, epoch: int) -> None:
    bom = trees / "application/usr/share/sbom/entrepot.cdx.json"
    bom.parent.mkdir(parents=True)
    python = [trees / each / PACKAGES for each in ("libraries", "application")]
    bom.write_text(sbom.make(trees / "system/var/lib/dpkg/status.d", python, epoch))


def _settle(trees: Path, epoch: int) -> None:
    """Set times and modes, whatever the umask is."""
    for path in trees.rglob("*"):
        name = path.relative_to(trees)
        if not path.is_symlink():
            executable = path.stat().st_mode & 0o100
            path.chmod(MODES.get(str(name), 0o755 if executable else 0o644))
        os.utime(path, (epoch, epoch), follow_symlinks=False)

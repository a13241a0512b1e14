"""The Debian package: built twice, installed in a copy of this system, served from, removed and purged."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import aiohttp
import pytest
import yaml

from tests.clients.processes import Process, require
from tests.documentation import site
from tests.processes import Server
from tests.test_distributions import needed
from tests.test_docs import ROOT
from tests.upstream import Upstream

__all__ = ["site"]  # a fixture
pytestmark = pytest.mark.clients

# Shows the whole system below $1/root, where changes are kept in memory, for as long as the process runs.
COPY = """
set -e
mount -t tmpfs tmpfs "$1"
mkdir "$1/changes" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/changes,workdir=$1/work" "$1/root"
mount -t tmpfs tmpfs "$1/root/tmp"
mount -t tmpfs tmpfs "$1/root/run"
mount --rbind /dev "$1/root/dev"
mount -t proc proc "$1/root/proc"
echo mounted
exec sleep infinity
"""


DATA = ("cache", "format", "private")  # of a server


def build(target: Path, libraries: Path, umask: int, *options: str | Path) -> Path:
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(target.parent),
        "SOURCE_DATE_EPOCH": "1700000000",
        "DPKG_DEB_COMPRESSOR_TYPE": "none",  # to be quick
    }
    words = [sys.executable, ROOT / "deploy/debian/build.py", target, "--libraries", libraries, *options]
    done = subprocess.run(
        list(map(str, words)), env=environment, umask=umask, capture_output=True, text=True, timeout=120
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


class Installed:
    """A copy of this system in which the package is installed."""

    def __init__(self, root: Path, holder: int) -> None:
        self._root = root
        self._enter = ["nsenter", f"--target={holder}", "--mount", "--", "chroot", str(root)]

    def command(self, *words: str) -> list[str]:
        return [*self._enter, *words]

    def run(self, *words: str, text: str = "") -> str:
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive"}
        done = subprocess.run(
            self.command(*words), env=environment, input=text, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def configure(self, tree: object) -> None:
        self.run("tee", "/etc/entrepot/config.yml", text=yaml.safe_dump(tree))


@pytest.fixture
def installed(package: Path, tmp_path: Path) -> Iterator[Installed]:
    require("unshare", "nsenter", "systemd-analyze")
    place = tmp_path / "copy"
    place.mkdir()
    holder = Process(["unshare", "--mount", "sh", "-c", COPY, "copy", place], ready="mounted")
    try:
        system = Installed(place / "root", holder.pid)
        system.run("tee", "/usr/sbin/policy-rc.d", text="#!/bin/sh\nexit 101\n")
        inside = Path(f"/proc/{holder.pid}/root{place}/root/tmp")  # as the holder sees it
        shutil.copy(package, inside)
        system.run("dpkg", "--force-unsafe-io", "--no-triggers", "--install", f"/tmp/{package.name}")
        yield system
    finally:
        holder.stop()


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


async def test_it_is_installed_serves_and_is_removed(
    installed: Installed, upstream: Upstream, tmp_path: Path
) -> None:
    image = upstream.image("library/app", "1")
    assert installed.run("stat", "--format=%U:%G %a", "/etc/entrepot", "/etc/entrepot/config.yml").split(
        "\n"
    )[:2] == [
        "root:entrepot 750",
        "root:entrepot 640",
    ]
    units = [f"/lib/systemd/system/{each}" for each in ("entrepot.service", "entrepot.socket")]
    assert installed.run("systemd-analyze", "verify", "--man=no", *units) == ""
    assert "/etc/entrepot/config.yml is valid" in installed.run("entrepot", "check", "--no-files")
    installed.configure(
        {
            "listen": "127.0.0.1:0",
            "admin": "127.0.0.1:0",
            "workers": 1,
            "disk": {"path": "/var/lib/entrepot"},
            "namespaces": {"docker.io": {"upstream": upstream.url}, "team": {"store": {}}},
        }
    )
    # As StateDirectory= does:
    installed.run("install", "-d", "-o", "entrepot", "-m", "700", "/var/lib/entrepot")
    user = ("setpriv", "--reuid=entrepot", "--regid=entrepot", "--clear-groups", "--no-new-privs")
    process = await asyncio.create_subprocess_exec(
        *installed.command(*user, "/usr/bin/entrepot", "serve"),
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    server = Server(process, tmp_path)
    try:
        await server.serving()
        async with aiohttp.ClientSession() as client:
            url = f"{server.url}/v2/docker.io/library/app"
            async with client.get(f"{url}/manifests/1") as response:
                assert await response.read() == image.content
            async with client.get(f"{url}/blobs/{image.layers[0]}") as response:
                assert await response.read() == b"a layer"
            blob = (
                f"{server.url}/v2/team/app/blobs/uploads/?digest=sha256:{hashlib.sha256(b'mine').hexdigest()}"
            )
            async with client.post(blob, data=b"mine") as response:
                assert response.status == 201
            for page in ("ui/", "docs/", "docs/reference/python-api.html"):
                async with client.get(f"{server.admin_url}/{page}") as response:
                    assert response.status == 200, page
        await server.stop()
    finally:
        await server.clear()
    assert not server.noise
    installed.run("dpkg", "--force-unsafe-io", "--no-triggers", "--remove", "entrepot")
    assert names(installed) == ["/etc/entrepot/config.yml", *(f"/var/lib/entrepot/{each}" for each in DATA)]
    said = installed.run("dpkg", "--force-unsafe-io", "--no-triggers", "--purge", "entrepot")
    assert "images that were pushed are left in /var/lib/entrepot" in said
    assert names(installed) == ["/var/lib/entrepot/format", "/var/lib/entrepot/private"]


def names(installed: Installed) -> list[str]:
    """What there is of the package, and of its server."""
    places = "/usr/bin/entrepot /usr/lib/entrepot /etc/entrepot/* /var/lib/entrepot/*"
    return installed.run("sh", "-c", f"ls -d {places} 2>/dev/null || true").split()

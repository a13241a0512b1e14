"""Entrepôt is installed as the pages say, each on a machine of its own, up to what is pulled through it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.authority import Authority
from tests.clients import debian_package
from tests.clients.machine import Machine
from tests.clients.processes import require
from tests.clients.surroundings import (
    CLONE,
    Page,
    provide_clone,
    provide_hub,
    provide_names,
    provide_packages,
)
from tests.documentation import site
from tests.test_distributions import built

__all__ = ["built", "site"]  # fixtures
pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def machine(home: Path) -> Iterator[Machine]:
    """Which reaches Docker Hub."""
    require("dh", "docker-registry", "dnsmasq", "dpkg-buildpackage", "skopeo", root=False)
    machine = Machine(home)
    try:
        provide_names(machine, home)
        provide_hub(machine, home, Authority(home))
        yield machine
    finally:
        machine.stop()


def test_under_systemd(machine: Machine, home: Path) -> None:
    page = Page("docs/install/systemd.md")
    provide_packages(machine, home)
    provide_clone(machine)

    def follow(words: str) -> str:
        return machine.run(page.script(words), directory=CLONE)

    follow("python3 -m venv /opt/entrepot")
    follow("systemd-sysusers")
    follow("entrepot check")
    assert "active (running)" in follow("systemctl enable --now")
    assert "docker.io/library/alpine " in follow("for pull in 1 2")
    follow("0.0.0.0:5000")
    assert "0.0.0.0:5000" in machine.run("ss --listening --tcp --numeric; entrepot ls")
    follow("LoadCredential")
    follow("pip install --upgrade")
    follow("ReadWritePaths")
    follow("userdel entrepot")
    page.check_whole()
    machine.run("! ls /var/lib/entrepot /etc/entrepot; ! systemctl status entrepot.service; ! id entrepot")


CONFIGURATION = """
listen: 127.0.0.1:5000
disk: {path: /var/lib/entrepot}
namespaces: {docker.io: {upstream: https://registry-1.docker.io}, team: {store: {}}}
"""


def test_by_the_debian_package(machine: Machine, home: Path, site: Path, tmp_path: Path) -> None:
    """Also removed and purged, where what was pushed stays."""
    page = Page("docs/install/debian.md")
    provide_packages(machine, home)
    provide_clone(machine)

    def follow(words: str) -> str:
        given = "".join(f"export {name}={value}\n" for name, value in debian_package.VARIABLES.items())
        return machine.run(given + page.script(words), directory=CLONE)

    follow("deploy/debian/build.py")
    [package] = machine.path("/tmp/packages").glob("*.deb")
    debian_package.check_files(package)
    debian_package.check_it_is_made_again(package, site, tmp_path)
    assert "active (running)" in follow("apt install --yes /tmp/packages")
    assert machine.run("stat --format='%U:%G %a' /etc/entrepot /etc/entrepot/config.yml").split("\n")[:2] == [
        "root:entrepot 750",
        "root:entrepot 640",
    ]
    units = "/lib/systemd/system/entrepot.service /lib/systemd/system/entrepot.socket"
    assert machine.run(f"systemd-analyze verify --man=no {units}") == ""
    assert "docker.io/library/alpine " in follow("for pull in 1 2")
    machine.run(
        "for page in ui/ docs/ docs/reference/python-api.html\n"
        "do curl --fail --silent http://127.0.0.1:5001/$page; done"
    )
    machine.path("/etc/entrepot/config.yml").write_text(CONFIGURATION)
    follow("entrepot check")
    follow("systemctl enable --now entrepot.socket")
    machine.run("skopeo copy --dest-tls-verify=false oci:/tmp/alpine docker://127.0.0.1:5000/team/app:1")
    assert "team/app" in machine.run("entrepot ls")
    page.check_whole()
    machine.run(
        "apt remove --yes entrepot\n"
        "ls /etc/entrepot/config.yml /var/lib/entrepot/cache; ! ls /usr/lib/entrepot"
    )
    said = machine.run("apt purge --yes entrepot; ! ls /etc/entrepot /var/lib/entrepot/cache")
    assert "images that were pushed are left in /var/lib/entrepot" in said
    machine.run("ls /var/lib/entrepot/private; ! systemctl status entrepot.service")


def test_by_pipx(machine: Machine, home: Path, built: Path) -> None:
    """By somebody who is not root."""
    page = Page("docs/install/python.md")
    [wheel] = built.glob("*.whl")
    provide_packages(machine, home, [wheel])
    machine.run(
        "useradd --create-home --shell /bin/bash you; echo 'you ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/you"
    )
    installation, serve, _ = page.script("pipx install entrepot").rpartition("entrepot serve")
    machine.run(installation, user="you", directory="/home/you")
    machine.start("complete instructions", "bash", "-lc", serve, user="you", directory="/home/you")
    said = machine.run(
        f"bash -lc {shlex.quote(page.script('skopeo copy'))}", user="you", directory="/home/you"
    )
    assert "docker.io/library/alpine " in said
    page.check_whole()
    machine.run("pipx install uv; ~/.local/bin/uvx entrepot ls", user="you", directory="/home/you")

"""What a page takes for granted, for a machine: names, Docker Hub, the package index, Docker, and a clone."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.authority import Authority
from tests.clients import images
from tests.clients.image import Layout
from tests.clients.machine import INTERNET, Machine
from tests.clients.processes import run
from tests.clients.site import DockerRegistry
from tests.test_distributions import repository
from tests.test_docs import ROOT
from tests.test_shell_blocks import scripts

WHEELS = ROOT / ".venv" / "wheels"  # as .ci/run downloads them
HUB = "registry-1.docker.io"
CLONE = "/root/entrepot"
AUTHORITIES = "/etc/ssl/certs/ca-certificates.crt"
PIP = f"""
[global]
no-index = true
find-links = http://{INTERNET}/
trusted-host = {INTERNET}
disable-pip-version-check = true
[install]
no-compile = true
"""
UV = f"""
no-index = true
find-links = ["http://{INTERNET}/"]
allow-insecure-host = ["{INTERNET}"]
python-downloads = "never"
"""
# There is no terminal, which `exec` of docker-compose would need.
DOCKER = """#!/bin/sh
case "$1" in
compose) shift; for each; do shift; set -- "$@" "$each"; [ "$each" != exec ] || set -- "$@" -T; done
    exec docker-compose "$@" ;;
*) exec /usr/bin/docker "$@" ;;
esac
"""


class Page:
    """The scripts of a page, each of which is to be run."""

    def __init__(self, name: str) -> None:
        self._left = [text for _, text in scripts((ROOT / name).read_text())]

    def script(self, words: str) -> str:
        """The next one with these words."""
        found = next(text for text in self._left if words in text)
        self._left.remove(found)
        return found

    def check_whole(self) -> None:
        assert self._left == []


def provide_names(machine: Machine, directory: Path, **more: str) -> None:
    """A server that knows where Docker Hub is, and `more` names with their addresses, and nothing else."""
    known = "".join(f"address=/{name}/{address}\n" for name, address in {HUB: INTERNET, **more}.items())
    (directory / "dnsmasq.conf").write_text(f"no-resolv\nno-hosts\nuser=root\npid-file\n{known}")
    words = ("--keep-in-foreground", "--log-facility=-", f"--conf-file={directory}/dnsmasq.conf")
    machine.serve("started", "dnsmasq", *words)
    machine.run(f"rm -f /etc/resolv.conf; echo nameserver {INTERNET} >/etc/resolv.conf")


def provide_hub(machine: Machine, directory: Path, authority: Authority) -> None:
    """Docker Hub, with docker.io/library/alpine:3; the machine trusts the authority."""
    root = directory / "hub"
    filled = DockerRegistry(root, directory)
    images.push(filled.url, "library/alpine", "3", images.index("alpine", "amd64", "arm64"))
    filled.stop()
    tls = authority.issue("hub", HUB)
    config = directory / "tls.yml"
    config.write_text(
        json.dumps(
            {
                "version": "0.1",
                "log": {"level": "info", "formatter": "text"},
                "storage": {
                    "filesystem": {"rootdirectory": str(root)},
                    "maintenance": {"readonly": {"enabled": True}},
                },
                "http": {"addr": f"{INTERNET}:443", "secret": "of no worth", "tls": tls},
            }
        )
    )
    machine.serve("listening on", "docker-registry", "serve", str(config))
    with machine.path(AUTHORITIES).open("a") as trusted:
        trusted.write(authority.ca.read_text())


def provide_packages(machine: Machine, directory: Path, more: Iterable[Path] = ()) -> None:
    """What pip and uv find instead of the package index: what .ci/run has downloaded, and `more` files."""
    if not WHEELS.exists():
        if os.environ.get("ENTREPOT_REQUIRE_CLIENTS") == "1":
            pytest.fail(f"{WHEELS} has no packages: .ci/run downloads them")
        pytest.skip(f"{WHEELS} has no packages: .ci/run says how they are downloaded")
    index = directory / "index"
    index.mkdir()
    for each in [*WHEELS.iterdir(), *more]:
        (index / each.name).symlink_to(each)
    server = ("-u", "-m", "http.server", f"--bind={INTERNET}", f"--directory={index}", "80")
    machine.serve("Serving HTTP", sys.executable, *server)
    machine.path("/etc/pip.conf").write_text(PIP)
    machine.path("/etc/uv").mkdir()
    machine.path("/etc/uv/uv.toml").write_text(UV)


def provide_clone(machine: Machine) -> None:
    """A clone of this repository in CLONE, of one commit."""
    for name in repository():
        target = machine.path(f"{CLONE}/{name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    machine.run(
        "git config --global user.name Ann; git config --global user.email ann@cache.example\n"
        "git init --quiet --initial-branch=main; git add --all; git commit --quiet --message 'All of it'",
        directory=CLONE,
    )


def provide_docker(machine: Machine, layout: Layout) -> None:
    """Docker of Debian, with the image; its part for compose files is a program of its own in Debian."""
    machine.run("systemctl start docker.service")
    program = machine.path("/usr/local/bin/docker")
    program.write_text(DOCKER)
    program.chmod(0o755)
    name = layout.top["annotations"]["org.opencontainers.image.ref.name"]
    daemon = f"--dest-daemon-host=unix://{machine.path('/run/docker.sock')}"
    copy = ["skopeo", "--insecure-policy", "copy", "--quiet", daemon, f"oci:{layout.directory}:{name}"]
    run([*copy, "docker-daemon:entrepot:latest"], os.environ)
    trust_in_image(machine, "entrepot")
    machine.run("docker tag entrepot localhost/entrepot")


def trust_in_image(machine: Machine, name: str) -> None:
    """Whom the machine trusts, the image does too, as docs/install/container.md says."""
    machine.run(
        f"mkdir -p /tmp/trust; cp {AUTHORITIES} /tmp/trust\n"
        f"printf 'FROM {name}\nCOPY ca-certificates.crt /etc/ssl/certs/\n' >/tmp/trust/Dockerfile\n"
        f"docker build --quiet --tag {name} /tmp/trust"
    )

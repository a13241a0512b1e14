"""Clients that show certificates, where one is required, and what they say where something is wrong."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.authority import Authority
from tests.clients.conftest import Filled, Images, before
from tests.clients.processes import own_address
from tests.clients.site import Site
from tests.clients.test_containerd import HOW, Containerd
from tests.clients.test_containerd import held as held_by_containerd
from tests.clients.test_dockerd import Docker
from tests.clients.test_dockerd import held as held_by_docker
from tests.clients.test_podman import Containers
from tests.clients.test_podman import held as held_by_podman
from tests.clients.test_skopeo import Skopeo, digests


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def guarded(filled: Filled, tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[Site]:
    """A site that lets in nobody without a certificate; for all tests here."""
    tls = {"client_ca": str(authority.ca), "client_certificate": "required"}
    issued = authority.issue("server", own_address())
    with before(filled, tmp_path_factory.mktemp("guarded"), {**issued, **tls}, authority.ca) as site:
        yield site


@pytest.fixture(scope="module")
def own(authority: Authority) -> dict[str, str]:
    return authority.issue("client", "ci.example")


def hand(own: dict[str, str], directory: Path) -> None:
    """Lay a client's own certificate beside that of the authority, as all but containerd look for it."""
    assert (directory / "ca.crt").exists()
    shutil.copyfile(own["certificate"], directory / "client.cert")
    shutil.copyfile(own["key"], directory / "client.key")


def test_skopeo(guarded: Site, home: Path, own: dict[str, str], pushed: Images) -> None:
    skopeo = Skopeo(guarded, home)
    name = f"{guarded.address}/docker.io/library/platforms:1"
    with pytest.raises(pytest.fail.Exception, match="certificate"):
        skopeo.copy(name)
    hand(own, home / ".config" / "containers" / "certs.d" / guarded.address)
    assert skopeo.copy(name) == digests(pushed.platforms)
    # By the options, where no directory of configuration is to be had.
    shutil.rmtree(home / ".config" / "containers" / "certs.d")
    with pytest.raises(pytest.fail.Exception, match=re.compile("unknown authority", re.IGNORECASE)):
        skopeo.copy(name)
    (home / "given").mkdir()
    shutil.copyfile(guarded.ca or "", home / "given" / "ca.crt")
    hand(own, home / "given")
    local = f"docker://{guarded.address}/local/team/platforms:1"
    skopeo.run("copy", "--all", "--src-cert-dir", home / "given", f"docker://{name}", f"dir:{home}/dir")
    skopeo.run("copy", "--all", "--dest-cert-dir", home / "given", f"dir:{home}/dir", local)
    said = skopeo.run("inspect", "--raw", "--cert-dir", home / "given", local)
    assert said.encode() == pushed.platforms.manifest.data


@pytest.mark.parametrize("program", ["podman", "buildah"])
def test_podman(guarded: Site, home: Path, own: dict[str, str], pushed: Images, program: str) -> None:
    containers = Containers(program, guarded, home)
    hand(own, home / ".config" / "containers" / "certs.d" / guarded.address)
    found = containers.pull("docker.io/library/layers:1", f"{guarded.address}/quay.example/team/app:1")
    assert found == [held_by_podman(pushed.layers), held_by_podman(pushed.app)]


def test_docker(guarded: Site, home: Path, own: dict[str, str], pushed: Images) -> None:
    docker = Docker(guarded, home)
    name = f"{guarded.address}/quay.example/team/app"
    expected = [held_by_docker("layers", pushed.layers), held_by_docker(name, pushed.app)]
    assert docker.pull("layers:1", f"{name}:1", own=own) == expected


def test_containerd(guarded: Site, home: Path, own: dict[str, str], pushed: Images) -> None:
    containerd = Containerd(guarded, home)
    containerd.configure("--no-bypass")
    pair = f'client = [["{own["certificate"]}", "{own["key"]}"]]'
    for path in (home / "etc" / "containerd" / "certs.d").glob("*/hosts.toml"):
        text = path.read_text()
        path.write_text(re.sub(r"(?m)^( *)(ca = .*)$", rf"\1\2\n\1{pair}", text))
        assert "client" in path.read_text()
    names = {"docker.io/library/schema2:1": pushed.schema2}
    assert containerd.pull(*names, how=HOW) == held_by_containerd(names)

"""Real clients push what they pulled, under another name; another one, which holds nothing, pulls that."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.conftest import Images
from tests.clients.images import Image, digest_of
from tests.clients.processes import Process, environment, require, run
from tests.clients.site import Site
from tests.clients.test_podman import Containers


class Skopeo:
    """Who looks at what was pushed: it holds nothing itself, and checks every digest."""

    def __init__(self, home: Path) -> None:
        require("skopeo", root=False)
        self._home = home
        self._environment = environment(home)

    def copy(self, source: str, destination: str, *words: str) -> None:
        plain = ("--src-tls-verify=false", "--dest-tls-verify=false")
        run(
            ["skopeo", "--insecure-policy", "copy", *plain, *words, source, destination],
            self._environment,
        )

    def held(self, name: str) -> set[str]:
        """The digests of all that `name` consists of."""
        directory = self._home / f"copy-{len(list(self._home.iterdir()))}"
        self.copy(f"docker://{name}", f"dir:{directory}", "--all")
        files = [path for path in directory.iterdir() if path.name != "version"]
        return {digest_of(path.read_bytes()) for path in files}

    def config(self, name: str) -> dict[str, object]:
        words = ["skopeo", "--insecure-policy", "inspect", "--config", "--tls-verify=false"]
        found: dict[str, object] = json.loads(run([*words, f"docker://{name}"], self._environment))
        return found


@pytest.fixture(scope="module")
def site(shared: Site) -> Site:
    return shared


@pytest.fixture
def team(request: pytest.FixtureRequest) -> str:
    """Where a test pushes to, and no other one does."""
    return f"local/{hashlib.sha256(request.node.name.encode()).hexdigest()[:16]}"


@pytest.fixture
def skopeo(home: Path) -> Skopeo:
    return Skopeo(home)


def digests(image: Image) -> set[str]:
    return {part.digest for part in image.parts()}


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("docker.io/library/layers:1", "layers"),
        ("docker.io/library/schema2:1", "schema2"),
        ("docker.io/library/platforms:1", "platforms"),
        ("docker.io/team/artifact:1", "artifact"),
    ],
)
def test_skopeo(site: Site, team: str, skopeo: Skopeo, pushed: Images, source: str, wanted: str) -> None:
    name = f"{site.address}/{team}/{wanted}:1"
    skopeo.copy(f"docker://{site.address}/{source}", f"docker://{name}", "--all")
    assert skopeo.held(name) == digests(getattr(pushed, wanted))
    # Into another repository, where its blobs are mounted; then by the digest alone.
    other = f"{site.address}/{team}/elsewhere/{wanted}"
    skopeo.copy(f"docker://{name}", f"docker://{other}:2", "--all")
    assert skopeo.held(f"{other}@{getattr(pushed, wanted).digest}") == digests(getattr(pushed, wanted))


class Pushing(Containers):
    """podman or buildah, with one storage."""

    def work(self, *words: str, program: str = "") -> str:
        storage = [f"--root={self._home}/storage/root", f"--runroot={self._home}/storage/run"]
        return run([program or self._program, *storage, "--storage-driver=vfs", *words], self.environment)


@pytest.mark.parametrize("program", ["podman", "buildah"])
def test_podman_and_buildah(
    site: Site, team: str, home: Path, skopeo: Skopeo, pushed: Images, program: str
) -> None:
    containers = Pushing(program, site, home)
    name = f"{site.address}/{team}/app:1"
    containers.work("pull", "--quiet", "--arch=amd64", "docker.io/library/layers:1")
    # podman compresses anew: the layers are other blobs of the same content.
    containers.work("push", "--tls-verify=false", "docker.io/library/layers:1", f"docker://{name}")
    (held,) = containers.pull(name)
    assert held.layers == pushed.layers.diff_ids
    # Once more there is nothing to send, and under another name nothing but a manifest.
    containers.work("push", "--tls-verify=false", "docker.io/library/layers:1", f"docker://{name}")
    containers.work("push", "--tls-verify=false", "docker.io/library/layers:1", f"docker://{name}2")
    assert skopeo.held(f"{name}2") == skopeo.held(name)


def test_podman_pushes_an_index(site: Site, team: str, home: Path, skopeo: Skopeo, pushed: Images) -> None:
    containers = Pushing("podman", site, home)
    name = f"{site.address}/{team}/platforms:1"
    containers.work("manifest", "create", "both")
    for child in pushed.platforms.children:
        source = f"docker://docker.io/library/platforms@{child.digest}"
        containers.work("manifest", "add", "both", source)
    containers.work("manifest", "push", "--all", "--tls-verify=false", "both", f"docker://{name}")
    found = skopeo.held(name)
    children = set().union(*map(digests, pushed.platforms.children))
    assert len(found) == len(children) + 1
    assert {part for part in found if part in children} == children


@pytest.fixture
def docker(site: Site, home: Path) -> Iterator[list[str]]:
    require("docker", "dockerd", "unshare")
    directory = home / "dockerd"
    directory.mkdir()
    (directory / "daemon.json").write_text(json.dumps({"registry-mirrors": [f"http://{site.address}"]}))
    socket = f"unix://{directory}/docker.sock"
    daemon = [
        *("unshare", "--mount"),  # its mounts end with it
        *("dockerd", f"--config-file={directory}/daemon.json", f"--host={socket}"),
        *(f"--data-root={directory}/data", f"--exec-root={directory}/run"),
        *(f"--pidfile={directory}/dockerd.pid", "--storage-driver=vfs"),
        *("--bridge=none", "--iptables=false", "--ip6tables=false"),
    ]
    process = Process(daemon, environment(home), ready="API listen on")
    yield ["docker", "--host", socket]
    process.stop()


def test_docker(site: Site, team: str, home: Path, docker: list[str], skopeo: Skopeo, pushed: Images) -> None:
    def work(*words: str) -> str:
        return run([*docker, *words], environment(home))

    source, name = "layers:1", f"{site.address}/{team}/app:1"
    work("pull", "--quiet", "--platform=linux/amd64", source)
    work("tag", source, name)
    said = work("push", name)
    found = re.search(r"digest: (sha256:[0-9a-f]{64}) size: \d+", said)
    assert found
    work("image", "rm", name, source)
    work("pull", "--quiet", name)
    image = json.loads(work("image", "inspect", name))[0]
    assert image["RepoDigests"] == [f"{name.removesuffix(':1')}@{found[1]}"]
    assert (image["Id"], tuple(image["RootFS"]["Layers"])) == (
        pushed.layers.config.digest,
        pushed.layers.diff_ids,
    )
    assert skopeo.config(name)["rootfs"] == {"type": "layers", "diff_ids": list(pushed.layers.diff_ids)}
    # Into a second repository: its layers are mounted.
    work("tag", name, f"{site.address}/{team}/second:1")
    said = work("push", f"{site.address}/{team}/second:1")
    assert said.count(f"Mounted from {team}/app") == len(pushed.layers.diff_ids)


def test_containerd(site: Site, team: str, home: Path, skopeo: Skopeo, pushed: Images) -> None:
    require("containerd", "ctr", "unshare")
    directory = home / "containerd"
    directory.mkdir()
    config = directory / "config.toml"
    config.write_text(
        f'version = 2\nroot = "{directory}/root"\nstate = "{directory}/state"\n'
        'disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]\n'
        f'[grpc]\naddress = "{directory}/containerd.sock"\n'
    )
    daemon = ["unshare", "--mount", "containerd", f"--config={config}"]  # its mounts end with it
    process = Process(daemon, environment(home), ready="containerd successfully booted")
    ctr = ["ctr", "--address", f"{directory}/containerd.sock", "images"]
    source, name = f"{site.address}/docker.io/library/platforms:1", f"{site.address}/{team}/platforms:1"
    try:
        run(
            [*ctr, "pull", "--plain-http", "--snapshotter", "native", "--all-platforms", source],
            environment(home),
        )
        run([*ctr, "push", "--plain-http", name, source], environment(home))
    finally:
        process.stop()
    assert skopeo.held(name) == digests(pushed.platforms)

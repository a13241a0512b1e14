"""containerd with the cache as the `_default` host: every registry's images, told apart by `ns`."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.clients.conftest import Filled, Images
from tests.clients.images import Image
from tests.clients.processes import Process, environment, require, run
from tests.clients.setup import write
from tests.clients.site import DockerRegistry, Site, pull_cold_warm_offline

_CONFIG = """
version = 2
root = "{directory}/root"
state = "{directory}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
address = "{directory}/containerd.sock"
"""


@dataclass(frozen=True)
class Held:
    """What containerd holds: what each name points at, and the digests of all content."""

    names: dict[str, str]
    content: set[str]


class Containerd:
    """containerd in directories of its own, started anew for every pull."""

    def __init__(self, site: Site, home: Path):
        require("containerd", "ctr", "unshare")
        self._home = home
        self._daemons = itertools.count()
        self._environment = environment(home)
        self._site = site
        self._hosts = home / "etc" / "containerd" / "certs.d"

    def configure(self, *words: str | Path) -> None:
        write(self._home, "containerd", self._site, *words)

    def pull(self, *names: str, how: tuple[str, ...]) -> Held:
        """Pull into a daemon that holds nothing, by the words `how` of ctr."""
        with self.running() as socket:
            ctr = ["ctr", "--address", socket]
            for name in names:
                run([*ctr, *how, "--hosts-dir", self._hosts, name], self._environment)
            rows = run([*ctr, "images", "ls"], self._environment).splitlines()[1:]
            content = run([*ctr, "content", "ls", "--quiet"], self._environment).split()
        return Held({name: digest for name, _type, digest, *_ in map(str.split, rows)}, set(content))

    @contextmanager
    def running(self) -> Iterator[str]:
        """A daemon that holds nothing; where it listens."""
        directory = self._home / f"containerd-{next(self._daemons)}"
        directory.mkdir()
        config = directory / "config.toml"
        config.write_text(_CONFIG.format(directory=directory))
        daemon = ["unshare", "--mount", "containerd", f"--config={config}"]  # its mounts end with it
        process = Process(daemon, self._environment, ready="containerd successfully booted")
        try:
            yield f"{directory}/containerd.sock"
        finally:
            process.stop()


@pytest.fixture
def containerd(site: Site, home: Path) -> Containerd:
    made = Containerd(site, home)
    made.configure()
    return made


def held(images: dict[str, Image]) -> Held:
    content = {part.digest for image in images.values() for part in image.parts()}
    return Held({name: image.digest for name, image in images.items()}, content)


def test_pull_and_unpack(site: Site, containerd: Containerd, pushed: Images) -> None:
    names = {
        "docker.io/library/layers:1": pushed.layers,
        "docker.io/library/schema2:1": pushed.schema2,
        "docker.io/library/platforms:1": pushed.platforms,
        f"docker.io/library/platforms@{pushed.platforms.digest}": pushed.platforms,
        "quay.example/team/app:1": pushed.app,
    }
    how = ("images", "pull", "--snapshotter", "native", "--all-platforms")
    pull_cold_warm_offline(site, lambda: containerd.pull(*names, how=how), held(names))


def test_pull_for_one_platform(site: Site, containerd: Containerd, pushed: Images) -> None:
    name = "docker.io/library/platforms:1"
    wanted = [pushed.platforms.manifest, *pushed.platforms.amd64.parts()]
    expected = Held({name: pushed.platforms.digest}, {part.digest for part in wanted})
    how = ("images", "pull", "--snapshotter", "native", "--platform", "linux/amd64")
    pull_cold_warm_offline(site, lambda: containerd.pull(name, how=how), expected)


def test_fetch_an_artifact(site: Site, containerd: Containerd, pushed: Images) -> None:
    names = {"docker.io/team/artifact:1": pushed.artifact}
    how = ("content", "fetch", "--all-platforms")
    pull_cold_warm_offline(site, lambda: containerd.pull(*names, how=how), held(names))


HOW = ("images", "pull", "--snapshotter", "native", "--all-platforms")


@pytest.mark.parametrize(
    "words", [("--no-bypass",), ("--namespace", "docker.io", "--namespace", "quay.example")]
)
def test_pull_as_setup_is_asked(site: Site, home: Path, pushed: Images, words: tuple[str, ...]) -> None:
    """Whatever goes past the cache cannot succeed here: it would need the network."""
    containerd = Containerd(site, home)
    containerd.configure(*words)
    names = {"docker.io/library/schema2:1": pushed.schema2, "quay.example/team/app:1": pushed.app}
    pull_cold_warm_offline(site, lambda: containerd.pull(*names, how=HOW), held(names))


def test_pull_from_registries_of_a_list(filled: Filled, tmp_path: Path, home: Path, pushed: Images) -> None:
    """No registry has an entry at the server, and the client none but `_default`."""
    hub, quay = (DockerRegistry(root, tmp_path) for root in filled.roots.values())
    try:
        first, second = hub.url.removeprefix("http://"), quay.url.removeprefix("http://127.0.0.1:")
        listed = {"hosts": [hub.url, f"http://localhost:{second}", "*.example.com"]}
        site = Site({"hub": hub, "quay": quay}, tmp_path, listed=listed)
        try:
            containerd = Containerd(site, home)
            containerd.configure()
            names = {
                f"{first}/library/schema2:1": pushed.schema2,
                f"{first}/library/platforms:1": pushed.platforms,
                f"localhost:{second}/team/app:1": pushed.app,
            }
            pull_cold_warm_offline(site, lambda: containerd.pull(*names, how=HOW), held(names))
        finally:
            site.stop()
    finally:
        hub.stop()
        quay.stop()


def test_pull_while_the_server_serves_and_when_it_does_not(
    filled: Filled, tmp_path: Path, home: Path, pushed: Images
) -> None:
    """Without the server, and without or with the file, containerd pulls from the registry itself."""
    hub = DockerRegistry(filled.roots["docker.io"], tmp_path)
    try:
        name = f"{hub.url.removeprefix('http://')}/library/schema2:1"
        expected = held({name: pushed.schema2})
        site = Site({"hub": hub}, tmp_path, listed={"hosts": [hub.url]})
        containerd = Containerd(site, home)
        command = [sys.executable, "-m", "proxy", "setup", "containerd", "--while-serving", "--root", home]
        holder = Process([*command, "--url", site.url], ready="written: ")
        try:
            assert containerd.pull(name, how=HOW) == expected
            assert any("request.served" in line and "library/schema2" in line for line in site.log)
            holder.kill()
        finally:
            site.stop()
        hosts = home / "etc" / "containerd" / "certs.d" / "_default" / "hosts.toml"
        assert site.url in hosts.read_text()
        before = len(hub.requests())
        assert containerd.pull(name, how=HOW) == expected
        assert len(hub.requests()) > before
        holder = Process([*command, "--url", site.url], ready="removed: ")  # once the server has not answered
        assert not hosts.exists()
        holder.stop()
        assert containerd.pull(name, how=HOW) == expected
    finally:
        hub.stop()


def test_pull_by_full_name(site: Site, containerd: Containerd, pushed: Images) -> None:
    names = {f"{site.address}/quay.example/team/app:1": pushed.app}
    pull_cold_warm_offline(site, lambda: containerd.pull(*names, how=HOW), held(names))


@pytest.mark.parametrize("words", [(), ("--no-bypass",)])
def test_pull_by_https(encrypted: Site, home: Path, pushed: Images, words: tuple[str, ...]) -> None:
    containerd = Containerd(encrypted, home)
    containerd.configure(*words)
    names = {
        "docker.io/library/schema2:1": pushed.schema2,
        f"{encrypted.address}/quay.example/team/app:1": pushed.app,
    }
    pull_cold_warm_offline(encrypted, lambda: containerd.pull(*names, how=HOW), held(names))

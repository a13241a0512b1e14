"""Configuration of a client that is in place only while the server answers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from click.testing import CliRunner
from yarl import URL

from proxy.cli.main import main
from proxy.doctor import containerd
from proxy.doctor.machine import Machine
from proxy.setup import hold
from proxy.setup.hold import FAILURES, HeldSetup
from proxy.setup.install import Refused
from proxy.setup.renderers import MARK, RENDERERS
from proxy.setup.site import Site
from tests.authority import Authority
from tests.conftest import Serve
from tests.test_setup_install import put, tree
from tests.upstream import Upstream

SITE = Site(URL("http://10.0.0.1:30500"))
DEFAULT = "etc/containerd/certs.d/_default/hosts.toml"
OWN = "etc/containerd/certs.d/10.0.0.1:30500/hosts.toml"


class Held:
    """A HeldSetup for containerd, and the lines that it has said."""

    def __init__(self, root: Path, client: str = "containerd") -> None:
        self.said: list[str] = []
        self.setup = HeldSetup(RENDERERS[client](SITE), root, self.said.append)

    def fail(self, times: int = FAILURES) -> None:
        for _ in range(times):
            self.setup.failed("refused")


def test_files_come_and_go_with_the_server(tmp_path: Path) -> None:
    put(tmp_path, "etc/containerd/certs.d/ghcr.io/hosts.toml", "# of somebody else")
    others = tree(tmp_path)
    held = Held(tmp_path)
    held.fail(2 * FAILURES)
    assert held.said == ["waiting for the server: refused"]
    held.setup.answered()
    assert tree(tmp_path).keys() == {*others, DEFAULT, OWN}
    assert held.said[1:] == [f"written: {tmp_path / each}" for each in (DEFAULT, OWN)]
    before = tree(tmp_path)
    held.setup.answered()
    held.fail(FAILURES - 1)
    held.setup.answered()
    held.fail(FAILURES - 1)
    assert tree(tmp_path) == before and len(held.said) == 3
    held.fail(1)
    assert tree(tmp_path) == others and not (tmp_path / DEFAULT).parent.exists()
    held.setup.answered()
    assert tree(tmp_path).keys() == before.keys()
    held.setup.close()
    assert tree(tmp_path) == others


def test_what_a_killed_process_has_left_is_taken_over(tmp_path: Path) -> None:
    Held(tmp_path).setup.answered()
    held = Held(tmp_path)
    held.fail(1)
    assert tree(tmp_path) == {}
    assert [each.partition(": ")[0] for each in held.said] == [
        "the server does not answer",
        "removed",
        "removed",
    ]


def test_a_file_of_a_former_address_is_replaced(tmp_path: Path) -> None:
    put(tmp_path, DEFAULT, f'{MARK}, which replaces it when it runs again.\n[host."http://10.0.0.9:1"]\n')
    held = Held(tmp_path)
    held.setup.answered()
    assert "10.0.0.1:30500" in (tmp_path / DEFAULT).read_text()


def test_a_file_of_somebody_else_stays_and_nothing_is_written(tmp_path: Path) -> None:
    put(tmp_path, DEFAULT, 'server = "https://mirror.example"\n')
    before = tree(tmp_path)
    held = Held(tmp_path)
    with pytest.raises(Refused, match=r"_default/hosts\.toml: it was not written by entrepot setup"):
        held.setup.answered()
    held.setup.close()
    assert tree(tmp_path) == before


def test_what_somebody_changes_meanwhile_stays(tmp_path: Path) -> None:
    held = Held(tmp_path)
    held.setup.answered()
    put(tmp_path, DEFAULT, "# mine now\n")
    with pytest.raises(Refused):
        held.setup.answered()
    held.setup.close()
    assert tree(tmp_path).keys() == {DEFAULT}
    assert held.said[-2:] == [
        f"left as it is: {tmp_path / DEFAULT}, which somebody has changed",
        f"removed: {tmp_path / OWN}",
    ]


def test_what_somebody_removes_meanwhile_is_written_again(tmp_path: Path) -> None:
    held = Held(tmp_path)
    held.setup.answered()
    (tmp_path / DEFAULT).unlink()
    held.setup.answered()
    assert tree(tmp_path).keys() == {DEFAULT, OWN}


@pytest.mark.parametrize("client", hold.CLIENTS)
def test_nothing_is_left_of_any_client(tmp_path: Path, client: str) -> None:
    held = Held(tmp_path, client)
    held.setup.answered()
    assert tree(tmp_path)
    held.setup.close()
    assert tree(tmp_path) == {}


async def test_a_real_server_is_asked_until_the_end(serve: Serve, upstream: Upstream, tmp_path: Path) -> None:
    server = await serve(upstream)
    site, ended = Site(URL(server.url)), asyncio.Event()
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if len(said) == 2:
            ended.set()

    await hold.hold(HeldSetup(RENDERERS["containerd"](site), tmp_path / "root", say), site, ended)
    assert [each.partition(": ")[0] for each in said] == ["written"] * 2 + ["removed"] * 2
    assert tree(tmp_path / "root") == {}


async def test_what_it_says_of_a_server_that_is_not_there(tmp_path: Path) -> None:
    ca = Authority(tmp_path).ca.read_text()
    for site in (Site(URL("http://127.0.0.1:9")), Site(URL("https://127.0.0.1:9"), ca=ca)):
        said, ended = [], asyncio.Event()

        def say(line: str, said: list[str] = said, ended: asyncio.Event = ended) -> None:
            said.append(line)
            ended.set()

        await hold.hold(HeldSetup(RENDERERS["containerd"](site), tmp_path / "root", say), site, ended)
        assert said == [
            f"waiting for the server: {site.base}/v2/: nothing listens there (connection refused)"
        ]


@pytest.mark.parametrize(
    "words",
    [
        ("containerd", "--write"),
        ("containerd", "--no-bypass"),
        ("containerd", "--force"),
        ("docker",),
        ("kind",),
    ],
)
def test_what_cannot_be_held(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(main, ["setup", *words, "--url", "http://127.0.0.1:9", "--while-serving"])
    assert result.exit_code == 2 and "--while-serving" in result.output


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ('[plugins."io.containerd.cri.v1.images".registry]\nconfig_path = "/etc/containerd/certs.d"', ""),
        ('[plugins."io.containerd.grpc.v1.cri".registry]\nconfig_path = "/etc/containerd/certs.d"', ""),
        (
            '[plugins."io.containerd.cri.v1.images".registry]\n'
            'config_path = "/var/lib/rancher/k3s/agent/etc/containerd/certs.d"',
            "",
        ),
        (
            '[plugins."io.containerd.grpc.v1.cri".registry]\nconfig_path = "/etc/registries"',
            "reads none of its",
        ),
        ("version = 2", "has no config_path"),
        ("", "has no config_path"),
        ("version = ", "is not TOML"),
        (
            '[plugins."io.containerd.grpc.v1.cri".registry]\nconfig_path = "/etc/containerd/certs.d"\n'
            '[plugins."io.containerd.grpc.v1.cri".registry.mirrors."docker.io"]\nendpoint = ["http://1"]',
            "beside config_path",
        ),
    ],
)
def test_whether_kubernetes_reads_the_files(tmp_path: Path, config: str, fault: str) -> None:
    put(tmp_path, "etc/containerd/config.toml", config)
    said = containerd.unread(Machine(SITE, tmp_path))
    assert fault in said and bool(said) == bool(fault)

"""What setup has installed is taken out again, and nothing of anybody else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from yarl import URL

from proxy.cli.main import main
from proxy.setup.renderers import RENDERERS
from proxy.setup.site import Site
from tests.authority import Authority
from tests.test_setup_install import backups, put, tree

PLAIN, SECURE = "http://cache.example:5000", "https://cache.example:5000"
HOSTS = "etc/containerd/certs.d/_default/hosts.toml"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", "/home/ann")
    path = tmp_path / "root"
    path.mkdir()
    return path


def run(root: Path, *words: str, url: str = PLAIN, status: int = 0) -> Result:
    result = CliRunner().invoke(main, ["setup", *words, "--url", url, "--root", str(root)])
    assert result.exit_code == status, result.output
    return result


@pytest.mark.parametrize("client", RENDERERS)
def test_all_is_gone_whatever_it_was_installed_with(root: Path, tmp_path: Path, client: str) -> None:
    ca = str(Authority(tmp_path).ca)
    others = put(root, "etc/docker/daemon.json", '{"debug": true}') if client == "docker" else None
    if all(each.kind in ("flags", "example") for each in RENDERERS[client](Site(URL(PLAIN))).pieces):
        run(root, client, "--remove")
        return
    run(root, client, "--write", "--ca-file", ca, "--no-bypass", url=SECURE)
    run(
        root,
        client,
        "--write",
        "--namespace",
        "docker.io",
        "--namespace",
        "quay.io",
        "--ca-file",
        ca,
        url=SECURE,
    )
    before = tree(root)
    diff = run(root, client, "--remove", "--dry-run", url=SECURE)
    assert tree(root) == before
    assert diff.stdout.count("+++ /dev/null") == len(before) - len(backups(root)) - (client == "docker")
    result = run(root, client, "--remove", url=SECURE)
    left = [each for each in root.rglob("*") if each.is_file() and each not in backups(root)]
    assert left == ([others] if others else [])
    assert ("then: " in result.stdout) == bool(before)  # a part alone is for hands
    again = run(root, client, "--remove", url=SECURE)
    assert "removed: " not in again.stdout and "backup: " not in again.stdout


def test_an_empty_directory_would_hide_the_default(root: Path) -> None:
    run(root, "containerd", "--write", "--namespace", "ghcr.io")
    put(root, "etc/containerd/certs.d/quay.io/hosts.toml", "")
    run(root, "containerd", "--remove")
    assert [each.name for each in (root / "etc/containerd/certs.d").iterdir()] == ["quay.io"]


def test_the_keys_of_others_stay(root: Path) -> None:
    others = {"registry-mirrors": ["https://other.example"], "data-root": "/srv", "labels": [], "debug": None}
    file = put(root, "etc/docker/daemon.json", json.dumps(others, indent=4))
    run(root, "docker", "--write")
    assert json.loads(file.read_text())["registry-mirrors"][0] == PLAIN
    result = run(root, "docker", "--remove")
    assert json.loads(file.read_text()) == others
    assert file.read_text().startswith('{\n    "registry-mirrors"')
    assert f"written: {file}" in result.stdout
    # Of another address nothing is there.
    assert f"left as it is: {file}" in run(root, "docker", "--remove", url=SECURE).stdout


def test_a_file_of_others_stays(root: Path) -> None:
    file = put(root, HOSTS, '[host."https://other.example"]\n')
    assert f"left as it is: {file}" in run(root, "containerd", "--remove").stdout
    assert file.exists()


def test_what_setup_has_replaced_is_named(root: Path) -> None:
    text = '[host."https://other.example"]\n'
    put(root, HOSTS, text)
    run(root, "containerd", "--write", "--force")
    run(root, "containerd", "--write", "--no-bypass")  # whose backup is one of ours
    result = run(root, "containerd", "--remove")
    (theirs,) = (each for each in backups(root) if each.read_text() == text)
    assert f"the file that it replaced is {theirs}" in result.stdout
    assert not (root / HOSTS).exists()


def test_a_file_of_ours_that_was_changed_is_kept_as_a_backup(root: Path) -> None:
    run(root, "containerd", "--write")
    file = root / HOSTS
    changed = file.read_text() + "# mine\n"
    file.write_text(changed)
    run(root, "containerd", "--remove")
    (kept,) = backups(root)
    assert kept.read_text() == changed


def test_parts_and_flags_are_for_hands(root: Path) -> None:
    part = '[plugins."io.containerd.cri.v1.images".registry]\nconfig_path = "/etc/containerd/certs.d"\n'
    put(root, "etc/containerd/config.toml", part)
    run(root, "containerd", "--write")
    result = run(root, "containerd", "--remove")
    assert "take out of /etc/containerd/config.toml by hand:" in result.stdout
    assert "grpc.v1.cri" not in result.stdout
    # Whatever it was made with.
    put(root, "home/ann/.colima/default/colima.yaml", "\n".join(_printed(root, "colima", "--no-bypass")))
    assert "server = " in run(root, "colima", "--remove").stdout
    assert "    --registry-map=" in run(root, "kaniko", "--remove").stdout


def _printed(root: Path, *words: str) -> list[str]:
    """The content that is printed, without comments."""
    return [each for each in run(root, *words).stdout.splitlines() if not each.startswith("# ")]


def test_what_must_not_be_changed_is_refused_and_all_else_stays(root: Path) -> None:
    run(root, "docker", "--write")
    put(root, "etc/docker/daemon.json", "{")
    before = tree(root)
    result = run(root, "docker", "--remove", status=1)
    assert "it is not JSON" in result.stderr and "nothing was removed" in result.stderr
    assert tree(root) == before


def test_nothing_is_there(root: Path) -> None:
    assert run(root, "docker", "--remove").stdout == "nothing to remove for docker\n"
    nothing = run(root, "stargz", "--namespace", "quay.io", "--write", url=SECURE, status=2)
    assert "stargz has nothing to install" in nothing.stderr
    assert "not both" in run(root, "docker", "--remove", "--write", status=2).stderr

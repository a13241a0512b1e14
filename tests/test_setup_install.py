"""A client's files put in place: nothing of anybody else's is lost, and what is right is left alone."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from proxy.cli.main import main

URL = ("--url", "http://cache.example:5000")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "root"
    path.mkdir()
    return path


def setup(root: Path, *words: str, status: int = 0) -> Result:
    result = CliRunner().invoke(main, ["setup", *words, *URL, "--root", str(root)])
    assert result.exit_code == status, result.output
    return result


def tree(root: Path) -> dict[str, tuple[int, int, str]]:
    """All files: their mode, time and content."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_file():
            status = path.stat()
            found[str(path.relative_to(root))] = status.st_mode & 0o7777, status.st_mtime_ns, path.read_text()
    return found


def put(root: Path, path: str, text: str, mode: int = 0o644) -> Path:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode())
    file.chmod(mode)
    return file


def backups(root: Path) -> list[Path]:
    return sorted(root.rglob("*.entrepot-*.bak"))


def test_printing_writes_nothing(root: Path) -> None:
    for client in ("docker", "containerd", "podman", "k3s", "kind", "talos", "buildkit", "kaniko", "crio"):
        assert setup(root, client).stdout.startswith("# ")
    assert tree(root) == {}


@pytest.mark.parametrize(
    ("client", "paths"),
    [
        ("docker", {"etc/docker/daemon.json", "etc/docker/certs.d/_default/hosts.toml"}),
        (
            "containerd",
            {
                "etc/containerd/certs.d/_default/hosts.toml",
                "etc/containerd/certs.d/cache.example:5000/hosts.toml",
            },
        ),
        ("podman", {"etc/containers/registries.conf.d/entrepot.conf"}),
        ("buildkit", {"etc/buildkit/buildkitd.toml"}),
        ("k3s", {"etc/rancher/k3s/registries.yaml"}),
        ("talos", {"etc/entrepot/clients/talos/registries.yaml"}),
    ],
)
def test_a_second_run_changes_nothing(root: Path, client: str, paths: set[str]) -> None:
    first = setup(root, client, "--write")
    placed = tree(root)
    assert set(placed) == paths
    assert {mode for mode, _, _ in placed.values()} == {0o644}
    assert first.stdout.count("written: ") == len(paths)
    second = setup(root, client, "--write")
    assert tree(root) == placed
    assert second.stdout.count("already up to date: ") == len(paths)
    assert "written" not in second.stdout


def test_podman_and_crio_share_a_file(root: Path) -> None:
    setup(root, "podman", "--write")
    assert "already up to date" in setup(root, "crio", "--write").stdout


def test_json_keeps_what_is_there(root: Path) -> None:
    before = json.dumps(
        {
            "data-root": "/srv/docker",
            "registry-mirrors": ["https://other.example"],
            "log-opts": {"max-size": "10m"},
            "labels": ["größe"],
        },
        indent=4,
        ensure_ascii=False,
    )
    file = put(root, "etc/docker/daemon.json", before, 0o600)
    result = setup(root, "docker", "--write")
    found = json.loads(file.read_text())
    assert found == {
        "data-root": "/srv/docker",
        # The first is asked first.
        "registry-mirrors": ["http://cache.example:5000", "https://other.example"],
        "log-opts": {"max-size": "10m"},
        "labels": ["größe"],
        "insecure-registries": ["cache.example:5000"],
    }
    assert next(iter(found)) == "data-root"
    assert '\n    "data-root"' in file.read_text()
    (backup,) = backups(root)
    assert backup.read_text() == before
    assert backup.parent == file.parent
    assert f"backup: {backup}" in result.stdout
    assert {each.stat().st_mode & 0o7777 for each in (file, backup)} == {0o600}
    again = tree(root)
    setup(root, "docker", "--write")
    assert tree(root) == again


def test_json_that_has_it_is_left_as_it_is(root: Path) -> None:
    text = '{"insecure-registries":["a.example", "cache.example:5000"],\r\n"registry-mirrors":["http://cache.example:5000"]}'
    file = put(root, "etc/docker/daemon.json", text)
    setup(root, "docker", "--write")
    assert file.read_bytes() == text.encode()
    assert backups(root) == []


def test_an_empty_file_is_nobodys(root: Path) -> None:
    file = put(root, "etc/docker/daemon.json", "\n")
    setup(root, "docker", "--write")
    assert json.loads(file.read_text())["registry-mirrors"] == ["http://cache.example:5000"]


@pytest.mark.parametrize("text", ["{", "[]", '{"registry-mirrors": "x"}', "\xff\x00".encode("latin-1")])
def test_json_that_cannot_be_merged_is_refused(root: Path, text: str | bytes) -> None:
    file = put(root, "etc/docker/daemon.json", "")
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = file.read_bytes()
    result = setup(root, "docker", "--write", status=1)
    assert file.read_bytes() == before
    # And so is all else, which has no fault: half of it would be a puzzle.
    assert [each for each in root.rglob("*") if each.is_file()] == [file]
    assert str(file) in result.stderr
    assert "nothing was written" in result.stderr
    assert '"registry-mirrors": ["http://cache.example:5000"]' in result.stdout


def test_a_foreign_file_is_refused_or_kept_beside(root: Path) -> None:
    text = '[host."https://other.example"]\n'
    file = put(root, "etc/containerd/certs.d/_default/hosts.toml", text, 0o640)
    before = tree(root)
    result = setup(root, "containerd", "--write", status=1)
    assert tree(root) == before
    assert "it was not written by entrepot setup" in result.stderr
    assert '    [host."http://cache.example:5000"]' in result.stdout

    setup(root, "containerd", "--write", "--force")
    assert "http://cache.example:5000" in tomllib.loads(file.read_text())["host"]
    (backup,) = backups(root)
    assert backup.read_text() == text
    assert {each.stat().st_mode & 0o7777 for each in (file, backup)} == {0o640}


def test_what_was_put_there_by_hand_is_right(root: Path) -> None:
    file = put(
        root,
        "etc/containerd/certs.d/_default/hosts.toml",
        '[host."http://cache.example:5000"]\n  capabilities = ["pull", "resolve"]\n\n',
    )
    before = file.read_text()
    assert f"already up to date: {file}" in setup(root, "containerd", "--write").stdout
    assert file.read_text() == before


def test_a_file_of_ours_is_replaced(root: Path) -> None:
    setup(root, "containerd", "--write")
    file = root / "etc/containerd/certs.d/_default/hosts.toml"
    old = file.read_text()
    setup(root, "containerd", "--write", "--no-bypass")
    assert tomllib.loads(file.read_text())["server"] == "http://cache.example:5000"
    (backup,) = backups(root)  # what is the same stays
    assert backup.read_text() == old


def test_a_link_stays_one(root: Path) -> None:
    real = put(root, "srv/daemon.json", "{}")
    link = root / "etc/docker/daemon.json"
    link.parent.mkdir(parents=True)
    link.symlink_to("../../srv/daemon.json")
    setup(root, "docker", "--write")
    assert link.is_symlink()
    assert json.loads(real.read_text())["registry-mirrors"]


def test_a_link_out_of_the_root_is_refused(root: Path, tmp_path: Path) -> None:
    """`/etc/docker/daemon.json` in an image may be a link to a file that, from here, is this machine's."""
    outside = put(tmp_path, "outside.json", "{}")
    link = root / "etc/docker/daemon.json"
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    assert "not below --root" in setup(root, "docker", "--write", status=1).stderr
    assert outside.read_text() == "{}"


def test_dry_run_shows_what_would_change(root: Path) -> None:
    put(root, "etc/docker/daemon.json", '{\n  "debug": true\n}\n')
    before = tree(root)
    for words in (["--dry-run"], ["--write", "--dry-run"]):
        result = setup(root, "docker", *words)
        assert f"--- {root}/etc/docker/daemon.json" in result.stdout
        assert '+    "http://cache.example:5000"' in result.stdout
        assert "--- /dev/null" in result.stdout
        assert tree(root) == before
    setup(root, "docker", "--write")
    assert "+++" not in setup(root, "docker", "--dry-run").stdout


def test_config_path_is_for_hands(root: Path) -> None:
    result = setup(root, "containerd", "--write")
    assert "add by hand to /etc/containerd/config.toml (containerd 1.x):" in result.stdout
    assert "add by hand to /etc/containerd/config.toml (containerd 2.x):" in result.stdout


@pytest.mark.parametrize(
    "text",
    [
        'version = 3\n[plugins."io.containerd.cri.v1.images".registry]\n'
        'config_path = "/etc/containerd/certs.d"\n',
        'version = 2\n[plugins."io.containerd.grpc.v1.cri".registry]\n'
        'config_path = "/etc/containerd/certs.d:/etc/docker/certs.d"\n',
    ],
)
def test_config_path_that_is_there_is_not_asked_for(root: Path, text: str) -> None:
    file = put(root, "etc/containerd/config.toml", text)
    assert "by hand" not in setup(root, "containerd", "--write").stdout
    assert file.read_text() == text


def test_a_broken_config_of_containerd_is_told(root: Path) -> None:
    put(root, "etc/containerd/config.toml", "version = = 2\n")
    assert "it is not TOML" in setup(root, "containerd", "--write", status=1).stderr


def test_flags_have_no_file(root: Path) -> None:
    for client in ("kaniko", "ollama", "flux"):
        assert "is configured by flags" in setup(root, client, "--write", status=2).stderr


def test_what_cannot_be_written_is_told(root: Path) -> None:
    put(root, "etc/docker/certs.d", "no directory")
    result = setup(root, "docker", "--write", status=1)
    assert str(root / "etc/docker/certs.d") in result.stderr
    assert not any(path.name.startswith(".") for path in root.rglob("*"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["podman", "--namespace", "edge"], "is not a host"),
        (["rkt"], "'rkt' is no client that setup knows; entrepot setup --help lists all"),
        (["doker"], "'doker' is no client that setup knows; did you mean docker"),
        (["docker", "--config", "/no/such.yml"], "cannot be read"),
    ],
)
def test_what_was_asked_wrongly_is_status_2(root: Path, words: list[str], says: str) -> None:
    assert says in setup(root, *words, status=2).stderr


def test_an_interrupted_write_leaves_the_old_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = put(root, "etc/docker/daemon.json", "{}")

    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device" in setup(root, "docker", "--write", status=1).stderr
    assert file.read_text() == "{}"
    assert [each for each in root.rglob("*") if each.is_file()] == [file]


def test_types(root: Path) -> None:
    """Numbers and nulls of others survive a merge."""
    others: dict[str, Any] = {"max-concurrent-downloads": 3, "debug": None, "shutdown-timeout": 1.5}
    file = put(root, "etc/docker/daemon.json", json.dumps(others))
    setup(root, "docker", "--write")
    found = json.loads(file.read_text())
    assert {key: found[key] for key in others} == others

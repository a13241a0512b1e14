"""The disk looked over: real directories, and what systems answer whose disks are not well."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from proxy.config.quantities import Share
from proxy.config.schema import DiskConfig
from proxy.doctor import disk
from proxy.doctor.checks import Check

GIB = 1 << 30


def look(path: Path, **keys: object) -> dict[str, Check]:
    found = disk.check(DiskConfig(path=path, **keys))  # type: ignore[arg-type]
    return {each.name: each for each in found}


def test_a_directory_that_is_well(tmp_path: Path) -> None:
    found = look(tmp_path)
    assert [found[each].state for each in ("disk", "locks", "links")] == ["ok"] * 3
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_made_later(tmp_path: Path) -> None:
    found = look(tmp_path / "a" / "b")
    assert (list(found), found["disk"].state) == (["disk"], "ok")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.os, "access", lambda path, how: False)  # root may do anything
    check = look(tmp_path / "a" / "b")["disk"]
    assert (check.state, check.message) == ("failed", f"does not exist, and cannot be created in {tmp_path}")


def test_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert look(tmp_path / "file")["disk"].message == "is not a directory"


def test_a_directory_that_takes_nothing() -> None:
    check = look(Path("/proc/self"))["disk"]  # for root, too
    assert check.state == "failed"
    assert f"user {os.geteuid()}" in check.advice


def test_locks_that_do_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(disk.fcntl, "flock", flock)
    found = look(tmp_path)
    assert (found["locks"].state, found["disk"].state) == ("failed", "ok")
    assert list(tmp_path.iterdir()) == []


def test_links_that_do_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    found = look(tmp_path)
    assert (found["links"].state, found["disk"].state) == ("warning", "ok")
    assert list(tmp_path.iterdir()) == []


# Of which kind it is

MOUNTINFO = """\
22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw
30 22 0:41 / /srv rw shared:1 - nfs4 server:/srv rw
31 30 0:42 / /srv/with\\040space rw - tmpfs tmpfs rw
32 22 0:43 / /merged rw master:2 propagate_from:3 - overlay overlay rw
33 22 0:44 / /fuse rw - fuse.sshfs x rw
34 22 8:2 / /again rw - nfs x rw
35 34 8:3 / /again rw - xfs /dev/sdb1 rw
short line
"""


@pytest.mark.parametrize(
    ("path", "kind", "state"),
    [
        ("/var/lib/entrepot", "ext4", "ok"),
        ("/srvx", "ext4", "ok"),
        ("/srv/cache", "nfs4", "warning"),
        ("/srv/with space/cache", "tmpfs", "warning"),
        ("/merged/cache", "overlay", "warning"),
        ("/fuse", "fuse.sshfs", "warning"),
        ("/again/cache", "xfs", "ok"),  # mounted over the other
    ],
)
def test_kinds_of_file_systems(tmp_path: Path, path: str, kind: str, state: str) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTINFO)
    assert disk.file_system(Path(path), mounts) == kind
    assert disk._check_file_system(Path(path), mounts).state == state


def test_a_kind_that_is_not_told(tmp_path: Path) -> None:
    assert disk.file_system(tmp_path, tmp_path / "absent") == ""
    assert disk._check_file_system(tmp_path, tmp_path / "absent").state == "ok"


# How much is left


@pytest.mark.parametrize(
    ("free", "keys", "state", "says"),
    [
        (50, {}, "ok", "50.0 GiB of 100.0 GiB are free"),
        (4, {"min_free": Share(percent=5)}, "warning", "less than disk.min_free (5.0 GiB)"),
        (50, {"cache_limit": 200 * GIB}, "warning", "disk.cache_limit is 200.0 GiB"),
        (0, {}, "failed", "pulls are not cached"),
    ],
)
def test_room(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    keys: dict[str, object],
    state: str,
    says: str,
) -> None:
    full(monkeypatch, free=free * GIB)
    check = look(tmp_path, **keys)["room"]
    assert check.state == state
    assert says in check.message


@pytest.mark.parametrize(("free", "state"), [(500, "ok"), (40, "warning"), (0, "failed")])
def test_inodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, state: str) -> None:
    full(monkeypatch, inodes=free)
    assert look(tmp_path)["inodes"].state == state


def test_file_systems_without_inodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full(monkeypatch, inodes=0, of=0)
    assert "inodes" not in look(tmp_path)


def full(monkeypatch: pytest.MonkeyPatch, free: int = 50 * GIB, inodes: int = 500, of: int = 1000) -> None:
    """A disk of 100 GiB."""
    status = SimpleNamespace(
        f_frsize=4096, f_blocks=100 * GIB // 4096, f_bavail=free // 4096, f_files=of, f_favail=inodes
    )
    monkeypatch.setattr(disk.os, "statvfs", lambda path: status)

"""Changes of a file of users: one line of it, all of it or nothing."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bcrypt
import pytest

from proxy.access import user_file
from proxy.access.htpasswd import parse
from proxy.access.user_file import UserFile
from tests.test_htpasswd import line

COMMENTED = b"# people\n%b\n# robots\n%b" % (line("alice", "a").encode(), line("ci", "b").encode())


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_file, "COST", 4)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "htpasswd"


def right(path: Path, user: str, password: str) -> bool:
    return bcrypt.checkpw(password.encode(), parse(path.read_bytes()).hashes[user])


def test_a_user_is_added_changed_and_removed(path: Path) -> None:
    users = UserFile(path)
    users.add("alice", "wonderland")
    users.add("böb", "grün")
    assert [*users.users().hashes] == ["alice", "böb"]
    assert right(path, "alice", "wonderland")
    assert right(path, "böb", "grün")
    users.change("alice", "through the glass")
    assert right(path, "alice", "through the glass")
    users.remove("alice")
    assert [*users.users().hashes] == ["böb"]
    assert not users.users().bad


def test_everything_else_stays(path: Path) -> None:
    path.write_bytes(COMMENTED)
    users = UserFile(path)
    users.change("alice", "new")
    changed = path.read_bytes().splitlines()
    assert [each for each in changed if each not in COMMENTED.splitlines()] == [changed[1]]
    users.add("carol", "c")
    assert path.read_bytes().splitlines()[:-1] == changed
    users.remove("alice")
    users.remove("carol")
    left = path.read_bytes().splitlines()
    assert left == [each for each in COMMENTED.splitlines() if b"alice" not in each]


@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n"])
def test_a_line_is_added_below_the_last_one(path: Path, end: bytes) -> None:
    path.write_bytes(line("alice", "a").encode().strip() + end)
    UserFile(path).add("bob", "b")
    assert [*parse(path.read_bytes()).hashes] == ["alice", "bob"]
    assert path.read_bytes().count(b"\n") == max(1, len(end)) + 1


def test_a_user_whose_name_begins_with_another_is_another(path: Path) -> None:
    users = UserFile(path)
    for name in ("al", "alice", "alice2"):
        users.add(name, "x")
    users.remove("alice")
    assert [*users.users().hashes] == ["al", "alice2"]


def test_a_broken_line_of_a_user_can_be_replaced(path: Path) -> None:
    path.write_bytes(b"alice:plain\n")
    UserFile(path).change("alice", "x")
    assert right(path, "alice", "x")


def test_who_is_there_and_who_is_not(path: Path) -> None:
    users = UserFile(path)
    with pytest.raises(FileNotFoundError):
        users.change("alice", "x")
    users.add("alice", "x")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="alice exists: change the password with entrepot user passwd alice"):
        users.add("alice", "y")
    for change in (lambda: users.change("bob", "x"), lambda: users.remove("bob")):
        with pytest.raises(ValueError, match="bob does not exist"):
            change()
    assert path.read_bytes() == before


def test_mode_owner_and_link_stay(tmp_path: Path, path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.write_bytes(COMMENTED)
    target.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(target, 1234, 2345)
    owner = (target.stat().st_uid, target.stat().st_gid)
    path.symlink_to(target)
    UserFile(path).add("carol", "c")
    assert path.is_symlink()
    found = target.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o640, *owner)
    assert "carol" in parse(target.read_bytes()).hashes
    assert sorted(each.name for each in tmp_path.iterdir()) == ["elsewhere", "htpasswd"]


def test_a_new_file_has_the_mode_of_the_umask(path: Path) -> None:
    before = os.umask(0o027)
    try:
        UserFile(path).add("alice", "x")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_file_that_cannot_be_written_is_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(COMMENTED)

    def fail(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        UserFile(path).add("carol", "c")
    assert path.read_bytes() == COMMENTED
    assert [each.name for each in path.parent.iterdir()] == ["htpasswd"]


def test_commands_at_once_lose_nobody(path: Path) -> None:
    names = [f"user{number}" for number in range(20)]
    with ThreadPoolExecutor(8) as threads:
        [*threads.map(lambda name: UserFile(path).add(name, "x"), names)]
    assert sorted(UserFile(path).users().hashes) == sorted(names)


@pytest.mark.parametrize("name", ["", "a:b", "a\nb", " a", "a ", "#a", "a" * 256, "\x00"])
def test_names_that_no_login_has(path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="must have"):
        UserFile(path).add(name, "x")
    assert not path.exists()


@pytest.mark.parametrize("password", ["", "a" * 73, "ü" * 37, "a\nb", "a\x00b"])
def test_passwords_that_bcrypt_does_not_tell_apart(path: Path, password: str) -> None:
    with pytest.raises(ValueError, match="must have"):
        UserFile(path).add("alice", password)
    assert not path.exists()

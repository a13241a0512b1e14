"""Users of an htpasswd file: who is one, what is wrong with it, and what happens when it changes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import bcrypt
import pytest
from structlog.testing import LogCapture

from proxy.access import htpasswd as module
from proxy.access.htpasswd import REMEMBERED_FOR, Htpasswd, parse
from storage.errors import Throttled
from tests.conftest import Clock


def line(user: str, password: str, cost: int = 4) -> str:
    return f"{user}:{bcrypt.hashpw(password.encode()[:72], bcrypt.gensalt(cost)).decode()}\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "htpasswd"
    path.write_text(
        "# people\n\n" + line("alice", "wonderland") + line("bob", "pässword").replace("$2b$", "$2y$")
    )
    return path


@pytest.fixture
async def users(path: Path, clock: Clock) -> AsyncIterator[Htpasswd]:
    users = Htpasswd(path, clock)
    yield users
    await users.close()


class Checked:
    """Counts what bcrypt is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hashes: list[bytes] = []
        self.gate = threading.Event()
        self.gate.set()
        self._checkpw = bcrypt.checkpw
        monkeypatch.setattr(bcrypt, "checkpw", self)

    def __call__(self, password: bytes, value: bytes) -> bool:
        self.hashes.append(value)
        self.gate.wait()
        return self._checkpw(password, value)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Checked:
    return Checked(monkeypatch)


@pytest.mark.parametrize(
    ("user", "password", "right"),
    [
        ("alice", "wonderland", True),
        ("bob", "pässword", True),
        ("alice", "Wonderland", False),
        ("alice", "", False),
        ("alice", "wonderland\0", False),
        ("alice", "\udcff", False),
        ("Alice", "wonderland", False),
        ("", "wonderland", False),
        ("carol", "wonderland", False),
    ],
)
async def test_verify(users: Htpasswd, user: str, password: str, right: bool) -> None:
    assert await users.verify(user, password) is right
    assert users.remembers(user, password) is right


async def test_a_long_password_counts_as_far_as_bcrypt_takes_it(path: Path, clock: Clock) -> None:
    path.write_text(line("alice", "x" * 100))
    users = Htpasswd(path, clock)
    assert await users.verify("alice", "x" * 100)
    assert not await users.verify("alice", "x" * 71)
    await users.close()


async def test_an_unknown_user_costs_the_same(users: Htpasswd, checked: Checked) -> None:
    assert not await users.verify("carol", "x")
    (dummy,) = checked.hashes
    assert dummy[4:6] == b"04"
    assert not any(dummy == value for value in parse(users._file.path.read_bytes()).hashes.values())


async def test_nobodys_hash_is_as_dear_as_most(path: Path) -> None:
    path.write_text(line("a", "x", 4) + line("b", "x", 5) + line("c", "x", 5))
    assert parse(path.read_bytes()).dummy.startswith(b"$2b$05$")
    assert parse(b"").dummy.startswith(b"$2b$10$")


async def test_what_was_right_is_remembered_for_some_minutes(
    users: Htpasswd, checked: Checked, clock: Clock
) -> None:
    for _ in range(3):
        assert await users.verify("alice", "wonderland")
    assert len(checked.hashes) == 1
    assert not await users.verify("alice", "wrong")
    assert not await users.verify("alice", "wrong")
    assert len(checked.hashes) == 3
    clock.advance(REMEMBERED_FOR)
    assert not users.remembers("alice", "wonderland")
    assert await users.verify("alice", "wonderland")
    assert len(checked.hashes) == 4


async def test_no_password_is_held(users: Htpasswd) -> None:
    assert await users.verify("alice", "wonderland")
    assert "wonderland" not in repr(vars(users))


async def test_memory_is_bounded(users: Htpasswd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REMEMBERED", 1)
    assert await users.verify("alice", "wonderland")
    assert await users.verify("bob", "pässword")
    assert not users.remembers("alice", "wonderland")
    assert users.remembers("bob", "pässword")


async def test_at_once_it_is_checked_once(users: Htpasswd, checked: Checked) -> None:
    checked.gate.clear()
    asked = [asyncio.create_task(users.verify("alice", "wonderland")) for _ in range(20)]
    await asyncio.sleep(0)
    checked.gate.set()
    assert all(await asyncio.gather(*asked))
    assert len(checked.hashes) == 1


async def test_a_check_that_nobody_can_join_any_more_is_remembered(users: Htpasswd) -> None:
    asked = asyncio.create_task(users.verify("alice", "wonderland"))
    await asyncio.sleep(0)
    (check,) = users._flights._flights.values()
    remembered: list[bool] = []
    check.add_done_callback(lambda _: remembered.append(users.remembers("alice", "wonderland")))
    assert await asked
    assert remembered == [True]


async def test_a_flood_is_refused(users: Htpasswd, checked: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAITING", 5)
    checked.gate.clear()
    asked = [asyncio.create_task(users.verify("alice", f"guess {number}")) for number in range(6)]
    for _ in range(3):
        await asyncio.sleep(0)
    with pytest.raises(Throttled):
        await asked[5]
    checked.gate.set()
    assert await asyncio.gather(*asked[:5]) == [False] * 5
    assert await users.verify("alice", "wonderland")


async def test_a_change_counts_at_once(users: Htpasswd, path: Path) -> None:
    assert await users.verify("alice", "wonderland")
    path.write_text(line("alice", "looking-glass"))
    assert not users.remembers("alice", "wonderland")
    assert not await users.verify("alice", "wonderland")
    assert await users.verify("alice", "looking-glass")
    assert not await users.verify("bob", "pässword")


async def test_a_pair_that_is_checked_while_the_file_changes_is_not_remembered(
    users: Htpasswd, path: Path, checked: Checked
) -> None:
    checked.gate.clear()
    asked = asyncio.create_task(users.verify("alice", "wonderland"))
    await asyncio.sleep(0)
    path.write_text(line("bob", "x"))
    assert not users.remembers("alice", "wonderland")
    checked.gate.set()
    await asked
    assert not users.remembers("alice", "wonderland")


@pytest.mark.errors("htpasswd.failed")
async def test_without_its_file_there_are_no_users(users: Htpasswd, path: Path, events: LogCapture) -> None:
    assert await users.verify("alice", "wonderland")
    content = path.read_bytes()
    path.unlink()
    for _ in range(2):
        assert not await users.verify("alice", "wonderland")
    assert [each["reason"] for each in events.entries] == ["No such file or directory"]
    path.write_bytes(content)
    assert await users.verify("alice", "wonderland")


@pytest.mark.errors("htpasswd.failed")
async def test_a_line_gone_bad_is_nobodys(users: Htpasswd, path: Path, events: LogCapture) -> None:
    path.write_text("alice:secret\n" + line("bob", "b"))
    assert not await users.verify("alice", "secret")
    assert await users.verify("bob", "b")
    (event,) = events.entries
    assert event["reason"] == "line 1 holds no bcrypt hash: use htpasswd -B"


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (b"alice", "line 1 is not <user>:<hash>"),
        (b":$2y$", "line 1 is not <user>:<hash>"),
        (b"# x\nalice:{SHA}qUqP5cyxm6YcTAhz05Hph5gvu9M=", "line 2 holds no bcrypt hash: use htpasswd -B"),
        (b"alice:$apr1$x$y", "line 1 holds no bcrypt hash: use htpasswd -B"),
        (b"alice:$2y$31$" + b"." * 53, "line 1 has a bcrypt cost other than 4 to 16: use htpasswd -B -C 10"),
        (b"alice:$2y$03$" + b"." * 53, "line 1 has a bcrypt cost other than 4 to 16: use htpasswd -B -C 10"),
        (b"\xff:$2y$10$" + b"." * 53, "line 1 is not UTF-8"),
        (b"a:$2y$10$%b\na:$2y$10$%b" % (b"." * 53, b"." * 53), "line 2 names a user a second time"),
    ],
)
def test_bad_lines_are_named(path: Path, text: bytes, cause: str) -> None:
    path.write_bytes(text)
    with pytest.raises(ValueError, match="line") as raised:
        Htpasswd(path)
    assert str(raised.value) == cause


def test_a_second_line_for_a_user_does_not_count(path: Path) -> None:
    first = line("alice", "first")
    users = parse((first + line("alice", "second")).encode())
    assert users.hashes == {"alice": first.partition(":")[2].strip().encode()}


def test_a_file_that_cannot_be_read(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Htpasswd(path.parent / "absent")
    assert list(path.parent.iterdir()) == [path]  # none was made up

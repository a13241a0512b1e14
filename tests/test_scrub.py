"""What the scrub finds of what a disk can do to content, and that it leaves all else as it was."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import LogCapture

from storage.disk import tree
from storage.disk.blobs import BlobFiles
from storage.disk.records import SQLiteRecords
from storage.disk.uploads import CHUNK
from storage.errors import BlobUnknown, OriginFailed, StorageFailed
from storage.maintenance import pace
from storage.maintenance import scrub as module
from storage.maintenance.scrub import Heal, Scrub
from storage.maintenance.scrub_progress import ScrubReport
from storage.oci import OCI_MANIFEST, Digest, Manifest, Tag
from storage.store import Store
from tests.conftest import Clock

APP = "docker.io/library/app"
OTHER = "docker.io/library/other"
DAY = 86400.0
damages = pytest.mark.errors("blob.damaged")


class Home:
    """A store with a scrub, what the scrub slept, and in which order it read blobs."""

    def __init__(
        self, root: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, private: bool = False
    ) -> None:
        self.root = root
        self.clock = clock
        self.files = BlobFiles(root, clock, private=private)
        self.records = SQLiteRecords(root / "records")
        self.store = Store(self.files, self.records, clock)
        self.slept: list[float] = []
        self.order: list[Digest] = []
        self.steps: dict[Digest, Callable[[], object]] = {}  # done after the first step of reading it
        self._watch(monkeypatch)

    def _watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        home, step = self, tree.BlobHasher.step

        def watched(reading: tree.BlobHasher) -> int:
            size = step(reading)
            digest = Digest(f"sha256:{reading.path.name}")
            if digest not in home.order[-1:]:
                home.order.append(digest)
            home.steps.pop(digest, lambda: None)()
            return size

        monkeypatch.setattr(tree.BlobHasher, "step", watched)

    def scrub(self, rate: float | None = None, **keys: Any) -> Scrub:
        return Scrub(self.store, rate, self.clock, ticks=self.clock, sleep=self._sleep, **keys)

    async def run(self, heal: Heal | None = None, **keys: Any) -> ScrubReport:
        return await self.scrub(**keys).run(heal)

    async def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.clock.advance(seconds)

    async def put(self, content: bytes, *repositories: str) -> Digest:
        digest = Digest.of(content)
        for repository in repositories or (APP,):
            upload = await self.store.start_upload(repository)
            await upload.write(content)
            await upload.commit(digest)
        return digest

    def path(self, digest: Digest) -> Path:
        return self.files.path(digest)

    def damage(self, digest: Digest) -> bytes:
        """Flip a bit of it; what it is then."""
        content = bytearray(self.path(digest).read_bytes())
        content[len(content) // 2] ^= 1
        self.path(digest).write_bytes(content)
        return bytes(content)

    @property
    def aside(self) -> list[str]:
        return sorted(path.name for path in self.root.glob("damaged/*"))

    def tree(self) -> dict[str, tuple[int, int]]:
        """All that is in it, with size and mtime."""
        return {
            str(path): (path.lstat().st_size, path.lstat().st_mtime_ns)
            for path in self.root.rglob("*")
            if "records" not in path.parts[-2:][0] and not path.name.startswith("records")
        }


@pytest.fixture
async def home(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Home]:
    found = Home(tmp_path / "cache", clock, monkeypatch)
    yield found
    await found.store.close()


@pytest.fixture
def heard(events: LogCapture) -> Callable[[str], list[dict[str, Any]]]:
    """The events of that name."""
    return lambda name: [dict(each) for each in events.entries if each["event"] == name]


Heard = Callable[[str], list[dict[str, Any]]]


class Healer:
    """Writes the content again, if it has it."""

    def __init__(self, home: Home, *contents: bytes, error: Exception | None = None) -> None:
        self._home = home
        self._contents = {Digest.of(content): content for content in contents}
        self._error = error
        self.asked: list[tuple[Digest, list[str]]] = []

    async def __call__(self, digest: Digest, repositories: list[str]) -> bool:
        self.asked.append((digest, repositories))
        if self._error is not None:
            raise self._error
        if digest not in self._contents:
            return False
        await self._home.put(self._contents[digest], repositories[0])
        return True


def sorted_contents(count: int) -> list[bytes]:
    """Contents of which no two share a fan-out directory, in the order of their digests."""
    found: dict[str, bytes] = {}
    number = 0
    while len(found) < count:
        content = f"content {number}".encode()
        found.setdefault(Digest.of(content).encoded[:2], content)
        number += 1
    return [found[start] for start in sorted(found)]


def neighbours(count: int) -> list[bytes]:
    """Contents whose digests begin alike, in their order."""
    found: dict[str, list[bytes]] = {}
    number = 0
    while True:
        content = f"content {number}".encode()
        same = found.setdefault(Digest.of(content).encoded[:2], [])
        same.append(content)
        if len(same) == count:
            return sorted(same, key=Digest.of)
        number += 1


# What is sound


async def test_what_is_sound_is_left_as_it_is(home: Home, heard: Heard) -> None:
    contents = [b"", b"x", b"y" * CHUNK, b"z" * (2 * CHUNK + 1)]
    for content in contents:
        await home.put(content)
    home.clock.advance(DAY)
    before = home.tree()
    report = await home.run(Healer(home))
    assert home.tree() == before
    assert (report.checked, report.bytes) == (4, sum(map(len, contents)))
    assert (report.damaged, report.healed, report.foreign) == (0, 0, 0)


async def test_an_empty_store_is_sound(home: Home) -> None:
    assert await home.run() == ScrubReport(0, 0, 0, 0, 0, 0.0)


async def test_algorithms_have_their_own_trees(home: Home) -> None:
    content = b"content"
    digest = Digest.of(content, "sha512")
    upload = await home.store.start_upload(APP)
    await upload.write(content)
    await upload.commit(digest)
    assert (await home.run()).checked == 1


async def test_what_is_not_committed_is_not_looked_at(home: Home) -> None:
    upload = await home.store.start_upload(APP)
    await upload.write(b"some")
    fill = await home.store.files.resume(Digest.of(b"whole"))
    await fill.write(b"wh")
    report = await home.run()
    assert (report.checked, report.foreign) == (0, 0)
    await upload.write(b" more")
    await upload.commit(Digest.of(b"some more"))
    await fill.write(b"ole")
    await fill.commit(Digest.of(b"whole"))
    assert (await home.run()).checked == 2


# What is damaged


def _flip(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@damages
@pytest.mark.parametrize(
    "damage",
    [_flip, lambda content: content[:-1], lambda content: b"", lambda content: content + b"\0"],
    ids=["flipped", "truncated", "emptied", "extended"],
)
async def test_damaged_content_is_set_aside_and_told_of(
    home: Home, heard: Heard, damage: Callable[[bytes], bytes]
) -> None:
    content = b"content" * CHUNK
    digest = await home.put(content, "docker.io/a", "ghcr.io/b")
    sound = await home.put(b"sound")
    home.path(digest).write_bytes(damage(content))
    report = await home.run()
    assert (report.checked, report.damaged, report.healed) == (2, 1, 0)
    aside = home.root / "damaged" / f"sha256-{digest.encoded}"
    assert aside.read_bytes() == damage(content)
    assert aside.stat().st_mtime == home.clock.now
    assert not home.store.holds(digest)
    assert home.store.holds(sound)
    with pytest.raises(BlobUnknown):
        await home.store.get_blob("docker.io/a", digest)
    (event,) = heard("blob.damaged")
    assert event == {
        "event": "blob.damaged",
        "log_level": "error",
        "digest": digest,
        "found": Digest.of(damage(content)),
        "bytes": len(damage(content)),
        "path": str(aside),
        "repositories": ["docker.io/a", "ghcr.io/b"],
        "action": "set aside",
    }
    assert (await home.run()).damaged == 0


@damages
async def test_damaged_content_is_fetched_again(home: Home, heard: Heard) -> None:
    digest = await home.put(b"content", "docker.io/a", "ghcr.io/b")
    await home.put(b"sound", "docker.io/c")
    home.damage(digest)
    heal = Healer(home, b"content")
    report = await home.run(heal)
    assert heal.asked == [(digest, ["docker.io/a", "ghcr.io/b"])]
    assert (report.damaged, report.healed) == (1, 1)
    assert [each["digest"] for each in heard("blob.healed")] == [digest]
    assert home.path(digest).read_bytes() == b"content"


@damages
@pytest.mark.parametrize("error", [None, OriginFailed("cut"), StorageFailed("full")])
async def test_what_cannot_be_fetched_again_stays_aside(
    home: Home, heard: Heard, error: Exception | None
) -> None:
    first, second = [await home.put(content) for content in sorted_contents(2)]
    home.damage(first)
    home.damage(second)
    heal = Healer(home, error=error)
    report = await home.run(heal)
    assert [digest for digest, _ in heal.asked] == [first, second]
    assert (report.damaged, report.healed) == (2, 0)
    assert heard("blob.healed") == []
    assert len(home.aside) == 2


@damages
async def test_what_no_repository_shows_is_not_fetched_again(home: Home, heard: Heard) -> None:
    digest = await home.put(b"content")
    await home.store.delete_blob(APP, digest)
    home.damage(digest)
    heal = Healer(home, b"content")
    assert (await home.run(heal)).damaged == 1
    assert heal.asked == []
    assert heard("blob.damaged")[0]["repositories"] == []


async def test_a_linked_blob_that_is_not_there_is_no_damage(home: Home) -> None:
    digest = await home.put(b"content")
    home.path(digest).unlink()
    report = await home.run(Healer(home))
    assert (report.checked, report.damaged, report.foreign) == (0, 0, 0)


# What happens while it is read


@pytest.mark.parametrize("damaged", [False, True])
async def test_a_blob_evicted_while_it_is_read_is_passed_by(home: Home, damaged: bool) -> None:
    digest = await home.put(b"content" * CHUNK)
    if damaged:
        home.damage(digest)
    home.steps[digest] = home.path(digest).unlink
    heal = Healer(home)
    assert (await home.run(heal)).damaged == 0
    assert (home.aside, heal.asked) == ([], [])


async def test_a_blob_evicted_before_it_is_read_is_passed_by(home: Home) -> None:
    first, second = [await home.put(content) for content in neighbours(2)]
    home.steps[first] = home.path(second).unlink
    report = await home.run()
    assert (report.checked, report.damaged) == (1, 0)


async def test_a_blob_filled_again_while_it_is_read_stays(home: Home) -> None:
    content = b"content" * CHUNK
    digest = await home.put(content)
    home.damage(digest)

    def fill() -> None:
        new = home.root / "new"
        new.write_bytes(content)
        new.replace(home.path(digest))

    home.steps[digest] = fill
    assert (await home.run(Healer(home))).damaged == 0
    assert home.aside == []
    assert home.path(digest).read_bytes() == content


async def test_a_blob_filled_again_at_the_last_moment_goes_back(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = await home.put(b"content")
    home.damage(digest)
    rename = Path.rename
    renamed: list[Path] = []

    def late(path: Path, target: Path) -> Path:
        if not renamed:
            new = home.root / "new"
            new.write_bytes(b"content")
            new.replace(path)
        renamed.append(target)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", late)
    assert (await home.run(Healer(home))).damaged == 0
    assert home.aside == []
    assert home.path(digest).read_bytes() == b"content"
    assert len(renamed) == 2


@pytest.mark.parametrize("what", ["link", "pipe", "directory"])
async def test_what_takes_a_blobs_name_before_it_is_read_is_not_followed(home: Home, what: str) -> None:
    first, second = [await home.put(content) for content in neighbours(2)]
    elsewhere = home.root / "elsewhere"
    elsewhere.write_bytes(b"other")

    def swap() -> None:
        path = home.path(second)
        path.unlink()
        if what == "link":
            path.symlink_to(elsewhere)
        elif what == "pipe":
            os.mkfifo(path)
        else:
            path.mkdir()

    home.steps[first] = swap
    report = await home.run()
    assert (report.checked, report.damaged) == (1, 0)
    assert os.path.lexists(home.path(second))


# What cannot be read


@pytest.fixture
def unreadable(home: Home, monkeypatch: pytest.MonkeyPatch) -> dict[Digest, int]:
    """By digest what reading fails with."""
    failures: dict[Digest, int] = {}
    read = os.read

    def failing(file: int, size: int) -> bytes:
        path = Path(f"/proc/self/fd/{file}").readlink()
        if (number := failures.get(Digest(f"sha256:{path.name}"))) is not None:
            raise OSError(number, os.strerror(number))
        return read(file, size)

    monkeypatch.setattr(os, "read", failing)
    return failures


@damages
@pytest.mark.parametrize("number", [errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.EACCES])
async def test_what_cannot_be_read_is_damaged(
    home: Home, unreadable: dict[Digest, int], heard: Heard, number: int
) -> None:
    digest = await home.put(b"content")
    await home.put(b"sound")
    unreadable[digest] = number

    async def heal(found: Digest, repositories: list[str]) -> bool:
        unreadable.clear()  # it gets another place on the disk
        return await Healer(home, b"content")(found, repositories)

    report = await home.run(heal)
    assert (report.checked, report.damaged, report.healed) == (2, 1, 1)
    assert heard("blob.damaged")[0]["found"] == os.strerror(number)


@pytest.mark.errors("blob.damaged", "disk.failed")
async def test_a_disk_that_fails_as_a_whole_costs_not_all_that_it_holds(
    home: Home, unreadable: dict[Digest, int], heard: Heard
) -> None:
    digests = [await home.put(content) for content in sorted_contents(8)]
    unreadable.update(dict.fromkeys(digests, errno.EIO))
    scrub = home.scrub()
    for _ in range(3):
        await scrub.run()
    assert len(home.aside) == module.UNREADABLE - 1
    assert len(heard("disk.failed")) == 1
    unreadable.clear()
    report = await scrub.run()
    assert (report.checked, report.damaged) == (8 - len(home.aside), 0)


@pytest.mark.errors("disk.failed")
async def test_a_failure_that_is_not_the_files_ends_the_run(
    home: Home, unreadable: dict[Digest, int]
) -> None:
    digest = await home.put(b"content")
    unreadable[digest] = errno.EMFILE
    scrub = home.scrub()
    with pytest.raises(StorageFailed):
        await scrub.run()
    assert home.aside == []
    assert scrub.progress is not None and not scrub.progress.running


@pytest.mark.errors("blob.damaged", "disk.failed")
async def test_what_cannot_be_set_aside_is_told_of_all_the_same(
    home: Home, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = await home.put(b"content")
    home.damage(digest)

    def refuse(path: Path, target: Path) -> Path:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "rename", refuse)
    heal = Healer(home, b"content")
    assert (await home.run(heal)).damaged == 1
    (event,) = heard("blob.damaged")
    assert (event["path"], event["action"]) == (str(home.path(digest)), "left in its place")
    assert heal.asked == []


# What is set aside


@damages
async def test_the_last_of_what_was_set_aside_is_kept(home: Home) -> None:
    digests = []
    for number in range(module.KEPT + 3):
        digests.append(await home.put(f"content {number}".encode()))
        home.damage(digests[-1])
        home.clock.advance(60)
        await home.run()
    (home.root / "damaged" / "notes").write_text("an operator's")
    digests.append(await home.put(b"last"))
    home.damage(digests[-1])
    home.clock.advance(60)
    await home.run()
    kept = {f"sha256-{digest.encoded}" for digest in digests[-module.KEPT :]}
    assert set(home.aside) == {*kept, "notes"}


@damages
async def test_what_was_set_aside_takes_little_room(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "ASIDE_BYTES", 1000)
    digests = []
    for number, size in enumerate((400, 700, 300, 5000)):
        digests.append(await home.put(bytes([number]) * size))
        home.damage(digests[-1])
        home.clock.advance(60)
        await home.run()
    assert set(home.aside) == {f"sha256-{digest.encoded}" for digest in digests[1:]}


@damages
async def test_all_that_was_set_aside_is_kept_where_nothing_can_be_fetched(home: Home) -> None:
    for number in range(module.KEPT + 3):
        home.damage(await home.put(f"content {number}".encode()))
    await home.run(kept=None)
    assert len(home.aside) == module.KEPT + 3


@damages
async def test_content_damaged_twice_is_set_aside_twice(home: Home) -> None:
    digest = await home.put(b"content")
    home.damage(digest)
    await home.run(Healer(home, b"content"))
    home.path(digest).write_bytes(b"other")
    await home.run(Healer(home, b"content"))
    assert [path.read_bytes() for path in home.root.glob("damaged/*")] == [b"other"]


# What is foreign


async def test_what_is_foreign_is_told_of_and_left_alone(home: Home, heard: Heard, tmp_path: Path) -> None:
    digest = await home.put(b"content")
    other = Digest.of(b"other")
    blobs, directory = home.root / "blobs", home.path(digest).parent
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"content")
    links = {
        blobs / "sha512": outside,
        blobs / "sha256" / ("00" if directory.name != "00" else "01"): outside,
        directory / (directory.name + "0" * 62): outside / "file",
        directory / (directory.name + "1" * 62): outside / "missing",
    }
    for path, target in links.items():
        path.symlink_to(target)
    files = [blobs / "README", blobs / "sha256" / "x", directory / "name", directory / "é", directory / "~~"]
    files += [
        directory / digest.encoded.upper(),
        directory / other.encoded,
        directory / f"{digest.encoded}.bak",
    ]
    for path in files:
        path.write_bytes(b"content")
    directories = [blobs / "md5", blobs / "sha256" / "abc", blobs / "sha256" / "AB", directory / "lost+found"]
    directories += [directory / (directory.name + "2" * 62)]
    for path in directories:
        path.mkdir()
        (path / "inside").write_bytes(b"content")
    pipe = directory / (directory.name + "3" * 62)
    os.mkfifo(pipe)
    expected = {str(path) for path in (*links, *files, *directories, pipe)}
    before = home.tree()
    report = await home.run(Healer(home))
    assert sorted(each["path"] for each in heard("scrub.foreign")) == sorted(expected)
    assert {each["log_level"] for each in heard("scrub.foreign")} == {"warning"}
    assert (report.foreign, report.checked, report.damaged) == (len(expected), 1, 0)
    assert home.tree() == before
    await home.run()
    assert len(heard("scrub.foreign")) == 2 * len(expected)


async def test_not_all_of_much_that_is_foreign_is_told(home: Home, heard: Heard) -> None:
    for number in range(module.LOGGED + 5):
        (home.root / "blobs" / f"file{number}").touch()
    assert (await home.run()).foreign == module.LOGGED + 5
    assert len(heard("scrub.foreign")) == module.LOGGED


async def test_a_tree_that_is_not_there_is_empty(home: Home) -> None:
    (home.root / "blobs").rmdir()
    assert (await home.run()).checked == 0


# Order and progress


async def cut_at(home: Home, digest: Digest, scrub: Scrub) -> None:
    """Run until `digest` is being read, and no further."""
    loop = asyncio.get_running_loop()
    run = asyncio.create_task(scrub.run())
    home.steps[digest] = lambda: bool(loop.call_soon_threadsafe(run.cancel))
    with pytest.raises(asyncio.CancelledError):
        await run


async def test_the_next_run_goes_on_with_the_oldest(home: Home) -> None:
    digests = [await home.put(content) for content in sorted_contents(5)]
    await cut_at(home, digests[2], home.scrub())
    home.order.clear()
    home.clock.advance(60)
    # As after a restart: another object, and what it knows comes from the disk.
    home.steps.update(dict.fromkeys(digests, lambda: home.clock.advance(60)))
    await home.run()
    assert home.order == [*digests[2:], *digests[:2]]
    home.order.clear()
    home.clock.advance(60)
    await home.run()
    assert home.order == [*digests[2:], *digests[:2]]


async def test_what_was_never_checked_comes_first(home: Home) -> None:
    contents = sorted_contents(3)
    first, third = await home.put(contents[0]), await home.put(contents[2])
    await home.run()
    home.clock.advance(60)
    second = await home.put(contents[1])
    home.order.clear()
    await home.run()
    assert home.order == [second, first, third]


async def test_within_a_directory_it_goes_on_where_it_was(home: Home) -> None:
    digests = [await home.put(content) for content in neighbours(4)]
    foreign = home.path(digests[0]).with_name("!")
    foreign.touch()
    home.steps[digests[1]] = lambda: home.clock.advance(module.SAVE_EVERY)
    await cut_at(home, digests[2], home.scrub())
    home.order.clear()
    scrub = home.scrub()
    report = await scrub.run()
    # A run leaves nothing out: what was checked before the cut comes last.
    assert home.order == [*digests[2:], *digests[:2]]
    assert (report.checked, report.foreign) == (4, 1)
    home.order.clear()
    home.clock.advance(60)
    await home.run()
    assert home.order == digests


async def test_only_what_is_old_enough_is_checked(home: Home) -> None:
    contents = sorted_contents(2)
    await home.put(contents[0])
    await home.run()
    home.clock.advance(DAY)
    await home.put(contents[1])
    assert (await home.scrub().run(older_than=2 * DAY)).checked == 1
    assert (await home.scrub().run(older_than=2 * DAY)).checked == 0
    home.clock.advance(DAY)
    assert (await home.scrub().run(older_than=2 * DAY)).checked == 1
    assert (await home.scrub().run()).checked == 2


async def test_two_runs_share_the_work(home: Home) -> None:
    digests = [await home.put(content) for content in sorted_contents(4)]
    scrub = home.scrub()
    other: list[ScrubReport] = []
    begun, done = asyncio.Event(), asyncio.Event()

    async def wait(seconds: float) -> None:
        begun.set()
        await done.wait()

    slow = Scrub(home.store, 1.0, home.clock, ticks=home.clock, sleep=wait)
    run = asyncio.create_task(slow.run())
    await begun.wait()
    home.clock.advance(1)
    other.append(await scrub.run())
    done.set()
    assert (other[0].checked, (await run).checked) == (4, 1)
    assert home.order == digests  # the first of them twice


@pytest.mark.parametrize("record", [b"", b"nonsense", b"nan x", b"inf", b"99999999999 ", b"\xff\xfe \xff"])
async def test_a_damaged_record_of_progress_is_as_none(home: Home, record: bytes) -> None:
    digest = await home.put(b"content")
    home.records.put(f"scrub sha256/{digest.encoded[:2]}", record)
    assert (await home.scrub().run(older_than=DAY)).checked == 1


async def test_progress_tells_how_far_it_is(home: Home) -> None:
    contents = [content * 1000 for content in sorted_contents(6)]
    digests = sorted([await home.put(content) for content in contents])
    scrub = home.scrub()
    assert scrub.progress is None
    seen: list[tuple[int, Digest | None, bool]] = []

    def look() -> None:
        assert scrub.progress is not None
        seen.append((scrub.progress.checked, scrub.progress.current, scrub.progress.running))

    home.steps.update(dict.fromkeys(digests, look))
    await scrub.run()
    assert seen == [(number, digest, True) for number, digest in enumerate(digests)]
    progress = scrub.progress
    assert progress is not None
    assert (progress.checked, progress.current, progress.running) == (6, None, False)
    assert progress.bytes == progress.total_bytes == sum(map(len, contents))
    assert progress.started_at == home.clock.now


async def test_the_whole_is_estimated_from_the_part(home: Home) -> None:
    digests = [await home.put(bytes([number]) * 100) for number in range(4)]
    assert len({digest.encoded[:2] for digest in digests}) == 4
    scrub = home.scrub()
    estimates: list[int] = []

    def look() -> None:
        assert scrub.progress is not None
        estimates.append(scrub.progress.total_bytes)

    home.steps.update(dict.fromkeys(digests, look))
    await scrub.run()
    assert estimates == [400] * 4


# Pace


async def test_it_reads_at_its_rate(home: Home) -> None:
    for number in range(3):
        await home.put(bytes([number]) * (4 * CHUNK))
    report = await home.run(rate=2 * CHUNK)
    assert report.seconds == pytest.approx(6.0)
    # Chunk by chunk, not blob by blob.
    assert max(home.slept) == pytest.approx(0.5)


async def test_short_rests_are_saved_up(home: Home) -> None:
    for number in range(100):
        await home.put(f"{number:04}".encode())
    report = await home.run(rate=1000.0)
    assert report.seconds == pytest.approx(0.4, abs=pace.GRAIN)
    assert min(home.slept) >= pace.GRAIN


async def test_the_time_that_reading_takes_is_no_rest(home: Home) -> None:
    digests = [await home.put(bytes([number]) * CHUNK) for number in range(4)]
    home.steps.update(dict.fromkeys(digests, lambda: home.clock.advance(0.25)))
    report = await home.run(rate=CHUNK)
    assert report.seconds == pytest.approx(4.0)
    assert sum(home.slept) == pytest.approx(3.0)


async def test_a_long_wait_is_followed_by_no_burst(home: Home) -> None:
    digests = sorted([await home.put(bytes([number]) * CHUNK) for number in range(8)])
    home.steps[digests[0]] = lambda: home.clock.advance(1000.0)
    await home.run(rate=CHUNK)
    assert sum(home.slept) == pytest.approx(8.0 - pace.CREDIT)


async def test_without_a_rate_or_on_demand_it_does_not_rest(home: Home) -> None:
    await home.put(b"x" * (4 * CHUNK))
    await home.run()
    await home.scrub(rate=1.0).run(paced=False)
    assert home.slept == []


async def test_it_can_be_cancelled_while_it_rests(home: Home) -> None:
    await home.put(b"x" * (4 * CHUNK))
    resting = asyncio.Event()

    async def rest(seconds: float) -> None:
        resting.set()
        await asyncio.Event().wait()

    scrub = Scrub(home.store, 1.0, home.clock, ticks=home.clock, sleep=rest)
    run = asyncio.create_task(scrub.run())
    await resting.wait()
    assert scrub.progress is not None and scrub.progress.bytes == CHUNK
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert not scrub.progress.running


async def test_it_can_be_cancelled_between_chunks(home: Home) -> None:
    digest = await home.put(b"x" * (64 * CHUNK))
    scrub = home.scrub()
    await cut_at(home, digest, scrub)
    assert scrub.progress is not None
    assert (scrub.progress.bytes, scrub.progress.checked) == (0, 0)


@damages
async def test_it_can_be_cancelled_while_a_blob_is_fetched_again(home: Home) -> None:
    digest = await home.put(b"content")
    home.damage(digest)
    asked = asyncio.Event()

    async def heal(found: Digest, repositories: list[str]) -> bool:
        asked.set()
        await asyncio.Event().wait()
        return True

    run = asyncio.create_task(home.run(heal))
    await asked.wait()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert len(home.aside) == 1
    assert (await home.run()).damaged == 0


# Manifests


def manifest(number: int) -> Manifest:
    return Manifest.of(OCI_MANIFEST, f'{{"schemaVersion": 2, "number": {number}}}'.encode())


@pytest.mark.errors("manifest.damaged")
@pytest.mark.parametrize("damage", ["content", "head", "nothing"])
async def test_a_damaged_manifest_is_removed_and_told_of(home: Home, heard: Heard, damage: str) -> None:
    sound, damaged = manifest(1), manifest(2)
    for each in (sound, damaged):
        await home.store.push_manifest(APP, each.digest, each)
    key = f"manifest {APP} {damaged.digest}"
    record = home.records.get(key)
    assert record is not None
    record = {"content": record[:-1], "head": b"x" + damaged.content, "nothing": b""}[damage]
    home.records.put(key, record)
    heal = Healer(home)
    report = await home.run(heal)
    assert (report.checked, report.damaged, report.healed) == (2, 1, 0)
    assert home.records.get(key) is None
    assert (await home.store.get_manifest(APP, sound.digest)).content == sound.content
    (event,) = heard("manifest.damaged")
    assert (event["repository"], event["reference"]) == (APP, damaged.digest)
    assert heal.asked == []


@pytest.mark.errors("manifest.damaged")
async def test_a_manifest_under_no_digest_is_damaged(home: Home) -> None:
    home.records.put(f"manifest {APP} latest", b"x 1\n{}")
    home.records.put("manifest nameless", b"x 1\n{}")
    assert (await home.run()).damaged == 2
    assert list(home.records.scan("manifest ")) == []


@pytest.mark.errors("manifest.damaged")
async def test_a_damaged_manifest_stays_where_nothing_can_be_fetched(home: Home, heard: Heard) -> None:
    key = f"manifest {APP} {manifest(1).digest}"
    home.records.put(key, b"x 1\n{}")
    assert (await home.run(kept=None)).damaged == 1
    assert home.records.get(key) == b"x 1\n{}"


@pytest.mark.errors("blob.missing")
async def test_a_blob_that_is_not_there_is_told_of_where_nothing_can_be_fetched(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, heard: Heard
) -> None:
    home = Home(tmp_path / "private", clock, monkeypatch, private=True)
    digest = await home.put(b"content", APP, OTHER)
    home.path(digest).unlink()
    assert (await home.run()).damaged == 0
    for runs in (1, 2):  # until it is pushed again
        assert (await home.run(kept=None)).damaged == 2
        assert [each["repository"] for each in heard("blob.missing")] == [APP, OTHER] * runs
    await home.put(b"content", APP)
    assert (await home.run(kept=None)).damaged == 0
    await home.store.close()


@damages
async def test_what_a_run_has_set_aside_is_told_of_once(home: Home, heard: Heard) -> None:
    home.damage(await home.put(b"content"))
    assert (await home.run(kept=None)).damaged == 1


@pytest.mark.errors("tag.unreadable", "link.unreadable", "manifest.unreadable")
async def test_records_that_cannot_be_read_are_told_of_where_nothing_can_be_fetched(
    home: Home, heard: Heard
) -> None:
    digest = await home.put(b"content")
    await home.store.push_manifest(APP, Tag("v1"), manifest(1))
    keys = [f"tag {APP} v1", f"link {APP} {digest}", f"manifest {APP} {manifest(1).digest}"]
    for key in keys:
        home.records.transaction(lambda batch, key=key: batch._cache.set(key, b"no check sum"))
    assert (await home.run(kept=None)).damaged == 3
    for key in keys:
        (event,) = heard(f"{key.split(' ')[0]}.unreadable")
        assert [event["repository"], event["reference"]] == key.split(" ")[1:]


async def test_a_blob_collected_while_its_link_is_looked_at_is_no_loss(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = await home.put(b"content")
    key, holds = f"link {APP} {digest}", home.files.holds

    def collected(digest: Digest) -> bool:
        home.records.delete(key)
        home.path(digest).unlink()
        return holds(digest)

    monkeypatch.setattr(home.files, "holds", collected)
    assert (await home.run(kept=None)).damaged == 0


async def test_a_manifest_put_again_meanwhile_stays(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    good = manifest(1)
    key = f"manifest {APP} {good.digest}"
    home.records.put(key, b"x 1\n{}")
    transaction = home.records.transaction

    def late(work: Any, shared: bool = False) -> Any:
        home.records.put(key, b"x 1\n" + good.content)
        return transaction(work, shared)

    monkeypatch.setattr(home.records, "transaction", late)
    assert (await home.run()).damaged == 0
    assert (await home.store.get_manifest(APP, good.digest)).content == good.content


async def test_many_manifests_are_read_at_the_rate(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH", 2)
    for number in range(5):
        await home.store.push_manifest(APP, manifest(number).digest, manifest(number))
    report = await home.run(rate=100.0)
    assert report.checked == 5
    assert len(home.slept) == 3
    assert report.bytes == sum(len(value) for _, value in home.records.scan("manifest "))


async def test_manifests_checked_lately_are_passed_by(home: Home) -> None:
    await home.store.push_manifest(APP, manifest(1).digest, manifest(1))
    assert (await home.run()).checked == 1
    home.clock.advance(DAY)
    assert (await home.scrub().run(older_than=2 * DAY)).checked == 0
    assert (await home.run()).checked == 1

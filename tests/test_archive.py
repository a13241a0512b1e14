from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tarfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from storage.archives import archive
from storage.archives.archive import Archive, open_archive, open_stream, read
from storage.errors import ArchiveInvalid
from tests import archives
from tests.archives import block, member, zstd

FILES = {"index.json": b"{}", "blobs/sha256/aa": b"x" * 3000, "empty": b""}


@pytest.fixture(params=["directory", "tar", "compressed"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Archive]:
    path = tmp_path / "images"
    if request.param == "directory":
        archives.write(FILES, path)
    else:
        content = archives.tar(FILES)
        path.write_bytes(gzip.compress(content) if request.param == "compressed" else content)
    with closing(open_archive(path, tmp_path)) as opened:
        yield opened


def test_parts_are_read_by_name(opened: Archive) -> None:
    assert {name: opened.size(name) for name in FILES} == {name: len(FILES[name]) for name in FILES}
    assert {name: read(opened, name) for name in FILES} == FILES
    with opened.opened("blobs/sha256/aa") as part:
        assert part.at(2990, 100) == b"x" * 10
        assert part.at(3000, 100) == b""
        assert b"".join(part.chunks()) == FILES["blobs/sha256/aa"]


@pytest.mark.parametrize("name", ["", "blobs", "other", "index.json/x", "blobs/sha256/ab"])
def test_what_is_not_there(opened: Archive, name: str) -> None:
    assert opened.size(name) is None
    with pytest.raises(ArchiveInvalid), opened.opened(name):
        pass


def test_what_is_too_large_to_be_what_it_should(opened: Archive) -> None:
    with pytest.raises(ArchiveInvalid, match="blobs/sha256/aa has 3000 bytes, more than 2999"):
        read(opened, "blobs/sha256/aa", 2999)


def test_nothing_is_left_of_what_was_decompressed(tmp_path: Path) -> None:
    path = tmp_path / "images.tar.gz"
    path.write_bytes(gzip.compress(archives.tar(FILES)))
    spool = tmp_path / "spool"
    spool.mkdir()
    with closing(open_archive(path, spool)):
        assert list(spool.iterdir()) == []  # it has no name: it goes with the process


def test_frames_of_zstd_are_one_archive(tmp_path: Path) -> None:
    """pzstd splits what it compresses, and puts a skippable frame before each part."""
    content = archives.tar(FILES)
    skipped = b"\x50\x2a\x4d\x18\x04\0\0\0size"
    path = tmp_path / "images.tar.zst"
    path.write_bytes(b"".join(skipped + zstd.compress(each) for each in (content[:900], content[900:])))
    with closing(open_archive(path, tmp_path)) as opened:
        assert read(opened, "index.json") == b"{}"


def test_a_pipe_is_read(tmp_path: Path) -> None:
    stream = io.BytesIO(gzip.compress(archives.tar(FILES)))
    with closing(open_stream(stream, "standard input", tmp_path)) as opened:
        assert read(opened, "index.json") == b"{}"


def test_who_reads_a_pipe_can_be_ended(tmp_path: Path) -> None:
    def end() -> None:
        raise InterruptedError

    for content in (archives.tar(FILES), gzip.compress(archives.tar(FILES))):
        with pytest.raises(InterruptedError):
            open_stream(io.BytesIO(content), "standard input", tmp_path, end)


def test_links_in_a_tar_lead_within_it(tmp_path: Path) -> None:
    path = tmp_path / "links.tar"
    links = {"a/layer.tar": "../b/layer.tar", "c": "a/layer.tar", "d": "../e", "f": "/etc/passwd", "g": "g"}
    content = archives.tar({"b/layer.tar": b"layer"})[:1024]
    content += b"".join(block(member(name, kind=tarfile.SYMTYPE, link=to)) for name, to in links.items())
    path.write_bytes(content + bytes(1024))
    with closing(open_archive(path, tmp_path)) as opened:
        assert read(opened, "a/layer.tar") == b"layer"
        assert [opened.size(name) for name in ("c", "d", "f", "g")] == [None] * 4  # one step, and not out


def test_links_in_a_directory_lead_nowhere(tmp_path: Path) -> None:
    directory = archives.write(FILES, tmp_path / "images")
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    (directory / "link").symlink_to(secret)
    os.mkfifo(directory / "pipe")
    with closing(open_archive(directory, tmp_path)) as opened:
        for name in ("link", "pipe"):
            assert opened.size(name) is None
            with pytest.raises(ArchiveInvalid), opened.opened(name):
                pass


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is neither a directory nor a tar"),
        (b"x" * 10_000, "is neither a directory nor a tar"),
        (b"\x28\xb5\x2f\xfd" + b"x" * 1000, "is damaged or truncated"),
        (zstd.compress(b"x" * 1000), "is neither a directory nor a tar"),
        (zstd.compress(archives.tar(FILES))[:-5], "is damaged or truncated, at byte "),
        (zstd.compress(bz2.compress(archives.tar(FILES))), "is compressed with bzip2"),
        (lzma.compress(b"x" * 1000), "is compressed with xz"),
        (bz2.compress(b"x" * 1000), "is compressed with bzip2"),
        (gzip.compress(b"x" * 1000), "is neither a directory nor a tar"),
        (gzip.compress(gzip.compress(archives.tar(FILES))), "is neither a directory nor a tar"),
        (gzip.compress(archives.tar(FILES))[:-9], "is damaged or truncated, at byte "),
        (gzip.compress(archives.tar(FILES))[:100] + b"x" * 100, "is damaged or truncated"),
        (archives.tar(FILES)[:2000], "it is truncated"),
    ],
    ids=[
        *(
            "nothing",
            "no tar",
            "zstd",
            "zstd of no tar",
            "zstd without its end",
            "bzip2 in zstd",
            "xz",
            "bzip2",
            "gzip of no tar",
            "gzip twice",
        ),
        *("gzip without its end", "gzip with other bytes", "tar without its end"),
    ],
)
def test_what_is_no_archive(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(ArchiveInvalid) as raised:
        open_archive(path, tmp_path)
    assert str(path) in str(raised.value)
    assert says in str(raised.value)


def test_what_is_not_there_at_all(tmp_path: Path) -> None:
    with pytest.raises(ArchiveInvalid, match=r"none\.tar: No such file"):
        open_archive(tmp_path / "none.tar", tmp_path)


@pytest.mark.clients
def test_a_bomb_is_put_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "INFLATION_FREE", 4 << 20)
    path = tmp_path / "bomb.tar.gz"
    path.write_bytes(gzip.compress(archives.tar({"zeros": bytes(64 << 20)})))
    with pytest.raises(ArchiveInvalid, match="this is no archive of images") as raised:
        open_archive(path, tmp_path)
    told = int(str(raised.value).split(" inflate to ")[1].split(":")[0])
    assert told < 20 << 20  # long before its end

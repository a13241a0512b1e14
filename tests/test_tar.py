from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from storage.archives import tar
from storage.errors import ArchiveInvalid
from tests import archives
from tests.archives import block, member

Read = Callable[[bytes], list[tuple[str, bytes]]]
END = bytes(1024)


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """The names and contents of what an archive says it holds."""

    def read(content: bytes) -> list[tuple[str, bytes]]:
        path = tmp_path / "archive.tar"
        path.write_bytes(content)
        with path.open("rb") as file:
            found = list(tar.members(file.fileno(), "archive.tar"))
            return [(each.name, os.pread(file.fileno(), each.size, each.offset)) for each in found]

    return read


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_others_write_is_read(read: Read, format: int) -> None:
    files = {"oci-layout": b"{}", "blobs/sha256/" + 64 * "a": b"x" * 1000, "empty": b"", "b": b"y" * 512}
    assert read(archives.tar(files, format)) == list(files.items())


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names(read: Read, format: int) -> None:
    files = {f"blobs/sha512/{'a' * 128}": b"x", f"{'d' * 200}/{'é' * 80}": b"y"}
    assert read(archives.tar(files, format)) == list(files.items())


def test_directories_and_dots_are_nothing(read: Read) -> None:
    content = block(member("./", kind=tarfile.DIRTYPE)) + block(member("blobs/", kind=tarfile.DIRTYPE)) * 2
    content += block(member("./a//b/./c", 1)) + b"x".ljust(512, b"\0") + END
    assert read(content) == [("a/b/c", b"x")]


def test_an_old_directory_ends_with_a_slash(read: Read) -> None:
    assert read(block(member("blobs/", kind=b"\0")) + block(member("a")) + END) == [("a", b"")]


def test_what_is_written_is_read_by_others(read: Read) -> None:
    files = {"entrepot.json": b"{}", f"blobs/sha512/{'a' * 128}": b"x" * 1000, "empty": b""}
    content = b"".join(
        tar.header(name, len(each)) + each + tar.padding(len(each)) for name, each in files.items()
    )
    content += bytes(tar.END)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        assert [each.name for each in archive] == list(files)
        assert [each.mtime for each in archive] == [0] * 3
        for name, each in files.items():
            found = archive.extractfile(name)
            assert found is not None and found.read() == each
    assert read(content) == list(files.items())


def test_more_than_eight_gigabytes(tmp_path: Path) -> None:
    size = 9 << 30
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / "large.tar"
        with path.open("wb") as file:
            head = member("large", size).tobuf(format)
            file.write(head)
            file.truncate(len(head) + size + len(END))
        with path.open("rb") as file:
            assert [each.size for each in tar.members(file.fileno(), "large.tar")] == [size]


# What is refused


def with_size(info: tarfile.TarInfo, field: bytes) -> bytes:
    """A header that says so, with the right sum."""
    content = bytearray(block(info))
    content[124:136] = field
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content)
    return bytes(content)


def with_pax(*records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    content = b"".join(records)
    return block(member("pax", len(content), kind)) + content + bytes(-len(content) % 512)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "ends at byte 0 without an end mark: it is truncated"),
        (block(member("a")), "ends at byte 512 without an end mark"),
        (block(member("a")) + bytes(512), "with half an end mark"),
        (block(member("a"))[:300], "ends at byte 300 without an end mark"),
        (block(member("a", 2000)) + END, "ends at byte 1536, within 'a' of 2000 bytes: it is truncated"),
        (with_size(member("a"), b"\x80" + b"\xff" * 11) + END, "within 'a' of "),
        (with_size(member("a"), b"-0000000001\0") + END, "byte 0: a member's size is b'-0000000001'"),
        (with_size(member("a"), b"0000_000001\0") + END, "a member's size is"),
        (block(member("a"))[:-1] + b"x" + END, "byte 0: a header is expected here"),
        (block(member("a")) + b"x" * 512 + END, "byte 512: a header is expected here"),
        (
            block(member("../../etc/passwd")) + END,
            "the name '../../etc/passwd' is too long, or outside of the archive",
        ),
        (block(member("blobs/../../a")) + END, "outside of the archive"),
        (block(member("/etc/passwd")) + END, "the name '/etc/passwd' is too long, or outside of the archive"),
        (block(member("a")) + block(member("./a")) + END, "byte 512: a second member is named 'a'"),
        (block(member("a", kind=tarfile.LNKTYPE, link="b")) + END, "'a' is a hard link"),
        (block(member("a", kind=tarfile.CHRTYPE)) + END, "'a' is a device"),
        (block(member("a", kind=tarfile.BLKTYPE)) + END, "'a' is a device"),
        (block(member("a", kind=tarfile.FIFOTYPE)) + END, "'a' is a pipe"),
        (block(member("a", kind=tarfile.GNUTYPE_SPARSE)) + END, "'a' is a sparse file"),
        (block(member("a", kind=b"Z")) + END, "'a' is of the unknown type b'Z'"),
        (with_pax(b"22 GNU.sparse.major=1\n") + block(member("a")) + END, "a sparse file"),
        (with_pax(b"13 path=../a\n") + block(member("a")) + END, "outside of the archive"),
        (with_pax(b"13 size=-100\n") + block(member("a")) + END, "a member's size is b'-100'"),
        (with_pax(b"14 size=10000\n") + block(member("a")) + END, "within 'a' of 10000 bytes"),
        (with_pax(b"99 path=a\n") + block(member("a")) + END, "an extended header is damaged"),
        (with_pax(b"x path=a\n") + block(member("a")) + END, "a member's size is b'x'"),
        (with_pax(b"1 \n") + block(member("a")) + END, "an extended header is damaged"),
        (block(member("pax", 1 << 40, tarfile.XHDTYPE)) + END, "an extended header has 1099511627776 bytes"),
        (block(member("long", 70_000, tarfile.GNUTYPE_LONGNAME)) + END, "an extended header has 70000 bytes"),
        (block(member("pax", 900, tarfile.XHDTYPE)) + b"x" * 512, "within an extended header at byte 512"),
    ],
)
def test_what_no_archive_of_images_has(read: Read, content: bytes, says: str) -> None:
    with pytest.raises(ArchiveInvalid) as raised:
        read(content)
    assert str(raised.value).startswith("archive.tar")
    assert says in str(raised.value)


def test_too_many_members(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "MEMBER_LIMIT", 3)
    assert len(read(b"".join(block(member(str(each))) for each in range(3)) + END)) == 3
    with pytest.raises(ArchiveInvalid, match="has more than 3 members"):
        read(b"".join(block(member(str(each))) for each in range(4)) + END)


def test_headers_for_all_are_passed_by(read: Read) -> None:
    comment = with_pax(b"13 comment=a\n", b"10 path=b\n", kind=tarfile.XGLTYPE)
    assert read(comment + block(member("a")) + END) == [("a", b"")]


def test_a_link_is_told_as_one(tmp_path: Path) -> None:
    path = tmp_path / "links.tar"
    path.write_bytes(block(member("a/b", kind=tarfile.SYMTYPE, link="../c")) + END)
    with path.open("rb") as file:
        [found] = tar.members(file.fileno(), "links.tar")
    assert (found.name, found.link, found.size) == ("a/b", "../c", 0)

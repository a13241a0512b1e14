"""The files of a layer, however it is compressed, cut and damaged."""

from __future__ import annotations

import gzip
import io
import tarfile
import tracemalloc
from typing import Any

import pytest

from storage.archives import layer
from storage.archives.layer import LayerFile, LayerListing
from storage.errors import ArchiveInvalid
from tests.archives import zstd


def info(name: str, kind: bytes = tarfile.REGTYPE, **fields: Any) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.mtime = kind, 1_700_000_000
    for key, value in fields.items():
        setattr(made, key, value)
    return made


def archive(*members: tarfile.TarInfo, form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as made:
        for each in members:
            made.addfile(each, io.BytesIO(bytes(each.size)))
    return buffer.getvalue()


SOME = archive(
    info("bin", tarfile.DIRTYPE, mode=0o755),
    info("bin/sh", size=3000, mode=0o4755, uid=7, gid=8),
    info("bin/" + "long" * 60, size=3),
    info("bin/ash", tarfile.SYMTYPE, linkname="sh"),
    info("bin/bash", tarfile.LNKTYPE, linkname="bin/" + "l" * 120),
    info("dev/null", tarfile.CHRTYPE),
    info("run/pipe", tarfile.FIFOTYPE),
    info("bin/.wh.gone"),
)
NAMES = ["bin", "bin/sh", "bin/" + "long" * 60, "bin/ash", "bin/bash", "dev/null", "run/pipe", "bin/.wh.gone"]


def listed(content: bytes, step: int = 1 << 16, **limits: int) -> tuple[list[LayerFile], LayerListing]:
    listing = LayerListing(**limits)
    files = []
    for start in range(0, len(content), step):
        files += listing.feed(content[start : start + step])
        if listing.done:
            break
    listing.finish()
    return files, listing


@pytest.mark.parametrize("step", [1, 511, 513, 1 << 20])
@pytest.mark.parametrize("form", ["none", "gzip", "zstd"])
def test_a_layer_in_pieces(form: str, step: int) -> None:
    packed = {"none": bytes, "gzip": gzip.compress, "zstd": zstd.compress}[form](SOME)
    files, listing = listed(packed, step)
    assert [each.path for each in files] == NAMES
    assert (listing.compression, listing.count, listing.cut) == (form, len(NAMES), "")
    kinds = ["directory", "file", "file", "symlink", "hardlink", "device", "pipe", "file"]
    assert [each.kind for each in files] == kinds
    assert files[1][2:] == (3000, 0o4755, 7, 8, 1_700_000_000.0, None)
    assert [each.link for each in files[3:5]] == ["sh", "bin/" + "l" * 120]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_every_form_of_tar(form: int) -> None:
    name = "d" * 90 + "/" + "f" * 90
    files, _ = listed(archive(info(name, size=9), info("next"), form=form))
    assert [each.path for each in files] == [name, "next"]


def test_layers_of_several_members_and_frames() -> None:
    half = len(SOME) // 2
    for packed in (
        gzip.compress(SOME[:half]) + gzip.compress(SOME[half:]),
        zstd.compress(SOME[:half]) + zstd.compress(SOME[half:]),
        b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc" + zstd.compress(SOME),  # RFC 8878 §3.1.2: a frame to skip
    ):
        for step in (7, 1 << 20):
            assert [each.path for each in listed(packed, step)[0]] == NAMES


def test_names_that_are_no_text_can_be_shown() -> None:
    files, _ = listed(archive(info("a\udcff<script>"), form=tarfile.GNU_FORMAT))
    assert [each.path for each in files] == ["a�<script>"]
    files[0].path.encode()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "truncated"),
        (b"abc", "truncated"),
        (b"no tar archive" * 99, "no tar archive"),
        (SOME[:600], "truncated"),
        (SOME[:2000], "truncated"),
        (gzip.compress(SOME)[:10] + b"\xff" * 99, "decompressed"),
        (zstd.compress(SOME)[:-4] + b"damage" * 9, "decompressed"),
        (zstd.compress(SOME)[:-1], "truncated"),
        (gzip.compress(SOME)[:100], "truncated"),
        (b"\x1f\x8b" + b"\xff" * 99, "decompressed"),
        (SOME[:512] + b"x" * 512, "no tar archive"),
    ],
)
def test_a_damaged_layer(content: bytes, says: str) -> None:
    for step in (3, 1 << 20):
        with pytest.raises(ArchiveInvalid, match=says):
            listed(content, step)


def header(size: bytes, kind: bytes = b"0") -> bytes:
    """A header whose size field is `size`."""
    block = bytearray(info("x", kind).tobuf(tarfile.GNU_FORMAT))
    block[124:136] = size.ljust(12, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def test_sizes_are_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    huge = b"\x80" + (1 << 60).to_bytes(11, "big")
    with pytest.raises(ArchiveInvalid, match="truncated"):
        listed(header(huge) + b"x" * 2000)
    with pytest.raises(ArchiveInvalid, match="bytes"):
        listed(header(b"\xff" * 12) + b"x" * 2000)  # negative
    for kind in (b"x", b"g", b"L", b"K"):
        with pytest.raises(ArchiveInvalid, match="extended header"):
            listed(header(huge, kind) + b"x" * 2000)


@pytest.mark.parametrize(
    "record", [b"", b"x", b"9999999 path=a\n", b"5 a=\n", b"11 path=ab", b"\xff" * 30, b"0 =\n"]
)
def test_damaged_extended_headers_say_nothing(record: bytes) -> None:
    extended = header(b"%o" % len(record), b"x") + record.ljust(512 if record else 0, b"\0")
    files, _ = listed(extended + archive(info("name")))
    assert [each.path for each in files][-1] == "name"


def test_a_sparse_file_of_gnu_tar() -> None:
    block = bytearray(header(b"%o" % 512, tarfile.GNUTYPE_SPARSE))
    block[482] = 1
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    maps = bytearray(512), bytearray(512)
    maps[0][504] = 1
    files, _ = listed(bytes(block) + b"".join(maps) + b"d" * 512 + archive(info("next")))
    assert [each.path for each in files] == ["x", "next"]


def test_a_bomb_takes_no_memory_and_is_cut() -> None:
    big = archive(info("zeros", size=20 << 20), info("after"))
    for pack in (gzip.compress, zstd.compress):
        packed = pack(big)
        tracemalloc.start()
        files, listing = listed(packed, limit=8 << 20)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 << 20
        assert ([each.path for each in files], listing.read < 9 << 20) == (["zeros"], True)
        assert listing.cut == "only the first 8 MiB are read"


def test_there_may_be_too_many_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "FILE_LIMIT", 3)
    files, listing = listed(SOME)
    assert (len(files), listing.cut) == (3, "only the first 3 files are read")

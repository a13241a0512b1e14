"""Tar archives, read without trust and written reproducibly.

Only the headers are read, and nothing is ever unpacked.  What no archive of images needs is an error: paths
that lead out of the archive, hard links, devices, sparse files, two members of one name.  Every error states
the byte offset.

POSIX.1-2024, pax, "ustar Interchange Format" and "pax Extended Header"; long names as GNU tar writes them.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from storage.errors import ArchiveInvalid

BLOCK = 512  # bytes
END = 2 * BLOCK  # zeros after the last member
MEMBER_LIMIT = 200_000  # members of an archive: each takes memory
EXTENDED_LIMIT = 1 << 16  # bytes of an extended header
NAME_LIMIT = 4096  # bytes of a name

_FILE, _LINK, _DIRECTORY, _PAX, _PAX_FOR_ALL, _LONG_NAME, _LONG_LINK = (
    b"0",
    b"2",
    b"5",
    b"x",
    b"g",
    b"L",
    b"K",
)
_REFUSED = {
    b"1": "a hard link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "a sparse file",
    b"D": "a directory's dump",
    b"M": "a part of another archive",
}


class TarMember(NamedTuple):
    """A file with its content at [offset, offset + size), or a symbolic link to the name `link`."""

    name: str
    offset: int
    size: int
    link: str | None = None


def members(file: int, what: str) -> Iterator[TarMember]:
    """List the members of the archive `what`, open as `file`, without directories.

    Raises ArchiveInvalid.
    """
    whole = os.fstat(file).st_size
    seen: set[str] = set()
    at, extended = 0, dict[str, str]()
    while (block := _header_block(file, at, what)) is not None:
        kind, size = _kind(block, at, what), _size(block, at, what)
        start = at + BLOCK
        if kind in (_PAX, _PAX_FOR_ALL, _LONG_NAME, _LONG_LINK):
            content = _extended(file, start, size, what)
            extended.update(_fields(kind, content, at, what))
        else:
            if "size" in extended:
                size = _number(extended["size"].encode(), 10, at, what)
            name = _plain(extended.get("path") or _name(block), at, what)
            link = extended.get("linkpath") or _text(block[157:257])
            extended = {}
            if kind != _FILE:
                size = 0
            if start + size > whole:
                raise ArchiveInvalid(
                    f"{what} ends at byte {whole}, within {name!r} of {size} bytes: it is truncated"
                )
            if kind != _DIRECTORY:
                if name in seen:
                    raise ArchiveInvalid(f"{what}, byte {at}: a second member is named {name!r}")
                seen.add(name)
                if len(seen) > MEMBER_LIMIT:
                    raise ArchiveInvalid(f"{what} has more than {MEMBER_LIMIT} members")
                yield TarMember(name, start, size, link if kind == _LINK else None)
        at = start + size + -size % BLOCK


def _header_block(file: int, at: int, what: str) -> bytes | None:
    """Read the block at `at`; None if it is an end mark."""
    block = os.pread(file, BLOCK, at)
    if len(block) < BLOCK:
        raise ArchiveInvalid(f"{what} ends at byte {at + len(block)} without an end mark: it is truncated")
    if block != bytes(BLOCK):
        return block
    if os.pread(file, BLOCK, at + BLOCK) != block:
        raise ArchiveInvalid(f"{what} ends at byte {at} with half an end mark: it is truncated")
    return None


def header(name: str, size: int) -> bytes:
    """The header of a file, a function of its name and size alone."""
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    return info.tobuf(tarfile.PAX_FORMAT)


def padding(size: int) -> bytes:
    """The bytes that follow the content of a file."""
    return bytes(-size % BLOCK)


def is_tar(block: bytes) -> bool:
    """Whether `block` can be the beginning of a tar archive, which may be empty."""
    return len(block) >= BLOCK and (
        block[:BLOCK] == bytes(BLOCK) or _sum(block[:BLOCK]) == _stated_sum(block)
    )


def _kind(block: bytes, at: int, what: str) -> bytes:
    if _sum(block) != _stated_sum(block):
        raise ArchiveInvalid(f"{what}, byte {at}: a header is expected here: the archive is damaged")
    kind = block[156:157]
    if kind in (b"\0", b"7", _FILE):
        # Before there was a type for directories, a slash at the end of the name meant one.
        return _DIRECTORY if kind == b"\0" and _name(block).endswith("/") else _FILE
    if kind in (_LINK, _DIRECTORY, _PAX, _PAX_FOR_ALL, _LONG_NAME, _LONG_LINK):
        return kind
    refused = _REFUSED.get(kind, f"of the unknown type {kind!r}")
    raise ArchiveInvalid(
        f"{what}, byte {at}: {_name(block)[:100]!r} is {refused}, which an archive of images cannot contain"
    )


def _sum(block: bytes) -> int:
    return sum(block) - sum(block[148:156]) + 8 * ord(" ")


def _stated_sum(block: bytes) -> int:
    with suppress(ValueError):
        return int(block[148:156].strip(b" \0") or b"0", 8)
    return -1


def _size(block: bytes, at: int, what: str) -> int:
    field = block[124:136]
    if field[0] == 0x80:  # GNU: beyond 8 GiB in binary
        return int.from_bytes(field[1:], "big")
    return _number(field.strip(b" \0") or b"0", 8, at, what)


def _number(text: bytes, base: int, at: int, what: str) -> int:
    # int() accepts signs, spaces and underscores as well.
    if text.isdigit() and len(text) < 20:
        with suppress(ValueError):
            return int(text, base)
    raise ArchiveInvalid(f"{what}, byte {at}: a member's size is {text[:20]!r}")


def _extended(file: int, start: int, size: int, what: str) -> bytes:
    if size > EXTENDED_LIMIT:
        raise ArchiveInvalid(
            f"{what}, byte {start}: an extended header has {size} bytes, more than {EXTENDED_LIMIT}"
        )
    content = os.pread(file, size, start)
    if len(content) < size:
        raise ArchiveInvalid(f"{what} ends within an extended header at byte {start}: it is truncated")
    return content


def _fields(kind: bytes, content: bytes, at: int, what: str) -> dict[str, str]:
    if kind == _LONG_NAME:
        return {"path": _text(content)}
    if kind == _LONG_LINK:
        return {"linkpath": _text(content)}
    found = {}
    while content:
        # "<length of it all> <key>=<value>\n"
        length, _, rest = content.partition(b" ")
        end = _number(length, 10, at, what) - len(length) - 1
        key, equals, value = rest[:end].partition(b"=")
        if not 0 < end <= len(rest) or not equals or not value.endswith(b"\n"):
            raise ArchiveInvalid(f"{what}, byte {at}: an extended header is damaged")
        if key.startswith(b"GNU.sparse."):
            raise ArchiveInvalid(
                f"{what}, byte {at}: a sparse file, which an archive of images cannot contain"
            )
        if key in (b"path", b"linkpath", b"size"):
            found[key.decode()] = value[:-1].decode("utf-8", "surrogateescape")
        content = rest[end:]
    # A header for all members mostly holds comments; a name or size for all of them would make no sense.
    return {} if kind == _PAX_FOR_ALL else found


def _name(block: bytes) -> str:
    name = _text(block[:100])
    before = _text(block[345:500]) if block[257:263] == b"ustar\0" else ""
    return f"{before}/{name}" if before else name


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _plain(name: str, at: int, what: str) -> str:
    """Normalise a name: `./a//b/` becomes a/b."""
    parts = [each for each in name.split("/") if each not in ("", ".")]
    if name.startswith("/") or ".." in parts or len(name) > NAME_LIMIT:
        raise ArchiveInvalid(
            f"{what}, byte {at}: the name {name[:100]!r} is too long, or outside of the archive"
        )
    return "/".join(parts)

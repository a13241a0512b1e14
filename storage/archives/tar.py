"""Tar archives, read without trust and written reproducibly.

Read is what a tar says it holds, not what a file system would make of it: nothing is ever unpacked.  What no
archive of images has any need of is refused where it is met: paths that lead out of it, hard links, devices,
sparse files, two members of one name.  Every error says at which byte.

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
MEMBERS = 200_000  # of an archive, at most: each takes memory
EXTRA = 1 << 16  # bytes of a header that stands before another
NAME = 4096  # bytes of a name, at most

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


class Member(NamedTuple):
    """A file, its content at [offset, offset + size); or a symbolic link to the name `link`."""

    name: str
    offset: int
    size: int
    link: str | None = None


def members(file: int, what: str) -> Iterator[Member]:
    """What the archive `what`, open as `file`, says it holds; directories are left out.

    Raises ArchiveInvalid.
    """
    whole = os.fstat(file).st_size
    seen: set[str] = set()
    at, extra = 0, dict[str, str]()
    while True:
        block = os.pread(file, BLOCK, at)
        if len(block) < BLOCK:
            raise ArchiveInvalid(
                f"{what} ends at byte {at + len(block)} without an end mark: it was truncated"
            )
        if block == bytes(BLOCK):
            if os.pread(file, BLOCK, at + BLOCK) != block:
                raise ArchiveInvalid(f"{what} ends at byte {at} with half an end mark: it was truncated")
            return
        kind, size = _kind(block, at, what), _size(block, at, what)
        start = at + BLOCK
        if kind in (_PAX, _PAX_FOR_ALL, _LONG_NAME, _LONG_LINK):
            content = _extra(file, start, size, what)
            extra.update(_fields(kind, content, at, what))
        else:
            if "size" in extra:
                size = _number(extra["size"].encode(), 10, at, what)
            name = _plain(extra.get("path") or _name(block), at, what)
            link = extra.get("linkpath") or _text(block[157:257])
            extra = {}
            if kind != _FILE:
                size = 0
            if start + size > whole:
                raise ArchiveInvalid(
                    f"{what} ends at byte {whole}, within {name!r} of {size} bytes: it was truncated"
                )
            if kind != _DIRECTORY:
                if name in seen:
                    raise ArchiveInvalid(f"{what}, byte {at}: {name!r} is there for the second time")
                seen.add(name)
                if len(seen) > MEMBERS:
                    raise ArchiveInvalid(f"{what} holds more than {MEMBERS} members")
                yield Member(name, start, size, link if kind == _LINK else None)
        at = start + size + -size % BLOCK


def header(name: str, size: int) -> bytes:
    """What comes before the content of a file; the same for the same."""
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    return info.tobuf(tarfile.PAX_FORMAT)


def padding(size: int) -> bytes:
    """What comes after it."""
    return bytes(-size % BLOCK)


def is_tar(block: bytes) -> bool:
    """Whether an archive may begin so; it need hold nothing."""
    return len(block) >= BLOCK and (block[:BLOCK] == bytes(BLOCK) or _sum(block[:BLOCK]) == _told_sum(block))


def _kind(block: bytes, at: int, what: str) -> bytes:
    if _sum(block) != _told_sum(block):
        raise ArchiveInvalid(f"{what}, byte {at}: there is no header where one belongs: it is damaged")
    kind = block[156:157]
    if kind in (b"\0", b"7", _FILE):
        # Before there was a kind for directories, a slash at the end made one.
        return _DIRECTORY if kind == b"\0" and _name(block).endswith("/") else _FILE
    if kind in (_LINK, _DIRECTORY, _PAX, _PAX_FOR_ALL, _LONG_NAME, _LONG_LINK):
        return kind
    told = _REFUSED.get(kind, f"of the unknown kind {kind!r}")
    raise ArchiveInvalid(
        f"{what}, byte {at}: {_name(block)[:100]!r} is {told}, which no archive of images has"
    )


def _sum(block: bytes) -> int:
    return sum(block) - sum(block[148:156]) + 8 * ord(" ")


def _told_sum(block: bytes) -> int:
    with suppress(ValueError):
        return int(block[148:156].strip(b" \0") or b"0", 8)
    return -1


def _size(block: bytes, at: int, what: str) -> int:
    field = block[124:136]
    if field[0] == 0x80:  # GNU: beyond 8 GiB in binary
        return int.from_bytes(field[1:], "big")
    return _number(field.strip(b" \0") or b"0", 8, at, what)


def _number(text: bytes, base: int, at: int, what: str) -> int:
    # int() takes signs, spaces and underscores as well.
    if text.isdigit() and len(text) < 20:
        with suppress(ValueError):
            return int(text, base)
    raise ArchiveInvalid(f"{what}, byte {at}: a member's size is {text[:20]!r}")


def _extra(file: int, start: int, size: int, what: str) -> bytes:
    if size > EXTRA:
        raise ArchiveInvalid(f"{what}, byte {start}: an extended header of {size} bytes, more than {EXTRA}")
    content = os.pread(file, size, start)
    if len(content) < size:
        raise ArchiveInvalid(f"{what} ends within an extended header at byte {start}: it was truncated")
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
            raise ArchiveInvalid(f"{what}, byte {at}: an extended header that cannot be read")
        if key.startswith(b"GNU.sparse."):
            raise ArchiveInvalid(f"{what}, byte {at}: a sparse file, which no archive of images has")
        if key in (b"path", b"linkpath", b"size"):
            found[key.decode()] = value[:-1].decode("utf-8", "surrogateescape")
        content = rest[end:]
    # One for all holds comments, mostly; a name or a size for all would be nonsense.
    return {} if kind == _PAX_FOR_ALL else found


def _name(block: bytes) -> str:
    name = _text(block[:100])
    before = _text(block[345:500]) if block[257:263] == b"ustar\0" else ""
    return f"{before}/{name}" if before else name


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _plain(name: str, at: int, what: str) -> str:
    """Without what says nothing: `./a//b/` is a/b."""
    parts = [each for each in name.split("/") if each not in ("", ".")]
    if name.startswith("/") or ".." in parts or len(name) > NAME:
        raise ArchiveInvalid(f"{what}, byte {at}: the name {name[:100]!r} leads out of the archive")
    return "/".join(parts)

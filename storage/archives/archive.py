"""Archives to read images from: a directory, or a tar, which may be compressed.

Both are parts by name, any of which can be read at any place: nothing is unpacked, and what is in memory
does not grow with what there is.  A tar that cannot be read so (compressed, or from a pipe) is first written,
as it comes, to a file without a name, that goes with us whatever happens.

What an archive says is not believed: see tar.py.  A link in a tar leads within it or nowhere; in a directory
one is no part.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import stat
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from storage.archives.tar import BLOCK, Member, is_tar, members
from storage.errors import ArchiveInvalid
from storage.oci import Digest

CHUNK = 1 << 20  # bytes read at a time
GIANT = 16 << 20  # bytes of a document that is read as a whole: more is none
INFLATED = 200  # times what is read; images hold what is compressed already, or are tars of programs
INNOCENT = 64 << 20  # inflated bytes before that counts

_GZIP = b"\x1f\x8b"
_COMPRESSED = {b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2"}


class Part(io.RawIOBase):
    """A file's content: `size` bytes of `file` from `offset` on.  Of no use once its archive is closed."""

    def __init__(self, file: int, offset: int, size: int) -> None:
        self.size = size
        self._file = file
        self._offset = offset
        self._at = 0

    def at(self, start: int, count: int) -> bytes:
        """From `start` on `count` bytes at most; none at its end."""
        return os.pread(self._file, max(0, min(count, self.size - start)), self._offset + start)

    def chunks(self) -> Iterator[bytes]:
        start = 0
        while chunk := self.at(start, CHUNK):
            yield chunk
            start += len(chunk)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = self.at(self._at, len(buffer))
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)

    def tell(self) -> int:
        return self._at


class Archive(Protocol):
    """`what` it is called in messages.  To be closed.  Everything blocks, and may raise ArchiveInvalid."""

    what: str

    def size(self, name: str) -> int | None:
        """None: there is no such part."""
        ...

    def place(self, name: str) -> int:
        """The order in which parts are read best."""
        ...

    def opened(self, name: str) -> AbstractContextManager[Part]:
        """Raises ArchiveInvalid where there is no such part."""
        ...

    def close(self) -> None: ...


class Directory:
    def __init__(self, path: Path) -> None:
        self.what = str(path)
        self._path = path

    def size(self, name: str) -> int | None:
        try:
            found = (self._path / name).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise ArchiveInvalid(f"{self.what}/{name}: {error.strerror}") from error
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def place(self, name: str) -> int:
        return 0

    @contextmanager
    def opened(self, name: str) -> Iterator[Part]:
        try:
            # Not by a link, and without waiting for whoever may write into a pipe.
            file = os.open(self._path / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise ArchiveInvalid(f"{self.what}/{name}: {error.strerror}") from error
        try:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode):
                raise ArchiveInvalid(f"{self.what}/{name} is no file")
            yield Part(file, 0, found.st_size)
        finally:
            os.close(file)

    def close(self) -> None:
        pass


class Tar:
    """`file` is to be one that can be read at any place, and is closed with it."""

    def __init__(self, file: IO[bytes], what: str) -> None:
        self.what = what
        self._file = file
        self._members: dict[str, Member] = {}
        try:
            for member in members(file.fileno(), what):
                self._members[member.name] = member
        except BaseException:
            file.close()
            raise

    def _find(self, name: str) -> Member | None:
        """A member, through one link at most: docker save makes links to layers that it has written."""
        found = self._members.get(name)
        if found is not None and found.link is not None:
            found = self._members.get(_beside(name, found.link))
        return None if found is None or found.link is not None else found

    def size(self, name: str) -> int | None:
        found = self._find(name)
        return None if found is None else found.size

    def place(self, name: str) -> int:
        found = self._find(name)
        return 0 if found is None else found.offset

    @contextmanager
    def opened(self, name: str) -> Iterator[Part]:
        found = self._find(name)
        if found is None:
            raise ArchiveInvalid(f"{self.what} holds no {name}")
        yield Part(self._file.fileno(), found.offset, found.size)

    def close(self) -> None:
        self._file.close()


def open_archive(path: Path, spool: Path, tick: Callable[[], None] = lambda: None) -> Directory | Tar:
    """The directory or tar at `path`; `-` is standard input.  What cannot be read in place goes to `spool`.

    `tick` is called while it does; what it raises ends it.

    Raises ArchiveInvalid, and OSError where there is no room for that.
    """
    if str(path) == "-":
        return open_stream(sys.stdin.buffer, "standard input", spool, tick)
    try:
        if path.is_dir():
            return Directory(path)
        file = path.open("rb")
    except OSError as error:
        raise ArchiveInvalid(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        with file:
            return open_stream(file, str(path), spool, tick)
    return open_spooled(file, str(path), spool, tick)


def open_stream(stream: IO[bytes], what: str, spool: Path, tick: Callable[[], None] = lambda: None) -> Tar:
    """What `stream` brings, to its end; it is not closed."""
    file = tempfile.TemporaryFile(dir=spool)  # noqa: SIM115
    try:
        while chunk := stream.read(CHUNK):
            tick()
            file.write(chunk)
        file.flush()
    except BaseException:
        file.close()
        raise
    return open_spooled(file, what, spool, tick)


def open_spooled(file: IO[bytes], what: str, spool: Path, tick: Callable[[], None]) -> Tar:
    """What lies in `file`, a tar that may be compressed.  It is closed with it, or now."""
    try:
        file.seek(0)
        begun = os.pread(file.fileno(), BLOCK, 0)
        if begun.startswith(_GZIP):
            plain = _inflated(file, what, spool, tick)
            file.close()
            file = plain
            begun = os.pread(file.fileno(), BLOCK, 0)
        for magic, name in _COMPRESSED.items():
            if begun.startswith(magic):
                raise ArchiveInvalid(f"{what} is compressed by {name}, which is not read here: decompress it")
        if not is_tar(begun):
            raise ArchiveInvalid(f"{what} is neither a directory nor a tar, plain or compressed by gzip")
    except BaseException:
        file.close()
        raise
    return Tar(file, what)


def _inflated(file: IO[bytes], what: str, spool: Path, tick: Callable[[], None]) -> IO[bytes]:
    plain = tempfile.TemporaryFile(dir=spool)  # noqa: SIM115
    try:
        for chunk in inflated(file, what):
            tick()
            plain.write(chunk)
        plain.flush()
    except BaseException:
        plain.close()
        raise
    return plain


def inflated(file: IO[bytes] | Part, what: str) -> Iterator[bytes]:
    """What was compressed by gzip.  Raises ArchiveInvalid, also where it is a bomb."""
    count = 0
    try:
        with gzip.GzipFile(fileobj=file, mode="rb") as unpacked:
            while chunk := unpacked.read(CHUNK):
                count += len(chunk)
                if count > INNOCENT and count > INFLATED * file.tell():
                    raise ArchiveInvalid(
                        f"{what}: {file.tell()} bytes of it inflate to {count}: that is no archive of images"
                    )
                yield chunk
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ArchiveInvalid(f"{what} is damaged or truncated, at byte {file.tell()}: {error}") from error


def read(archive: Archive, name: str, most: int = GIANT) -> bytes:
    """All of a part.  Raises ArchiveInvalid where it is not there, or larger than it is to be."""
    with archive.opened(name) as part:
        if part.size > most:
            raise ArchiveInvalid(f"{archive.what}: {name} has {part.size} bytes, more than {most}")
        content = part.at(0, part.size)
        if len(content) < part.size:
            raise ArchiveInvalid(f"{archive.what}: {name} ends after {len(content)} of {part.size} bytes")
        return content


def digest_of(chunks: Iterable[bytes], algorithm: str = "sha256") -> Digest:
    found = hashlib.new(algorithm)
    for chunk in chunks:
        found.update(chunk)
    return Digest(f"{algorithm}:{found.hexdigest()}")


def _beside(name: str, link: str) -> str:
    """The name that a link of that name leads to; what leads out of the archive leads nowhere."""
    found = name.split("/")[:-1]
    for each in link.split("/"):
        if each == "..":
            if not found:
                return ""
            found.pop()
        elif each not in ("", "."):
            found.append(each)
    return "" if link.startswith("/") else "/".join(found)

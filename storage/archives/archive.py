"""Archives to read images from: directories and tar archives, which may be compressed.

An archive consists of named parts that are read at any offset: nothing is unpacked, and memory use does not
depend on its size.  A tar archive without random access (compressed, or from a pipe) is first copied to a
file without a name, which disappears with this process.

Archives are not trusted: see tar.py.  A symbolic link in a tar archive resolves to a member of it or to
nothing; a symbolic link in a directory is not a part.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import stat
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from storage.archives.tar import BLOCK, TarMember, is_tar, members
from storage.disk.uploads import CHUNK
from storage.errors import ArchiveInvalid
from storage.oci import Digest

DOCUMENT_LIMIT = 16 << 20  # bytes of a document that is read as a whole
INFLATION_LIMIT = 200  # times the compressed size; layers are compressed already, or tar archives of programs
INFLATION_FREE = 64 << 20  # inflated bytes before that limit applies

# How compressed files begin: RFC 1952 §2.3.1; RFC 8878 §3.1, whose frames can follow skippable ones.
_COMPRESSED = {
    "gzip": re.compile(rb"\x1f\x8b"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    "xz": re.compile(rb"\xfd7zXZ"),
    "bzip2": re.compile(rb"BZh"),
}
_SUPPORTED = ("gzip", "zstd")


class ArchivePart(io.RawIOBase):
    """A file in an archive: `size` bytes of `file` from `offset` on, until the archive is closed."""

    def __init__(self, file: int, offset: int, size: int) -> None:
        self.size = size
        self._file = file
        self._offset = offset
        self._at = 0

    def at(self, start: int, count: int) -> bytes:
        """At most `count` bytes from `start` on; none at the end."""
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
    """A directory or tar archive whose parts are read by name.  Close it after use.

    Methods block, and may raise ArchiveInvalid.  `what` names the archive in messages.
    """

    what: str

    def size(self, name: str) -> int | None:
        """The size of a part in bytes; None if there is no such part."""
        ...

    def position(self, name: str) -> int:
        """A key to sort parts by, so that reading them in order is fast."""
        ...

    def opened(self, name: str) -> AbstractContextManager[ArchivePart]:
        """Open a part.  Raises ArchiveInvalid if there is no such part."""
        ...

    def close(self) -> None: ...


class DirectoryArchive:
    """A directory as an archive."""

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

    def position(self, name: str) -> int:
        return 0

    @contextmanager
    def opened(self, name: str) -> Iterator[ArchivePart]:
        try:
            # Follow no link, and do not wait for a writer if it is a pipe.
            file = os.open(self._path / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise ArchiveInvalid(f"{self.what}/{name}: {error.strerror}") from error
        try:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode):
                raise ArchiveInvalid(f"{self.what}/{name} is not a file")
            yield ArchivePart(file, 0, found.st_size)
        finally:
            os.close(file)

    def close(self) -> None:
        pass


class TarArchive:
    """A tar archive in `file`, which must allow random access and is closed with the archive."""

    def __init__(self, file: IO[bytes], what: str) -> None:
        self.what = what
        self._file = file
        self._members: dict[str, TarMember] = {}
        try:
            for member in members(file.fileno(), what):
                self._members[member.name] = member
        except BaseException:
            file.close()
            raise

    def _find(self, name: str) -> TarMember | None:
        """Find a member, through at most one link: `docker save` links to layers that it wrote before."""
        found = self._members.get(name)
        if found is not None and found.link is not None:
            found = self._members.get(_resolve_link(name, found.link))
        return None if found is None or found.link is not None else found

    def size(self, name: str) -> int | None:
        found = self._find(name)
        return None if found is None else found.size

    def position(self, name: str) -> int:
        found = self._find(name)
        return 0 if found is None else found.offset

    @contextmanager
    def opened(self, name: str) -> Iterator[ArchivePart]:
        found = self._find(name)
        if found is None:
            raise ArchiveInvalid(f"{self.what} does not contain {name}")
        yield ArchivePart(self._file.fileno(), found.offset, found.size)

    def close(self) -> None:
        self._file.close()


def open_archive(
    path: Path, spool: Path, tick: Callable[[], None] = lambda: None
) -> DirectoryArchive | TarArchive:
    """Open the directory or tar archive at `path`; `-` is standard input.

    What does not allow random access is first copied into the directory `spool`; `tick` is called after
    every chunk, and may raise an exception to cancel that.

    Raises ArchiveInvalid, and OSError if the copy does not fit.
    """
    if str(path) == "-":
        return open_stream(sys.stdin.buffer, "standard input", spool, tick)
    try:
        if path.is_dir():
            return DirectoryArchive(path)
        file = path.open("rb")
    except OSError as error:
        raise ArchiveInvalid(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        with file:
            return open_stream(file, str(path), spool, tick)
    return open_spooled(file, str(path), spool, tick)


def open_stream(
    stream: IO[bytes], what: str, spool: Path, tick: Callable[[], None] = lambda: None
) -> TarArchive:
    """Copy `stream` to its end and open the copy.  The stream is not closed."""
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


def open_spooled(file: IO[bytes], what: str, spool: Path, tick: Callable[[], None]) -> TarArchive:
    """Open the tar archive in `file`, which may be compressed.  The archive, or an error, closes the file."""
    try:
        file.seek(0)
        begun = os.pread(file.fileno(), BLOCK, 0)
        if (kind := compression(begun)) in _SUPPORTED:
            plain = _inflated(file, kind, what, spool, tick)
            file.close()
            file = plain
            begun = os.pread(file.fileno(), BLOCK, 0)
            kind = compression(begun)
        if not is_tar(begun):
            if kind not in (None, *_SUPPORTED):
                raise ArchiveInvalid(
                    f"{what} is compressed with {kind}, which is not supported: decompress it first"
                )
            raise ArchiveInvalid(
                f"{what} is neither a directory nor a tar archive, plain or compressed with gzip or zstd"
            )
    except BaseException:
        file.close()
        raise
    return TarArchive(file, what)


def compression(begun: bytes) -> str | None:
    """The name of the compression of a file that begins so; None if it is not compressed."""
    return next((name for name, magic in _COMPRESSED.items() if magic.match(begun)), None)


def _inflated(file: IO[bytes], kind: str, what: str, spool: Path, tick: Callable[[], None]) -> IO[bytes]:
    plain = tempfile.TemporaryFile(dir=spool)  # noqa: SIM115
    try:
        for chunk in inflated(file, kind, what):
            tick()
            plain.write(chunk)
        plain.flush()
    except BaseException:
        plain.close()
        raise
    return plain


def inflated(file: IO[bytes] | ArchivePart, kind: str, what: str) -> Iterator[bytes]:
    """Decompress gzip or zstd, in chunks.

    Raises ArchiveInvalid if it is damaged, a decompression bomb, or of another `kind`.
    """
    count = 0
    opened, failures = _decompressor(kind, what)
    try:
        with opened(file) as unpacked:
            while chunk := unpacked.read(CHUNK):
                count += len(chunk)
                if count > INFLATION_FREE and count > INFLATION_LIMIT * file.tell():
                    raise ArchiveInvalid(
                        f"{what}: {file.tell()} bytes of it inflate to {count}: this is no archive of images"
                    )
                yield chunk
    except failures as error:
        raise ArchiveInvalid(f"{what} is damaged or truncated, at byte {file.tell()}: {error}") from error


def _decompressor(kind: str, what: str) -> tuple[Callable[[Any], Any], tuple[type[Exception], ...]]:
    """A function that opens a compressed file, and the errors of damaged content."""
    if kind == "gzip":
        return lambda file: gzip.GzipFile(fileobj=file, mode="rb"), (EOFError, zlib.error, gzip.BadGzipFile)
    if kind != "zstd":
        raise ArchiveInvalid(f"{what} is compressed with {kind}, which is not supported")
    # Imported here: few archives need it.
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    # It refuses windows of more than 128 MiB, so that memory use is bounded.
    return lambda file: zstd.ZstdFile(file), (EOFError, zstd.ZstdError)


def read(archive: Archive, name: str, most: int = DOCUMENT_LIMIT) -> bytes:
    """Read a whole part.  Raises ArchiveInvalid if it is missing, or larger than `most` bytes."""
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
    return Digest.of_hash(found)


def _resolve_link(name: str, link: str) -> str:
    """Resolve the target of the link `name`; an empty string if it is outside of the archive."""
    found = name.split("/")[:-1]
    for each in link.split("/"):
        if each == "..":
            if not found:
                return ""
            found.pop()
        elif each not in ("", "."):
            found.append(each)
    return "" if link.startswith("/") else "/".join(found)

"""The files of a layer, listed without trust while its bytes come; nothing is unpacked or kept.

A layer is a tar archive, plain or compressed by gzip or zstd: image-spec, layer.md.  What it states of
itself is not believed: memory is bounded, and so are the members and bytes that are read.
"""

from __future__ import annotations

import sys
import tarfile
import zlib
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from storage.archives.tar import BLOCK
from storage.errors import ArchiveInvalid

PIECE = 1 << 18  # bytes that are decompressed at once
UNPACKED_LIMIT = 2 << 30  # bytes after decompression
FILE_LIMIT = 200_000  # members
EXTENDED_LIMIT = 1 << 20  # bytes of an extended header, which may hold attributes of a file
NAME_LIMIT = 4096  # characters

_GZIP, _ZSTD, _SKIPPABLE = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\x2a\x4d\x18"
_KINDS = {
    tarfile.SYMTYPE: "symlink",
    tarfile.LNKTYPE: "hardlink",
    tarfile.DIRTYPE: "directory",
    tarfile.CHRTYPE: "device",
    tarfile.BLKTYPE: "device",
    tarfile.FIFOTYPE: "pipe",
}


class LayerFile(NamedTuple):
    """A member of a layer.  `modified` is in seconds since the epoch, `link` the target of a link."""

    path: str
    kind: str
    size: int
    mode: int
    uid: int
    gid: int
    modified: float
    link: str | None


class LayerListing:
    """Lists the files of a layer out of its bytes, which `feed` takes in order.

    compression: gzip, zstd or none, once known
    read: bytes after decompression
    count: files so far
    cut: why the rest is not read; empty if it was, or may be
    """

    def __init__(self, limit: int = UNPACKED_LIMIT) -> None:
        self.compression = ""
        self.read = 0
        self.count = 0
        self.cut = ""
        self.ended = False
        self._limit = limit
        self._start = b""
        self._packing: _Packing | None = None
        self._buffer = bytearray()
        self._skip = 0
        self._needed = BLOCK
        self._extended = b""  # the type of the extended header that comes
        self._mapped = 0  # bytes to skip after the map of a sparse file
        self._fields: dict[str, str] = {}

    def feed(self, content: bytes) -> Iterator[LayerFile]:
        """The files that `content` completes.  Blocks; raises ArchiveInvalid."""
        if self._packing is None:
            self._start += content
            if len(self._start) < len(_ZSTD):
                return
            content = self._start
            self._packing = _packing(content)
            self.compression = self._packing.name
        try:
            for piece in self._packing.pieces(content):
                self.read += len(piece)
                yield from self._parse(piece)
                if self.read >= self._limit and not self.done:
                    self.cut = f"only the first {self._limit >> 20} MiB are read"
                if self.done:
                    return
        except self._packing.error as error:
            raise ArchiveInvalid(f"byte {self.read} of the layer cannot be decompressed: {error}") from None

    def finish(self) -> None:
        """Called after the last bytes.  Raises ArchiveInvalid if more were to come."""
        begun = self._buffer or self._skip or self._extended
        if not self.done and (begun or self._packing is None or not self._packing.complete):
            raise ArchiveInvalid(f"the layer ends at byte {self.read}, within a member: it is truncated")

    @property
    def done(self) -> bool:
        """Whether no more bytes are wanted."""
        return self.ended or bool(self.cut)

    def _parse(self, piece: bytes) -> Iterator[LayerFile]:
        buffer, at = self._buffer, 0
        buffer += piece
        while not self.done:
            step = min(self._skip, len(buffer) - at)
            self._skip -= step
            at += step
            if self._skip or len(buffer) - at < self._needed:
                break
            block = bytes(buffer[at : at + self._needed])
            at += self._needed
            if self._extended:
                self._extend(block)
            elif (found := self._member(block)) is not None:
                self.count += 1
                if self.count >= FILE_LIMIT:
                    self.cut = f"only the first {FILE_LIMIT} files are read"
                yield found
        del buffer[:at]

    def _member(self, block: bytes) -> LayerFile | None:
        if block == bytes(BLOCK):
            self.ended = True
            return None
        info = _header(block, self.read)
        if info.type in (
            tarfile.XHDTYPE,
            tarfile.XGLTYPE,
            tarfile.GNUTYPE_LONGNAME,
            tarfile.GNUTYPE_LONGLINK,
        ):
            if info.size > EXTENDED_LIMIT:
                raise ArchiveInvalid(f"an extended header of {info.size} bytes, more than {EXTENDED_LIMIT}")
            if info.size:
                self._extended, self._needed = info.type, info.size + -info.size % BLOCK
            return None
        fields, self._fields = self._fields, {}
        size = _number(fields.get("size"), info.size)
        if info.isreg() or info.type not in tarfile.SUPPORTED_TYPES:
            self._skip = size + -size % BLOCK
        if info.type == tarfile.GNUTYPE_SPARSE and block[482]:
            # More of its map comes before its content, up to a block that says it is the last.
            self._extended, self._mapped, self._skip = info.type, self._skip, 0
        return LayerFile(
            path=_printable(fields.get("GNU.sparse.name") or fields.get("path") or info.name),
            kind=_KINDS.get(info.type, "file"),
            size=_number(fields.get("GNU.sparse.realsize"), size) if info.isreg() else 0,
            mode=info.mode & 0o7777,
            uid=_number(fields.get("uid"), info.uid),
            gid=_number(fields.get("gid"), info.gid),
            modified=float(info.mtime),
            link=_printable(fields.get("linkpath") or info.linkname)
            if info.islnk() or info.issym()
            else None,
        )

    def _extend(self, block: bytes) -> None:
        """Read an extended header: pax, "pax Extended Header"; or a long name, as GNU tar writes them."""
        kind = self._extended
        if kind == tarfile.GNUTYPE_SPARSE:
            if not block[504]:
                self._extended, self._skip = b"", self._mapped
            return
        self._extended, self._needed = b"", BLOCK
        if kind == tarfile.XHDTYPE:
            self._fields.update(_fields(block))
        elif kind != tarfile.XGLTYPE:
            name = "path" if kind == tarfile.GNUTYPE_LONGNAME else "linkpath"
            self._fields[name] = block.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _header(block: bytes, at: int) -> tarfile.TarInfo:
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        raise ArchiveInvalid(
            f"before byte {at} of the layer a header is expected: it is no tar archive"
        ) from None
    if info.size < 0:
        raise ArchiveInvalid(f"before byte {at} of the layer a member has {info.size} bytes")
    return info


def _fields(content: bytes) -> Iterator[tuple[str, str]]:
    """The records of a pax header, `<length> <key>=<value>` and a line feed, up to one that is damaged."""
    while content:
        length, space, rest = content.partition(b" ")
        if not space or not length.isdigit() or len(length) > 8:
            return
        end = int(length) - len(length) - 1
        key, equals, value = rest[:end].partition(b"=")
        if not 0 < end <= len(rest) or not equals or not value.endswith(b"\n"):
            return
        yield key.decode("utf-8", "replace"), value.rstrip(b"\n").decode("utf-8", "surrogateescape")
        content = rest[end:]


def _number(text: str | None, default: int) -> int:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 20 else default


def _printable(name: str) -> str:
    """The name with what is not UTF-8 replaced."""
    return name[:NAME_LIMIT].encode("utf-8", "surrogateescape").decode("utf-8", "replace")


# Compression


class _Packing(Protocol):
    """How a layer is compressed."""

    name: str
    error: type[Exception]

    @property
    def complete(self) -> bool:
        """Whether the bytes so far may be all."""

    def pieces(self, content: bytes) -> Iterator[bytes]:
        """What `content`, the next bytes, decompresses to, in small pieces.  Raises `error`."""


def _packing(start: bytes) -> _Packing:
    """That of a layer that begins so."""
    if start.startswith(_GZIP):
        return _Gzip()
    if start.startswith(_ZSTD) or (start[1:4] == _SKIPPABLE and start[0] >> 4 == 5):
        return _Zstd()
    return _Plain()


class _Plain:
    name, complete = "none", True
    error: type[Exception] = zlib.error

    def pieces(self, content: bytes) -> Iterator[bytes]:
        yield content


class _Gzip:
    """Members of gzip, one after the other: RFC 1952 §2.2."""

    name = "gzip"
    error: type[Exception] = zlib.error

    def __init__(self) -> None:
        self._member = zlib.decompressobj(31)

    @property
    def complete(self) -> bool:
        return self._member.eof

    def pieces(self, content: bytes) -> Iterator[bytes]:
        while content:
            if self._member.eof:
                if not content.strip(b"\0"):
                    return  # padding
                self._member = zlib.decompressobj(31)
            if piece := self._member.decompress(content, PIECE):
                yield piece
            content = self._member.unused_data if self._member.eof else self._member.unconsumed_tail


class _Zstd:
    """Frames of zstd, one after the other: RFC 8878 §3.1."""

    name = "zstd"

    def __init__(self) -> None:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
        self.error: type[Exception] = zstd.ZstdError
        self._new = zstd.ZstdDecompressor
        self._frame = self._new()

    @property
    def complete(self) -> bool:
        return self._frame.eof

    def pieces(self, content: bytes) -> Iterator[bytes]:
        while content or not (self._frame.eof or self._frame.needs_input):
            if self._frame.eof:
                self._frame = self._new()
            if piece := self._frame.decompress(content, PIECE):
                yield piece
            content = self._frame.unused_data if self._frame.eof else b""

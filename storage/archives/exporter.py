"""Writes bundles from stores: OCI image layouts, as a directory or a tar archive.  See bundle.py.

All content is verified while it is written.  A bundle gets its name when all of it is on the disk, so that an
interrupted export leaves no file of that name.  The same content results in the same bundle.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from storage.archives import bundle
from storage.archives.bundle import blob_name
from storage.archives.export_plan import ContentSource, ExportPlan
from storage.archives.tar import END, header, padding
from storage.disk.modes import DIRECTORY_MODE, FILE_MODE, make_directory
from storage.disk.uploads import CHUNK
from storage.errors import BlobUnknown
from storage.oci import Digest

Tick = Callable[[int], None]  # called with the bytes written so far; may raise to cancel the export


def ignored(done: int) -> None:
    pass


class Sink(Protocol):
    """The target of an export, written file by file."""

    def put(self, name: str, size: int, chunks: Iterable[bytes]) -> None: ...

    def end(self) -> None: ...


class TarSink:
    """A tar archive that is passed to `write` in pieces, from its beginning to its end."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self._write = write

    def put(self, name: str, size: int, chunks: Iterable[bytes]) -> None:
        self._write(header(name, size))
        for chunk in chunks:
            self._write(chunk)
        self._write(padding(size))

    def end(self) -> None:
        self._write(bytes(END))


def into(file: int) -> Callable[[bytes], None]:
    """A function that writes its whole argument to the descriptor `file`."""

    def write(chunk: bytes) -> None:
        view = memoryview(chunk)
        while view:
            view = view[os.write(file, view) :]

    return write


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, FILE_MODE)


class DirectorySink:
    """A directory to which the files of a bundle are written."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._written: list[Path] = []

    def put(self, name: str, size: int, chunks: Iterable[bytes]) -> None:
        path = self._directory / name
        make_directory(path.parent)
        # Copied, not hard-linked: a change to a file of the bundle must not change the stored blob.
        with open(path, "wb", buffering=0, opener=_private) as file:
            for chunk in chunks:
                file.write(chunk)
        self._written.append(path)

    def end(self) -> None:
        for path in self._written:  # only now, when the kernel has written most of it already
            with path.open("rb") as file:
                os.fdatasync(file.fileno())


def write(
    plan: ExportPlan, sink: Sink, signature: Callable[[bytes], bytes] | None, tick: Tick = ignored
) -> Digest:
    """Write a bundle; the digest of its entrepot.json.

    Raises BlobUnknown if content is damaged, or was deleted since the plan was made.
    """
    document = bundle.encode(plan.contents)
    small = {bundle.LAYOUT: bundle.LAYOUT_CONTENT, bundle.INDEX: plan.index, bundle.CONTENTS: document}
    if signature is not None:
        small[bundle.SIGNATURE] = signature(document)
    for name, content in small.items():
        sink.put(name, len(content), [content])
    done = 0
    with ThreadPoolExecutor(1) as hasher:
        for digest, source in plan.sources.items():
            sink.put(blob_name(digest), source.size, _chunks(digest, source, hasher))
            done += source.size
            tick(done)
    return Digest.of(document)


def _chunks(digest: Digest, source: ContentSource, hasher: ThreadPoolExecutor) -> Iterator[bytes]:
    if source.repository is not None:
        yield source.store.manifest(source.repository, digest)[0].content  # verified there
        return
    try:
        file = source.store.files.reader(digest)
    except BlobUnknown:
        raise BlobUnknown(f"{digest} was deleted since the export began: export again") from None
    found = hashlib.new(digest.algorithm)
    at = 0
    try:
        while (chunk := file.read(CHUNK)) and at + len(chunk) <= source.size:
            hashing = hasher.submit(found.update, chunk)  # while the chunk is written
            yield chunk
            hashing.result()
            at += len(chunk)
    finally:
        file.close()
    if chunk or at < source.size or Digest.of_hash(found) != digest:
        where = source.store.files.path(digest) or source.store.files.root
        raise BlobUnknown(
            f"{digest} is damaged in {where}: run entrepot scrub to set it aside, then fetch it again"
        )


@contextmanager
def named(path: Path) -> Iterator[Sink]:
    """A bundle that gets the name `path` when the block succeeds: a tar archive if `path` ends in .tar.

    Raises the errors of placed().
    """
    tar = path.suffix == ".tar"
    with placed(path, directory=not tar) as (partial, file):
        sink = TarSink(into(file)) if tar else DirectorySink(partial)
        yield sink
        sink.end()


@contextmanager
def placed(path: Path, *, directory: bool = False) -> Iterator[tuple[Path, int]]:
    """A file or directory that gets the name `path` when the block succeeds; its present path and descriptor.

    Raises FileExistsError if `path` exists, and OSError.
    """
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        _remove_abandoned(left)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        if directory:
            partial.mkdir(mode=DIRECTORY_MODE)
            file = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        else:
            file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)  # marks it as in use: see _remove_abandoned()
            yield partial, file
            os.fsync(file)
            partial.rename(path)
        finally:
            os.close(file)
    finally:
        _remove(partial)


def _remove_abandoned(partial: Path) -> None:
    """Remove what a killed process left; a running one holds a lock on it."""
    with suppress(OSError):
        file = os.open(partial, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(partial)
        finally:
            os.close(file)


def _remove(partial: Path) -> None:
    if partial.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        partial.unlink(missing_ok=True)

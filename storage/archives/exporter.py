"""Out of stores, into a bundle: an OCI image layout, as a directory or a tar.  See bundle.py.

Every byte is compared with its digest on its way out.  A bundle gets its name when all of it is on the disk:
whatever ends the work before, nothing bears the name.  The same content makes the same bundle.
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
from storage.archives.export_plan import ExportPlan, Source
from storage.archives.tar import END, header, padding
from storage.errors import BlobUnknown
from storage.oci import Digest

CHUNK = 1 << 20  # bytes

Tick = Callable[[int], None]  # called with how many bytes are done; what it raises ends the work


def unheeded(done: int) -> None:
    pass


class Sink(Protocol):
    """Where a bundle is written to, file by file."""

    def put(self, name: str, size: int, chunks: Iterable[bytes]) -> None: ...

    def end(self) -> None: ...


class TarSink:
    """`write` gets it piece by piece, from its beginning to its end."""

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
    """Writes all that it is given to `file`."""

    def write(chunk: bytes) -> None:
        view = memoryview(chunk)
        while view:
            view = view[os.write(file, view) :]

    return write


class DirectorySink:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._written: list[Path] = []

    def put(self, name: str, size: int, chunks: Iterable[bytes]) -> None:
        path = self._directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # Copied, though a hard link costs nothing: who changes a file of a bundle must not change ours.
        with path.open("wb", buffering=0) as file:
            for chunk in chunks:
                file.write(chunk)
        self._written.append(path)

    def end(self) -> None:
        for path in self._written:  # here, when most of it is on the disk already
            with path.open("rb") as file:
                os.fdatasync(file.fileno())


def write(
    plan: ExportPlan, sink: Sink, signature: Callable[[bytes], bytes] | None, tick: Tick = unheeded
) -> Digest:
    """The digest of its entrepot.json.  Raises BlobUnknown where something is damaged, or has gone."""
    told = bundle.encode(plan.contents)
    small = {bundle.LAYOUT: bundle.LAYOUT_CONTENT, bundle.INDEX: plan.index, bundle.CONTENTS: told}
    if signature is not None:
        small[bundle.SIGNATURE] = signature(told)
    for name, content in small.items():
        sink.put(name, len(content), [content])
    done = 0
    with ThreadPoolExecutor(1) as hasher:
        for digest, source in plan.blobs.items():
            sink.put(blob_name(digest), source.size, _chunks(digest, source, hasher))
            done += source.size
            tick(done)
    return Digest.of(told)


def _chunks(digest: Digest, source: Source, hasher: ThreadPoolExecutor) -> Iterator[bytes]:
    if source.repository is not None:
        yield source.store.manifest(source.repository, digest)[0].content  # which is compared there
        return
    path = source.store.files.path(digest)
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # not Files.open(): to be exported is no use
    except FileNotFoundError:
        raise BlobUnknown(f"{digest} has gone since it was looked for: export again") from None
    found = hashlib.new(digest.algorithm)
    at = 0
    try:
        while (chunk := os.read(file, CHUNK)) and at + len(chunk) <= source.size:
            hashing = hasher.submit(found.update, chunk)  # while it is written
            yield chunk
            hashing.result()
            at += len(chunk)
    finally:
        os.close(file)
    if chunk or at < source.size or found.hexdigest() != digest.encoded:
        raise BlobUnknown(
            f"{digest} is damaged here, in {path}: entrepot scrub sets it aside, then have it fetched again"
        )


@contextmanager
def named(path: Path) -> Iterator[Sink]:
    """A bundle that bears the name `path` once the block has ended well: a tar if that ends in .tar.

    Raises as placed() does.
    """
    tar = path.suffix == ".tar"
    with placed(path, directory=not tar) as (partial, file):
        sink = TarSink(into(file)) if tar else DirectorySink(partial)
        yield sink
        sink.end()


@contextmanager
def placed(path: Path, *, directory: bool = False) -> Iterator[tuple[Path, int]]:
    """What bears the name `path` once the block has ended well: its path until then, and it itself, open.

    Raises FileExistsError where there is something of that name, and what else OSError tells.
    """
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        _remove_left(left)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        if directory:
            partial.mkdir()
            file = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        else:
            file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)  # it is somebody's: see above
            yield partial, file
            os.fsync(file)
            partial.rename(path)
        finally:
            os.close(file)
    finally:
        _remove(partial)


def _remove_left(partial: Path) -> None:
    """By one who was killed; a living one has it locked."""
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

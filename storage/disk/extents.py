"""Which bytes of a sparse file are there: as a value, and as a list in a file beside it.

A file that has no list is one extent from its beginning.  A list exists before the file gets its first hole,
and names bytes only after they are written; so what it names can be read, whenever its writer is killed.  The
machine may fail as well: then what was written last may be missing, and only what was synchronized counts.

A list may name repositories that show parts of the blob: then the file is kept though the rest may not come.
It also names clients that asked for parts, and tells readers in other processes which bytes its writer could
not get.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from storage.disk.health import sync
from storage.disk.locks import leads_to
from storage.disk.modes import create_file

SUFFIX = ".extents"
_HEAD = "extents 1"  # the format
LONG = 1 << 20  # bytes of a list from which on the next writer replaces it
_SYNCED = "synced"
_CLIENT = "client"
_SHOWN = "shown"
_REFUSED = "refused"
_BESIDE = re.compile(r"(.+)\.(\d+)\.(?:extents|extents\.new|wanted|writer)")


class Extents:
    """A set of bytes, as spans that neither overlap nor touch each other."""

    def __init__(self, spans: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        self.total = 0  # bytes
        for start, stop in spans:
            self.add(start, stop)

    def __iter__(self) -> zip[tuple[int, int]]:
        return zip(self._starts, self._stops, strict=True)

    def add(self, start: int, stop: int) -> None:
        """Add [start, stop)."""
        if self._stops and self._stops[-1] == start <= stop:  # most are added at the end
            self._stops[-1] = stop
            self.total += stop - start
            return
        first, last = bisect_left(self._stops, start), bisect_right(self._starts, stop)
        if start < stop:
            starts, stops = self._starts[first:last] or [start], self._stops[first:last] or [stop]
            self._replace(first, last, [(min(start, starts[0]), max(stop, stops[-1]))])

    def remove(self, start: int, stop: int) -> None:
        """Remove [start, stop)."""
        first, last = bisect_right(self._stops, start), bisect_left(self._starts, stop)
        if start < stop and first < last:
            self._replace(first, last, [(self._starts[first], start), (stop, self._stops[last - 1])])

    def _replace(self, first: int, last: int, spans: list[tuple[int, int]]) -> None:
        """Replace the spans with these numbers."""
        spans = [(start, stop) for start, stop in spans if start < stop]
        self.total += sum(stop - start for start, stop in spans)
        self.total -= sum(self._stops[first:last]) - sum(self._starts[first:last])
        self._starts[first:last] = [start for start, _ in spans]
        self._stops[first:last] = [stop for _, stop in spans]

    def has(self, others: Iterable[tuple[int, int]]) -> bool:
        """Whether all these bytes are in the set."""
        return all(self.end(start) >= stop for start, stop in others)

    def end(self, offset: int) -> int:
        """Where the bytes from `offset` on end; `offset` if it is not in the set."""
        at = bisect_right(self._starts, offset) - 1
        return max(offset, self._stops[at]) if at >= 0 else offset

    def gap(self, offset: int, stop: int) -> tuple[int, int]:
        """The first bytes of [offset, stop) that are not in the set; an empty span if all are."""
        start = min(self.end(offset), stop)
        at = bisect_right(self._starts, start)
        return start, min(stop, self._starts[at]) if at < len(self._starts) else stop

    def joined(self, least: int) -> list[tuple[int, int]]:
        """The spans; those that are less than `least` bytes apart are one."""
        found: list[tuple[int, int]] = []
        for start, stop in self:
            if found and start - found[-1][1] < least:
                start = found.pop()[0]
            found.append((start, stop))
        return found

    @property
    def count(self) -> int:
        """How many spans there are."""
        return len(self._starts)

    def gaps(self, start: int, stop: int) -> list[tuple[int, int]]:
        """What of [start, stop) is not in the set."""
        found = []
        while (gap := self.gap(start, stop))[0] < gap[1]:
            found.append(gap)
            start = gap[1]
        return found


class ExtentList:
    """The list of the extents of a file with `size` bytes; one process writes it, others may read it.

    `clients` and `repositories` are those it names; `refused` are the bytes that could not be got, each time.
    """

    def __init__(self, path: Path, file: int) -> None:
        self.size = -1
        self.clients: set[str] = set()
        self.repositories: set[str] = set()
        self.refused: list[tuple[int, int]] = []
        self._path = path
        self._file = file
        self._position = 0  # up to where it is read
        self.boot = ""  # of the machine on which it was written
        self._lasting: list[tuple[int, int]] = []  # what was synchronized
        self._damaged = False

    @staticmethod
    def path(of: Path, file: int) -> Path:
        """Where the list of a file is."""
        return beside(of, file, SUFFIX)

    @classmethod
    def create(cls, path: Path, size: int, extents: Extents, former: ExtentList | None = None) -> ExtentList:
        """Create or replace it.  It is on the disk when this returns, if the file is.  Raises OSError."""
        new = path.with_name(path.name + ".new")
        created = cls(path, create_file(new, os.O_RDWR | os.O_TRUNC | os.O_APPEND))
        try:
            created.size = size
            os.write(created._file, f"{_HEAD} {size} {_boot()}\n".encode())
            for client in former.clients if former else ():
                created.add_client(client)
            for repository in former.repositories if former else ():
                created.show(repository)
            created.append(extents)
            os.fsync(created._file)
            new.replace(path)
            sync(path.parent)
        except BaseException:
            created.close()
            new.unlink(missing_ok=True)
            raise
        return created

    @classmethod
    def find(cls, path: Path, flags: int = os.O_RDONLY) -> ExtentList | None:
        """Open it, if it exists.  Raises OSError."""
        try:
            return cls(path, os.open(path, flags | os.O_CLOEXEC))
        except FileNotFoundError:
            return None

    @property
    def current(self) -> bool:
        """Whether no other list has replaced it."""
        return leads_to(self._path, self._file)

    def append(self, extents: Iterable[tuple[int, int]]) -> None:
        if lines := "".join(f"{start} {stop}\n" for start, stop in extents):
            os.write(self._file, lines.encode())

    def add_client(self, client: str) -> None:
        """Name a client, which is a word."""
        if client not in self.clients:
            self.clients.add(client)
            os.write(self._file, f"{_CLIENT} {client}\n".encode())

    def show(self, repository: str) -> None:
        """Parts of the blob are shown in `repository`: keep them."""
        if repository not in self.repositories:
            self.repositories.add(repository)
            os.write(self._file, f"{_SHOWN} {repository}\n".encode())

    def refuse(self, start: int, stop: int) -> None:
        """Tell readers that [start, stop) could not be got."""
        os.write(self._file, f"{_REFUSED} {start} {stop}\n".encode())

    def sync(self) -> None:
        """What is in the list so far is on the disk; the caller has synchronized the file."""
        os.write(self._file, f"{_SYNCED}\n".encode())
        os.fdatasync(self._file)

    def read(self, extents: Extents) -> None:
        """Add what was appended since it was last read, up to a line that is incomplete or malformed."""
        for line in self._lines():
            if self.boot == "":
                head, _, rest = line.partition(_HEAD + " ")
                size, _, self.boot = rest.partition(" ")
                if head or not size.isdecimal() or not self.boot:
                    self._damaged = True
                    return
                self.size = int(size)
            elif line != _SYNCED:
                if not self._read_line(line.split(" "), extents):
                    self._damaged = True
                    return
            elif self.boot != _boot():
                self._lasting = list(extents)

    def _read_line(self, words: list[str], extents: Extents) -> bool:
        """Whether it is well formed."""
        if words[0] in (_CLIENT, _SHOWN) and len(words) == 2:
            (self.clients if words[0] == _CLIENT else self.repositories).add(words[1])
            return True
        refused = words[0] == _REFUSED
        if len(words) != 2 + refused or not all(each.isdecimal() for each in words[refused:]):
            return False
        start, stop = int(words[-2]), min(int(words[-1]), self.size)
        if refused:
            self.refused.append((start, stop))
        else:
            extents.add(start, stop)
        return True

    def load(self) -> Extents:
        """All that counts, for the next writer."""
        extents = Extents()
        self.read(extents)
        return extents if self.boot == _boot() else Extents(self._lasting)

    @property
    def sound(self) -> bool:
        """Whether all of it was read, and more can be appended to it: it is not long, either."""
        all_of_it = not self._damaged and self._position == os.fstat(self._file).st_size
        return self.boot == _boot() and all_of_it and self._position < LONG

    def _lines(self) -> Iterable[str]:
        content = bytearray()
        while chunk := os.pread(self._file, 1 << 20, self._position + len(content)):
            content += chunk
        end = content.rfind(b"\n") + 1
        self._position += end
        return content[:end].decode("ascii", "replace").splitlines()

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        os.close(self._file)


def beside(of: Path, file: int, suffix: str) -> Path:
    """A file about an open file: others may have, or get, the same name, but not its number."""
    return of.with_name(f"{of.name}.{os.fstat(file).st_ino}{suffix}")


def is_beside(path: Path) -> bool:
    """Whether this is a file about another one."""
    return _BESIDE.fullmatch(path.name) is not None


def is_about_a_file(path: Path) -> bool:
    """Whether this is a file about one that exists."""
    match = _BESIDE.fullmatch(path.name)
    try:
        return match is not None and path.with_name(match[1]).stat().st_ino == int(match[2])
    except FileNotFoundError:
        return False


@cache
def _boot() -> str:
    """What no other start of the machine has."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"

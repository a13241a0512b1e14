"""Changes of a file of users: one line is added, replaced or removed, and every other byte stays.

The file is replaced as a whole, so that a server never reads a part of it, and keeps its mode and owner.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import bcrypt

from proxy.access.htpasswd import Users, parse

COST = 10  # of bcrypt: some tens of milliseconds
LONGEST_PASSWORD = 72  # bytes that bcrypt uses
LONGEST_NAME = 255  # bytes


class UserFile:
    """A file as `htpasswd -B` writes it.  All methods raise OSError, and ValueError for what is wrong with
    their arguments.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()  # a symbolic link stays one

    def users(self) -> Users:
        return parse(self._path.read_bytes())

    def add(self, user: str, password: str) -> None:
        """Add a user; a missing file is created."""
        line = _line(user, password)
        with self._locked():
            content = self._path.read_bytes() if self._path.exists() else b""
            if user in parse(content).hashes:
                raise ValueError(f"{user} exists: change the password with entrepot user passwd {user}")
            self._write(content + (b"" if content.endswith(b"\n") or not content else b"\n") + line)

    def change(self, user: str, password: str) -> None:
        """Change the password of a user."""
        self._replace(user, _line(user, password))

    def remove(self, user: str) -> None:
        self._replace(user, b"")

    def _replace(self, user: str, line: bytes) -> None:
        with self._locked():
            before = self._path.read_bytes().splitlines(keepends=True)
            after = [line if _is_of(each, user) else each for each in before]
            if after == before:
                raise ValueError(f"{user} does not exist")
            self._write(b"".join(after))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Wait for other commands that change the file."""
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)
            yield
        finally:
            os.close(directory)

    def _write(self, content: bytes) -> None:
        descriptor, name = tempfile.mkstemp(prefix=f".{self._path.name}.", dir=self._path.parent)
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                try:
                    status = self._path.stat()
                except FileNotFoundError:
                    # As for htpasswd: the user of the server is not known, and has to read it.
                    os.fchmod(descriptor, 0o666 & ~_umask())
                else:
                    with suppress(PermissionError):  # only root may change an owner
                        os.fchown(descriptor, status.st_uid, status.st_gid)
                    os.fchmod(descriptor, status.st_mode & 0o7777)
                os.fsync(descriptor)
            Path(name).replace(self._path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def check_name(user: str) -> None:
    """Raise ValueError, with half a sentence, for a name that the file or a login cannot hold."""
    if not user or len(user.encode()) > LONGEST_NAME:
        raise ValueError(f"must have 1 to {LONGEST_NAME} bytes")
    if ":" in user or not user.isprintable() or user != user.strip() or user.startswith("#"):
        raise ValueError(
            "must have no colon, no control character, no space at an end, and no # at its start"
        )


def check_password(password: str) -> None:
    """Raise ValueError, with half a sentence, for a password that bcrypt cannot hold."""
    encoded = password.encode()
    if not encoded or len(encoded) > LONGEST_PASSWORD:
        raise ValueError(f"must have 1 to {LONGEST_PASSWORD} bytes, since bcrypt ignores all others")
    if not password.isprintable():
        raise ValueError("must have no control character")


def _line(user: str, password: str) -> bytes:
    check_name(user)
    check_password(password)
    return b"%b:%b\n" % (user.encode(), bcrypt.hashpw(password.encode(), bcrypt.gensalt(COST)))


def _is_of(line: bytes, user: str) -> bool:
    return line.strip().startswith(user.encode() + b":")


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask

"""Users and their passwords, in a file that `htpasswd -B` writes.

- Only bcrypt is accepted: a line with anything else is reported and ignored.
- The file is read again when it changes, so a removed user loses access at once.
- bcrypt takes tens of milliseconds by design: it runs in its own threads, so that a flood of passwords delays
  no pull, and a pair that was right is remembered for some minutes, as a keyed hash.
- The response time does not reveal whether a user exists.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import bcrypt
import structlog

from proxy.config.watched_file import WatchedFile
from storage.concurrency import SingleFlight
from storage.errors import Throttled

log = structlog.get_logger()

REMEMBERED_FOR = 300.0  # seconds
REMEMBERED = 10_000  # pairs
THREADS = 2
WAITING = 64  # passwords that may wait for a thread
HIGHEST_COST = 16  # a higher one would keep a thread busy for more than some seconds
_HASH = re.compile(rb"\$2[aby]\$([0-9]{2})\$[./A-Za-z0-9]{53}")
_SHOWN = 5  # bad lines in an error message


@dataclass(frozen=True)
class Users:
    """The content of a file.

    hashes: by user
    dummy: a hash without a user, of the same cost as the others
    bad: what is wrong with which line
    """

    hashes: dict[str, bytes]
    dummy: bytes
    bad: tuple[str, ...] = ()


def parse(content: bytes) -> Users:
    hashes: dict[str, bytes] = {}
    bad = []
    for number, line in enumerate(content.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith(b"#"):
            continue
        try:
            user, value = _read(line)
            if user in hashes:
                raise ValueError("names a user a second time")
            hashes[user] = value
        except ValueError as error:
            bad.append(f"line {number} {error}")
    costs = Counter(value[4:6] for value in hashes.values())
    cost = costs.most_common(1)[0][0] if costs else b"10"
    return Users(hashes, b"$2b$" + cost + b"$" + b"." * 53, tuple(bad))


def _read(line: bytes) -> tuple[str, bytes]:
    """Parse a line.  Raises ValueError, without text of the line: it may hold a password."""
    name, colon, value = line.partition(b":")
    if not colon or not name:
        raise ValueError("is not <user>:<hash>")
    found = _HASH.fullmatch(value)
    if not found:
        raise ValueError("holds no bcrypt hash: use htpasswd -B")
    if not 4 <= int(found[1]) <= HIGHEST_COST:
        raise ValueError(f"has a bcrypt cost other than 4 to {HIGHEST_COST}: use htpasswd -B -C 10")
    try:
        return name.decode(), value
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None


NO_USERS = parse(b"")


class Htpasswd:
    """Verifies passwords by a file.  Raises OSError, and ValueError if the file has a bad line."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = WatchedFile(path, parse)
        self._clock = clock
        self._key = secrets.token_bytes(32)
        self._right: dict[bytes, float] = {}  # until when
        self._proofs: dict[str, str] = {}  # by user
        self._flights = SingleFlight()
        self._waiting = 0
        self._reason = ""
        self._users = self._file.current()
        if self._users.bad:
            raise ValueError("; ".join(self._users.bad[:_SHOWN]))
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="bcrypt")

    def remembers(self, user: str, password: str) -> bool:
        """Whether the pair was verified recently, by the file as it is now."""
        self._reload()
        return self._clock() < self._right.get(self._hash(user, password), 0.0)

    async def verify(self, user: str, password: str) -> bool:
        """Whether the password is right.  Raises Throttled if too many passwords wait to be checked."""
        self._reload()
        users, key = self._users, self._hash(user, password)
        if self._clock() < self._right.get(key, 0.0):
            return True
        return await self._flights.join((key, id(users)), lambda: self._check(users, key, user, password))

    def proof(self, user: str) -> str:
        """What tells the present password of a user from any other, without being it; "" without a user."""
        self._reload()
        if (found := self._proofs.get(user)) is None and (value := self._users.hashes.get(user)) is not None:
            found = self._proofs[user] = hashlib.sha256(value).hexdigest()[:32]
        return found or ""

    async def close(self) -> None:
        await self._flights.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _reload(self) -> None:
        """Read the users again if the file has changed; there are none if it cannot be read."""
        try:
            users, reason = self._file.current(), ""
            reason = "; ".join(users.bad[:_SHOWN])
        except OSError as error:
            users, reason = NO_USERS, error.strerror or "it cannot be read"
        if reason and reason != self._reason:
            log.error("htpasswd.failed", path=str(self._file.path), reason=reason)
        self._reason = reason
        if users is not self._users:
            self._users = users
            self._right.clear()
            self._proofs.clear()

    async def _check(self, users: Users, key: bytes, user: str, password: str) -> bool:
        if self._waiting >= WAITING:
            raise Throttled("too many passwords are being checked: try again", retry_after=1)
        self._waiting += 1
        try:
            value = users.hashes.get(user)
            right = await asyncio.get_running_loop().run_in_executor(
                self._threads, _matches, password, value or users.dummy
            )
        finally:
            self._waiting -= 1
        if not right or value is None:
            return False
        if users is self._users:
            self._right.pop(key, None)
            self._right[key] = self._clock() + REMEMBERED_FOR
            if len(self._right) > REMEMBERED:
                del self._right[next(iter(self._right))]
        return True

    def _hash(self, user: str, password: str) -> bytes:
        pair = f"{user}\0{password}".encode("utf-8", "surrogateescape")
        return hmac.digest(self._key, pair, hashlib.sha256)


def _matches(password: str, value: bytes) -> bool:
    # bcrypt uses 72 bytes, and htpasswd cuts longer passwords there.
    encoded = password.encode("utf-8", "surrogateescape")[:72]
    return b"\0" not in encoded and bcrypt.checkpw(encoded, value)

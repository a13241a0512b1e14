"""A recording of what an upstream answers.

    exchanges.json    the answers, by method, path and query
    bodies/<sha256>   their bodies

exchanges.json is written last, and only if the upstream has not failed: a directory without it is no
recording.
"""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeAlias

import aiohttp
import msgspec

__all__ = ["RecordMode", "RecordedAnswer", "Recording", "RecordingInvalid"]

RecordMode: TypeAlias = Literal["once", "none", "all"]

INDEX = "exchanges.json"
CHUNK = 1 << 18  # bytes
# What upstream and client say of content; nothing of a connection, a credential or a limit.
KEPT = (
    "Accept-Ranges",
    "Content-Length",
    "Content-Type",
    "Docker-Content-Digest",
    "Docker-Distribution-Api-Version",
    "Link",
    "OCI-Filters-Applied",
)


class RecordingInvalid(ValueError):
    """A recording cannot be read, or has no answer; the message says what to do."""


class RecordedAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """An answer.  `body` is the SHA-256 of its body, which is a file; "" for none."""

    status: int
    headers: dict[str, str]
    body: str = ""


class _Index(msgspec.Struct, frozen=True):
    upstream: str
    answers: dict[str, RecordedAnswer]


class Recording:
    """The answers of `source`, which come from `directory` or are recorded there.

    upstream: what exchanges.json calls the source
    mode: `once` reads a recording, or makes one where there is none; `none` only reads; `all` makes it anew
    """

    def __init__(self, directory: Path, upstream: str, mode: RecordMode = "once") -> None:
        self._directory, self._upstream = directory, upstream
        self._answers: dict[str, RecordedAnswer] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._failed = False
        recorded = (directory / INDEX).exists()
        self.replays = mode == "none" or (mode == "once" and recorded)
        if self.replays:
            self._answers = self._read()
        else:
            (directory / "bodies").mkdir(parents=True, exist_ok=True)

    def _read(self) -> dict[str, RecordedAnswer]:
        file = self._directory / INDEX
        try:
            return msgspec.json.decode(file.read_bytes(), type=_Index).answers
        except FileNotFoundError:
            raise RecordingInvalid(
                f"{file} does not exist: record it by --entrepot-record=once, with a network"
            ) from None
        except (OSError, msgspec.MsgspecError) as error:
            raise RecordingInvalid(
                f"{file} cannot be read: {error}; record it anew by --entrepot-record=all"
            ) from error

    def body(self, answer: RecordedAnswer) -> Path:
        """The file with the body of an answer that has one."""
        return self._directory / "bodies" / answer.body

    async def answer(
        self, session: aiohttp.ClientSession, source: str, method: str, path: str, accept: str
    ) -> RecordedAnswer:
        """The answer to a request, which is sent to `source` at most once.

        Raises RecordingInvalid if it is not in a recording that is only read, and aiohttp.ClientError.
        """
        key = f"{method} {path}"
        async with self._locks.setdefault(key, asyncio.Lock()):
            known = self._answers.get(key) or (self._answers.get(f"GET {path}") if method == "HEAD" else None)
            if known is not None:
                return known
            if self.replays:
                raise RecordingInvalid(
                    f"{self._directory} has no answer to {key}: record it anew by --entrepot-record=all"
                )
            try:
                fetched = await self._fetch(session, source, method, path, accept)
            except Exception:
                self._failed = True
                raise
            if fetched.status >= 500 or fetched.status == 429:
                self._failed = True
            else:
                self._answers[key] = fetched
            return fetched

    async def _fetch(
        self, session: aiohttp.ClientSession, source: str, method: str, path: str, accept: str
    ) -> RecordedAnswer:
        async with session.request(method, source + path, headers={"Accept": accept}) as response:
            headers = {name: response.headers[name] for name in KEPT if name in response.headers}
            if method == "HEAD":
                return RecordedAnswer(response.status, headers)
            hashed = hashlib.sha256()
            with tempfile.NamedTemporaryFile(dir=self._directory, delete=False) as file:
                try:
                    async for chunk in response.content.iter_chunked(CHUNK):
                        hashed.update(chunk)
                        file.write(chunk)
                    file.close()
                    Path(file.name).chmod(0o644)
                    answer = RecordedAnswer(response.status, headers, hashed.hexdigest())
                    Path(file.name).replace(self.body(answer))
                except BaseException:
                    with suppress(FileNotFoundError):
                        Path(file.name).unlink()
                    raise
            return answer

    def close(self) -> None:
        """Write what was recorded, and remove bodies that no answer has."""
        if self.replays or self._failed or not self._answers:
            return
        needed = {each.body for each in self._answers.values()}
        for path in (self._directory / "bodies").iterdir():
            if path.name not in needed:
                path.unlink()
        index = _Index(self._upstream, dict(sorted(self._answers.items())))
        content = msgspec.json.format(msgspec.json.encode(index), indent=2) + b"\n"
        partial = self._directory / f"{INDEX}.partial"
        partial.write_bytes(content)
        partial.replace(self._directory / INDEX)

"""What was read from records, as long as no record has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar, cast

from storage.records import Records

T = TypeVar("T")


class Remembered(Generic[T]):
    """The result of `read`, which reads records and is called again whenever any of them may have changed.

    Calling it raises what `read` raises.  It is used in one thread.
    """

    def __init__(self, records: Records, read: Callable[[], T]) -> None:
        self._current = records.version
        self._read = read
        self._version: object = None
        self._value: T | None = None

    def __call__(self) -> T:
        version = self._current()  # before reading: a change meanwhile is one more reason to read
        if version is None or version != self._version:
            self._version = None
            self._value = self._read()
            self._version = version
        return cast(T, self._value)

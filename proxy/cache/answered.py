"""Answered: a value, and how the cache came by it."""

from __future__ import annotations

import math
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")
Other = TypeVar("Other")


class Answered(NamedTuple, Generic[T]):
    """A value, and how the cache came by it.

    `result` is hit, miss, revalidated or stale, as in RFC 9111.  `age` is the number of seconds since the
    origin last vouched for the value, `ttl` how many more it counts as fresh (None: without limit).
    `detail` is the code of the error because of which the value is stale.
    """

    value: T
    result: str
    age: float = 0.0
    ttl: float | None = None
    detail: str = ""

    @classmethod
    def of(cls, value: T, result: str, age: float, fresh_for: float, detail: str = "") -> Answered[T]:
        """An answer that counts as fresh for `fresh_for` seconds, which may be infinite, less its age."""
        return cls(value, result, age, None if math.isinf(fresh_for) else fresh_for - age, detail)

    def with_value(self, value: Other) -> Answered[Other]:
        return Answered(value, *self[1:])

"""What a screen shows in place of an answer that an operation refuses."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Generic, TypeVar

import msgspec

from proxy.namespaces.references import FieldInvalid
from storage.errors import RegistryError

T = TypeVar("T")


class Answer(msgspec.Struct, Generic[T], frozen=True):
    """What was `found`, or with a `status` that is none of success, the `fault`."""

    found: T | None
    fault: str = ""
    status: int = 200


async def tried(work: Awaitable[T]) -> Answer[T]:
    """The answer of an operation that may refuse it."""
    try:
        return Answer(await work)
    except FieldInvalid as error:
        return Answer(None, error.cause, 400)
    except RegistryError as error:
        return Answer(None, str(error) or error.code, error.status)

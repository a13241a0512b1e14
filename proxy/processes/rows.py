"""Rows of the state of a process that answers of the admin API have too, and the bases of all its rows."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

FillResult: TypeAlias = Literal["committed", "followed", "linked", "kept", "suspended", "failed", "uncached"]


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """The base of all answers."""


class ReplicaModel(Model, frozen=True, kw_only=True):
    """The base of rows that may differ by replica.

    `replica` is the URL of the one of a fleet whose row it is, None if all replicas have it alike, or without
    a fleet.
    """

    replica: str | None = None


class SpanRow(Model, frozen=True):
    """The bytes of a blob from `start` on and before `stop`."""

    start: int
    stop: int


class EndedFillRow(ReplicaModel, frozen=True):
    """A fill that has ended.

    `result` says how: committed (fetched), followed (another process fetched it), linked (stored already, for
    another repository), kept (parts of it), suspended (the server stopped), uncached (it could not be stored)
    or failed.  `error` is None if it succeeded.
    """

    digest: str
    namespace: str
    repository: str
    bytes: int
    started: float
    ended: float
    result: FillResult
    error: str | None


class RefusalRow(Model, frozen=True):
    """A host refused a credential, and has granted it nothing since.

    `credential` is its number in the configuration, `at` is in seconds since the epoch.
    """

    credential: int
    host: str
    status: int
    at: float

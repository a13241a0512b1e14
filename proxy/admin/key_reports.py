"""What the admin API answers about API keys.  Times are seconds since the epoch."""

from __future__ import annotations

from proxy.processes.rows import Model


class KeyRow(Model, frozen=True):
    """An API key, which is not shown: it was `made`, and last `used`, None for never.

    `expires` is None if it does not.  `locked` is the number of lines of the lock file that it is for, None
    without one.
    """

    name: str
    scopes: list[str]
    made: float
    expires: float | None
    used: float | None
    locked: int | None


class KeyCreated(Model, frozen=True):
    """A new API key, which is shown this once, and what its owner should know."""

    key: str
    row: KeyRow
    notes: list[str]


class TokensEnded(Model, frozen=True):
    """All tokens of the token endpoint were ended, by deleting the `keys` that had signed them."""

    keys: int


class KeyRevoked(Model, frozen=True):
    """An API key that is no longer accepted."""

    name: str

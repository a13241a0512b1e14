"""What an extension is to the server: one protocol for each kind.

A package offers an extension by an entry point, whose value is a class or another callable that makes it:

    [project.entry-points."entrepot.event_sinks"]
    json_lines = "entrepot_json_lines:JSONLines"

Of that, the server uses

    protocol    the VERSION of these protocols that it was written for, an attribute
    Settings    if it has any: a dataclass or a msgspec.Struct of its own keys, an attribute
    itself      called with a Settings, or with nothing; raises ValueError about wrong settings

and of what it makes, the methods of the protocol, and `async def close(self)` if there is one.  To make an
extension opens no connection: `entrepot check` makes one too.

All code of an extension runs in a thread of its own, with an event loop of its own, in each process that uses
it.  So it may keep objects of asyncio, needs no locks, and delays nothing but itself.  A call that takes
longer than its `timeout`, that raises anything at all or returns what it should not, has failed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

VERSION = 1  # of all protocols here: a change that breaks extensions makes another one


def _check(value: object, kind: type | tuple[type, ...], what: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{what} is {type(value).__name__}")


# Credential providers: entrepot.credential_providers


@dataclass(frozen=True, slots=True)
class HostLogin:
    """A user name and a password for an upstream, which may be used for `valid_for` seconds."""

    username: str
    password: str = field(repr=False)
    valid_for: float = 300.0

    def __post_init__(self) -> None:
        _check(self.username, str, "username")
        _check(self.password, str, "password")
        _check(self.valid_for, (int, float), "valid_for")


class CredentialProvider(Protocol):
    """Knows the logins of upstreams.  It runs in workers and in the housekeeping process."""

    @abstractmethod
    async def get(self, host: str, repository: str) -> HostLogin | None:
        """The login for a host, with its port if it has one; None to ask without one.

        `repository` is what it is needed for, empty if it is for none or any.
        """
        ...


# Event sinks: entrepot.event_sinks


class EventSink(Protocol):
    """Takes events.  It runs in the housekeeping process."""

    @abstractmethod
    async def send(self, event: Mapping[str, Any]) -> None:
        """Take a CloudEvent (docs/events.md) as JSON has it.

        Events come one after the other, from a queue on disk.  One whose call failed comes again, and so may
        one that was taken, if the server was killed: it then has the same `id`.
        """
        ...

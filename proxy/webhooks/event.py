"""An event: an action on content, as it is kept in the queues until it is delivered.

Queued events do not depend on a webhook's format, so the format can be changed while events are pending.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, TypeAlias

import msgspec

from storage.oci import Digest, Tag

EventAction: TypeAlias = Literal["push", "pull", "delete", "mount", "move", "hold"]
ContentKind: TypeAlias = Literal["manifest", "blob", "tag"]


class EventRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """The request that caused an event; all members are empty if a cache acted by itself."""

    id: str = ""
    address: str = ""
    host: str = ""
    method: str = ""
    agent: str = ""


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An action on content.

    at: seconds since the epoch
    repository: a full name
    size: -1 if it is not known
    tag: the tag that was requested, that moved, or that is held
    former: the digest that the tag pointed to before it moved, or at which it is held
    source: the repository that a blob was mounted from
    url: where the client of the request finds the content of `digest`
    actor: the user
    """

    id: str
    at: float
    action: EventAction
    kind: ContentKind
    repository: str
    digest: str = ""
    media_type: str = ""
    size: int = -1
    tag: str = ""
    former: str = ""
    source: str = ""
    url: str = ""
    actor: str = ""
    request: EventRequest = EventRequest()


def about_tag(
    action: EventAction, at: float, repository: str, tag: Tag, former: Digest, digest: Digest
) -> Event:
    """That a tag moved, or is held; `repository` is a full name."""
    return Event(
        id=str(uuid.uuid4()),
        at=at,
        action=action,
        kind="tag",
        repository=repository,
        tag=str(tag),
        digest=str(digest),
        former=str(former),
    )


def deletion(at: float, repository: str, tag: str = "", digest: str = "") -> Event:
    """That a tag was deleted, or without one a manifest; `repository` is a full name."""
    return Event(
        id=str(uuid.uuid4()),
        at=at,
        action="delete",
        kind="tag" if tag else "manifest",
        repository=repository,
        digest=digest,
        tag=tag,
    )


# The events of what this context is about to do.  A registry that records them takes them out of the list.
_caused: ContextVar[list[Event] | None] = ContextVar("caused", default=None)


@contextmanager
def causing(events: Iterable[Event]) -> Iterator[list[Event]]:
    """Have a registry record `events` with what is done in this context; returns those left to publish."""
    left = list(events)
    token = _caused.set(left)
    try:
        yield left
    finally:
        _caused.reset(token)


def take_caused() -> list[Event]:
    """The events of what this context does, which the caller records."""
    caused = _caused.get() or []
    taken = caused[:]
    caused.clear()
    return taken


_decode = msgspec.json.Decoder(Event).decode
encode = msgspec.json.Encoder().encode


def decode(record: bytes) -> Event | None:
    """Return None if `record` is no event, or an event of an incompatible version."""
    try:
        return _decode(record)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None

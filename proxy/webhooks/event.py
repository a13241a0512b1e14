"""An event: an action on content, as it is kept in the queues until it is delivered.

Queued events do not depend on a webhook's format, so the format can be changed while events are pending.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

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


_decode = msgspec.json.Decoder(Event).decode
encode = msgspec.json.Encoder().encode


def decode(record: bytes) -> Event | None:
    """Return None if `record` is no event, or an event of an incompatible version."""
    try:
        return _decode(record)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None

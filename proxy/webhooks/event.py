"""Something that happened to content, as it lies in the queues until a webhook has been told of it.

Whatever a webhook's format, what is queued is this: so the format can be changed while something waits.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

EventAction: TypeAlias = Literal["push", "pull", "delete", "mount", "move"]
ContentKind: TypeAlias = Literal["manifest", "blob", "tag"]


class EventRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """By which request; nothing is known of it where a cache asked by itself."""

    id: str = ""
    address: str = ""
    host: str = ""
    method: str = ""
    agent: str = ""


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`action` was done to a `kind` of content at `at`, in seconds since the epoch.

    `repository` is a full name.  `size` is -1 where it is not known.  `tag` is the one that was asked for, or
    that moved; `former` is the digest that it moved from, `source` the repository that a blob was mounted
    from.  `url` is where the client of the request finds what `digest` says.  `actor` is who it was.
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
    """None where it is none of ours, or of another version."""
    try:
        return _decode(record)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None

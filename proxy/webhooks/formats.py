"""The formats in which webhooks receive events: those of Docker's registry, or CloudEvents.

    registry      Distribution's envelope, application/vnd.docker.distribution.events.v2+json, of one event
    cloudevents   CloudEvents 1.0, structured content mode: application/cloudevents+json

Members without a known value are left out.  Both formats add to Distribution's vocabulary the actions `move`
and `hold`, and the member `fromDigest`, the digest that a tag pointed to before, or is held at.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias
from urllib.parse import quote

import msgspec

from proxy.webhooks.event import Event
from storage.names import written

Format: TypeAlias = Literal["registry", "cloudevents"]

REGISTRY = "application/vnd.docker.distribution.events.v2+json"
CLOUDEVENTS = "application/cloudevents+json"
_PAST = {
    "push": "pushed",
    "pull": "pulled",
    "delete": "deleted",
    "mount": "mounted",
    "move": "moved",
    "hold": "held",
}


@dataclass(frozen=True, slots=True)
class EventSource:
    """The server that sends events: its address, and an id for the lifetime of this process."""

    address: str
    instance: str

    @classmethod
    def of_this_process(cls, port: int, instance: str) -> EventSource:
        return cls(f"{socket.gethostname()}:{port}", instance)


def render(event: Event, format: Format, source: EventSource) -> tuple[str, bytes]:
    """Return the media type and the body of a request that delivers `event`."""
    if format == "registry":
        return REGISTRY, msgspec.json.encode({"events": [_registry(event, source)]})
    return CLOUDEVENTS, msgspec.json.encode(cloudevent(event, source))


def _registry(event: Event, source: EventSource) -> dict[str, Any]:
    """distribution, docs: "Work with notifications", "Events"."""
    size = event.size if event.size >= 0 else None
    request = event.request
    return {
        "id": event.id,
        "timestamp": _time(event.at),
        "action": event.action,
        "target": _known(
            mediaType=event.media_type,
            digest=event.digest,
            size=size,
            length=size,
            repository=event.repository,
            fromRepository=event.source,
            fromDigest=event.former,
            url=event.url,
            tag=event.tag,
        ),
        "request": _known(
            id=request.id,
            addr=request.address,
            host=request.host,
            method=request.method,
            useragent=request.agent,
        ),
        "actor": _known(name=event.actor),
        "source": _known(addr=source.address, instanceID=source.instance),
    }


def cloudevent(event: Event, source: EventSource) -> dict[str, Any]:
    """CloudEvents 1.0, "Required Attributes"; JSON Event Format, "Envelope"."""
    repository = event.repository
    request = event.request
    return {
        "specversion": "1.0",
        "id": event.id,
        # A URI reference.  An id is unique within its source.
        "source": f"//{quote(source.address, safe=':.-')}/{repository.partition('/')[0]}",
        "type": f"entrepot.{event.kind}.{_PAST[event.action]}",
        "subject": written(repository, event.tag or event.digest),
        "time": _time(event.at),
        "datacontenttype": "application/json",
        "data": _known(
            repository=repository,
            tag=event.tag,
            digest=event.digest,
            fromDigest=event.former,
            fromRepository=event.source,
            mediaType=event.media_type,
            size=event.size if event.size >= 0 else None,
            url=event.url,
            actor=event.actor,
            request=_known(
                id=request.id,
                address=request.address,
                host=request.host,
                method=request.method,
                agent=request.agent,
            )
            or None,
        ),
    }


def _known(**members: Any) -> dict[str, Any]:
    return {name: value for name, value in members.items() if value not in (None, "")}


def _time(seconds: float) -> str:
    """RFC 3339."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")

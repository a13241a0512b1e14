"""What a webhook is sent: the events of Docker's registry, or CloudEvents.

    registry      Distribution's envelope, application/vnd.docker.distribution.events.v2+json, of one event
    cloudevents   CloudEvents 1.0, structured content mode: application/cloudevents+json

Members whose value is not known are left out.  In both, what Distribution has no word for is an additional
member: the action `move`, and `fromDigest`, what a tag pointed to before.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias
from urllib.parse import quote

import msgspec

from proxy.webhooks.event import Event

Format: TypeAlias = Literal["registry", "cloudevents"]

REGISTRY = "application/vnd.docker.distribution.events.v2+json"
CLOUDEVENTS = "application/cloudevents+json"
_PAST = {"push": "pushed", "pull": "pulled", "delete": "deleted", "mount": "mounted", "move": "moved"}


@dataclass(frozen=True, slots=True)
class Source:
    """Which server it is that tells: where it listens, and a name for as long as this process runs."""

    address: str
    instance: str

    @classmethod
    def here(cls, port: int, instance: str) -> Source:
        return cls(f"{socket.gethostname()}:{port}", instance)


def render(happening: Event, format: Format, source: Source) -> tuple[str, bytes]:
    """The media type and the body."""
    if format == "registry":
        return REGISTRY, msgspec.json.encode({"events": [_registry(happening, source)]})
    return CLOUDEVENTS, msgspec.json.encode(_cloudevent(happening, source))


def _registry(happening: Event, source: Source) -> dict[str, Any]:
    """distribution, docs: "Work with notifications", "Events"."""
    size = happening.size if happening.size >= 0 else None
    request = happening.request
    return {
        "id": happening.id,
        "timestamp": _time(happening.at),
        "action": happening.action,
        "target": _known(
            mediaType=happening.media_type,
            digest=happening.digest,
            size=size,
            length=size,
            repository=happening.repository,
            fromRepository=happening.source,
            fromDigest=happening.former,
            url=happening.url,
            tag=happening.tag,
        ),
        "request": _known(
            id=request.id,
            addr=request.address,
            host=request.host,
            method=request.method,
            useragent=request.agent,
        ),
        "actor": _known(name=happening.actor),
        "source": _known(addr=source.address, instanceID=source.instance),
    }


def _cloudevent(happening: Event, source: Source) -> dict[str, Any]:
    """CloudEvents 1.0, "Required Attributes"; JSON Event Format, "Envelope"."""
    repository = happening.repository
    named = f":{happening.tag}" if happening.tag else f"@{happening.digest}"
    request = happening.request
    return {
        "specversion": "1.0",
        "id": happening.id,
        # A URI reference.  What follows it is what an id is unique within.
        "source": f"//{quote(source.address, safe=':.-')}/{repository.partition('/')[0]}",
        "type": f"entrepot.{happening.kind}.{_PAST[happening.action]}",
        "subject": f"{repository}{named}",
        "time": _time(happening.at),
        "datacontenttype": "application/json",
        "data": _known(
            repository=repository,
            tag=happening.tag,
            digest=happening.digest,
            fromDigest=happening.former,
            fromRepository=happening.source,
            mediaType=happening.media_type,
            size=happening.size if happening.size >= 0 else None,
            url=happening.url,
            actor=happening.actor,
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

"""What receivers read: written down here whole, as programs for the incumbent expect it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from proxy.webhooks.event import Event, EventRequest, decode, encode
from proxy.webhooks.formats import CLOUDEVENTS, REGISTRY, EventSource, render
from storage.oci import OCI_MANIFEST

DIGEST, FORMER = "sha256:" + "a" * 64, "sha256:" + "b" * 64
SOURCE = EventSource("warehouse:5000", "0123456789abcdef")
PUSH = Event(
    id="320678d8-ca14-430f-8bb6-4ca139cd83f7",
    at=1_700_000_000.25,
    action="push",
    kind="manifest",
    repository="local/team/app",
    digest=DIGEST,
    media_type=OCI_MANIFEST,
    size=708,
    tag="latest",
    url=f"https://registry.example/v2/local/team/app/manifests/{DIGEST}",
    actor="ci",
    request=EventRequest("6df24a34-1", "192.0.2.7", "registry.example", "PUT", "docker/27.3"),
)
MOVE = Event(
    id="1",
    at=1_700_000_000.0,
    action="move",
    kind="tag",
    repository="docker.io/library/alpine",
    digest=DIGEST,
    former=FORMER,
    tag="3",
)
MOUNT = Event(
    id="2",
    at=1_700_000_000.0,
    action="mount",
    kind="blob",
    repository="local/b",
    source="local/a",
    digest=DIGEST,
    size=0,
)
DELETE = Event(
    id="3", at=1_700_000_000.0, action="delete", kind="tag", repository="local/team/app", tag="old"
)


def rendered(happening: Event, format: Any) -> Any:
    media_type, body = render(happening, format, SOURCE)
    assert media_type == {"registry": REGISTRY, "cloudevents": CLOUDEVENTS}[format]
    return json.loads(body)


def test_a_push_is_the_envelope_of_the_incumbent() -> None:
    assert rendered(PUSH, "registry") == {
        "events": [
            {
                "id": "320678d8-ca14-430f-8bb6-4ca139cd83f7",
                "timestamp": "2023-11-14T22:13:20.250000Z",
                "action": "push",
                "target": {
                    "mediaType": "application/vnd.oci.image.manifest.v1+json",
                    "digest": DIGEST,
                    "size": 708,
                    "length": 708,
                    "repository": "local/team/app",
                    "url": f"https://registry.example/v2/local/team/app/manifests/{DIGEST}",
                    "tag": "latest",
                },
                "request": {
                    "id": "6df24a34-1",
                    "addr": "192.0.2.7",
                    "host": "registry.example",
                    "method": "PUT",
                    "useragent": "docker/27.3",
                },
                "actor": {"name": "ci"},
                "source": {"addr": "warehouse:5000", "instanceID": "0123456789abcdef"},
            }
        ]
    }
    assert REGISTRY == "application/vnd.docker.distribution.events.v2+json"


def test_a_push_as_a_cloudevent() -> None:
    assert rendered(PUSH, "cloudevents") == {
        "specversion": "1.0",
        "id": "320678d8-ca14-430f-8bb6-4ca139cd83f7",
        "source": "//warehouse:5000/local",
        "type": "entrepot.manifest.pushed",
        "subject": "local/team/app:latest",
        "time": "2023-11-14T22:13:20.250000Z",
        "datacontenttype": "application/json",
        "data": {
            "repository": "local/team/app",
            "tag": "latest",
            "digest": DIGEST,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "size": 708,
            "url": f"https://registry.example/v2/local/team/app/manifests/{DIGEST}",
            "actor": "ci",
            "request": {
                "id": "6df24a34-1",
                "address": "192.0.2.7",
                "host": "registry.example",
                "method": "PUT",
                "agent": "docker/27.3",
            },
        },
    }
    assert CLOUDEVENTS == "application/cloudevents+json"


@pytest.mark.parametrize(
    ("happening", "target"),
    [
        (
            MOVE,
            {"repository": "docker.io/library/alpine", "tag": "3", "digest": DIGEST, "fromDigest": FORMER},
        ),
        (
            MOUNT,
            {"repository": "local/b", "fromRepository": "local/a", "digest": DIGEST, "size": 0, "length": 0},
        ),
        (DELETE, {"repository": "local/team/app", "tag": "old"}),
    ],
)
def test_what_is_not_known_is_left_out(happening: Event, target: dict[str, Any]) -> None:
    (event,) = rendered(happening, "registry")["events"]
    assert event["action"] == happening.action
    assert event["target"] == target
    assert (event["request"], event["actor"]) == ({}, {})
    data = rendered(happening, "cloudevents")["data"]
    assert data == {name: value for name, value in target.items() if name != "length"}


@pytest.mark.parametrize(
    ("happening", "type", "subject"),
    [
        (MOVE, "entrepot.tag.moved", "docker.io/library/alpine:3"),
        (MOUNT, "entrepot.blob.mounted", f"local/b@{DIGEST}"),
        (DELETE, "entrepot.tag.deleted", "local/team/app:old"),
    ],
)
def test_a_cloudevent_says_what_it_is_about(happening: Event, type: str, subject: str) -> None:
    found = rendered(happening, "cloudevents")
    assert (found["type"], found["subject"]) == (type, subject)


def test_a_source_is_a_uri_reference_whatever_the_machine_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "a machine/ü")
    source = EventSource.of_this_process(5000, "x")
    found = json.loads(render(PUSH, "cloudevents", source)[1])["source"]
    assert re.fullmatch(r"//[A-Za-z0-9%._:-]+/local", found)


@pytest.mark.parametrize("happening", [PUSH, MOVE, MOUNT, DELETE])
def test_what_is_queued_comes_back(happening: Event) -> None:
    assert decode(encode(happening)) == happening


@pytest.mark.parametrize("record", [b"", b"{}", b"[1]", b"\xff", encode(PUSH).replace(b"push", b"burn")])
def test_what_is_no_happening_is_none(record: bytes) -> None:
    assert decode(record) is None

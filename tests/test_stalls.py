"""What would hold up the event loop runs in threads: which call runs where, not how long it takes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from storage import oci
from storage.concurrency import LARGE
from storage.oci import OCI_INDEX, Digest
from tests.conftest import Serve
from tests.upstream import Status, Upstream

CALLS = ("_decode", "_decode_type")


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, bool]]]:
    """The calls that parse large JSON, and whether each ran in the thread of the event loop."""
    calls: list[tuple[str, bool]] = []

    def recording(name: str, real: Any) -> Any:
        def call(content: bytes, *args: Any, **keys: Any) -> Any:
            if len(content) > LARGE:
                calls.append((name, threading.current_thread() is threading.main_thread()))
            return real(content, *args, **keys)

        return call

    for name in CALLS:
        monkeypatch.setattr(oci, name, recording(name, getattr(oci, name)))
    monkeypatch.setattr(oci.json, "loads", recording("loads", json.loads))
    yield calls


def index(entries: int, **more: Any) -> bytes:
    """An index that lists so many images, and names none that a registry must have."""
    children = [
        {"mediaType": "application/vnd.example+json", "digest": str(Digest.of(b"%d" % each)), "size": 1}
        for each in range(entries)
    ]
    found = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": children, **more}
    return json.dumps(found).encode()


@pytest.mark.parametrize("media_type", [OCI_INDEX, "application/json"])
async def test_a_large_index_is_pulled_without_parsing_it_on_the_loop(
    serve: Serve, upstream: Upstream, parsed: list[tuple[str, bool]], media_type: str
) -> None:
    content = index(1000)
    assert len(content) > LARGE
    upstream.next("GET", "3", Status(200, {"Content-Type": media_type}, content))
    site = await serve(upstream, refuse_incomplete="always")
    status, headers, body = await site.get("/v2/library/alpine/manifests/3")
    assert (status, headers["Content-Type"], body) == (200, OCI_INDEX, content)
    assert not any(on_loop for _, on_loop in parsed), parsed


async def test_a_large_index_is_pushed_and_listed_without_parsing_it_on_the_loop(
    serve: Serve, upstream: Upstream, parsed: list[tuple[str, bool]]
) -> None:
    image = Digest.of(b"{}")
    site = await serve(upstream, more={"local": {"store": {"sparse": True}}})
    tag = str(image).replace(":", "-")
    for reference in ("big", tag):
        async with site.request(
            "PUT",
            f"/v2/local/app/manifests/{reference}",
            data=index(1000, subject={"mediaType": OCI_INDEX, "digest": str(image), "size": 2}),
            headers={"Content-Type": OCI_INDEX},
        ) as response:
            assert response.status == 201, await response.text()
            assert response.headers["OCI-Subject"] == image
    status, _, body = await site.get(f"/v2/local/app/referrers/{image}")
    assert status == 200
    assert json.loads(body)["manifests"]
    assert parsed
    assert not any(on_loop for _, on_loop in parsed), parsed

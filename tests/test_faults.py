"""Every fault of an upstream x every operation x (cold, warm, stale), and what holds whatever happens:

- a client gets the exact bytes, an error of the specification's shape, or a broken connection;
- the store holds only content that is what its digest says;
- the next request without the fault succeeds, with the exact bytes.

What is warm is served without a request, so there the fault is never met.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from storage.disk.records import SQLiteRecords
from storage.oci import Digest
from tests.conftest import Clock, Serve, Site
from tests.upstream import (
    Bearer,
    ContentType,
    Corrupt,
    ExpireToken,
    Fault,
    Gzip,
    Hold,
    Image,
    NoDigest,
    Redirect,
    Refuse,
    Request,
    Reset,
    RetryAfter,
    Status,
    Truncate,
    Upstream,
    WrongDigest,
    WrongLength,
)

pytestmark = pytest.mark.errors("fill.failed", "upstream.wrong_digest")

FRESH = 600.0  # seconds, the default
LATER = 61.0  # seconds: more than negative_for, any Retry-After below, and a 429 without one
SPAN = slice(1000, 2000)
ALWAYS = 1000


@dataclass(frozen=True)
class Scenario:
    """`times` is how often the fault strikes; one that lets no byte pass does so once, or we would wait."""

    make: Callable[[], Fault]
    times: int = ALWAYS
    options: dict[str, Any] = field(default_factory=dict)
    unheard: tuple[str, ...] = ()  # operations in which nothing contradicts the lie


SHORT = {"header_timeout": "200ms", "progress_timeout": "200ms"}
SCENARIOS = {
    **{
        f"status {code}": Scenario(lambda code=code: Status(code))  # type: ignore[misc]
        for code in (401, 403, 404, 429, 500, 503)
    },
    "status 500 with a page": Scenario(lambda: Status(500, {"Content-Type": "text/html"}, b"<html>")),
    "retry after seconds": Scenario(lambda: RetryAfter(5)),
    "retry after a date": Scenario(lambda: RetryAfter(formatdate(None, usegmt=True), 503)),
    "refuse": Scenario(Refuse),
    "reset before headers": Scenario(lambda: Reset(None)),
    "reset at once": Scenario(lambda: Reset(0), times=1),
    "reset": Scenario(lambda: Reset(100), times=3),
    "truncate before headers": Scenario(lambda: Truncate(None)),
    "truncate at once": Scenario(lambda: Truncate(0), times=1),
    "truncate": Scenario(lambda: Truncate(100), times=3),
    "corrupt": Scenario(lambda: Corrupt(0)),
    "hold headers": Scenario(lambda: Hold(asyncio.Event(), None), options=SHORT),
    "hold": Scenario(lambda: Hold(asyncio.Event(), 100), times=1, options=SHORT),
    "length too long": Scenario(lambda: WrongLength(7), unheard=("blob HEAD",)),
    "length too short": Scenario(lambda: WrongLength(-7), unheard=("blob HEAD",)),
    "no digest": Scenario(NoDigest),
    "wrong digest": Scenario(WrongDigest),
    "redirect loop": Scenario(lambda: Redirect("?again")),
    "redirect to nowhere": Scenario(lambda: Redirect("http://127.0.0.1:1/")),
    "redirect to nonsense": Scenario(lambda: Redirect("http://[::1")),
    "expired token": Scenario(ExpireToken, times=1),
    "gzip": Scenario(Gzip),
    "html": Scenario(lambda: ContentType("text/html; charset=utf-8")),
    "charset": Scenario(lambda: ContentType("application/vnd.oci.image.manifest.v1+json; charset=utf-8")),
}
OPERATIONS = ("tag", "digest", "blob GET", "blob HEAD", "blob Range", "tags", "referrers")


@dataclass
class Held:
    """A repository of the upstream, and what is right about it."""

    name: str
    image: Image
    layer: bytes
    referrers: list[str]

    @classmethod
    def put(cls, upstream: Upstream, name: str) -> Held:
        layer = random.Random(name).randbytes(4096)
        image = upstream.image(name, "latest", [layer])
        artifact = upstream.artifact(name, image, "application/x-signature")
        return cls(name, image, layer, [artifact.digest])

    def path(self, operation: str) -> str:
        paths = {
            "tag": "manifests/latest",
            "digest": f"manifests/{self.image.digest}",
            "tags": "tags/list",
            "referrers": f"referrers/{self.image.digest}",
        }
        return f"/v2/{self.name}/{paths.get(operation, f'blobs/{self.image.layers[0]}')}"

    async def ask(self, site: Site, operation: str, *, trusting: bool = True) -> str:
        """ "exact", "error" or "broken"; everything else is an AssertionError."""
        method = "HEAD" if operation == "blob HEAD" else "GET"
        headers = {"Range": f"bytes={SPAN.start}-{SPAN.stop - 1}"} if operation == "blob Range" else {}
        try:
            async with site.request(method, self.path(operation), headers=headers) as response:
                body = await response.read()
        except (aiohttp.ClientError, ConnectionError):
            return "broken"
        if response.status < 400:
            self._check(operation, response, body, trusting)
            return "exact"
        assert response.status in (404, 502, 503, 504)
        assert response.headers["Content-Type"] == "application/json"
        if response.status == 503:
            assert int(response.headers["Retry-After"]) > 0
        if method == "GET":
            assert json.loads(body)["errors"][0]["code"]
        return "error"

    def _check(self, operation: str, response: aiohttp.ClientResponse, body: bytes, trusting: bool) -> None:
        assert response.status == (206 if operation == "blob Range" else 200)
        if operation in ("tag", "digest"):
            assert body == self.image.content
            assert response.headers["Docker-Content-Digest"] == self.image.digest
            assert response.headers["Content-Type"] == self.image.media_type
        elif operation == "blob GET":
            assert body == self.layer
        elif operation == "blob Range":
            assert body == self.layer[SPAN]
        elif operation == "tags":
            assert json.loads(body)["tags"] == ["latest"]
        elif operation == "referrers":
            assert [each["digest"] for each in json.loads(body)["manifests"]] == self.referrers
        elif trusting:
            assert response.headers.get("Content-Length", "4096") == "4096"


class Switch:
    """Lets the faults strike while it is on."""

    def __init__(self, upstream: Upstream, scenario: Scenario) -> None:
        self.on = False
        for method in ("GET", "HEAD"):
            upstream.next(method, self._meets, scenario.make(), times=scenario.times)

    def _meets(self, request: Request) -> bool:
        return self.on and request.kind != "token"


def verify_store(directory: Path) -> None:
    """Of a server that has been stopped."""
    found = set()
    for path in (directory / "cache" / "blobs").glob("*/*/*"):
        algorithm = path.parent.parent.name
        assert hashlib.new(algorithm, path.read_bytes()).hexdigest() == path.name
        found.add(f"{algorithm}:{path.name}")
    records = SQLiteRecords(directory / "cache" / "records")
    for key, value in records.scan("manifest "):
        digest = Digest.parse(key.split(" ")[2])
        assert Digest.of(value.partition(b"\n")[2], digest.algorithm) == digest
    for key, value in records.scan("tag "):
        named = value.decode().split(" ")[0]
        assert records.get(f"manifest {key.split(' ')[1]} {named}") is not None
    for key, _ in records.scan("link "):
        assert key.split(" ")[2] in found
    records.close()


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", SCENARIOS)
async def test_fault(serve: Serve, upstream: Upstream, clock: Clock, name: str, operation: str) -> None:
    scenario = SCENARIOS[name]
    if name == "expired token":
        upstream.auth = Bearer()
    site = await serve(upstream, options=scenario.options)
    cold, warm, stale = (Held.put(upstream, f"a/{each}") for each in ("cold", "warm", "stale"))
    for held in (warm, stale):
        assert await held.ask(site, operation) == "exact"
        if operation == "blob HEAD":  # which leaves nothing behind: it is warm when it was pulled
            assert await held.ask(site, "blob GET") == "exact"
    switch = Switch(upstream, scenario)
    switch.on = True
    upstream.clear()
    assert await warm.ask(site, operation) == "exact"
    assert upstream.log == []
    trusting = operation not in scenario.unheard
    await cold.ask(site, operation, trusting=trusting)
    assert upstream.requests
    clock.advance(FRESH + 1)
    outcome = await stale.ask(site, operation)
    if operation.startswith("blob") or operation == "digest":
        # Nothing about it can be stale.  (The cold one's fill may still be at work.)
        asked = [request for request in upstream.requests if request.repository == stale.name]
        assert (outcome, asked) == ("exact", [])
    elif name in ("status 429", "status 500", "status 503", "refuse", "hold headers", "redirect loop"):
        assert outcome == "exact"
    switch.on = False
    clock.advance(LATER)
    for held in (cold, warm, stale):
        assert await held.ask(site, operation) == "exact"
    await site.app.stop()
    verify_store(site.directory)


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_an_upstream_that_is_not_there(
    serve: Serve, upstream: Upstream, clock: Clock, operation: str
) -> None:
    site = await serve(upstream)
    cold, warm, stale = (Held.put(upstream, f"a/{each}") for each in ("cold", "warm", "stale"))
    for held in (warm, stale):
        await held.ask(site, "blob GET" if operation == "blob HEAD" else operation)
    await upstream.stop()
    assert await warm.ask(site, operation) == "exact"
    assert await cold.ask(site, operation) == "error"
    clock.advance(FRESH + 1)
    assert await stale.ask(site, operation) == "exact"
    await upstream.start()
    clock.advance(LATER)
    for held in (cold, warm, stale):
        assert await held.ask(site, operation) == "exact"
    await site.app.stop()
    verify_store(site.directory)

"""A site before upstreams that fail, for tests of breakers, retries and failover."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from tests.conftest import Serve, Site
from tests.upstream import (
    Hold,
    Image,
    Request,
    Upstream,
)

FRESH = 600.0  # seconds, the default
STALE = "; ttl=-"  # in Cache-Status
PAUSE = 10.0  # seconds that a tag is not asked for after it could not be; the default
TAG = "/v2/a/b/manifests/latest"
OTHER = "/v2/a/b/manifests/other"
CHUNK = 1 << 18
QUICK = {"header_timeout": "250ms"}


def blob_of(digest: str) -> str:
    return f"/v2/a/b/blobs/{digest}"


def code_of(body: bytes) -> str:
    code = json.loads(body)["errors"][0]["code"]
    assert isinstance(code, str)
    return code


def anything(request: Request) -> bool:
    return True


def silence(after: int | None = None) -> Hold:
    """An upstream that says no more; the fake lets go of it when it stops."""
    return Hold(asyncio.Event(), after)


async def warm(serve: Serve, upstream: Upstream, **keys: Any) -> tuple[Site, Image]:
    """A site that has pulled two tags, both due by now."""
    image = upstream.image("a/b", "latest")
    upstream.image("a/b", "other", [b"another"])
    site = await serve(upstream, **keys)
    for path in (TAG, OTHER):
        assert (await site.get(path))[0] == 200
    site.clock.advance(FRESH + 1)
    upstream.clear()
    return site, image


async def pull(site: Site, path: str = TAG) -> tuple[int, bytes, str]:
    """Status, body, and what Cache-Status says."""
    status, headers, body = await site.get(path)
    return status, body, headers.get("Cache-Status", "")


async def metric(site: Site, name: str) -> dict[str, float]:
    """Its values, by the host they are of."""
    found = {}
    for line in (await site.metrics()).splitlines():
        if line.startswith(name + "{"):
            labels, _, value = line.partition("} ")
            found[labels.partition('host="')[2].partition('"')[0]] = float(value)
    return found

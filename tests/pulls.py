"""Pulls of one image through a site, for tests of what a cache asks its origin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.conftest import Serve, Site
from tests.upstream import (
    Image,
    Upstream,
)

MANY = 50
FRESH = 600.0  # seconds, the default
TAG = "/v2/a/b/manifests/latest"
TAGS = "/v2/a/b/tags/list"


def manifest_of(reference: str) -> str:
    return f"/v2/a/b/manifests/{reference}"


async def warm(serve: Serve, upstream: Upstream, **keys: Any) -> tuple[Site, Image]:
    """A site that has pulled a/b:latest, and an upstream that has forgotten it was asked."""
    image = upstream.image("a/b", "latest")
    site = await serve(upstream, **keys)
    assert (await site.get(TAG))[2] == image.content
    upstream.clear()
    return site, image


async def pull(site: Site, path: str = TAG) -> tuple[int, bytes, str]:
    """Status, body, and what Cache-Status says."""
    status, headers, body = await site.get(path)
    return status, body, headers.get("Cache-Status", "")


def code_of(body: bytes) -> str:
    code = json.loads(body)["errors"][0]["code"]
    assert isinstance(code, str)
    return code


def on_disk(directory: Path) -> dict[Path, tuple[int, int]]:
    """Every file, when it was written and its size.  SQLite's -shm is memory that readers share."""
    files = [path for path in directory.rglob("*") if path.is_file() and not path.name.endswith("-shm")]
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in files}

"""Caches that ask each other, over one bucket and one database."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.fleet import SECRET, free_ports
from tests.objects import FakeBucket
from tests.postgres import PostgresServer
from tests.test_shared_caches import LAYER, content_of, deposited, fake, pull
from tests.upstream import Upstream

__all__ = ["fake"]  # a fixture

pytestmark = pytest.mark.clients


async def test_what_all_ask_for_at_once_is_fetched_once_and_stored_once(
    fake: FakeBucket,
    serve: Serve,
    upstream: Upstream,
    postgres_server: PostgresServer,
    tmp_path: Path,
) -> None:
    settings = fake.settings("fleet")
    shared = {
        "records": postgres_server.database(),
        "bucket": settings.url,
        "endpoint": settings.endpoint,
        "access_key": settings.access_key,
        "secret_key": settings.secret_key,
        "caches": {},
    }
    ports = free_ports(3)
    peers = {"urls": [f"http://127.0.0.1:{port}" for port in ports], "secret": SECRET}
    sites = []
    for port in ports:
        top = {"listen": f"127.0.0.1:{port}", "shared": shared, "peers": peers}
        sites.append(await serve(upstream, directory=tmp_path / str(port), top=top))
    image = upstream.image("a/b", "latest", [LAYER, b"another layer"])
    await asyncio.gather(*(pull(each, upstream, image) for each in sites * 3))
    assert len(upstream.log) == 1 + len(content_of(upstream, image))
    for each in sites:
        await deposited(each)
    assert len(fake.objects) == len(content_of(upstream, image))

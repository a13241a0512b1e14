"""docs/library.md: its programs run as they stand there."""

from __future__ import annotations

import re
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from proxy.upstream.connect import Connect
from proxy.upstream.requests import UpstreamSettings
from tests.objects import FakeBucket
from tests.postgres import PostgresServer
from tests.upstream import Upstream

PAGE = Path(__file__).parents[1] / "docs" / "library.md"


def program(section: str) -> dict[str, Any]:
    """What the program of a section defines."""
    text = PAGE.read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    found: dict[str, Any] = {"__name__": "program"}
    exec(compile(code, str(PAGE), "exec"), found)
    return found


async def test_a_cache(upstream: Upstream, tmp_path: Path) -> None:
    image = upstream.image("library/alpine", "3", [b"layer"])
    serve = program("A cache")["serve"]
    settings = UpstreamSettings(upstream.url, Connect(plain_http=True))
    async with AsyncExitStack() as closing, aiohttp.ClientSession() as session:
        runner = await serve(settings, tmp_path / "cache", 0, closing)
        host, port = runner.addresses[0]
        for _ in range(2):
            for path in ("manifests/3", f"blobs/{image.layers[0]}"):
                async with session.get(f"http://{host}:{port}/v2/alpine/{path}") as response:
                    assert response.status == 200, await response.text()
                    content = await response.read()
        assert content == b"layer"
    assert sum(each.path.endswith(f"/blobs/{image.layers[0]}") for each in upstream.requests) == 1


async def test_a_store_in_a_bucket(tmp_path: Path) -> None:
    found = program("A store in a bucket")
    async with FakeBucket() as fake:
        store = found["open_store"](fake.settings(), tmp_path / "store")
        pushed = await found["push"](store, "a/b", b"content")
        blob = await store.get_blob("a/b", pushed.digest)
        assert b"".join([chunk async for chunk in blob.chunks()]) == b"content"
        await store.close()
    assert list(fake.objects.values()) == [b"content"]


async def test_the_parts_of_a_configuration(upstream: Upstream, tmp_path: Path) -> None:
    image = upstream.image("library/alpine", "3", [b"layer"])
    config = tmp_path / "entrepot.yml"
    tree = {
        "disk": {"path": str(tmp_path / "disk")},
        "namespaces": {"docker.io": {"upstream": upstream.url}},
    }
    config.write_text(yaml.safe_dump(tree))
    digest_of = program("The parts of a configuration")["digest_of"]
    assert await digest_of(config, "docker.io/library/alpine", "3") == image.digest


@pytest.mark.clients
async def test_a_store_in_a_bucket_and_a_database(tmp_path: Path, postgres_server: PostgresServer) -> None:
    found, database = program("A store in a bucket and a database"), postgres_server.database()
    async with FakeBucket() as bucket:
        one, other = (found["shared_store"](bucket.settings(), database, tmp_path / name) for name in "ab")
        digest = await found["push"](one, "local/a", b"content")
        blob = await other.get_blob("local/a", digest)
        assert b"".join([each async for each in blob.chunks()]) == b"content"
        await blob.close()
        for each in (one, other):
            await each.close()

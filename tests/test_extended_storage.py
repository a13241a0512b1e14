"""Storage that is an extension: the example keeps the contract of a store, and what fails is contained."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from proxy.config.errors import ConfigError
from proxy.config.extensions import ExtensionConfig, HiddenSettings
from proxy.extensions.extension import Extensions
from proxy.extensions.protocols import OfferedObject
from proxy.namespaces.extended_bucket import ExtensionBucket
from storage.bucket.blobs import BucketBlobs
from storage.bucket.objects import ObjectUnknown, healthy
from storage.disk.records import SQLiteRecords
from storage.errors import Unavailable
from storage.oci import Digest
from storage.store import Store
from tests.conftest import Clock, Serve, configuration
from tests.extensions import (
    RELEASE,
    Misbehaving,
    Package,
    package,  # noqa: F401
    released,  # noqa: F401
)
from tests.test_contract import PullContract, PushContract, StoreContent, Subject
from tests.test_extended import WAYS, extension, ready
from tests.test_push import Client, image
from tests.upstream import Upstream

HERE = "tests.test_extended_storage"
EXAMPLE = Path(__file__).parents[1] / "examples" / "extensions" / "object_directory"


@pytest.fixture
async def subject(
    tmp_path: Path,
    package: Package,  # noqa: F811
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Subject]:
    """A store whose blobs the example keeps."""
    monkeypatch.syspath_prepend(EXAMPLE)  # type: ignore[no-untyped-call]
    package.offer("storage", "object_directory", "entrepot_object_directory:ObjectDirectory")
    kept, root = tmp_path / "kept", tmp_path / "store"
    kept.mkdir()
    settings = HiddenSettings(directory=str(kept))
    config = ExtensionConfig(kind="storage", use="object_directory", timeout=20.0, settings=settings)
    extensions = Extensions({"mine": config})
    bucket = ExtensionBucket(extensions.make("mine"), "pre/fix", healthy("a bucket", root))
    records = SQLiteRecords(root / "records")
    store = Store(BucketBlobs(bucket, records, root, clock), records, clock)
    yield Subject(store, StoreContent(store), frozenset())
    await store.close()
    await extensions.close()


class TestExamplePull(PullContract):
    pass


class TestExamplePush(PushContract):
    pass


# In a server


class Memory(Misbehaving):
    """Objects in memory; `how` is how each but the first `times` calls end."""

    objects: ClassVar[dict[str, bytes]] = {}

    async def put(self, key: str, source: Path, size: int) -> Any:
        found = await self.act(None, "put", key)
        content = source.read_bytes()
        assert len(content) == size
        self.objects[key] = content
        return found

    async def get(self, key: str, start: int, stop: int | None) -> Any:
        content = self.objects.get(key)
        found = None if content is None else OfferedObject(len(content), self.read(content[start:stop]))
        return await self.act(found, "get", key)

    async def read(self, content: bytes) -> Any:
        yield content[:3]
        yield content[3:]

    async def size(self, key: str) -> Any:
        content = self.objects.get(key)
        return await self.act(None if content is None else len(content), "size", key)

    async def delete(self, key: str) -> Any:
        self.objects.pop(key, None)
        return await self.act(None, "delete", key)


async def started(serve: Serve, upstream: Upstream, package: Package, **settings: Any) -> Client:  # noqa: F811
    package.offer("storage", "one", f"{HERE}:Memory")
    Memory.objects.clear()
    top = {
        "extensions": {"mine": extension("storage", **settings)},
        "shared": {"bucket": "extension://mine/some/prefix"},
    }
    return Client(await serve(upstream, more={"local": {"store": {}}}, top=top))


async def test_what_is_pushed_is_kept_by_it(serve: Serve, upstream: Upstream, package: Package) -> None:  # noqa: F811
    client = await started(serve, upstream, package)
    config = await client.blob(b"{}")
    assert (await client.manifest("v1", image())).status == 201
    assert len(Memory.objects.pop("some/prefix/entrepot")) == 32  # whose the others are
    assert list(Memory.objects.values()) == [b"{}"]
    assert next(iter(Memory.objects)).startswith("some/prefix/sha256/")
    for _ in range(2):
        status, _, body = await client.site.get(f"/v2/local/team/app/blobs/{config}")
        assert (status, body) == (200, b"{}")
    assert await ready(client.site) == {"status": "ready"}


@pytest.mark.errors("extension.failed", "bucket.failed")
@pytest.mark.parametrize("how", WAYS)
async def test_storage_that_fails(
    serve: Serve,
    upstream: Upstream,
    package: Package,  # noqa: F811
    how: str,
) -> None:
    site = (await started(serve, upstream, package, how=how, times=1)).site
    digest = Digest.of(b"content")
    path = f"/v2/local/team/app/blobs/uploads/?digest={digest}"

    async def push() -> tuple[int, str]:
        async with site.request("POST", path, data=b"content") as response:
            return response.status, await response.text()

    status, text = await push()
    assert status == 503
    assert "the object storage of this registry" in text
    found = await ready(site)
    assert found["status"] == "degraded"
    assert found["extensions"].startswith("mine ")
    assert (await site.get("/v2/"))[0] == 200
    RELEASE.set()
    while status != 201:  # until its thread is free
        status, _ = await push()
        assert status in (201, 503)
    status, _, body = await site.get(f"/v2/local/team/app/blobs/{digest}")
    assert (status, body) == (200, b"content")
    assert await ready(site) == {"status": "ready"}


@pytest.mark.errors("extension.failed", "bucket.failed")
async def test_what_threads_ask_of_it(package: Package, tmp_path: Path) -> None:  # noqa: F811
    package.offer("storage", "one", f"{HERE}:Memory")
    Memory.objects.clear()
    Memory.objects["key"] = b"content"
    extensions = Extensions({"mine": ExtensionConfig(kind="storage", use="one", timeout=20.0)})
    bucket = ExtensionBucket(extensions.make("mine"), "", healthy("a bucket", tmp_path))
    assert await asyncio.to_thread(lambda: b"".join(bucket.chunks("key"))) == b"content"
    with pytest.raises(ObjectUnknown):
        await asyncio.to_thread(lambda: list(bucket.chunks("nothing")))
    await asyncio.to_thread(bucket.probe)
    await asyncio.to_thread(bucket.delete, "key")
    assert Memory.objects == {}
    Memory.made[-1].behaviour.how = "exit"
    for work in (lambda: list(bucket.chunks("key")), lambda: bucket.delete("key"), bucket.probe):
        with pytest.raises(Unavailable, match="raised SystemExit"):
            await asyncio.to_thread(work)
    assert bucket.health.ill()
    await extensions.close()


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"shared": {"bucket": "extension://mine"}}, "shared.bucket: extensions has no mine: add it"),
        (
            {"shared": {"bucket": "extension://mine", "region": "x"}},
            "region is for s3://, and bucket is extension://",
        ),
        (
            {
                "shared": {"bucket": "extension://mine"},
                "redirect": {"above": "1MiB"},
                "extensions": {"mine": {"kind": "storage"}},
            },
            "redirect: an extension (shared.bucket) has no URLs for clients",
        ),
        ({"extensions": {"mine": {"kind": "storage"}}}, "name it in shared.bucket, as extension://NAME"),
    ],
)
def test_what_is_wrong_with_the_configuration(tmp_path: Path, tree: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        configuration(tmp_path, tree)
    assert says in str(refused.value)

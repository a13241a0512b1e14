"""The contract, for every implementation; and that the fake upstream, through Upstream, keeps it as well.

What tells a fault of the fake from one of Upstream is tests/test_upstream_fake.py, which asks the fake by
plain HTTP.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path

import pytest
import yaml
from aiohttp import web

from proxy.cache.cache import Cache
from proxy.cache.fills import Fills
from proxy.cache.policy import Policy
from proxy.namespaces.hosted import Hosted, PushRules
from proxy.namespaces.routing import Member, Namespaces
from proxy.telemetry.metrics import Metrics
from proxy.upstream.client import UpstreamRegistry
from proxy.upstream.credentials import Credentials
from proxy.upstream.requests import UpstreamSettings
from proxy.web.listener import ConnectionLimits, Listener
from proxy.web.server import DistributionAPI
from storage.bucket.blobs import BucketBlobs
from storage.bucket.objects import Bucket, healthy
from storage.disk.blobs import BlobFiles
from storage.disk.records import SQLiteRecords
from storage.errors import BlobUnknown, ManifestUnknown, RegistryError, Unsupported
from storage.maintenance.leases import Leases
from storage.oci import Digest, Manifest, Tag
from storage.postgres.records import PostgresRecords
from storage.records import Records
from storage.registry import Registry
from storage.store import Store
from tests import upstream as fake
from tests.conftest import OPEN, Clock
from tests.objects import FakeBucket

pytest.register_assert_rewrite("tests.contract")

from tests.contract import PullContract, PushContract, Subject, call, manifest, methods, refused  # noqa: E402

PUSH = frozenset(
    ("start_upload", "resume_upload", "mount_blob", "push_manifest", "delete_blob", "delete_manifest")
)


WORKERS = {"one worker": 1, "three workers": 3}  # of servers in processes of their own


class FakeContent:
    def __init__(self, registry: fake.Upstream) -> None:
        self._registry = registry

    async def blob(self, repository: str, content: bytes, algorithm: str = "sha256") -> Digest:
        return Digest(self._registry.blob(repository, content, algorithm))

    async def manifest(self, repository: str, manifest: Manifest, tag: str | None = None) -> Digest:
        algorithm = manifest.digest.algorithm
        return Digest(
            self._registry.manifest(repository, manifest.content, manifest.media_type, tag, algorithm)
        )

    async def delete_blob(self, repository: str, digest: Digest) -> None:
        self._registry.delete_blob(repository, digest)


class StoreContent:
    def __init__(self, store: Store, prefix: str = "") -> None:
        self._store = store
        self._prefix = prefix

    async def blob(self, repository: str, content: bytes, algorithm: str = "sha256") -> Digest:
        upload = await self._store.start_upload(self._prefix + repository)
        await upload.write(content)
        return (await upload.commit(Digest.of(content, algorithm))).digest

    async def manifest(self, repository: str, manifest: Manifest, tag: str | None = None) -> Digest:
        reference = manifest.digest if tag is None else Tag(tag)
        return (await self._store.push_manifest(self._prefix + repository, reference, manifest)).digest

    async def delete_blob(self, repository: str, digest: Digest) -> None:
        await self._store.delete_blob(self._prefix + repository, digest)


class Running:
    """A server as people run it, with the namespace `local`; its processes are for all tests here."""

    def __init__(self, url: str, root: Path) -> None:
        self.url = url
        self._root = root

    def store(self) -> Store:
        """What it serves, opened by this process too, and emptied."""
        records = SQLiteRecords(self._root / "records", durable=True)
        for key in list(records.keys("")):
            records.delete(key)
        return Store(BlobFiles(self._root, private=True), records, collected=True)


@contextmanager
def running(directory: Path, workers: int) -> Iterator[Running]:
    directory.mkdir()
    tree = {
        "listen": "127.0.0.1:0",
        "admin": "off",
        "workers": workers,
        "disk": {"path": str(directory / "disk")},
        "log": {"level": "error"},
        "access": OPEN,
        "namespaces": {"local": {"store": {"sparse": True}}},
    }
    (directory / "entrepot.yml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "proxy", "serve", "--config", str(directory / "entrepot.yml")]
    with (directory / "log").open("w") as log:  # the server's, which must not be ours once a test has begun
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    with process:
        try:
            assert process.stdout is not None
            found = re.search(r"listening on (\S+)", process.stdout.readline())
            assert found, (directory / "log").read_text()
            yield Running(found[1], directory / "disk" / "private")
        finally:
            process.terminate()
    assert (directory / "log").read_text() == ""


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Running]]:
    directory = tmp_path_factory.mktemp("servers")
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(running(directory / str(workers), workers))
            for name, workers in WORKERS.items()
        }


class Builder:
    """Builds registries, and takes them down again in the opposite order."""

    def __init__(
        self,
        directory: Path,
        clock: Clock,
        server: Callable[[str], Running],
        database: Callable[[], str],
        stack: AsyncExitStack,
    ) -> None:
        self._directory, self._clock, self._server, self._stack = directory, clock, server, stack
        self._database = database

    async def build(self, kind: str) -> Subject:
        outer, _, inner = kind.partition(" -> ")
        if kind in WORKERS:
            server = self._server(kind)
            store = server.store()
            self._stack.push_async_callback(store.close)
            content = StoreContent(store, "local/")
            return Subject(self.upstream(server.url), content, frozenset(), "local/", filters=False)
        if kind == "store":
            store = self.store("store")
            return Subject(store, StoreContent(store), frozenset())
        if kind == "bucket":
            store = await self.bucket()
            return Subject(store, StoreContent(store), frozenset())
        if kind.startswith("hosted"):
            records = PostgresRecords(self._database()) if kind.endswith("database") else None
            store = await self.bucket(records) if "bucket" in kind else self.store("store", records)
            # Put past its rules: what was imported need not keep them, and is served all the same.
            hosted = Hosted("local", store, Leases(store, 3600.0), PushRules(sparse=True))
            return Subject(hosted, StoreContent(store, "local/"), frozenset())
        if kind == "upstream -> fake":
            registry = await self._stack.enter_async_context(fake.Upstream(takes=fake.Takes()))
            return Subject(self.upstream(registry.url), FakeContent(registry), frozenset(), filters=False)
        subject = await self.build(inner)
        if outer == "namespaces":
            others = Member(Registry(), "docker.io"), Member(Registry(), "z")
            namespaces = Namespaces([*others, Member(subject.registry, "local")])
            return Subject(namespaces, subject.content, frozenset(), "local/")
        if outer == "server":
            subject.registry = self.upstream(await self.serve(subject.registry))
            subject.unsupported, subject.filters = frozenset(), False
        elif outer == "cache":
            subject.registry = self.cache(subject.registry)
            subject.unsupported = PUSH | {"repositories"}
        else:
            raise ValueError(kind)
        return subject

    def store(self, name: str, records: Records | None = None) -> Store:
        directory = self._directory / name
        records = records or SQLiteRecords(directory / "records")
        store = Store(BlobFiles(directory, self._clock), records, self._clock)
        self._stack.push_async_callback(store.close)
        return store

    async def bucket(self, records: Records | None = None) -> Store:
        """A store whose blobs are in a bucket."""
        fake = await self._stack.enter_async_context(FakeBucket())
        directory = self._directory / "bucket"
        records = records or SQLiteRecords(directory / "records")
        bucket = Bucket(fake.settings().connect(), "a bucket", healthy("a bucket", directory))
        store = Store(BucketBlobs(bucket, records, directory, self._clock), records, self._clock)
        self._stack.push_async_callback(store.close)
        return store

    def upstream(self, url: str) -> UpstreamRegistry:
        upstream = UpstreamRegistry(
            "docker.io", UpstreamSettings(url), [Credentials()], Metrics(), self._clock
        )
        self._stack.push_async_callback(upstream.close)
        return upstream

    async def serve(self, registry: Registry) -> str:
        """The URL of our server over it, whose repositories' names are the registry's own."""

        def qualify(name: str, *, ns: str | None, host: str | None, prefix: str) -> str:
            return name

        runner = web.ServerRunner(
            Listener(DistributionAPI(registry, qualify, Metrics()).handle, ConnectionLimits()),
            shutdown_timeout=1,
        )
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0]
        return f"http://{host}:{port}"

    def cache(self, origin: Registry) -> Cache:
        store = self.store("cache")
        fills = Fills(store, Metrics())
        # Nothing stays fresh, nor unknown: what is put at the origin is seen at once.
        policy = Policy(fresh_for=lambda tag: 0.0, negative_for=0.0)
        cache = Cache("docker.io", origin, store, fills, policy, self._clock)
        self._stack.push_async_callback(cache.close)
        self._stack.push_async_callback(fills.close)
        return cache


@pytest.fixture
async def builder(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> AsyncIterator[Builder]:
    def server(kind: str) -> Running:
        """Started when the first test asks for it."""
        found: Running = request.getfixturevalue("servers")[kind]
        return found

    def database() -> str:
        found: str = request.getfixturevalue("postgres_server").database()
        return found

    async with AsyncExitStack() as stack:
        yield Builder(tmp_path, clock, server, database, stack)


@pytest.fixture
async def subject(request: pytest.FixtureRequest, builder: Builder) -> Subject:
    return await builder.build(request.param)


SERVERS = [pytest.param(each, marks=pytest.mark.clients) for each in WORKERS]
DATABASES = [
    pytest.param(each, marks=pytest.mark.clients) for each in ("hosted database", "hosted bucket database")
]


@pytest.mark.parametrize(
    "subject",
    [
        "store",
        "upstream -> fake",
        "server -> store",
        "cache -> store",
        "cache -> upstream -> fake",
        "cache -> server -> store",
        "namespaces -> store",
        "hosted",
        "cache -> server -> hosted",
        "bucket",
        "hosted bucket",
        "cache -> server -> hosted bucket",
        *DATABASES,
        *SERVERS,
    ],
    indirect=True,
)
class TestPull(PullContract):
    pass


@pytest.mark.parametrize(
    "subject",
    [
        "store",
        "hosted",
        "namespaces -> store",
        "upstream -> fake",
        "server -> store",
        "server -> hosted",
        "bucket",
        "hosted bucket",
        "server -> hosted bucket",
        *DATABASES,
        *SERVERS,
    ],
    indirect=True,
)
class TestPush(PushContract):
    pass


@pytest.mark.parametrize("name", sorted(methods()))
async def test_a_registry_of_no_kind_refuses_everything(name: str) -> None:
    await refused(call(Registry(), name), Unsupported)


@pytest.mark.parametrize("cached", [False, True])
async def test_who_cannot_tell_referrers_says_so(builder: Builder, cached: bool) -> None:
    """Not by an empty list: clients then look for the fallback tag."""
    async with fake.Upstream(referrers_api=False) as registry:
        upstream: Registry = builder.upstream(registry.url)
        asked = builder.cache(upstream) if cached else upstream
        await FakeContent(registry).manifest("a", manifest(), "latest")
        for repository in ("a", "nowhere"):
            await refused(asked.referrers(repository, manifest().digest), ManifestUnknown)


async def test_a_cache_that_holds_a_blob_for_one_repository_asks_for_another(builder: Builder) -> None:
    async with fake.Upstream() as registry:
        cache = builder.cache(builder.upstream(registry.url))
        digest = await StoreContent(builder.store("cache")).blob("docker.io/a", b"content")
        registry.blob("b", b"another")
        for _ in range(2):
            await refused(cache.get_blob("b", digest), BlobUnknown)
            await refused(cache.resolve_blob("b", digest), BlobUnknown)
        await (await cache.get_blob("a", digest)).close()


@pytest.mark.clients
@pytest.mark.parametrize("kind", ["tags", "referrers"])
async def test_a_listing_nested_beyond_reason_is_no_listing(builder: Builder, kind: str) -> None:
    async with fake.Upstream() as registry:
        upstream = builder.upstream(registry.url)
        await FakeContent(registry).manifest("a", manifest(), "latest")
        registry.next("GET", kind, fake.Status(200, body=b'{"a":' * 100_000))
        asked = upstream.tags("a") if kind == "tags" else upstream.referrers("a", manifest().digest)
        await refused(asked, RegistryError)

"""If-Match and If-None-Match: which are false, of requests that read and that write."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.conditions import Conditions
from storage.disk.blobs import BlobFiles
from storage.disk.records import SQLiteRecords
from storage.errors import ManifestUnknown
from storage.keys import MANIFEST
from storage.oci import OCI_INDEX, Digest, Manifest, Tag
from storage.store import Store
from storage.values import StoredManifest
from tests.conftest import Serve
from tests.receiver import Receiver, receiver  # noqa: F401  a fixture
from tests.test_push import APP, Client, index
from tests.test_webhooks import Told, told  # noqa: F401  a fixture
from tests.upstream import Upstream
from tests.wire import Reply, Wire, connect

TAG, TYPE = f"{APP}/manifests/1", f"Content-Type: {OCI_INDEX}"
NUMBERS = itertools.count()

# {} is the digest of what is there.  Whether each is true if it is there, and if nothing is.
CONDITIONS: list[tuple[tuple[str, ...], bool, bool]] = [
    ((), True, True),
    (('If-Match: "{}"',), True, False),
    (("If-Match: {}",), True, False),
    (("If-Match: *",), True, False),
    (('If-Match: "other", "{}"',), True, False),
    (('If-Match: "other"', 'If-Match: "{}"'), True, False),
    (('If-Match: "other" ,, "{}",',), True, False),
    (('If-Match: "a,b","{}"',), True, False),
    (('If-Match: "other"',), False, False),
    (("If-Match: ",), False, False),
    (('If-Match: W/"{}"',), False, False),
    (('If-Match: W/ "{}"',), False, False),
    (('If-Match: "*"',), False, False),
    (('If-Match: "other", *',), False, False),
    (('If-Match: "sha256:{}"',), False, False),
    (('If-Match: "a,{},b"',), False, False),
    (('If-Match: "{}" "{}"',), False, False),
    (("If-None-Match: *",), False, True),
    (('If-None-Match: "{}"',), False, True),
    (("If-None-Match: {}",), False, True),
    (('If-None-Match: W/"{}"',), False, True),
    (('If-None-Match: "other"', 'If-None-Match: "{}"'), False, True),
    (('If-None-Match: "other"',), True, True),
    (("If-None-Match: ",), True, True),
    (('If-None-Match: "*"',), True, True),
    (('If-Match: "{}"', "If-None-Match: *"), False, False),
    (('If-Match: "{}"', 'If-None-Match: "other"'), True, False),
    (("If-Unmodified-Since: Thu, 01 Jan 1970 00:00:00 GMT",), True, True),
]


@pytest.fixture
async def client(serve: Serve, upstream: Upstream) -> Client:
    return Client(await serve(upstream, more={"local": {"store": {"immutable_tags": ["v*"]}}}))


def others() -> Iterator[bytes]:
    """Manifests, each another."""
    for number in NUMBERS:
        yield index(annotations={"number": str(number)})


async def put(wire: Wire, content: bytes, lines: tuple[str, ...], path: str = TAG) -> Reply:
    return await wire.ask("PUT", path, TYPE, *lines, body=content)


def filled(lines: tuple[str, ...], digest: Digest) -> tuple[str, ...]:
    return tuple(line.replace("{}", digest) for line in lines)


@pytest.mark.clients
async def test_writes(client: Client) -> None:
    """A write of which a precondition is false is refused, and not done."""
    contents = others()
    async with connect(client.site.url) as wire:
        for lines, present, absent in CONDITIONS:
            old, new = next(contents), next(contents)
            digest = Digest.of(old)
            given = filled(lines, digest)
            assert (await put(wire, old, ())).status == 201
            for path, content in ((TAG, new), (f"{APP}/manifests/{digest}", old)):
                assert (await put(wire, content, given, path)).status == (201 if present else 412), given
            found = await wire.ask("GET", TAG)
            assert found.body == (new if present else old), given
            etag = Digest.of(found.body)
            refused = await wire.ask("DELETE", TAG, *filled(lines, etag))
            assert refused.status == (202 if present else 412), given
            assert (await wire.ask("HEAD", TAG)).status == (404 if present else 200), given
            await wire.ask("DELETE", TAG)
            # RFC 9110 §13.2.1: it would be answered 404 without them
            assert (await wire.ask("DELETE", TAG, *given)).status == 404, given
            digested = f"{APP}/manifests/{Digest.of(new)}"
            for path in (TAG, digested):
                await wire.ask("DELETE", digested)
                assert (await put(wire, new, given, path)).status == (201 if absent else 412), given
                assert (await wire.ask("HEAD", path)).status == (200 if absent else 404), given


@pytest.mark.clients
async def test_deletions_of_manifests_and_blobs(client: Client) -> None:
    contents = others()
    async with connect(client.site.url) as wire:
        for lines, present, _ in CONDITIONS:
            digest = await client.blob(content := next(contents))
            assert (await put(wire, content, ())).status == 201
            given = filled(lines, digest)
            for path in (f"{APP}/manifests/{digest}", f"{APP}/blobs/{digest}"):
                assert (await wire.ask("DELETE", path, *given)).status == (202 if present else 412), given
                assert (await wire.ask("HEAD", path)).status == (404 if present else 200), given
                assert (await wire.ask("DELETE", path)).status == (404 if present else 202), given
                assert (await wire.ask("DELETE", path, *given)).status == 404, given


async def test_reads(client: Client) -> None:
    async with connect(client.site.url) as wire:
        digest = await client.blob(content := next(others()))
        assert (await put(wire, content, ())).status == 201
        for lines, present, _ in CONDITIONS:
            given = filled(lines, digest)
            modified = not any(line.startswith("If-None") for line in lines)
            for path in (TAG, f"{APP}/manifests/{digest}", f"{APP}/blobs/{digest}"):
                for method in ("GET", "HEAD"):
                    reply = await wire.ask(method, path, *given)
                    assert reply.status == (200 if present else 412 if modified else 304), given
                    if method == "GET" and present:
                        assert reply.body == content


async def test_other_errors_come_first(client: Client) -> None:
    """RFC 9110 §13.2.1."""
    content, other = itertools.islice(others(), 2)
    stale = {"If_Match": '"other"', "Content_Type": OCI_INDEX}
    assert (await client.manifest("v1", content, OCI_INDEX)).status == 201
    assert (await client.ask("PUT", f"{APP}/manifests/v1", other, **stale)).status == 403
    assert (await client.ask("DELETE", f"{APP}/manifests/v1", **stale)).status == 403
    answer = await client.ask("PUT", f"{APP}/manifests/v1", content, **stale)
    assert (answer.status, answer.code) == (412, "PRECONDITION_FAILED")
    incomplete = index(b"{}")
    assert (
        await client.ask("PUT", f"{APP}/manifests/v1", incomplete, **stale)
    ).code == "MANIFEST_BLOB_UNKNOWN"
    assert (await client.ask("PUT", f"{APP}/manifests/v1", b"{", **stale)).code == "MANIFEST_INVALID"


async def test_a_manifest_that_cannot_be_read_is_not_there(tmp_path: Path) -> None:
    store = Store(BlobFiles(tmp_path), SQLiteRecords(tmp_path / "records"))
    manifest, new = Manifest.of(OCI_INDEX, next(others())), Conditions(none_match=frozenset("*"))
    for damaged in (b"", b"no record", StoredManifest(OCI_INDEX, 0.0, b"other").encode()):
        await store.push_manifest("a", Tag("1"), manifest)
        store.records.put(MANIFEST.key("a", manifest.digest), damaged)
        for reference in (Tag("1"), manifest.digest):
            with pytest.raises(ManifestUnknown):
                await store.delete_manifest("a", reference, new)
        await store.push_manifest("a", Tag("1"), manifest, when=new)
        assert await store.get_manifest("a", Tag("1")) == manifest
    await store.close()


@pytest.mark.housekeeping
async def test_what_is_refused_is_no_event(told: Told, receiver: Receiver) -> None:  # noqa: F811
    client = await told()
    content, other = itertools.islice(others(), 2)
    digest = await client.blob(content)
    stale = {"If_Match": '"other"', "Content_Type": OCI_INDEX}
    for method, path in (("PUT", TAG), ("DELETE", TAG), ("DELETE", f"{APP}/blobs/{digest}")):
        await client.manifest("1", content, OCI_INDEX)
        assert (await client.ask(method, path, other, **stale)).status == 412
    assert (await client.manifest("2", other, OCI_INDEX)).status == 201
    events = await receiver.took(5)
    assert [(each["action"], each["target"].get("tag")) for each in events] == [
        ("push", None),
        *[("push", "1")] * 3,
        ("push", "2"),
    ]

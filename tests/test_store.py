"""The store's own rules: links, tags last, deletion, referrers; and that a damaged record is as none."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from storage.disk.blobs import BlobFiles
from storage.disk.records import SQLiteBatch, SQLiteRecords
from storage.errors import (
    BlobUnknown,
    DigestInvalid,
    ManifestUnknown,
    NameUnknown,
    StorageFailed,
)
from storage.oci import OCI_INDEX, OCI_MANIFEST, Descriptor, Digest, Manifest, Tag
from storage.records import Batch
from storage.store import Store
from storage.values import Pointer
from tests.conftest import Clock

DIGEST = Digest.of(b"content")
LATEST = Tag("latest")
SIGNATURE, EMPTY_TYPE = "application/vnd.example.signature", "application/vnd.oci.empty.v1+json"


class Home:
    """A store, and what it stands on."""

    def __init__(self, directory: Path, clock: Callable[[], float]) -> None:
        self.files = BlobFiles(directory, clock)
        self.records = SQLiteRecords(directory / "records")
        self.store = Store(self.files, self.records, clock, collected=True)

    async def put_blob(self, repository: str, content: bytes) -> Digest:
        upload = await self.store.start_upload(repository)
        await upload.write(content)
        return (await upload.commit(Digest.of(content))).digest

    async def read(self, repository: str, digest: Digest) -> bytes:
        blob = await self.store.get_blob(repository, digest)
        try:
            return b"".join([chunk async for chunk in blob.chunks()])
        finally:
            await blob.close()


@pytest.fixture
async def home(tmp_path: Path, clock: Clock) -> AsyncIterator[Home]:
    found = Home(tmp_path / "disk", clock)
    yield found
    await found.store.close()


def described(content: bytes, media_type: str = OCI_MANIFEST) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": Digest.of(content), "size": len(content)}


def image(number: int = 0, **more: Any) -> Manifest:
    body = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": described(b"{}", EMPTY_TYPE), **more}
    return Manifest.of(OCI_MANIFEST, json.dumps({**body, "number": number}).encode())


# Blobs and links


async def test_a_blob_is_seen_where_it_is_linked_only(home: Home) -> None:
    digest = await home.put_blob("a", b"content")
    with pytest.raises(BlobUnknown):
        await home.store.get_blob("b", digest)
    with pytest.raises(BlobUnknown):
        await home.store.mount_blob("b", digest, "c")
    assert await home.store.mount_blob("b", digest, "a") == await home.store.resolve_blob("a", digest)
    assert await home.read("b", digest) == b"content"


async def test_a_link_knows_when_it_was_made(home: Home, clock: Clock) -> None:
    digest = await home.put_blob("a", b"content")
    made_at = clock.now
    clock.advance(100)
    await home.store.link("b", digest)
    for repository, linked_at in (("a", made_at), ("b", made_at + 100)):
        blob, found = home.store.blob(repository, digest)
        await blob.close()
        assert found == linked_at


async def test_nothing_is_linked_that_is_not_here(home: Home) -> None:
    with pytest.raises(BlobUnknown):
        await home.store.link("a", DIGEST)
    assert list(home.records.scan("")) == []


async def test_a_blob_whose_file_went_is_unknown_and_can_come_again(home: Home) -> None:
    digest = await home.put_blob("a", b"content")
    home.files.path(digest).unlink()
    assert not home.store.holds(digest)
    with pytest.raises(BlobUnknown):
        await home.store.resolve_blob("a", digest)
    await home.put_blob("a", b"content")
    assert await home.read("a", digest) == b"content"


async def test_a_truncated_blob_is_unknown_and_can_come_again(home: Home) -> None:
    digest = await home.put_blob("a", b"content")
    home.files.path(digest).write_bytes(b"conte")
    with pytest.raises(BlobUnknown, match="5 of 7 bytes"):
        await home.store.get_blob("a", digest)
    assert not home.store.holds(digest)
    await home.put_blob("a", b"content")
    assert await home.read("a", digest) == b"content"


async def test_deleting_a_blob_takes_it_from_one_repository_and_from_no_reader(home: Home) -> None:
    digest = await home.put_blob("a", b"content")
    await home.store.link("b", digest)
    blob = await home.store.get_blob("a", digest)
    await home.store.delete_blob("a", digest)
    with pytest.raises(BlobUnknown):
        await home.store.get_blob("a", digest)
    with pytest.raises(BlobUnknown):
        await home.store.delete_blob("a", digest)
    assert b"".join([chunk async for chunk in blob.chunks()]) == b"content"
    await blob.close()
    assert await home.read("b", digest) == b"content"


async def test_a_wrong_digest_is_refused_and_leaves_nothing(home: Home) -> None:
    upload = await home.store.start_upload("a")
    await upload.write(b"other content")
    assert upload.offset == 13
    with pytest.raises(DigestInvalid):
        await upload.commit(DIGEST)
    assert not home.store.holds(DIGEST)
    assert list(home.records.scan("")) == []


# Manifests and tags


async def test_a_manifest_keeps_its_bytes_and_its_type(home: Home) -> None:
    for number, media_type in enumerate(
        (OCI_MANIFEST, "a/b; c=d", "", "text/é", b"a/\xff".decode("utf-8", "surrogateescape"))
    ):
        manifest = Manifest.of(media_type, b" not\njson \n%d\0" % number)
        await home.store.push_manifest("a", LATEST, manifest)
        assert await home.store.get_manifest("a", LATEST) == manifest
        assert await home.store.get_manifest("a", manifest.digest) == manifest
        assert await home.store.resolve_manifest("a", LATEST) == manifest.descriptor


async def test_a_manifest_knows_when_it_was_stored_and_a_tag_when_it_was_validated(
    home: Home, clock: Clock
) -> None:
    stored_at = clock.now
    await home.store.push_manifest("a", LATEST, image())
    assert home.store.pointer("a", LATEST) == Pointer(image().digest, stored_at)
    clock.advance(0.25)
    await home.store.point("a", LATEST, image().digest)
    assert home.store.pointer("a", LATEST) == Pointer(image().digest, stored_at + 0.25)
    assert home.store.manifest("a", LATEST) == (image(), stored_at)


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
async def test_a_manifest_is_had_by_the_digest_that_it_was_pushed_by(home: Home, algorithm: str) -> None:
    digest = Digest.of(image().content, algorithm)
    descriptor = await home.store.push_manifest("a", digest, image())
    assert descriptor == Descriptor(OCI_MANIFEST, digest, len(image().content))
    assert await home.store.get_manifest("a", digest) == Manifest(OCI_MANIFEST, image().content, digest)


async def test_a_manifest_that_is_not_what_its_digest_says_is_refused(home: Home) -> None:
    for algorithm in ("sha256", "sha512"):
        with pytest.raises(DigestInvalid):
            await home.store.push_manifest("a", Digest.of(b"other", algorithm), image())
    assert list(home.records.scan("")) == []


async def test_a_push_is_all_or_nothing(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    put, manifest = SQLiteBatch.put, image(subject=described(b"subject"))
    for failing in ("manifest", "referrers", "tag", "pushed"):

        def record(batch: SQLiteBatch, key: str, value: bytes, failing: str = failing) -> None:
            if key.startswith(f"{failing} "):
                raise StorageFailed("power cut")
            put(batch, key, value)

        monkeypatch.setattr(SQLiteBatch, "put", record)
        with pytest.raises(StorageFailed):
            await home.store.push_manifest("a", LATEST, manifest, [Tag("v1")])
        assert list(home.records.scan("")) == []
    monkeypatch.setattr(SQLiteBatch, "put", put)
    await home.store.push_manifest("a", LATEST, manifest, [Tag("v1")])
    kinds = [key.partition(" ")[0] for key, _ in home.records.scan("")]
    assert kinds == ["counted", "manifest", "pushed", "referrers", "tag", "tag", "total"]


async def test_what_changes_tags_and_manifests_is_counted(home: Home) -> None:
    async def pushed() -> bytes | None:
        return home.records.get("pushed a")

    assert await pushed() is None
    await home.store.push_manifest("a", LATEST, image())
    await home.store.push_manifest("b", LATEST, image())
    assert await pushed() == b"1"
    await home.store.delete_manifest("a", LATEST)
    await home.store.delete_manifest("a", image().digest)
    assert await pushed() == b"3"


async def test_a_blob_that_is_linked_was_used_just_now(home: Home, clock: Clock) -> None:
    """So whoever collects what is old and without a link spares it."""
    digest = await home.put_blob("a", b"content")
    clock.advance(1000)
    await home.store.mount_blob("b", digest, "a")
    assert home.files.path(digest).stat().st_mtime == clock()


async def test_a_mount_from_whichever_repository_shows_it(home: Home) -> None:
    digest = await home.put_blob("a/b", b"content")
    await home.put_blob("c", b"content")
    with pytest.raises(BlobUnknown):
        await home.store.mount_blob("d", Digest.of(b"other"))
    with pytest.raises(BlobUnknown):
        await home.store.mount_blob("d", digest, visible=lambda name: name == "elsewhere")
    for name in ("a/b", "c"):
        asked = f"d{name}"
        await home.store.mount_blob(asked, digest, visible=lambda each, name=name: each == name)  # type: ignore[misc]
        assert await home.read(asked, digest) == b"content"


async def test_a_tag_that_points_at_nothing_is_unknown(home: Home) -> None:
    await home.store.point("a", LATEST, DIGEST)
    with pytest.raises(ManifestUnknown):
        await home.store.get_manifest("a", LATEST)


async def test_deleting_a_tag_leaves_its_manifest_and_other_tags(home: Home) -> None:
    for tag in ("latest", "v1"):
        await home.store.push_manifest("a", Tag(tag), image())
    await home.store.delete_manifest("a", LATEST)
    assert await home.store.tags("a") == ["v1"]
    assert await home.store.get_manifest("a", image().digest) == image()
    for gone in (LATEST, Tag("v2")):
        with pytest.raises(ManifestUnknown):
            await home.store.delete_manifest("a", gone)
        with pytest.raises(ManifestUnknown):
            await home.store.get_manifest("a", gone)


async def test_deleting_a_manifest_takes_its_tags_and_what_it_says_of_others(home: Home) -> None:
    subject, other = image(1), image(2)
    signature = image(3, subject=described(subject.content))
    for tag, manifest in (("s", subject), ("sig", signature), ("sig2", signature), ("o", other)):
        await home.store.push_manifest("a", Tag(tag), manifest)
    await home.store.push_manifest("b", Tag("sig"), signature)
    await home.store.delete_manifest("a", signature.digest)
    assert await home.store.tags("a") == ["o", "s"]
    assert await home.store.referrers("a", subject.digest) == []
    assert [each.digest for each in await home.store.referrers("b", subject.digest)] == [signature.digest]
    assert await home.store.get_manifest("b", Tag("sig")) == signature
    with pytest.raises(ManifestUnknown):
        await home.store.delete_manifest("a", signature.digest)


async def test_referrers_outlive_their_subject(home: Home) -> None:
    """distribution-spec, "Listing Referrers": the subject need not be there."""
    subject = image(1)
    signature = image(3, subject=described(subject.content))
    await home.store.push_manifest("a", signature.digest, signature)
    await home.store.push_manifest("a", subject.digest, subject)
    await home.store.delete_manifest("a", subject.digest)
    assert [each.digest for each in await home.store.referrers("a", subject.digest)] == [signature.digest]


async def test_referrers_are_described_as_the_specification_says(home: Home) -> None:
    """distribution-spec, "Listing Referrers": artifactType, else the config's type; annotations as given."""
    subject = described(b"subject")
    named = image(1, subject=subject, artifactType=SIGNATURE, annotations={"a": "b"})
    unnamed = image(2, subject=subject)
    body = json.dumps({"mediaType": OCI_INDEX, "manifests": [], "subject": subject}).encode()
    index = Manifest.of(OCI_INDEX, body)
    for manifest in (named, unnamed, index):
        await home.store.push_manifest("a", manifest.digest, manifest)
    found = {each.digest: each for each in await home.store.referrers("a", Digest.of(b"subject"))}
    assert found == {
        named.digest: Descriptor(OCI_MANIFEST, named.digest, len(named.content), SIGNATURE),
        unnamed.digest: Descriptor(OCI_MANIFEST, unnamed.digest, len(unnamed.content), EMPTY_TYPE),
        index.digest: Descriptor(OCI_INDEX, index.digest, len(body)),
    }
    assert found[named.digest].annotations == {"a": "b"}
    assert found[unnamed.digest].annotations is None
    only = await home.store.referrers("a", Digest.of(b"subject"), SIGNATURE)
    assert [each.digest for each in only] == [named.digest]


async def test_a_page_of_referrers_reads_what_it_shows(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = described(b"subject")
    made = [image(n, subject=subject, artifactType=f"a/{n % 2}") for n in range(40)]
    for manifest in made:
        await home.store.push_manifest("a", manifest.digest, manifest)
    digests = sorted(each.digest for each in made)
    read, real = [], Descriptor.from_json
    monkeypatch.setattr(Descriptor, "from_json", lambda value: read.append(value) or real(value))
    for start in (0, 13, 35):
        last = digests[start - 1] if start else ""
        found = await home.store.referrers("a", Digest.of(b"subject"), None, last, 5)
        assert [each.digest for each in found] == digests[start : start + 5]
        assert len(read) == 5
        read.clear()
    [first] = await home.store.referrers("a", Digest.of(b"subject"), "a/1", "", 1)
    assert len(read) == digests.index(first.digest) + 1


@pytest.mark.parametrize("content", [b"", b"no JSON", b'{"subject":7}', b'{"a":' * 100_000])
async def test_a_manifest_of_no_known_form_is_stored_as_it_is(home: Home, content: bytes) -> None:
    manifest = Manifest.of("application/vnd.example", content)
    await home.store.push_manifest("a", LATEST, manifest)
    assert await home.store.get_manifest("a", LATEST) == manifest


# Listings


async def test_tags_in_order_after_last_up_to_limit(home: Home) -> None:
    tags = ["1.0", "1.0-rc", "1.0.1", "A", "_x", "a", "a-b", "a.b"]
    for tag in reversed(tags):
        await home.store.push_manifest("a", Tag(tag), image())
    await home.store.push_manifest("a-b", Tag("neighbour"), image())
    assert await home.store.tags("a") == tags
    assert await home.store.tags("a", "1.0-rc", 2) == ["1.0.1", "A"]
    assert await home.store.tags("a", "1.0.0.0") == tags[2:]
    assert await home.store.tags("a", "z") == []
    assert await home.store.tags("a", limit=0) == []


async def test_tags_of_nothing_and_of_untagged_manifests(home: Home) -> None:
    with pytest.raises(NameUnknown):
        await home.store.tags("a")
    await home.store.push_manifest("a", image().digest, image())
    assert await home.store.tags("a") == []


async def test_repositories_are_those_with_manifests(home: Home) -> None:
    names = ["a", "a-b", "a/b", "a/b/c", "b", "b0"]
    for name in reversed(names):
        for number in range(3):
            await home.store.push_manifest(name, LATEST, image(number))
    await home.put_blob("c", b"content")
    assert await home.store.repositories() == names
    assert await home.store.repositories("a-b", 2) == ["a/b", "a/b/c"]
    assert await home.store.repositories("a/") == names[2:]
    assert await home.store.repositories("z") == []
    assert await home.store.repositories(limit=0) == []


async def test_a_listing_is_kept_with_its_time(home: Home, clock: Clock) -> None:
    assert home.store.listings.get("a", "tags") is None
    await home.store.listings.put("a", "tags", ["x", {"y": 1}])
    found = home.store.listings.get("a", "tags")
    assert found is not None
    assert (found.value, found.validated_at) == (["x", {"y": 1}], clock.now)
    assert home.store.listings.get("a", f"referrers {DIGEST}") is None


# Damage


_NUMBERS = [b"7", b"8", b"7.5", b"-1", b"1e999", b"nan", b"inf", b"-inf", b"1_0", b"0x7", b"9" * 400]
_JSON = [b"[]", b"{}", b'{"a":' * 10_000, b'"\xff"']
_TEXTS = [b"", b"\0", b"\xff", b"content", OCI_MANIFEST.encode(), b"sha999:00", b"sha256:", DIGEST.encode()]
_FIELDS = st.sampled_from([*_NUMBERS, *_JSON, *_TEXTS])
_RECORDS = st.binary() | st.lists(_FIELDS, max_size=4).flatmap(
    lambda fields: st.sampled_from([b" ", b"\n", b""]).map(lambda between: between.join(fields))
)


@pytest.mark.parametrize("kind", ["tag", "manifest", "link", "referrers", "listing"])
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    max_examples=80,
    deadline=None,
)
@given(record=_RECORDS)
@example(record=b"nan 7")
@example(record=b"1e999 7")
@example(record=b"7 nan")
@example(record=b"\xff 7")
@example(record=b"sha999:00 7")
@example(record=b"7\n" + b'{"a":' * 10_000)
@example(record=b'{"mediaType":7}')
async def test_whatever_a_record_holds_it_is_right_or_absent(home: Home, kind: str, record: bytes) -> None:
    key = {
        "tag": "tag a latest",
        "manifest": f"manifest a {DIGEST}",
        "link": f"link a {DIGEST}",
        "referrers": f"referrers a {DIGEST} {DIGEST}",
        "listing": "listing a tags",
    }[kind]
    path = home.files.path(DIGEST)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"content")
    home.records.put(key, record)
    store = home.store
    for ask, unknown in (
        (store.get_blob("a", DIGEST), BlobUnknown),
        (store.resolve_blob("a", DIGEST), BlobUnknown),
        (store.get_manifest("a", LATEST), ManifestUnknown),
        (store.get_manifest("a", DIGEST), ManifestUnknown),
        (store.resolve_manifest("a", LATEST), ManifestUnknown),
        (store.tags("a"), NameUnknown),
        (store.referrers("a", DIGEST), ManifestUnknown),
        (store.repositories(), NameUnknown),
    ):
        try:
            found: Any = await ask
        except unknown:
            continue
        if isinstance(found, Manifest):
            assert (found.content, found.digest) == (b"content", DIGEST)
        elif hasattr(found, "chunks"):
            assert b"".join([chunk async for chunk in found.chunks()]) == b"content"
            await found.close()
    for read in (store.pointer("a", LATEST), store.listings.get("a", "tags")):
        assert read is None or abs(read.validated_at) < float("inf")


async def test_one_damaged_referrer_does_not_hide_the_others(home: Home) -> None:
    signature = image(3, subject=described(b"subject"))
    await home.store.push_manifest("a", signature.digest, signature)
    subject = Digest.of(b"subject")
    for number, damage in enumerate((b"", b"[]", b'"\xff"', b"{" * 7, b'{"mediaType":"a/b"}')):
        home.records.put(f"referrers a {subject} {Digest.of(b'%d' % number)}", damage)
    assert [each.digest for each in await home.store.referrers("a", subject)] == [signature.digest]


# Several at once


async def test_writes_leave_the_loop_alone(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write is a transaction, and takes as long as the disk does."""
    transaction, loop_thread, threads = home.records.transaction, threading.get_ident(), set()

    def record(work: Callable[[Batch], object], shared: bool = False) -> object:
        threads.add(threading.get_ident())
        return transaction(work, shared)

    monkeypatch.setattr(home.records, "transaction", record)
    digest = await home.put_blob("a", b"content")
    await home.store.mount_blob("b", digest, "a")
    await home.store.push_manifest("a", LATEST, image())
    await home.store.point("a", LATEST, image().digest)
    await home.store.listings.put("a", "tags", [])
    assert threads
    assert loop_thread not in threads


async def test_many_push_at_once(home: Home) -> None:
    async def push(number: int) -> None:
        manifest = image(number)
        await home.store.push_manifest("a", Tag(f"v{number:02}"), manifest)
        await home.store.push_manifest("a", LATEST, manifest)
        await home.put_blob("a", b"%d" % (number % 3))

    await asyncio.gather(*map(push, range(16)))
    assert await home.store.tags("a") == ["latest", *(f"v{number:02}" for number in range(16))]
    assert (await home.store.get_manifest("a", LATEST)).digest in {image(each).digest for each in range(16)}
    for number in range(3):
        assert await home.read("a", Digest.of(b"%d" % number)) == b"%d" % number


async def test_two_stores_on_one_directory_are_one(home: Home, tmp_path: Path, clock: Clock) -> None:
    other = Home(tmp_path / "disk", clock)
    digest = await home.put_blob("a", b"content")
    await home.store.push_manifest("a", LATEST, image())
    assert await other.read("a", digest) == b"content"
    assert await other.store.get_manifest("a", LATEST) == image()
    await other.store.delete_manifest("a", LATEST)
    with pytest.raises(ManifestUnknown):
        await home.store.get_manifest("a", LATEST)
    await other.store.close()

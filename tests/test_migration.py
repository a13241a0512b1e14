"""A directory of Distribution, taken over: whole, damaged, again, and while others are at work."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from proxy.namespaces.hosted import Hosted
from storage.concurrency import Cancelled
from storage.disk.blobs import BlobFiles
from storage.disk.records import SQLiteRecords
from storage.errors import BlobUnknown, ManifestUnknown, StorageFailed
from storage.keys import MANIFEST as MANIFEST_RECORD
from storage.maintenance.collection import Collection
from storage.maintenance.leases import Leases
from storage.maintenance.retention import KeepTags, RetentionRules
from storage.migration import adoption, distribution
from storage.migration.migration import Damage, Migration, MigrationReport
from storage.oci import Digest, Manifest, Tag
from storage.store import Store
from tests.collecting import DAY
from tests.conftest import Clock
from tests.layout import INDEX, MANIFEST, Layout, described, digest_of

Take = Callable[..., MigrationReport]
SHA512 = "0" * 128


@pytest.fixture
def made(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "registry")


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    directory = tmp_path / "private"
    store = Store(
        BlobFiles(directory, clock), SQLiteRecords(directory / "records", clock), clock, collected=True
    )
    yield store
    store.records.close()


@pytest.fixture
def take(made: Layout, store: Store, clock: Clock) -> Take:
    def run(**rules: object) -> MigrationReport:
        source = distribution.DistributionTree(made.directory)
        intake = Migration(store, source, clock=clock, **rules)  # type: ignore[arg-type]
        intake.run(source.repositories(), lambda name: f"local/{name}")
        return intake.report

    return run


async def content(store: Store, repository: str, digest: str) -> bytes:
    blob = await store.get_blob(f"local/{repository}", Digest(digest))
    try:
        return b"".join([chunk async for chunk in blob.chunks()])
    finally:
        await blob.close()


async def test_all_of_it_is_taken(made: Layout, store: Store, take: Take) -> None:
    image = made.image("team/app", "1", "latest", layers=[b"one", b"two"])
    other = made.image("team/app", layers=[b"three"])
    index = made.index("team/app", [image, other], "all")
    signature = made.image(
        "team/app", subject=described(MANIFEST, made.data(image).read_bytes()), artifactType="a/signature"
    )
    made.image("base", "1", layers=[b"one"])
    taken = take()
    assert taken.damaged == taken.kept == []
    assert (taken.repositories, taken.tags, taken.manifests, taken.present) == (2, 4, 5, 0)
    configs = [b'{"of": "team/app"}', b'{"of": "base"}']
    blobs = [b"one", b"two", b"three", b"a layer", *configs]
    assert (taken.blobs, taken.bytes) == (len(blobs), sum(map(len, blobs)))
    assert taken.linked == taken.blobs
    hosted = Hosted("local", store, Leases(store, 3600.0))
    assert await hosted.repositories() == ["base", "team/app"]
    assert await hosted.tags("team/app") == ["1", "all", "latest"]
    for tag, digest in (("1", image), ("latest", image), ("all", index)):
        found = await hosted.get_manifest("team/app", Tag(tag))
        assert (found.digest, found.content) == (digest, made.data(digest).read_bytes())
    assert (await hosted.get_manifest("team/app", Tag("all"))).media_type == INDEX
    for each in (b"one", b"two", b"three"):
        assert await content(store, "team/app", digest_of(each)) == each
    assert await content(store, "base", digest_of(b"one")) == b"one"
    (referrer,) = await hosted.referrers("team/app", Digest(image))
    assert (referrer.digest, referrer.artifact_type) == (signature, "a/signature")
    with pytest.raises(BlobUnknown):
        await store.get_blob("local/base", Digest(digest_of(b"two")))


def test_files_are_linked_and_get_the_present_time(
    made: Layout, store: Store, take: Take, clock: Clock
) -> None:
    made.image("a", "1")
    data = made.data(digest_of(b"a layer"))
    os.utime(data, (1, 1))
    take()
    found = store.files.path(Digest(digest_of(b"a layer"))).stat()
    assert os.path.samestat(found, data.stat())
    assert found.st_mtime == clock()  # who collects sees that it is new
    assert found.st_uid == store.files.root.stat().st_uid


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: only root changes owners")
@pytest.mark.parametrize(("mode", "linked"), [(0o644, True), (0o640, False)])
def test_files_of_another_user(made: Layout, store: Store, take: Take, mode: int, linked: bool) -> None:
    """They become the store's, unless the other user would then not be able to read them any more."""
    os.chown(store.files.root, 1000, 1000)
    made.image("a", "1", layers=[b"one"])
    for each in (b"one", b'{"of": "a"}'):
        os.chown(made.data(digest_of(each)), 4000, 4000)
        made.data(digest_of(each)).chmod(mode)
    assert take().linked == (2 if linked else 0)
    path = store.files.path(Digest(digest_of(b"one")))
    assert path.read_bytes() == b"one"
    assert path.stat().st_uid == 1000
    assert path.parent.stat().st_uid == 1000
    assert os.path.samestat(path.stat(), made.data(digest_of(b"one")).stat()) == linked
    assert made.data(digest_of(b"one")).stat().st_uid == (1000 if linked else 4000)


def test_where_nothing_can_be_linked_it_is_copied(
    made: Layout, store: Store, take: Take, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(adoption.os, "link", refuse)
    large = bytes(range(256)) * 20_000
    made.image("a", "1", layers=[large, b""])
    broken = made.image("b", "1", layers=[b"good"])
    made.data(digest_of(b"good")).write_bytes(b"evil")
    taken = take()
    assert (taken.blobs, taken.linked) == (4, 0)
    path = store.files.path(Digest(digest_of(large)))
    assert path.read_bytes() == large
    assert not os.path.samestat(path.stat(), made.data(digest_of(large)).stat())
    assert {each.what for each in taken.damaged} == {digest_of(b"good"), broken, "1"}
    assert not store.holds(Digest(digest_of(b"good")))


def test_a_second_run_takes_what_is_new(
    made: Layout, store: Store, take: Take, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    one = made.image("a", "1")
    take()
    made.image("a", "2", layers=[b"a layer", b"another"])
    read: list[Path] = []
    original = adoption.Adoption.adopt

    def spy(self: adoption.Adoption, digest: Digest, source: Path) -> int:
        read.append(source)
        return original(self, digest, source)

    monkeypatch.setattr(adoption.Adoption, "adopt", spy)
    taken = take()
    assert (taken.repositories, taken.tags, taken.manifests, taken.blobs, taken.present) == (1, 1, 1, 1, 1)
    assert read == [made.data(digest_of(b"another"))]
    before = list(store.records.scan("pushed "))
    again = take()
    assert (again.tags, again.manifests, again.blobs, again.present, again.damaged) == (0, 0, 0, 2, [])
    assert list(store.records.scan("pushed ")) == before  # nothing was written
    assert store.pointer("local/a", Tag("1")).digest == one  # type: ignore[union-attr]


def test_one_that_was_stopped_is_gone_on_with(made: Layout, store: Store) -> None:
    for number in range(5):
        made.image(f"r{number}", "1", layers=[b"%d" % number])
    source = distribution.DistributionTree(made.directory)
    intake = Migration(store, source)

    def names() -> Iterator[str]:
        for name in source.repositories():
            if name == "r3":
                intake.stop()
            yield name

    with pytest.raises(Cancelled):
        intake.run(names(), lambda name: f"local/{name}")
    assert intake.report.manifests == 3
    again = Migration(store, source)
    again.run(source.repositories(), lambda name: f"local/{name}")
    assert (again.report.manifests, again.report.present, again.report.tags) == (2, 3, 2)


def test_what_is_damaged_is_told_and_all_else_is_taken(made: Layout, store: Store, take: Take) -> None:
    good = made.image("a", "good", layers=[b"fine"])
    bad = made.image("a", "bad", layers=[b"fine", b"rotten"])
    gone = made.image("a", "gone", layers=[b"lost"])
    unlinked = made.image("a", "unlinked", layers=[b"elsewhere"])
    index = made.index("a", [good, bad], "index")
    outer = made.index("a", [index], "outer")
    whole = made.index("a", [good], "whole")
    made.data(digest_of(b"rotten")).write_bytes(b"Rotten")
    made.data(digest_of(b"lost")).unlink()
    made.link("a", "_layers", digest_of(b"elsewhere")).unlink()
    made.point("a", "dangling", "sha256:" + "0" * 64)
    made.point("a", "no tag!", good)
    made.tag("a", "good").with_name("link").write_bytes(good.encode())
    old = made.manifest("a", b'{"schemaVersion": 1}', "old")
    strange = made.repository("a") / "_manifests" / "revisions" / "md5" / "00" / "link"
    strange.parent.mkdir(parents=True)
    strange.write_text("md5:00")
    taken = take()
    told = {each.what: each.why for each in taken.damaged}
    assert len(told) == len(taken.damaged)
    assert {each.repository for each in taken.damaged} == {"a"}
    expected = {
        digest_of(b"rotten"): f"it is damaged: its content is {digest_of(b'Rotten')}",
        digest_of(b"lost"): "it is missing: there is a link to it, but no data",
        digest_of(b"elsewhere"): "it is missing: there is no link to it in this repository",
        bad: f"it names {digest_of(b'rotten')}, which is missing or incomplete",
        gone: f"it names {digest_of(b'lost')}, which is missing or incomplete",
        unlinked: f"it names {digest_of(b'elsewhere')}, which is missing or incomplete",
        index: f"it names {bad}, which is missing or incomplete",
        outer: f"it names {index}, which is missing or incomplete",
        "bad": f"it points to {bad}, which is not stored",
        "gone": f"it points to {gone}, which is not stored",
        "unlinked": f"it points to {unlinked}, which is not stored",
        "index": f"it points to {index}, which is not stored",
        "outer": f"it points to {outer}, which is not stored",
        "old": f"it points to {old}, which is not stored",
        "dangling": f"it points to sha256:{'0' * 64}, which is not stored",
        "md5:00": "its digest is invalid, or of an unknown algorithm",
    }
    assert {what: told[what] for what in expected} == expected
    assert set(told) - set(expected) == {old, "no tag!"}
    assert (taken.manifests, taken.tags) == (2, 2)
    assert store.pointer("local/a", Tag("whole")).digest == whole  # type: ignore[union-attr]
    for digest in (bad, gone, unlinked, index, outer):
        with pytest.raises(ManifestUnknown):
            store.manifest("local/a", Digest(digest))
    # What the image that is not whole shares with others is theirs.
    assert store.linked("local/a", Digest(digest_of(b"fine"))) is not None
    assert store.linked("local/a", Digest(digest_of(b"rotten"))) is None


def test_what_was_damaged_is_taken_when_it_is_whole_again(made: Layout, store: Store, take: Take) -> None:
    made.index("a", [made.image("a", layers=[b"rotten"])], "1")
    made.data(digest_of(b"rotten")).write_bytes(b"Rotten")
    assert (take().manifests, take().tags) == (0, 0)
    made.data(digest_of(b"rotten")).write_bytes(b"rotten")
    taken = take()
    assert (taken.manifests, taken.tags, taken.damaged) == (2, 1, [])


def test_an_index_without_some_of_its_children(made: Layout, store: Store, take: Take) -> None:
    """As a cache's directory has them: where the namespace allows it, what is there is taken."""
    child = made.image("a")
    index = made.index("a", [child, "sha256:" + "0" * 64], "1")
    taken = take()
    assert taken.damaged == [
        Damage("a", index, f"it names sha256:{'0' * 64}, which is missing or incomplete"),
        Damage("a", "1", f"it points to {index}, which is not stored"),
    ]
    assert take(sparse=True).damaged == []
    assert store.pointer("local/a", Tag("1")).digest == index  # type: ignore[union-attr]
    made.data(digest_of(b"a layer")).write_bytes(b"A layer")
    made.image("b", "1", layers=[b"b layer"])
    made.data(digest_of(b"b layer")).unlink()
    assert "1" in {each.what for each in take(sparse=True).damaged}  # an image is whole, or it is none


def test_a_child_that_is_here_already_counts(made: Layout, store: Store, take: Take) -> None:
    child = made.image("a")
    take()
    made.link("a", "_manifests/revisions", child).unlink()
    made.index("a", [child], "1")
    assert take().damaged == []


def test_an_index_of_blobs(made: Layout, store: Store, take: Take) -> None:
    """As BuildKit exports its cache: what it lists is no manifest."""
    layers = [b"one", b"two"]
    listed = [described("application/vnd.oci.image.layer.v1.tar+gzip", each) for each in layers]
    listed.append(described("application/vnd.buildkit.cacheconfig.v0", b"{}"))
    for each in (*layers, b"{}"):
        made.blob("a", each)
    index = made.manifest("a", {"schemaVersion": 2, "mediaType": INDEX, "manifests": listed}, "cache")
    taken = take()
    assert (taken.damaged, taken.manifests, taken.blobs) == ([], 1, 3)
    assert store.pointer("local/a", Tag("cache")).digest == index  # type: ignore[union-attr]
    assert store.linked("local/a", Digest(digest_of(b"two"))) is not None


def test_what_is_collected_meanwhile_is_taken_once_more(
    made: Layout, store: Store, take: Take, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. a blob is here, named by nothing  2. it is found here  3. it is collected  4. it is to be linked."""
    path = store.files.path(Digest(digest_of(b"one")))
    path.parent.mkdir(parents=True)
    path.write_bytes(b"one")
    made.image("a", "1", layers=[b"one"])
    transaction, times = SQLiteRecords.transaction, 0

    def collect(self: SQLiteRecords, work: Callable[[object], object], shared: bool = False) -> object:
        nonlocal times
        times += 1
        if times == 1:
            path.unlink()
        return transaction(self, work, shared)

    monkeypatch.setattr(SQLiteRecords, "transaction", collect)
    taken = take()
    assert (taken.damaged, taken.manifests, taken.tags) == ([], 1, 1)
    assert path.read_bytes() == b"one"
    assert times == 3


def test_layers_that_are_had_elsewhere_may_lack(made: Layout, take: Take) -> None:
    foreign = {
        **described("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", b"of Windows"),
        "urls": ["https://registry.example/base"],
    }
    made.image("a", "1", layers=[])
    made.manifest("a", {"schemaVersion": 2, "mediaType": MANIFEST, "layers": [foreign]}, "2")
    assert take().damaged == []


async def test_a_blob_pushed_by_sha512(made: Layout, store: Store, take: Take) -> None:
    asked = made.blob("a", b"content", "sha512")
    layer = described("application/vnd.oci.image.layer.v1.tar", b"content", "sha512")
    made.manifest("a", {"schemaVersion": 2, "mediaType": MANIFEST, "layers": [layer]}, "1")
    taken = take()
    assert (taken.damaged, taken.blobs) == ([], 1)
    assert await content(store, "a", asked) == b"content"
    # By its content it is what its link says, but not what it is asked for by.
    wrong = f"sha512:{SHA512}"
    link = made.link("b", "_layers", wrong)
    link.parent.mkdir(parents=True)
    link.write_text(digest_of(b"content"))
    body = {"schemaVersion": 2, "mediaType": MANIFEST, "layers": [{**layer, "digest": wrong}]}
    made.manifest("b", body, "1")
    told = {each.what: each.why for each in take().damaged}
    assert re.match("it is damaged: its content is sha512:", told[wrong])


def test_uploads_and_blobs_that_no_manifest_names_stay(made: Layout, store: Store, take: Take) -> None:
    made.image("a", "1")
    upload = made.repository("a") / "_uploads" / "0b1c" / "data"
    upload.parent.mkdir(parents=True)
    upload.write_bytes(b"half of it")
    made.blob("a", b"of nobody")
    assert take().blobs == 2
    assert not store.holds(Digest(digest_of(b"of nobody")))
    assert not store.holds(Digest(digest_of(b"half of it")))


def test_tags_move_as_they_moved_there_but_not_past_a_push_here(
    made: Layout, store: Store, take: Take, clock: Clock
) -> None:
    one, two = made.image("a", layers=[b"1"]), made.image("a", layers=[b"2"])
    for tag in ("moved", "pushed", "immutable"):
        made.point("a", tag, one, at=clock() - 100)
    rules = {"immutable": lambda tag: tag == "immutable"}
    assert take(**rules).tags == 3
    made.point("a", "moved", two, at=clock() + 50)
    made.point("a", "immutable", two, at=clock() + 50)
    made.point("a", "pushed", two, at=clock() + 50)
    clock.advance(100)
    pushed = Manifest(MANIFEST, made.data(one).read_bytes(), Digest(one))
    store.records.transaction(lambda batch: store.put_tags(batch, "local/a", {Tag("pushed"): pushed.digest}))
    taken = take(**rules)
    assert taken.tags == 1
    assert taken.kept == [
        Damage("a", "immutable", f"it stays {one}: it is immutable"),
        Damage("a", "pushed", f"it stays {one}: it was pushed here since"),
    ]
    pointers = {tag: store.pointer("local/a", Tag(tag)) for tag in ("moved", "pushed", "immutable")}
    assert {tag: each.digest for tag, each in pointers.items() if each} == {
        "moved": two,
        "pushed": one,
        "immutable": one,
    }


def test_tags_count_as_pushed_now_in_the_order_in_which_they_were(
    made: Layout, store: Store, take: Take, clock: Clock
) -> None:
    image = made.image("a")
    for tag, age in (("1.9", 300 * DAY), ("1.10", 200 * DAY), ("1.2", 400 * DAY), ("1.11", 100 * DAY)):
        made.point("a", tag, image, at=clock() - age)
    assert take().tags == 4
    leases = Leases(store, DAY, clock)
    clock.advance(2 * DAY)
    for rule, left in (
        (KeepTags(pushed_within=30 * DAY), ["1.10", "1.11", "1.2", "1.9"]),
        (KeepTags(last=3), ["1.10", "1.11", "1.9"]),
        (KeepTags(last=2), ["1.10", "1.11"]),
    ):
        Collection(store, lambda name, rule=rule: RetentionRules(keep_tags=(rule,)), leases, clock).run()  # type: ignore[misc]
        assert store._tags("local/a", "", None) == left


def test_a_tag_that_is_pushed_meanwhile_stays(
    made: Layout, store: Store, take: Take, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. a tag is not here  2. it is pushed, or its manifest is deleted  3. it is to be set."""
    one, two = Digest(made.image("a", layers=[b"1"])), Digest(made.image("a", layers=[b"2"]))
    assert take().manifests == 2
    for tag in ("immutable", "pushed", "same"):
        made.point("a", tag, one, at=clock() + (50 if tag == "immutable" else -50))
    made.point("a", "deleted", two, at=clock())
    tags = distribution.DistributionTree.tags

    def meanwhile(tree: distribution.DistributionTree, repository: str) -> Iterator[str]:
        yield from tags(tree, repository)
        now = {Tag("immutable"): two, Tag("pushed"): two, Tag("same"): one}
        store.records.transaction(lambda batch: store.put_tags(batch, "local/a", now))
        store.records.delete(MANIFEST_RECORD.key("local/a", two))

    monkeypatch.setattr(distribution.DistributionTree, "tags", meanwhile)
    taken = take(immutable=lambda tag: tag == "immutable")
    assert (taken.tags, taken.damaged) == (0, [])
    assert taken.kept == [
        Damage("a", "deleted", f"{two} was deleted meanwhile"),
        Damage("a", "immutable", f"it stays {two}: it is immutable"),
        Damage("a", "pushed", f"it stays {two}: it was pushed here since"),
    ]


async def test_what_loses_its_tag_is_kept_for_the_grace_period(
    made: Layout, store: Store, take: Take, clock: Clock
) -> None:
    hosted = Hosted("local", store, leases := Leases(store, 3600.0, clock), clock=clock)
    one, two = made.image("a", "1", layers=[b"1"]), made.image("a", layers=[b"2"])
    take(retag=hosted.retag)
    clock.advance(7200)
    made.point("a", "1", two, at=clock())
    assert take(retag=hosted.retag).tags == 1
    assert leases.of("local/a", one) == clock()


def test_a_dry_run_tells_and_takes_nothing(made: Layout, store: Store, take: Take) -> None:
    image = made.image("a", "1", layers=[b"one", b"two"])
    made.index("a", [image], "2")
    made.image("b", "1", layers=[b"lost"])
    made.data(digest_of(b"lost")).unlink()
    would = take(dry_run=True)
    assert list(store.records.scan("")) == []
    assert not store.holds(Digest(digest_of(b"one")))
    taken = take()
    assert taken.linked == taken.blobs
    assert would == MigrationReport(
        taken.repositories, taken.tags, taken.manifests, taken.blobs, taken.bytes, 0, 0, [], taken.damaged
    )


def test_more_than_fits_into_one_group(made: Layout, store: Store, take: Take) -> None:
    images = [made.image("a", f"v{number}", layers=[b"%d" % (number % 7)]) for number in range(200)]
    made.index("a", [made.index("a", images[:100]), made.index("a", images[100:])], "all")
    taken = take()
    assert (taken.damaged, taken.manifests, taken.tags, taken.blobs) == ([], 7 + 3, 201, 8)


def test_a_repository_that_cannot_be_read_is_told(
    made: Layout, store: Store, take: Take, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.image("a", "1")
    made.image("b", "1")
    original = distribution.DistributionTree.tags

    def fail(self: distribution.DistributionTree, repository: str) -> Iterator[str]:
        if repository == "a":
            raise PermissionError(13, "Permission denied")
        return original(self, repository)

    monkeypatch.setattr(distribution.DistributionTree, "tags", fail)
    taken = take()
    assert taken.damaged == [Damage("a", "", "it cannot be read: Permission denied")]
    assert taken.tags == 1


def test_what_counts_on_a_blob_comes_when_the_disk_has_it(
    made: Layout, store: Store, take: Take, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.image("a", "1", layers=[b"one", b"two"])
    steps: list[str] = []
    sync, transaction, fdatasync = adoption.sync, SQLiteRecords.transaction, os.fdatasync
    blobs = store.files.root / "blobs"

    def spy(directory: Path) -> None:
        steps.append(f"sync {directory.relative_to(store.files.root)}")
        sync(directory)

    monkeypatch.setattr(adoption, "sync", spy)
    monkeypatch.setattr(os, "fdatasync", lambda file: (steps.append("data"), fdatasync(file)))
    monkeypatch.setattr(
        SQLiteRecords, "transaction", lambda *arguments: (steps.append("records"), transaction(*arguments))[1]
    )
    take()
    placed = [store.files.path(Digest(digest_of(each))) for each in (b"one", b"two", b'{"of": "a"}')]
    named = {each.parent for each in placed} | {blobs / "sha256", blobs, blobs.parent}
    synced = {f"sync {each.relative_to(blobs.parent)}" for each in named}
    # The data of each, the directories of all at once, then what names them; the tag last.
    assert steps[:3] == ["data"] * 3
    assert set(steps[3:-2]) == synced
    assert len(steps[3:-2]) == len(synced)
    assert steps[-2:] == ["records", "records"]


def test_what_was_placed_before_a_death_is_not_read_again(
    made: Layout, store: Store, take: Take, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. its blobs are placed  2. it dies before anything names them  3. the next run links them."""
    image = made.image("a", "1", layers=[b"one"])

    class Death(BaseException):
        pass

    def die(*arguments: object) -> None:
        raise Death

    with monkeypatch.context() as patch:
        patch.setattr(SQLiteRecords, "transaction", die)
        with pytest.raises(Death):
            take()
    assert store.holds(Digest(digest_of(b"one")))
    assert list(store.records.scan("")) == []
    monkeypatch.setattr(adoption.Adoption, "adopt", lambda *_: pytest.fail("it was read again"))
    taken = take()
    assert (taken.manifests, taken.blobs, taken.damaged) == (1, 0, [])
    assert store.pointer("local/a", Tag("1")).digest == image  # type: ignore[union-attr]


@pytest.mark.errors("disk.failed")
def test_our_own_disk_failing_ends_it(
    made: Layout, store: Store, take: Take, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.image("a", "1")

    def fail(self: BlobFiles, partial: Path, file: int, path: Path) -> list[Path]:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(BlobFiles, "place", fail)
        with pytest.raises(StorageFailed):
            take()
    assert take().tags == 1

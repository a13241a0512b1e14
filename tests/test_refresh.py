"""Refreshing: what is asked of the origin, what is whole then, and when it is due."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from structlog.testing import LogCapture

from proxy.cache.cache import Cache
from proxy.cache.fills import Fills
from proxy.cache.keep_fresh import Freshener
from proxy.cache.policy import Policy
from proxy.cache.refresh import FILLS, RefreshResult, refresh
from proxy.namespaces.routing import Member, Namespaces
from proxy.telemetry.metrics import Metrics
from proxy.upstream import client, requests
from proxy.upstream.connect import Connect
from proxy.upstream.credentials import Credentials
from proxy.upstream.transport import RETRIES
from storage.disk.blobs import BlobFiles
from storage.disk.records import SQLiteRecords
from storage.errors import (
    BlobUnknown,
    ManifestInvalid,
    ManifestUnknown,
    NameUnknown,
    OriginFailed,
    RegistryError,
    StorageFailed,
    TooManyRequests,
    Unavailable,
    Unsupported,
)
from storage.graph import fallback_tag, walk
from storage.maintenance.pins import Pin, Pins
from storage.oci import ARTIFACTS, OCI_INDEX, OCI_MANIFEST, Digest, Tag
from storage.store import Store
from tests.conftest import Clock
from tests.upstream import Hold, Image, Manifest, Refuse, RetryAfter, Status, Upstream, digest_of

NAME = "up/a/b"
TAG = Tag("latest")
PIN = f"{NAME}:{TAG}"
HOUR = 3600.0
HEAD = "HEAD manifest a/b:latest"


@dataclass
class Rig:
    """A cache `up` and a store `own`, as namespaces."""

    store: Store
    fills: Fills
    cache: Cache
    namespaces: Namespaces
    upstream: Upstream
    clock: Clock
    reserve: int = 0

    async def refresh(
        self, reference: str = TAG, *platforms: str, referrers: bool = False, sparing: bool = False
    ) -> RefreshResult:
        named = Digest(reference) if ":" in reference else Tag(reference)
        return await refresh(self.namespaces, NAME, named, platforms, referrers, sparing)

    def restart(self, policy: Policy) -> None:
        """Serve the same store by a cache with another policy."""
        cache = Cache("up", self.cache.origin, self.store, self.fills, policy, self.clock)
        self.namespaces = Namespaces([Member(cache, "up"), Member(self.store, "own")])

    def pointed(self, tag: str) -> Digest:
        """What the tag is here."""
        pointer = self.store.pointer(NAME, Tag(tag))
        assert pointer is not None
        return pointer.digest

    def holds(self, *digests: str) -> list[bool]:
        """Whether the repository shows them, and their bytes are here."""
        return [
            self.store.holds(Digest(each)) and self.store.records.get(f"link {NAME} {each}") is not None
            for each in digests
        ]

    def pinning(self, *pins: Pin) -> Freshener:
        return Freshener(self.namespaces, self.store, Pins(self.store, pins), self.clock)


def policy(offline: bool = False, drop: bool = False) -> Policy:
    return Policy(lambda tag: 600.0, offline=offline, drop_deleted=drop)


@pytest.fixture
async def rig(tmp_path: Path, upstream: Upstream, clock: Clock) -> AsyncIterator[Rig]:
    metrics = Metrics()
    connect = Connect(plain_http=True, header_timeout=2, progress_timeout=2)
    told = requests.UpstreamSettings(upstream.url, connect, reserve=lambda limit: rig.reserve)
    origin = client.UpstreamRegistry("up", told, [Credentials()], metrics, clock)
    store = Store(BlobFiles(tmp_path, clock), SQLiteRecords(tmp_path / "records"), clock)
    fills = Fills(store, metrics, backoff=0)
    cache = Cache("up", origin, store, fills, policy(), clock)
    namespaces = Namespaces([Member(cache, "up"), Member(store, "own")])
    rig = Rig(store, fills, cache, namespaces, upstream, clock)
    yield rig
    await fills.close()
    await namespaces.close()


def asked(upstream: Upstream) -> list[str]:
    """The requests, and they are forgotten.  Those for blobs may come in any order."""
    found = upstream.log
    upstream.clear()
    return sorted(found)


def fetches(image: Image, *first: str) -> list[str]:
    return sorted([*first, *(f"GET blob a/b@{each[:19]}" for each in (image.config, *image.layers))])


def signatures(*manifests: Manifest) -> list[str]:
    """The tags that cosign would have made are asked for, in vain."""
    return [
        f"GET manifest a/b:{each.digest.replace(':', '-')}.{kind}"
        for each in manifests
        for kind in ("sig", "att", "sbom")
    ]


def told(events: LogCapture, name: str) -> list[dict[str, object]]:
    return [dict(each) for each in events.entries if each["event"] == name]


# One refreshing


async def test_what_was_never_pulled_comes_whole(rig: Rig, upstream: Upstream) -> None:
    image = upstream.image("a/b", "latest", [b"one", b"three"])
    found = await rig.refresh()
    assert asked(upstream) == fetches(image, "GET manifest a/b:latest")
    assert rig.holds(image.config, *image.layers) == [True] * 3
    assert (found.digest, found.new, found.moved) == (image.digest, True, None)
    size = len(b"one") + len(b"three") + len(upstream.repositories["a/b"].blobs[image.config])
    assert (found.manifests, found.blobs, found.fetched, found.bytes) == (1, 3, 3, size)


async def test_what_has_not_changed_costs_one_head(rig: Rig, upstream: Upstream) -> None:
    image = upstream.image("a/b", "latest")
    await rig.refresh()
    upstream.clear()
    for _ in range(2):  # fresh as it is
        found = await rig.refresh()
        assert asked(upstream) == [HEAD]
    assert not found.changed
    assert (found.digest, found.blobs, found.fetched, found.bytes) == (image.digest, 2, 0, 0)


async def test_it_is_validated_then(rig: Rig, upstream: Upstream, clock: Clock) -> None:
    upstream.image("a/b", "latest")
    await rig.refresh()
    clock.advance(500)
    await rig.refresh()
    upstream.clear()
    clock.advance(500)
    await rig.namespaces.get_manifest(NAME, TAG)
    assert asked(upstream) == []


async def test_a_tag_that_moved_fetches_what_is_new(rig: Rig, upstream: Upstream) -> None:
    old = upstream.image("a/b", "latest", [b"base", b"old"])
    await rig.refresh()
    upstream.clear()
    new = upstream.image("a/b", "latest", [b"base", b"new"])
    found = await rig.refresh()
    # The config says which layers there are, so it is another one as well.
    assert asked(upstream) == sorted(
        [
            HEAD,
            f"GET manifest a/b@{new.digest[:19]}",
            f"GET blob a/b@{new.config[:19]}",
            f"GET blob a/b@{digest_of(b'new')[:19]}",
        ]
    )
    assert (found.moved, found.digest, found.new) == (old.digest, new.digest, False)
    assert (found.blobs, found.fetched) == (3, 2)
    assert rig.holds(new.config, *new.layers) == [True] * 3


async def test_what_went_from_the_store_comes_again(rig: Rig, upstream: Upstream) -> None:
    image = upstream.image("a/b", "latest", [b"one", b"two"])
    await rig.refresh()
    upstream.clear()
    rig.store.files.path(Digest(image.layers[1])).unlink()
    found = await rig.refresh()
    assert asked(upstream) == sorted([HEAD, f"GET blob a/b@{image.layers[1][:19]}"])
    assert (found.fetched, found.bytes, found.moved, found.changed) == (1, 3, None, True)


async def test_bytes_of_another_repository_are_linked(rig: Rig, upstream: Upstream) -> None:
    upstream.image("c/d", "latest")
    image = upstream.image("a/b", "latest")
    await refresh(rig.namespaces, "up/c/d", TAG)
    upstream.clear()
    found = await rig.refresh()
    assert asked(upstream) == sorted(
        [
            "GET manifest a/b:latest",
            f"HEAD blob a/b@{image.config[:19]}",
            f"HEAD blob a/b@{image.layers[0][:19]}",
        ]
    )
    assert (found.blobs, found.fetched, found.bytes) == (2, 0, 0)
    assert rig.holds(image.config, *image.layers) == [True] * 2


async def test_an_index_brings_the_children_of_the_platforms(rig: Rig, upstream: Upstream) -> None:
    amd64 = upstream.image("a/b", layers=[b"base", b"amd64"])
    arm64 = upstream.image("a/b", layers=[b"base", b"arm64"], platform="linux/arm64/v8")
    index = upstream.index("a/b", "latest", [amd64, arm64])
    found = await rig.refresh(TAG, "linux/arm64")
    assert asked(upstream) == fetches(
        arm64, "GET manifest a/b:latest", f"GET manifest a/b@{arm64.digest[:19]}"
    )
    assert (found.digest, found.manifests, found.blobs) == (index.digest, 2, 3)
    assert rig.holds(*amd64.layers) == [True, False]
    found = await rig.refresh()
    assert asked(upstream) == sorted(
        [
            HEAD,
            f"GET manifest a/b@{amd64.digest[:19]}",
            f"GET blob a/b@{amd64.config[:19]}",
            f"GET blob a/b@{amd64.layers[1][:19]}",
        ]
    )
    assert (found.manifests, found.blobs, found.fetched) == (3, 5, 2)


async def test_by_digest_nothing_is_validated(rig: Rig, upstream: Upstream) -> None:
    image = upstream.image("a/b")
    assert (await rig.refresh(image.digest)).changed
    assert asked(upstream) == fetches(image, f"GET manifest a/b@{image.digest[:19]}")
    assert not (await rig.refresh(image.digest)).changed
    assert asked(upstream) == []


async def test_what_refers_to_it_comes_where_wanted(rig: Rig, upstream: Upstream) -> None:
    image = upstream.image("a/b", "latest")
    bill = upstream.artifact("a/b", image, "application/sbom")
    signature = upstream.artifact("a/b", bill, "application/signature")
    await rig.refresh()
    upstream.clear()
    found = await rig.refresh(referrers=True)
    assert asked(upstream) == sorted(
        [
            HEAD,
            f"GET manifest a/b@{bill.digest[:19]}",
            f"GET manifest a/b@{signature.digest[:19]}",
            f"GET blob a/b@{digest_of(b'{}')[:19]}",
            *(f"GET referrers a/b@{each.digest[:19]}" for each in (image, bill, signature)),
            *signatures(image),
        ]
    )
    assert (found.manifests, found.blobs, found.fetched) == (3, 3, 1)
    kept = Pins(rig.store, [Pin(PIN)]).pinned()
    assert {bill.digest, signature.digest, digest_of(b"{}")} <= kept.digests


async def test_without_a_referrers_api_there_are_none(rig: Rig, upstream: Upstream) -> None:
    upstream.referrers_api = False
    image = upstream.image("a/b", "latest")
    assert (await rig.refresh(referrers=True)).manifests == 1
    assert f"GET manifest a/b:{image.digest.replace(':', '-')}" in upstream.log


async def test_without_a_referrers_api_there_are_those_of_the_fallback_tag(
    rig: Rig, upstream: Upstream
) -> None:
    upstream.referrers_api = False
    image = upstream.image("a/b", "latest")
    bill = upstream.artifact("a/b", image, "application/sbom")
    fallback = upstream.index("a/b", image.digest.replace(":", "-"), [bill])
    found = await rig.refresh(referrers=True)
    assert (found.manifests, found.referrers) == (3, 2)
    assert rig.holds(digest_of(b"{}")) == [True]
    kept = Pins(rig.store, [Pin(PIN)]).pinned()
    assert {bill.digest, digest_of(b"{}"), fallback.digest} <= kept.digests
    assert (NAME, fallback_tag(Digest(image.digest))) in kept.references


async def test_signatures_come_by_the_tags_that_cosign_makes(rig: Rig, upstream: Upstream) -> None:
    image = upstream.image("a/b", "latest")
    signature = upstream.image("a/b", f"{image.digest.replace(':', '-')}.sig", [b"signed"])
    found = await rig.refresh(referrers=True)
    assert (found.manifests, found.referrers) == (2, 1)
    assert rig.holds(*signature.layers) == [True]
    kept = Pins(rig.store, [Pin(PIN)]).pinned()
    assert {signature.digest, *signature.layers} <= kept.digests


async def test_below_the_reserve_what_is_not_here_is_left_to_clients(rig: Rig, upstream: Upstream) -> None:
    upstream.image("a/b", "latest")
    image = upstream.image("a/b", "other")
    upstream.ratelimit = 100, 3600, 10
    await rig.refresh()
    rig.reserve = 20
    assert (await rig.refresh(rig.pointed("latest"), sparing=True)).fetched == 0
    upstream.clear()
    with pytest.raises(TooManyRequests):
        await rig.refresh("other", sparing=True)
    assert asked(upstream) == []
    assert (await rig.refresh("other")).digest == image.digest


async def test_some_blobs_come_at_once_but_not_all(rig: Rig, upstream: Upstream) -> None:
    upstream.image("a/b", "latest", [bytes([number]) * 100 for number in range(9)])
    gate = asyncio.Event()
    held = [Hold(gate, after=None) for _ in range(FILLS)]
    for hold in held:
        upstream.next("GET", "blob", hold)
    refreshing = asyncio.create_task(rig.refresh())
    await asyncio.gather(*(hold.reached.wait() for hold in held))
    assert sum(line.startswith("GET blob") for line in upstream.log) == FILLS
    gate.set()
    assert (await refreshing).fetched == 10


async def test_a_blob_that_comes_in_already_is_waited_for(rig: Rig, upstream: Upstream) -> None:
    image = upstream.image("a/b", "latest", [b"a layer" * 1000])
    hold = Hold(gate := asyncio.Event(), after=100)
    upstream.next("GET", image.layers[0], hold)
    blob = await rig.namespaces.get_blob(NAME, Digest(image.layers[0]))
    await hold.reached.wait()
    refreshing = asyncio.create_task(rig.refresh())
    gate.set()
    await refreshing
    await blob.close()
    assert asked(upstream) == fetches(image, "GET manifest a/b:latest")
    assert rig.holds(image.config, *image.layers) == [True] * 2


# What goes wrong in one


async def test_a_tag_that_is_not_there_is_unknown(rig: Rig, upstream: Upstream) -> None:
    upstream.image("a/b", "other")
    with pytest.raises(ManifestUnknown):
        await rig.refresh()
    upstream.image("a/b", "latest")
    await rig.refresh()  # whatever was remembered


@pytest.mark.parametrize("drop", [False, True])
async def test_a_tag_that_went_is_unknown_also_where_it_is_kept(
    rig: Rig, upstream: Upstream, drop: bool
) -> None:
    upstream.image("a/b", "latest")
    await rig.refresh()
    rig.restart(policy(drop=drop))
    upstream.delete_tag("a/b", "latest")
    with pytest.raises(ManifestUnknown):
        await rig.refresh()
    assert (rig.store.pointer(NAME, TAG) is None) == drop


async def test_an_origin_that_fails_is_no_revalidation(rig: Rig, upstream: Upstream) -> None:
    image = upstream.image("a/b", "latest")
    await rig.refresh()
    upstream.next("HEAD", "latest", Status(503), times=RETRIES + 1)
    with pytest.raises(Unavailable):
        await rig.refresh()
    found = await rig.namespaces.get_manifest(NAME, TAG)
    assert found.digest == image.digest
    await rig.refresh()  # also in the pause that it makes


async def test_offline_nothing_is_asked(rig: Rig, upstream: Upstream) -> None:
    upstream.image("a/b", "latest")
    await rig.refresh()
    upstream.clear()
    rig.restart(policy(offline=True))
    for tag in ("latest", "other"):
        with pytest.raises(Unavailable, match="up is set offline"):
            await rig.refresh(tag)
    assert asked(upstream) == []


async def test_what_the_origin_lacks_is_told_when_the_rest_is_here(rig: Rig, upstream: Upstream) -> None:
    one, two = upstream.image("a/b", layers=[b"one", b"gone"]), upstream.image("a/b", layers=[b"two"])
    upstream.index("a/b", "latest", [one, two])
    upstream.delete_blob("a/b", digest_of(b"gone"))
    with pytest.raises(BlobUnknown):
        await rig.refresh()
    assert rig.holds(one.config, *one.layers, two.config, *two.layers) == [True, True, False, True, True]
    upstream.blob("a/b", b"gone")
    upstream.delete_manifest("a/b", two.digest)
    rig.store.records.delete(f"manifest {NAME} {two.digest}")
    rig.clock.advance(60)  # it is remembered as unknown for a while
    with pytest.raises(ManifestUnknown):
        await rig.refresh()
    assert rig.holds(*one.layers) == [True, True]


async def test_layers_that_are_to_be_had_elsewhere_may_be_missing(rig: Rig, upstream: Upstream) -> None:
    config = upstream.blob("a/b", b"{}")
    foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
    upstream.manifest(
        "a/b",
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": {"mediaType": "application/json", "digest": config, "size": 2},
            "layers": [{"mediaType": foreign, "digest": digest_of(b"elsewhere"), "size": 9}],
        },
        tag="latest",
    )
    freshener = rig.pinning(Pin(PIN, HOUR))
    (found,) = await freshener.run_once()
    assert isinstance(found, RefreshResult)
    assert (found.blobs, found.fetched) == (2, 1)
    assert await freshener.due() == []


async def test_the_blobs_that_an_index_lists_are_fetched(rig: Rig, upstream: Upstream) -> None:
    layer = upstream.blob("a/b", b"a layer")
    listed = {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": layer, "size": 7}
    upstream.manifest(
        "a/b", {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [listed]}, tag="latest"
    )
    freshener = rig.pinning(Pin(PIN, HOUR))
    (found,) = await freshener.run_once()
    assert isinstance(found, RefreshResult)
    assert (found.manifests, found.blobs, found.fetched) == (1, 1, 1)
    assert rig.holds(layer) == [True]
    assert await freshener.due() == []


@pytest.mark.parametrize("media_type", ARTIFACTS)
async def test_the_blobs_of_an_artifact_are_fetched(rig: Rig, upstream: Upstream, media_type: str) -> None:
    blob = upstream.blob("a/b", b"an sbom")
    listed = [{"mediaType": "application/json", "digest": blob, "size": 7}]
    upstream.manifest("a/b", {"mediaType": media_type, "blobs": listed}, tag="latest")
    found = await rig.refresh()
    assert (found.manifests, found.blobs, found.fetched) == (1, 1, 1)
    assert rig.holds(blob) == [True]
    upstream.delete_blob("a/b", blob)
    rig.store.files.path(Digest(blob)).unlink()
    with pytest.raises(BlobUnknown):
        await rig.refresh()


@pytest.mark.parametrize(
    "body",
    [
        {"schemaVersion": 1, "fsLayers": [{"blobSum": digest_of(b"a layer")}]},
        {"mediaType": "application/vnd.example.thing+json", "things": [digest_of(b"a layer")]},
        {"layers": [], "Layers": [{"mediaType": "a/b", "digest": digest_of(b"a layer"), "size": 7}]},
    ],
)
async def test_what_names_content_that_cannot_be_read_is_told(
    rig: Rig, upstream: Upstream, body: dict[str, object]
) -> None:
    upstream.blob("a/b", b"a layer")
    upstream.manifest("a/b", json.dumps(body).encode(), str(body.get("mediaType", OCI_MANIFEST)), "latest")
    with pytest.raises(ManifestInvalid, match="cannot be read"):
        await rig.refresh()
    assert rig.holds(digest_of(b"a layer")) == [False]
    assert (await rig.namespaces.get_manifest(NAME, TAG)).content  # clients get it all the same


@pytest.mark.errors("fill.failed")
async def test_a_fill_that_fails_is_told(rig: Rig, upstream: Upstream, tmp_path: Path) -> None:
    image = upstream.image("a/b", "latest", [b"a layer" * 100])
    upstream.blob("a/b", b"other")
    upstream.repositories["a/b"].blobs[image.layers[0]] = b"a Layer" * 100
    with pytest.raises(OriginFailed, match="wrong content"):
        await rig.refresh()
    assert rig.holds(*image.layers) == [False]


async def test_what_cannot_be_stored_is_told(
    rig: Rig, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream.image("a/b", "latest")

    async def full(digest: Digest) -> None:
        raise StorageFailed("no room")

    monkeypatch.setattr(rig.store.files, "resume", full)
    with pytest.raises(StorageFailed, match="could not be stored"):
        await rig.refresh()


async def test_only_a_cache_is_refreshed(rig: Rig) -> None:
    with pytest.raises(Unsupported, match="own is not a cache"):
        await refresh(rig.namespaces, "own/a/b", TAG)
    with pytest.raises(Unsupported, match="own is not a cache"):
        await rig.namespaces.fill_blob("own/a/b", Digest.of(b""))
    with pytest.raises(NameUnknown):
        await refresh(rig.namespaces, "elsewhere/a/b", TAG)


async def test_many_that_ask_at_once_are_one_request(rig: Rig, upstream: Upstream) -> None:
    upstream.image("a/b", "latest")
    await rig.refresh()
    rig.clock.advance(HOUR)
    upstream.clear()
    hold = Hold(gate := asyncio.Event(), after=None)
    upstream.next("HEAD", "latest", hold)
    asking = [asyncio.ensure_future(rig.refresh()) for _ in range(5)]
    await hold.reached.wait()
    pulling = asyncio.ensure_future(rig.namespaces.get_manifest(NAME, TAG))
    gate.set()
    await asyncio.gather(pulling, *asking)
    assert asked(upstream) == [HEAD]


# When


async def test_a_pin_fetches_in_the_beginning(rig: Rig, upstream: Upstream, events: LogCapture) -> None:
    image = upstream.image("a/b", "latest")
    freshener = rig.pinning(pin := Pin(PIN, HOUR))
    assert await freshener.due() == [(NAME, TAG, pin)]
    (found,) = await freshener.run_once()
    assert isinstance(found, RefreshResult)
    assert found.digest == image.digest
    assert asked(upstream) == fetches(
        image, "GET manifest a/b:latest", f"GET referrers a/b@{image.digest[:19]}", *signatures(image)
    )
    (event,) = told(events, "pin.refreshed")
    assert (event["namespace"], event["repository"], event["reference"]) == ("up", "a/b", "latest")
    assert (event["digest"], event["old"], event["blobs"]) == (image.digest, None, 2)
    assert await freshener.due() == []
    assert await freshener.run_once() == []
    assert asked(upstream) == []


async def test_it_is_due_when_its_time_has_passed(
    rig: Rig, upstream: Upstream, clock: Clock, events: LogCapture
) -> None:
    upstream.image("a/b", "latest")
    freshener = rig.pinning(Pin(PIN, HOUR))
    await freshener.run_once()
    upstream.clear()
    begun = clock.now
    assert await freshener.next_at() == begun + HOUR
    clock.advance(HOUR - 1)
    assert await freshener.due() == []
    clock.advance(1)
    (found,) = await freshener.run_once()
    assert isinstance(found, RefreshResult)
    assert not found.changed
    assert asked(upstream) == [HEAD]
    assert len(told(events, "pin.refreshed")) == 1  # the first
    assert await freshener.next_at() == begun + 2 * HOUR


async def test_a_pull_that_validates_puts_it_off(rig: Rig, upstream: Upstream, clock: Clock) -> None:
    upstream.image("a/b", "latest")
    freshener = rig.pinning(Pin(PIN, HOUR))
    await freshener.run_once()
    clock.advance(HOUR / 2)
    await rig.namespaces.get_manifest(NAME, TAG)
    clock.advance(HOUR / 2)
    assert await freshener.due() == []


async def test_a_clock_that_was_set_back_puts_nothing_off(rig: Rig, upstream: Upstream, clock: Clock) -> None:
    upstream.image("a/b", "latest")
    freshener = rig.pinning(pin := Pin(PIN, HOUR))
    await freshener.run_once()
    clock.advance(-86400)
    assert await freshener.due() == [(NAME, TAG, pin)]


async def test_what_a_client_pulled_in_part_is_made_whole(rig: Rig, upstream: Upstream) -> None:
    amd64, arm64 = upstream.image("a/b", layers=[b"1"]), upstream.image("a/b", platform="linux/arm64")
    index = upstream.index("a/b", "latest", [amd64, arm64])
    await rig.namespaces.get_manifest(NAME, TAG)  # fresh, and nothing else
    freshener = rig.pinning(Pin(PIN, HOUR))
    (found,) = await freshener.run_once()
    assert isinstance(found, RefreshResult)
    assert (found.manifests, found.fetched) == (3, 4)
    assert not walk(rig.store, NAME, Digest(index.digest)).missing
    # And again where something went.
    rig.store.files.path(Digest(amd64.layers[0])).unlink()
    assert len(await freshener.due()) == 1
    await freshener.run_once()
    assert rig.holds(*amd64.layers) == [True]
    assert await freshener.due() == []


async def test_of_other_platforms_nothing_is_missed(rig: Rig, upstream: Upstream) -> None:
    amd64, arm64 = upstream.image("a/b", layers=[b"1"]), upstream.image("a/b", platform="linux/arm64")
    upstream.index("a/b", "latest", [amd64, arm64])
    freshener = rig.pinning(Pin(PIN, HOUR, ("linux/amd64",)))
    await freshener.run_once()
    assert await freshener.due() == []
    assert rig.holds(*amd64.layers, *arm64.layers) == [True, False]


async def test_a_glob_refreshes_what_is_known_here(rig: Rig, upstream: Upstream) -> None:
    for tag in ("1", "2", "x"):
        upstream.image("a/b", tag)
    for tag in ("1", "x"):
        await rig.namespaces.get_manifest(NAME, Tag(tag))
    freshener = rig.pinning(pin := Pin(f"{NAME}:[0-9]", HOUR))
    assert await freshener.due() == [(NAME, Tag("1"), pin)]


async def test_without_keep_fresh_nothing_is_refreshed(rig: Rig, upstream: Upstream, clock: Clock) -> None:
    upstream.image("a/b", "latest")
    await rig.namespaces.get_manifest(NAME, TAG)
    freshener = rig.pinning(Pin(PIN), Pin(f"{NAME}:other"))
    clock.advance(365 * 86400)
    assert await freshener.run_once() == []
    assert await freshener.next_at() is None


async def test_a_digest_is_fetched_once(rig: Rig, upstream: Upstream, clock: Clock) -> None:
    image = upstream.image("a/b")
    freshener = rig.pinning(Pin(f"{NAME}@{image.digest}", HOUR))
    (found,) = await freshener.run_once()
    assert isinstance(found, RefreshResult)
    clock.advance(365 * 86400)
    assert await freshener.run_once() == []
    assert await freshener.next_at() is None


@pytest.mark.parametrize(
    ("platforms", "more", "together"),
    [
        (("linux/amd64",), ("linux/arm64",), ("linux/amd64", "linux/arm64")),
        (("linux/amd64",), ("linux/amd64",), ("linux/amd64",)),
        (("linux/amd64",), (), ()),
        ((), ("linux/amd64",), ()),
    ],
)
async def test_pins_of_one_tag_count_together(
    rig: Rig, platforms: Sequence[str], more: Sequence[str], together: Sequence[str]
) -> None:
    freshener = rig.pinning(Pin(PIN, 2 * HOUR, tuple(platforms)), Pin(PIN, HOUR, tuple(more)), Pin(PIN))
    assert await freshener.due() == [(NAME, TAG, Pin(PIN, HOUR, tuple(together)))]


async def test_a_pin_by_command_counts_at_once_until_it_is_removed(rig: Rig, clock: Clock) -> None:
    pins = Pins(rig.store, (), clock)
    freshener = Freshener(rig.namespaces, rig.store, pins, clock)
    assert await freshener.due() == []
    pins.add(Pin(PIN, HOUR))
    assert [each[:2] for each in await freshener.due()] == [(NAME, TAG)]
    pins.remove(PIN)
    assert await freshener.due() == []


async def test_a_pin_that_can_match_nothing_disturbs_nobody(rig: Rig, upstream: Upstream) -> None:
    upstream.image("a/b", "latest")
    odd = [Pin(pattern, HOUR) for pattern in ("up/a/_b:1", "up/a/b:!", "up/a/b@sha256:1")]
    assert len(await rig.pinning(*odd, Pin(PIN, HOUR)).run_once()) == 1


# Failures


async def test_a_failure_is_told_and_tried_again_later_and_later(
    rig: Rig, upstream: Upstream, clock: Clock, events: LogCapture
) -> None:
    upstream.image("a/b", "other")
    freshener = rig.pinning(Pin(PIN, 7 * 86400.0))
    waits = []
    for _ in range(9):
        (error,) = await freshener.run_once()
        assert isinstance(error, ManifestUnknown)
        at = await freshener.next_at()
        assert at is not None
        waits.append(at - clock.now)
        clock.advance(waits[-1] - 1)
        assert await freshener.due() == []
        clock.advance(1)
    assert waits == [60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]
    failed = told(events, "pin.failed")
    assert len(failed) == 9
    assert {each["log_level"] for each in failed} == {"warning"}
    assert (failed[0]["repository"], failed[0]["pattern"], failed[0]["again_in"]) == ("a/b", PIN, 60)
    upstream.image("a/b", "latest")
    (found,) = await freshener.run_once()
    assert isinstance(found, RefreshResult)
    assert await freshener.next_at() == clock.now + 7 * 86400


async def test_one_that_fails_does_not_keep_the_others_back(rig: Rig, upstream: Upstream) -> None:
    upstream.image("a/b", "z")
    found = await rig.pinning(*(Pin(f"{NAME}:{tag}", HOUR) for tag in ("a", "z"))).run_once()
    assert [isinstance(each, RegistryError) for each in found] == [True, False]


async def test_what_an_origin_says_of_when_to_come_back_counts(rig: Rig, upstream: Upstream) -> None:
    upstream.image("a/b", "latest")
    upstream.next("GET", "latest", RetryAfter(900))
    freshener = rig.pinning(Pin(PIN, HOUR))
    (error,) = await freshener.run_once()
    assert isinstance(error, Unavailable)
    assert await freshener.next_at() == rig.clock.now + 900


async def test_an_origin_that_is_down_leaves_what_is_here(rig: Rig, upstream: Upstream, clock: Clock) -> None:
    image = upstream.image("a/b", "latest")
    freshener = rig.pinning(Pin(PIN, HOUR))
    await freshener.run_once()
    clock.advance(HOUR)
    upstream.next("HEAD", "latest", Refuse(), times=RETRIES + 1)
    (error,) = await freshener.run_once()
    assert isinstance(error, Unavailable)
    assert (await rig.namespaces.get_manifest(NAME, TAG)).digest == image.digest
    clock.advance(60)
    (found,) = await freshener.run_once()
    assert isinstance(found, RefreshResult)


async def test_a_pin_that_is_gone_has_failed_never(rig: Rig, clock: Clock) -> None:
    pins = Pins(rig.store, (), clock)
    freshener = Freshener(rig.namespaces, rig.store, pins, clock)
    pins.add(Pin(PIN, HOUR))
    await freshener.run_once()
    assert await freshener.due() == []
    pins.remove(PIN)
    assert await freshener.due() == []
    pins.add(Pin(PIN, HOUR))
    assert len(await freshener.due()) == 1


async def test_what_refers_to_it_is_asked_for_again_after_a_failure(
    rig: Rig, upstream: Upstream, clock: Clock
) -> None:
    image = upstream.image("a/b", "latest")
    bill = upstream.artifact("a/b", image, "application/sbom")
    upstream.next("GET", "referrers", Status(503), times=RETRIES + 1)
    freshener = rig.pinning(Pin(PIN, HOUR))
    (error,) = await freshener.run_once()
    assert isinstance(error, Unavailable)
    clock.advance(60)
    await freshener.run_once()
    assert bill.digest in Pins(rig.store, [Pin(PIN)]).pinned().digests

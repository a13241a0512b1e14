"""Copying between registries: what is asked, in which order, and what becomes of it when either fails."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest

from proxy.telemetry.metrics import Metrics
from proxy.transfer.blob_copy import BlobCopy, RetryPolicy
from proxy.transfer.copy import Copier, CopyCounts, CopyOptions, CopyRoute
from proxy.upstream.client import UpstreamRegistry as Client
from proxy.upstream.credentials import Credentials
from proxy.upstream.requests import UpstreamSettings
from storage.errors import DigestInvalid, ManifestInvalid, ManifestUnknown, OriginFailed, RegistryError
from storage.oci import ARTIFACTS, Descriptor, Digest, Reference, Span, Tag
from storage.registry import Blob, Registry, Upload
from tests.upstream import (
    OCI_INDEX,
    OCI_MANIFEST,
    Corrupt,
    Fault,
    Hold,
    Reset,
    RetryAfter,
    Status,
    Takes,
    Truncate,
    Upstream,
    digest_of,
)

LARGE = bytes(range(251)) * 12_000  # 3 MB: more than fits into one request
Copy = Callable[..., Awaitable[tuple[Digest, bool]]]


class Board:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.moves: list[tuple[Digest, int, int]] = []
        self.over: list[Digest] = []
        self.notes: list[str] = []
        self.pauses: list[float] = []

    def moved(self, digest: Digest, done: int, whole: int) -> None:
        self.moves.append((digest, done, whole))

    def ended(self, digest: Digest) -> None:
        self.over.append(digest)

    def note(self, text: str) -> None:
        self.notes.append(text)

    async def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)


class Ground:
    """A source and a destination, and a way to copy from one to the other."""

    def __init__(self, source: Upstream, destination: Upstream, stack: AsyncExitStack) -> None:
        self.source, self.destination = source, destination
        self.board = Board()
        self.lost = 0  # uploads that the destination began, though nobody was told
        self._stack = stack
        self._clients = [self._client(each, each is destination) for each in (source, destination)]
        self.copying = self.anew()

    def _client(self, registry: Upstream, pushed_to: bool) -> Client:
        settings = UpstreamSettings(registry.url, pushed_to=pushed_to)
        clock = asyncio.get_running_loop().time
        name = "destination" if pushed_to else "source"
        client = Client(name, settings, [Credentials()], Metrics(), clock)
        self._stack.push_async_callback(client.close)
        return client

    def anew(self, **rules: object) -> Copier:
        """Another call, which knows nothing of the ones before."""
        patience = RetryPolicy(self.board, self.board.pause)
        copying = Copier(self._clients[1], CopyOptions(**rules), self.board, patience)  # type: ignore[arg-type]
        self._stack.push_async_callback(copying.close)
        self.copying = copying
        return copying

    async def copy(
        self, reference: str, *tags: str, repository: str = "a", target: str = "b", within: bool = False
    ) -> tuple[Digest, bool]:
        asked: Reference = Digest(reference) if ":" in reference else Tag(reference)
        named = [Tag(each) for each in tags or ((reference,) if ":" not in reference else ())]
        route = CopyRoute(self._clients[within], repository, target, within)
        return await self.copying.copy(route, asked, named)

    @property
    def asked(self) -> list[str]:
        return self.destination.log

    def held(self, repository: str = "b") -> tuple[set[str], set[str], dict[str, str]]:
        """Blobs, manifests and tags of the destination."""
        holder = self.destination.repositories[repository]
        return set(holder.blobs), set(holder.manifests), dict(holder.tags)


@pytest.fixture
async def ground() -> AsyncIterator[Ground]:
    async with AsyncExitStack() as stack:
        source = await stack.enter_async_context(Upstream())
        destination = await stack.enter_async_context(Upstream(takes=Takes(checks=True)))
        ground = Ground(source, destination, stack)
        yield ground
        assert len(destination.uploads) == ground.lost, "an upload was left open"


async def test_an_image_goes_in_order(ground: Ground) -> None:
    image = ground.source.image("a", "1", [b"one"])
    assert await ground.copy("1") == (image.digest, True)
    assert ground.held() == ({image.config, *image.layers}, {image.digest}, {"1": image.digest})
    assert ground.destination.repositories["b"].manifests[image.digest].content == image.content
    order = [each for each in ground.asked if not each.startswith(("HEAD", "GET"))]
    assert [each.split()[0] for each in order] == ["POST", "POST", "PUT", "PUT", "PUT", "PUT"]
    assert order[-2:] == [f"PUT manifest b@{image.digest[:19]}", "PUT manifest b:1"]
    assert ground.copying.done == CopyCounts(
        1, 1, 2, len(b"one") + len(ground.source.repositories["a"].blobs[image.config])
    )
    assert sorted(ground.board.over) == sorted((image.config, *image.layers))


async def test_what_is_there_is_not_sent_again(ground: Ground) -> None:
    image = ground.source.image("a", "1", [b"one", b"two"])
    ground.destination.blob("b", b"one")
    await ground.copy("1")
    assert ground.copying.done.present == 1
    ground.destination.clear()
    ground.source.clear()
    ground.anew()
    assert await ground.copy("1") == (image.digest, False)
    assert ground.copying.done == CopyCounts(present=3)
    assert {each.split()[0] for each in ground.asked} <= {"HEAD", "GET"}
    # Of the source nothing is asked but what the tag is, and what refers to it.
    assert [each for each in ground.source.log if each.startswith("GET")] == [
        f"GET referrers a@{image.digest[:19]}"
    ]


async def test_a_blob_that_the_destination_has_lost_is_sent_again(ground: Ground) -> None:
    image = ground.source.image("a", "1", [b"one", b"two"])
    await ground.copy("1")
    del ground.destination.repositories["b"].blobs[image.layers[0]]
    ground.anew()
    assert await ground.copy("1") == (image.digest, True)
    assert ground.copying.done == CopyCounts(blobs=1, bytes=3, present=2)
    assert image.layers[0] in ground.held()[0]
    ground.anew()
    assert await ground.copy("1") == (image.digest, False)


async def test_a_tag_that_moved_is_moved(ground: Ground) -> None:
    ground.source.image("a", "1", [b"one"])
    await ground.copy("1")
    moved = ground.source.image("a", "1", [b"two"])
    ground.anew()
    assert await ground.copy("1") == (moved.digest, True)
    assert ground.copying.done.present == 0
    assert ground.held()[2] == {"1": moved.digest}


async def test_an_index_with_its_children_and_theirs(ground: Ground) -> None:
    images = [ground.source.image("a", None, [name.encode()], f"linux/{name}") for name in ("amd64", "arm64")]
    inner = ground.source.index("a", None, images)
    outer = ground.source.index("a", "1", [inner, images[0]])
    assert await ground.copy("1", "x", "y") == (outer.digest, True)
    everything = {outer.digest, inner.digest, *(each.digest for each in images)}
    assert ground.held()[1:] == (everything, {"x": outer.digest, "y": outer.digest})
    assert ground.copying.done.manifests == 4


async def test_an_index_that_lacks_a_child_there_gets_it(ground: Ground) -> None:
    images = [ground.source.image("a", None, [name.encode()], f"linux/{name}") for name in ("amd64", "arm64")]
    index = ground.source.index("a", "1", images)
    await ground.copy("1")
    ground.destination.delete_manifest("b", images[1].digest)
    ground.anew()
    assert await ground.copy("1") == (index.digest, True)
    assert images[1].digest in ground.held()[1]


async def test_one_platform_gets_the_tag(ground: Ground) -> None:
    images = [ground.source.image("a", None, [name.encode()], f"linux/{name}") for name in ("amd64", "arm64")]
    ground.source.index("a", "1", images)
    ground.anew(platforms=("linux/arm64",))
    assert await ground.copy("1") == (images[1].digest, True)
    assert ground.held()[1:] == ({images[1].digest}, {"1": images[1].digest})
    ground.anew(platforms=("linux/riscv64",))
    with pytest.raises(
        ManifestUnknown, match="the index has no image for linux/riscv64: linux/amd64, linux/arm64"
    ):
        await ground.copy("1")
    ground.source.index("a", "2", [replace(images[0], platform="")])
    with pytest.raises(ManifestUnknown, match="no image for linux/riscv64: it names no platform"):
        await ground.copy("2")


async def test_one_platform_with_several_images(ground: Ground) -> None:
    images = [ground.source.image("a", None, [name.encode()], f"linux/arm/{name}") for name in ("v6", "v7")]
    ground.source.index("a", "1", images)
    ground.anew(platforms=("linux/arm",))
    with pytest.raises(ManifestUnknown, match="several images for linux/arm: linux/arm/v6, linux/arm/v7"):
        await ground.copy("1")
    ground.anew(platforms=("linux/arm/v7",))
    assert (await ground.copy("1"))[0] == images[1].digest


async def test_several_platforms_keep_the_index(ground: Ground) -> None:
    names = ("amd64", "arm64", "s390x")
    images = [ground.source.image("a", None, [name.encode()], f"linux/{name}") for name in names]
    index = ground.source.index("a", "1", images)
    ground.destination.takes = Takes()
    ground.anew(platforms=("linux/amd64", "linux/arm64"))
    assert await ground.copy("1") == (index.digest, True)
    assert ground.held()[1] == {index.digest, images[0].digest, images[1].digest}
    ground.anew(platforms=("linux/amd64", "linux/riscv64"))
    await ground.copy("1")
    assert ground.board.notes == [f"b@{index.digest} has no image for linux/riscv64"]
    ground.anew(platforms=("linux/arm", "linux/riscv64"))
    with pytest.raises(ManifestUnknown, match="has no image for linux/arm, linux/riscv64"):
        await ground.copy("1")


async def test_an_index_of_blobs(ground: Ground) -> None:
    """As BuildKit exports its cache: what it lists is no manifest."""
    kinds = {
        b"one": "application/vnd.oci.image.layer.v1.tar",
        b"{}": "application/vnd.buildkit.cacheconfig.v0",
    }
    listed = [
        {"mediaType": kind, "digest": ground.source.blob("a", each), "size": len(each)}
        for each, kind in kinds.items()
    ]
    body = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": listed}
    digest = ground.source.manifest("a", body, tag="cache")
    ground.destination.takes = Takes()
    assert await ground.copy("cache") == (digest, True)
    assert ground.held()[0] == {digest_of(each) for each in kinds}


@pytest.mark.parametrize("media_type", ARTIFACTS)
async def test_an_artifact_goes_with_its_blobs(ground: Ground, media_type: str) -> None:
    listed = [{"mediaType": "text/plain", "digest": ground.source.blob("a", b"notes"), "size": 5}]
    digest = ground.source.manifest("a", {"mediaType": media_type, "blobs": listed}, tag="1")
    ground.destination.takes = Takes()
    assert await ground.copy("1") == (digest, True)
    assert ground.held() == ({digest_of(b"notes")}, {digest}, {"1": digest})


@pytest.mark.parametrize("key", ["things", "Layers", "fsLayers"])
async def test_what_names_content_that_cannot_be_read_stays(ground: Ground, key: str) -> None:
    listed = [{"mediaType": "text/plain", "digest": ground.source.blob("a", b"notes"), "size": 5}]
    ground.source.manifest("a", {"mediaType": "application/vnd.example+json", key: listed}, tag="1")
    with pytest.raises(ManifestInvalid, match="cannot be read"):
        await ground.copy("1")
    assert "b" not in ground.destination.repositories


async def test_by_digest_it_comes_without_a_tag(ground: Ground) -> None:
    image = ground.source.image("a")
    assert await ground.copy(image.digest) == (image.digest, True)
    assert ground.held()[2] == {}


# Blobs of several repositories


async def test_what_another_repository_there_has_is_mounted(ground: Ground) -> None:
    image = ground.source.image("a", "1", [LARGE])
    ground.source.image("c", "1", [LARGE])
    await asyncio.gather(ground.copy("1"), ground.copy("1", repository="c", target="d"))
    assert ground.copying.done.mounted == 2  # its config is the same as well
    assert ground.source.bytes_sent == len(LARGE) + len(ground.source.repositories["a"].blobs[image.config])
    assert ground.held("d")[0] == ground.held("b")[0]


async def test_who_does_not_mount_gets_it_sent(ground: Ground) -> None:
    ground.destination.takes = Takes(mounts=False)
    for name in ("a", "c"):
        ground.source.image(name, "1", [LARGE])
    await ground.copy("1")
    await ground.copy("1", repository="c", target="d")
    assert ground.copying.done.mounted == 0
    assert ground.held("d")[0] == ground.held("b")[0]


async def test_within_one_registry_nothing_is_transferred(ground: Ground) -> None:
    image = ground.destination.image("a", "1", [LARGE])
    assert await ground.copy("1", "2", within=True) == (image.digest, True)
    assert ground.copying.done == CopyCounts(1, 1, 0, 0, 2, 0)
    assert ground.held() == ({image.config, *image.layers}, {image.digest}, {"2": image.digest})


async def test_layers_that_are_had_elsewhere_are_left_out(ground: Ground) -> None:
    layer = {
        "mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        "digest": digest_of(b"of Windows"),
        "size": 10,
        "urls": ["https://elsewhere.example/"],
    }
    ground.source.manifest("a", {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "layers": [layer]}, tag="1")
    ground.destination.takes = Takes()
    await ground.copy("1")
    assert ground.held()[0] == set()


# Referrers


@pytest.mark.parametrize("source_api", [True, False])
@pytest.mark.parametrize("destination_api", [True, False])
async def test_what_refers_to_it_comes_along(ground: Ground, source_api: bool, destination_api: bool) -> None:
    """By the API, or by the tag that clients keep where there is none, on either side."""
    image = ground.source.image("a", None, [b"one"])
    index = ground.source.index("a", "1", [image])
    signature = ground.source.artifact("a", index, "a/signature", {"by": "us"})
    listing = ground.source.artifact("a", image, "a/listing")
    countersign = ground.source.artifact("a", signature, "a/signature")
    subjects = {index.digest: signature, image.digest: listing, signature.digest: countersign}
    ground.source.referrers_api, ground.destination.referrers_api = source_api, destination_api
    if not source_api:
        for subject, artifact in subjects.items():
            body = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [artifact.descriptor]}
            ground.source.manifest("a", body, tag=subject.replace(":", "-"))
    await ground.copy("1")
    _, manifests, tags = ground.held()
    assert {each.digest for each in subjects.values()} <= manifests
    assert set(tags) == {"1"} | (set() if destination_api else {each.replace(":", "-") for each in subjects})
    if not destination_api:
        holder = ground.destination.repositories["b"]
        (listed,) = json.loads(holder.manifests[tags[index.digest.replace(":", "-")]].content)["manifests"]
        assert listed["digest"] == signature.digest
    ground.anew()
    ground.destination.clear()
    assert (await ground.copy("1"))[1] is False
    # What came later comes with the next call.
    later = ground.source.artifact("a", image, "a/later")
    if not source_api:
        named = [listing.descriptor, later.descriptor]
        body = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": named}
        ground.source.manifest("a", body, tag=image.digest.replace(":", "-"))
    ground.anew()
    assert (await ground.copy("1"))[1] is True
    assert later.digest in ground.held()[1]
    if not destination_api:
        tag = ground.held()[2][image.digest.replace(":", "-")]
        listed = json.loads(ground.destination.repositories["b"].manifests[tag].content)["manifests"]
        assert [each["digest"] for each in listed] == [listing.digest, later.digest]


async def test_signatures_from_before_there_were_referrers(ground: Ground) -> None:
    image = ground.source.image("a", "1", [b"one"])
    tags = {f"{image.digest.replace(':', '-')}.{kind}" for kind in ("sig", "att", "sbom")}
    for tag in tags:
        ground.source.image("a", tag, [tag.encode()])
    await ground.copy("1")
    assert set(ground.held()[2]) == {"1"} | tags


async def test_referrers_may_stay(ground: Ground) -> None:
    image = ground.source.image("a", "1", [b"one"])
    ground.source.artifact("a", image, "a/signature")
    ground.anew(referrers=False)
    await ground.copy("1")
    assert ground.held()[1] == {image.digest}
    assert not any("referrers" in each or ".sig" in each for each in ground.source.log)


async def test_a_tag_that_is_no_list_of_referrers_is_left_alone(ground: Ground) -> None:
    image = ground.source.image("a", "1", [b"one"])
    ground.source.artifact("a", image, "a/signature")
    ground.destination.referrers_api = False
    tag = image.digest.replace(":", "-")
    ground.destination.image("b", tag, [b"somebody's"])
    before = ground.held()[2]
    with pytest.raises(OriginFailed, match="is not an index of referrers"):
        await ground.copy("1")
    assert ground.held()[2] == before


# What fails


async def test_a_source_that_cuts_is_gone_on_with(ground: Ground) -> None:
    image = ground.source.image("a", "1", [LARGE])
    ground.source.next("GET", image.layers[0], Reset(after=1_000_000))
    ground.source.next("GET", image.layers[0], Truncate(after=500_000))
    await ground.copy("1")
    assert ground.destination.repositories["b"].blobs[image.layers[0]] == LARGE
    ranges = [each.range for each in ground.source.requests if each.reference == image.layers[0]]
    assert ranges == [None, "bytes=1000000-", "bytes=1500000-"]
    uploads = [each for each in ground.asked if each.startswith("POST")]
    assert len(uploads) == 2  # one for each blob: nothing was sent twice
    assert len(ground.board.pauses) == 2


@pytest.mark.parametrize("method", ["POST", "PATCH", "PUT"])
@pytest.mark.parametrize("fault", [Status(503), Reset(after=None)])
async def test_a_destination_that_fails_gets_it_once_more(ground: Ground, method: str, fault: Fault) -> None:
    image = ground.source.image("a", "1", [LARGE])
    ground.destination.next(method, "upload", fault)
    ground.lost = 1 if method == "POST" else 0
    await ground.copy("1")
    assert ground.destination.repositories["b"].blobs[image.layers[0]] == LARGE
    assert ground.destination.unmet == []


async def test_it_gives_up_in_the_end(ground: Ground) -> None:
    image = ground.source.image("a", "1", [b"one"])
    ground.source.next("GET", image.layers[0], Status(500), times=100)
    with pytest.raises(OriginFailed):
        await ground.copy("1")
    assert ground.board.pauses == [1.0, 2.0, 4.0]
    assert image.digest not in ground.destination.repositories["b"].manifests
    assert len(ground.board.over) == 2


async def test_wrong_bytes_are_never_committed(ground: Ground) -> None:
    image = ground.source.image("a", "1", [LARGE])
    ground.source.next("GET", image.layers[0], Corrupt(2_000_000))
    with pytest.raises(DigestInvalid, match=f"sends content with digest sha256:.* for {image.layers[0]}"):
        await ground.copy("1")
    assert image.layers[0] not in ground.destination.repositories["b"].blobs
    assert not any(f"digest={image.layers[0][:19]}" in each for each in ground.asked)


async def test_a_registry_that_limits_requests_is_waited_for(ground: Ground) -> None:
    image = ground.source.image("a", "1", [b"one"])
    ground.source.next("GET", image.digest, RetryAfter(30))

    async def wait(seconds: float) -> None:
        ground.board.pauses.append(seconds)
        budget = ground._clients[0]._sender.budgets[0]
        budget._table.discard(budget._key)

    ground.board.pause = wait  # type: ignore[method-assign]
    ground.anew()
    await ground.copy("1")
    assert ground.board.pauses == [30]
    assert ground.board.notes == ["source limits our requests: waiting for 30 s"]


async def test_what_the_destination_refuses_is_told(ground: Ground) -> None:
    image = ground.source.image("a", "1", [b"one"])
    body = json.dumps({"errors": [{"code": "DENIED", "message": "quota of\n12 GB exceeded"}]}).encode()
    ground.destination.next("PUT", image.digest, Status(403, body=body))
    with pytest.raises(RegistryError, match="DENIED quota of 12 GB exceeded"):
        await ground.copy("1")


async def test_who_is_cut_leaves_no_manifest_before_its_blobs(ground: Ground) -> None:
    """And goes on where he was."""
    image = ground.source.image("a", "1", [b"one", LARGE])
    gate = Hold(asyncio.Event(), after=2_000_000)
    ground.source.next("GET", image.layers[1], gate)
    copying = asyncio.create_task(ground.copy("1"))
    await gate.reached.wait()
    copying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await copying
    await ground.copying.close()
    assert ground.held()[1:] == (set(), {})
    assert ground.destination.uploads == []
    ground.anew()
    await ground.copy("1")
    assert ground.held()[1:] == ({image.digest}, {"1": image.digest})
    assert ground.copying.done.present >= 1


async def test_an_upload_is_given_up_even_by_who_is_cancelled_meanwhile() -> None:
    leaving, gate = asyncio.Event(), asyncio.Event()

    class Slow(Upload):
        offset = 0
        forgotten = False

        async def write(self, chunk: bytes) -> None:
            raise OriginFailed("the destination fails")

        async def cancel(self, error: BaseException | None = None) -> None:
            leaving.set()
            await gate.wait()
            self.forgotten = True

    class Failing(Registry):
        upload = Slow()

        async def start_upload(
            self, repository: str, size: int | None = None, algorithm: str = "sha256"
        ) -> Upload:
            return self.upload

        async def get_blob(self, repository: str, digest: Digest, span: Span | None = None) -> Blob:
            return Ready()

    class Ready(Blob):
        async def chunks(self, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
            yield b"content"

        async def close(self) -> None: ...

    registry, board = Failing(), Board()
    blob = Descriptor("a/layer", Digest.of(b"content"), 7)
    transfer = BlobCopy(registry, "a", registry, "b", blob)
    running = asyncio.create_task(transfer.run(board, RetryPolicy(board, board.pause)))
    await leaving.wait()
    running.cancel()
    await asyncio.sleep(0)
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert registry.upload.forgotten


async def test_a_dry_run_asks_and_sends_nothing(ground: Ground) -> None:
    image = ground.source.image("a", None, [b"one", LARGE])
    index = ground.source.index("a", "1", [image])
    ground.source.artifact("a", index, "a/signature")
    ground.destination.blob("b", b"one")
    ground.anew(dry_run=True)
    assert await ground.copy("1") == (index.digest, True)
    would = ground.copying.done
    assert {each.split()[0] for each in ground.asked} <= {"HEAD", "GET"}
    assert not any(each.startswith("GET blob") for each in ground.source.log)
    ground.anew()
    await ground.copy("1")
    assert ground.copying.done == would


async def test_progress_is_told(ground: Ground) -> None:
    image = ground.source.image("a", "1", [LARGE])
    await ground.copy("1")
    moves = [done for digest, done, whole in ground.board.moves if digest == image.layers[0]]
    assert {whole for digest, _, whole in ground.board.moves if digest == image.layers[0]} == {len(LARGE)}
    assert moves == sorted(moves)
    assert len(moves) > 2
    assert moves[-1] == len(LARGE)

"""Who waits for a manifest as an outage ends: all of them get what the first one gets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from proxy.namespaces.composition import Composition, compose
from proxy.upstream import breaker
from proxy.upstream.errors import OriginAway
from storage.disk.locks import POLL
from storage.errors import ManifestUnknown, OriginFailed
from storage.oci import Digest, Reference, Span, Tag
from storage.registry import Blob, Registry
from storage.shared import SharedState
from tests.conftest import Clock, Serve, configuration
from tests.outages import silence
from tests.upstream import Image, Upstream

NAME = "docker.io/a/b"


@pytest.fixture
async def workers(tmp_path: Path, upstream: Upstream, clock: Clock) -> AsyncIterator[list[Composition]]:
    """Two workers of a server: one disk, and what is known of upstreams in common."""
    tree = {
        "disk": {"path": str(tmp_path / "disk")},
        "namespaces": {"docker.io": {"upstream": upstream.url}},
    }
    config, shared = configuration(tmp_path, tree), SharedState()
    made = [compose(config, clock, shared=shared) for _ in range(2)]
    yield made
    for each in made:
        await each.close()


@pytest.fixture
def image(upstream: Upstream) -> Image:
    return upstream.image("a/b", "latest")


async def outage(workers: list[Composition], upstream: Upstream, clock: Clock) -> None:
    """The upstream was away, is back, and no request has been sent to it since."""
    await upstream.stop()
    for each in workers:
        with pytest.raises(OriginFailed):
            await each.namespaces.get_manifest(NAME, Tag("absent"))
    await upstream.start()
    clock.advance(1)


References = Callable[[Image], Reference]


@pytest.mark.parametrize("reference", [lambda image: Tag("latest"), lambda image: Digest.parse(image.digest)])
async def test_waiters_of_several_workers_get_the_answer_of_the_first(
    workers: list[Composition], upstream: Upstream, clock: Clock, image: Image, reference: References
) -> None:
    asked = reference(image)
    await outage(workers, upstream, clock)
    held = silence()
    upstream.next("GET", str(asked), held)
    first = asyncio.create_task(workers[0].namespaces.get_manifest(NAME, asked))
    await held.reached.wait()
    later = [asyncio.create_task(each.namespaces.get_manifest(NAME, asked)) for each in workers * 3]
    # They have come as far as they get without an answer: who is refused has ended by now.
    done, _ = await asyncio.wait(later, timeout=3 * POLL)
    assert not done, [each.exception() for each in done]
    held.gate.set()
    assert [each.content for each in await asyncio.gather(first, *later)] == [image.content] * 7
    assert len(upstream.log) == 1


async def test_if_the_first_fails_so_do_the_others(
    workers: list[Composition], upstream: Upstream, clock: Clock, image: Image
) -> None:
    asked = Digest.parse(image.digest)
    await outage(workers, upstream, clock)
    held = silence()
    upstream.next("GET", asked, held)
    first = asyncio.create_task(workers[0].namespaces.get_manifest(NAME, asked))
    await held.reached.wait()
    later = [asyncio.create_task(each.namespaces.get_manifest(NAME, asked)) for each in workers]
    await upstream.stop()
    found = await asyncio.gather(first, *later, return_exceptions=True)
    # The last waits in another process.
    assert [type(each) for each in found] == [OriginAway, OriginAway, OriginFailed]
    assert len(upstream.log) == 1


async def test_a_manifest_that_is_not_there(
    workers: list[Composition], upstream: Upstream, clock: Clock, image: Image
) -> None:
    absent = Digest.of(b"absent")
    await outage(workers, upstream, clock)
    held = silence()
    upstream.next("GET", absent, held)
    first = asyncio.create_task(workers[0].namespaces.get_manifest(NAME, absent))
    await held.reached.wait()
    later = [asyncio.create_task(each.namespaces.get_manifest(NAME, absent)) for each in workers]
    held.gate.set()
    found = await asyncio.gather(first, *later, return_exceptions=True)
    assert [type(each) for each in found] == [ManifestUnknown] * 3


async def test_all_who_wait_for_a_probe_get_its_answer(
    serve: Serve, upstream: Upstream, clock: Clock, image: Image
) -> None:
    """podman is served an image of which layers are missing only if they can be fetched."""
    site = await serve(upstream, fresh_for="forever")
    path = "/v2/a/b/manifests/latest"
    assert (await site.get(path))[0] == 200
    await upstream.stop()
    assert (await site.get("/v2/a/b/manifests/absent"))[0] == 502
    await upstream.start()
    clock.advance(1)
    upstream.clear()
    held = silence()
    upstream.next("GET", "base", held)
    first = asyncio.create_task(site.get(path, User_Agent="containers/5.0"))
    await held.reached.wait()
    later = [asyncio.create_task(site.get(path, User_Agent="containers/5.0")) for _ in range(3)]
    assert (await site.get(path))[0] == 200  # who does not mind does not wait; by now the others have come
    held.gate.set()
    assert [(await each)[0] for each in (first, *later)] == [200] * 4
    assert upstream.log == ["GET base"]


# What else is asked for as an outage ends


def of_blob(registry: Registry, image: Image) -> Awaitable[object]:
    return read(registry.get_blob("docker.io/a/b", Digest(image.layers[0])))


def of_range(registry: Registry, image: Image) -> Awaitable[object]:
    return read(registry.get_blob("docker.io/a/b", Digest(image.layers[0]), Span(1)))


def of_size(registry: Registry, image: Image) -> Awaitable[object]:
    return registry.resolve_blob("docker.io/a/b", Digest(image.layers[0]))


def of_manifest(registry: Registry, image: Image) -> Awaitable[object]:
    return registry.get_manifest("docker.io/a/b", Digest(image.digest))


def of_tags(registry: Registry, image: Image) -> Awaitable[object]:
    return registry.tags("docker.io/a/b")


async def read(opening: Awaitable[Blob]) -> bytes:
    blob = await opening
    try:
        return b"".join([chunk async for chunk in blob.chunks()])
    finally:
        await blob.close()


ASKED = [of_blob, of_range, of_size, of_manifest, of_tags]


@pytest.mark.parametrize("first", ASKED)
async def test_whatever_is_asked_for_waits_for_the_answer_to_the_first(
    workers: list[Composition], upstream: Upstream, clock: Clock, image: Image, first: Callable[..., Any]
) -> None:
    """Ollama asks for a HEAD, podman for layers, and each from another worker."""
    await outage(workers, upstream, clock)
    held = silence()
    upstream.next("GET" if first is not of_size else "HEAD", lambda request: True, held)
    one, two = (each.namespaces for each in workers)
    asking = [asyncio.create_task(first(one, image))]
    await held.reached.wait()
    asking += [asyncio.create_task(each(registry, image)) for each in ASKED for registry in (one, two)]
    done, _ = await asyncio.wait(asking, timeout=3 * POLL)
    assert not done, [each.exception() for each in done]
    held.gate.set()
    await asyncio.gather(*asking)
    for each in workers:
        await each.fills.close()


async def test_who_waits_for_a_probe_does_not_wait_long(
    workers: list[Composition],
    upstream: Upstream,
    clock: Clock,
    image: Image,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(breaker, "PATIENCE", 0.01)
    await outage(workers, upstream, clock)
    held = silence()
    upstream.next("GET", lambda request: True, held)
    first = asyncio.create_task(of_manifest(workers[0].namespaces, image))
    await held.reached.wait()
    for each in workers:
        with pytest.raises(OriginFailed, match="the next attempt is not due yet"):
            await of_tags(each.namespaces, image)
    held.gate.set()
    await first

"""Keeping house in a running server: what goes, what stays, and that no pull notices."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from proxy.server import housekeeping
from storage.oci import Digest
from tests.conftest import Clock, Serve, Site
from tests.upstream import Image, Upstream

DAY = 86400.0
NAME = "/v2/library/app"


async def pull(site: Site, image: Image, tag: str = "latest") -> None:
    status, _, body = await site.get(f"{NAME}/manifests/{tag}")
    assert (status, body) == (200, image.content)
    for digest in (image.config, *image.layers):
        status, _, _ = await site.get(f"{NAME}/blobs/{digest}")
        assert status == 200
        await site.app.composition.fills.ended(Digest(digest))  # its last byte was sent before


def disk(home: Path, **keys: object) -> dict[str, object]:
    return {"disk": {"path": str(home / "disk"), "min_free": 0, **keys}}


def stored(site: Site) -> set[str]:
    return {f"sha256:{path.name}" for path in (site.directory / "cache" / "blobs").glob("*/*/*")}


async def test_what_nobody_uses_goes_and_is_fetched_again(
    serve: Serve, upstream: Upstream, clock: Clock, tmp_path: Path
) -> None:
    image = upstream.image("library/app", "latest", [b"layer" * 1000])
    site = await serve(upstream, top=disk(tmp_path, keep_for="30d"))
    await pull(site, image)
    await site.app.composition.recorder.flush()
    clock.advance(29 * DAY)
    await site.app.housekeeper.expire()
    assert stored(site) == {image.config, *image.layers}
    clock.advance(2 * DAY)
    await site.app.housekeeper.expire()
    assert stored(site) == set()
    assert await site.app.composition.store.repositories() == []
    await pull(site, image)
    assert stored(site) == {image.config, *image.layers}


async def test_a_layer_that_nobody_asks_for_stays_while_its_image_is_asked_for(
    serve: Serve, upstream: Upstream, clock: Clock, tmp_path: Path
) -> None:
    image = upstream.image("library/app", "latest", [b"base" * 1000, b"top" * 1000])
    site = await serve(upstream, top=disk(tmp_path, keep_for="30d"))
    await pull(site, image)
    for _ in range(10):
        clock.advance(7 * DAY)
        await site.get(f"{NAME}/manifests/latest")  # its client has the layers
        await site.app.composition.recorder.flush()
        await site.app.housekeeper.expire()
    assert stored(site) == {image.config, *image.layers}


async def test_a_fill_that_passes_the_limit_makes_the_oldest_go(
    serve: Serve, upstream: Upstream, clock: Clock, tmp_path: Path
) -> None:
    images = [upstream.image("library/app", f"v{number}", [bytes([number]) * 100_000]) for number in range(9)]
    site = await serve(upstream, top=disk(tmp_path, cache_limit="500KB", evict_to="80%"))
    for number, image in enumerate(images):
        clock.advance(3600)
        await pull(site, image, f"v{number}")
    await site.app.housekeeper.make_room(0)
    held = stored(site)
    assert images[-1].layers[0] in held
    assert images[0].layers[0] not in held
    assert sum(path.stat().st_size for path in (site.directory / "cache" / "blobs").glob("*/*/*")) <= 500_000
    await pull(site, images[0], "v0")


async def test_all_who_ask_for_room_meanwhile_share_one_look(
    serve: Serve, upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = (await serve(upstream, top=disk(tmp_path))).app.housekeeper
    looked: list[int] = []
    begun, more = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def over(coming: int) -> int:
        looked.append(coming)
        loop.call_soon_threadsafe(begun.set)
        more.wait(10)
        return 0

    monkeypatch.setattr(keeper._eviction, "over", over)
    first = asyncio.create_task(keeper.make_room(5))
    await begun.wait()
    others = [asyncio.create_task(keeper.make_room(each)) for each in (1, 70, 0)]
    await asyncio.sleep(0)
    others[1].cancel()
    more.set()
    await asyncio.gather(first, *others, return_exceptions=True)
    assert looked == [5, 70]
    await keeper.make_room(2)
    assert looked == [5, 70, 2]


async def test_a_pin_stays_whatever_its_age(
    serve: Serve, upstream: Upstream, clock: Clock, tmp_path: Path
) -> None:
    pinned = upstream.image("library/app", "stable", [b"pinned" * 1000])
    other = upstream.image("library/app", "latest", [b"other" * 1000])
    site = await serve(
        upstream, top=disk(tmp_path, keep_for="1d") | {"pins": ["docker.io/library/app:stable"]}
    )
    await pull(site, pinned, "stable")
    await pull(site, other)
    await site.app.composition.recorder.flush()
    clock.advance(9 * DAY)
    await site.app.housekeeper.expire()
    assert stored(site) == {pinned.config, *pinned.layers}
    upstream.requests.clear()
    upstream_head = await site.get(f"{NAME}/manifests/{pinned.digest}")
    assert upstream_head[0] == 200
    assert upstream.requests == []


async def test_a_round_makes_the_next_one_wait_for_what_it_counts_not_for_what_it_removes(
    serve: Serve, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, passed = await serve(upstream), [0.0]

    def takes(seconds: float) -> Callable[..., int]:
        return lambda *arguments: passed.append(passed[-1] + seconds) or 0  # type: ignore[func-returns-value]

    monkeypatch.setattr(housekeeping, "time", SimpleNamespace(monotonic=lambda: passed[-1]))
    monkeypatch.setattr(site.app.composition.store.files, "reap", takes(3600))
    monkeypatch.setattr(site.app.composition.maintenance.eviction, "over", takes(60))
    monkeypatch.setattr(site.app.composition.maintenance.eviction, "stored", takes(0.5))
    assert await site.app.housekeeper._round() == 100


@pytest.mark.errors("blob.damaged")
async def test_what_the_disk_damaged_is_fetched_again(
    serve: Serve, upstream: Upstream, clock: Clock, tmp_path: Path
) -> None:
    image = upstream.image("library/app", "latest", [b"layer" * 1000])
    site = await serve(upstream, top=disk(tmp_path, scrub="off"))
    await pull(site, image)
    digest = image.layers[0]
    path = site.app.composition.store.files.path(Digest(digest))
    path.write_bytes(b"x" * path.stat().st_size)
    report = await site.app.composition.maintenance.scrubs[0].run(site.app.housekeeper.heal)
    assert (report.damaged, report.healed) == (1, 1)
    status, _, body = await site.get(f"{NAME}/blobs/{digest}")
    assert (status, body) == (200, b"layer" * 1000)

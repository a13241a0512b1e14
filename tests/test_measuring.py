"""What many manifests name is looked at once in a call, and no call looks at too much."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.admin import inventory, measuring, readiness
from proxy.ui.screens import image as image_screen
from proxy.ui.screens.image import Sums
from storage.oci import Digest
from tests.test_operations import ALPINE, Site, describe, on, settings, site

__all__ = ["settings", "site"]  # fixtures


class LookUps:
    """Which manifests were read, and whether which blobs are stored was looked up, each time."""

    def __init__(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        self.manifests: list[str] = []
        self.blobs: list[str] = []
        for name, noted in (("manifest", self.manifests), ("linked", self.blobs)):
            monkeypatch.setattr(site.store, name, self._noting(getattr(site.store, name), noted))

    def _noting(self, read: Any, noted: list[str]) -> Any:
        def wrapped(repository: str, digest: Any) -> Any:
            noted.append(str(digest))
            return read(repository, digest)

        return wrapped


async def small_indexes(site: Site, number: int) -> dict[str, Any]:
    """Each names the same image, and has a tag; `top` names them all.  Returns the image."""
    layer = describe(Digest.of(b"absent"), 1000)
    config = await site.blob(ALPINE, b"{}")
    made = await site.manifest(ALPINE, {"config": config, "layers": [layer]})
    named = [
        await site.manifest(
            ALPINE, {"manifests": [on("linux/a", made)], "annotations": {"n": str(each)}}, f"s{each}"
        )
        for each in range(number)
    ]
    await site.manifest(
        ALPINE, {"manifests": [on(f"linux/{n}", each) for n, each in enumerate(named)]}, "top"
    )
    return made


async def test_what_many_indexes_name_is_looked_at_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    made = await small_indexes(site, 20)
    for reference in ("alpine:s*", "alpine:top"):
        seen = LookUps(site, monkeypatch)
        rows = (await site.operations.images(reference, 100)).images
        assert seen.manifests.count(made["digest"]) == 1
        assert len(seen.blobs) == 2
        for row in rows:
            assert not row.complete
            assert row.bytes_whole == row.bytes_held + 1000 and row.bytes_held > made["size"]
        assert {each.bytes_whole for row in rows for each in row.platforms} <= {
            made["size"] + 2 + 1000 + size for size in (0, *range(200, 400))
        }
    seen = LookUps(site, monkeypatch)
    (ready,) = await site.operations.ready(["alpine:top"])
    assert seen.manifests.count(made["digest"]) == 1
    (missing,) = ready.missing
    assert (missing.digest, missing.size, len(missing.platforms)) == (str(Digest.of(b"absent")), 1000, 20)


async def test_blobs_that_several_manifests_of_a_platform_name_count_once(site: Site) -> None:
    one, other = (
        await site.image(ALPINE, None, b"common", b"1"),
        await site.image(ALPINE, None, b"common", b"22"),
    )
    index = await site.manifest(ALPINE, {"manifests": [on("linux/a", one), on("linux/a", other)]})
    await site.manifest(ALPINE, {"manifests": [on("linux/a", index), on("linux/b", one)]}, "nested")
    (row,) = (await site.operations.images("alpine:nested")).images
    common, configs = len(b"common"), len(b"{}common1") + len(b"{}common22")
    manifests = index["size"] + one["size"] + other["size"]
    below = manifests + common + 1 + 2 + configs
    assert [each.bytes_whole for each in row.platforms] == [
        below,
        one["size"] + common + 1 + len(b"{}common1"),
    ]
    assert row.complete and all(each.complete for each in row.platforms)
    tree = await site.operations.show("alpine:nested")
    sums = Sums([tree.node])
    assert [sums.part(each).whole for each in tree.node.children] == [
        each.bytes_whole for each in row.platforms
    ]
    assert sums.part(tree.node).whole == row.bytes_whole


async def test_the_size_of_what_names_too_much_is_unknown(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    await small_indexes(site, 20)
    monkeypatch.setattr(measuring, "MOST", 20)
    monkeypatch.setattr(measuring, "LEAST", 20)
    (row,) = (await site.operations.images("alpine:top")).images
    assert (row.bytes_whole, row.complete, len(row.platforms)) == (None, False, 20)
    assert row.media_type is not None and row.bytes_held > 0
    assert row.platforms[-1].bytes_whole is None and not row.platforms[-1].complete
    # The next image is measured all the same.
    rows = {each.tag: each for each in (await site.operations.images("alpine:*", 100)).images}
    assert rows["s1"].bytes_whole is not None
    assert (await site.operations.why("alpine:top")).stored
    (first, *_) = (await site.operations.history("alpine:top")).rows
    assert (first.stored, first.bytes_whole) == (True, None)


async def test_a_tree_that_names_too_much_is_cut(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    made = await small_indexes(site, 20)
    whole = await site.operations.show("alpine:top")
    assert not whole.cut and len(whole.node.children) == 20
    monkeypatch.setattr(inventory, "NODES", 21)
    seen = LookUps(site, monkeypatch)
    found = await site.operations.show("alpine:top")
    assert found.cut and [len(each.children) for each in found.node.children] == [1] + [0] * 19
    assert seen.manifests.count(made["digest"]) == 1
    monkeypatch.setattr(image_screen, "MOST", 5)
    sums = Sums([whole.node])
    assert sums.part(whole.node).whole is None
    assert not sums.part(whole.node).complete


async def test_what_is_missing_to_very_many_platforms(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    await small_indexes(site, 20)
    monkeypatch.setattr(readiness, "MOST", 3)
    (ready,) = await site.operations.ready(["alpine:top"])
    (missing,) = ready.missing
    assert missing.platforms == ["linux/0", "linux/1", "linux/2"]

"""The commands that change private registries, each against a running server and on a directory."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from proxy.cli import stores
from proxy.cli.main import main
from storage.oci import OCI_INDEX, OCI_MANIFEST, Digest
from tests.conftest import Serve, Site
from tests.receiver import Receiver, receiver  # noqa: F401  a fixture
from tests.test_admin import conforms
from tests.upstream import Image, Upstream

LAYER = b"a layer" * 1000


@dataclass
class Shop:
    """A server with a cache and private registries, and how to run commands on it."""

    site: Site
    config: Path
    running: bool
    base: str = ""

    async def stop(self) -> None:
        """Leave only the directory, if commands are to work on that."""
        if not self.running:
            await self.site.app.stop()

    async def run(self, *words: str, typed: str | None = None) -> Result:
        given = ["--config", str(self.config)]
        if self.running:
            given += ["--server", str(self.site.app.admin_url)]
        return await asyncio.to_thread(CliRunner().invoke, main, [*words, *given], input=typed)

    async def told(self, *words: str) -> Any:
        result = await self.run(*words, "--json")
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        conforms("POST", f"/api/v1/{words[0]}", 200, found)
        return found

    async def push(self, name: str, tag: str, *layers: bytes) -> str:
        described = []
        for layer in (b"{}", *layers):
            digest = Digest.of(layer)
            path = f"/v2/{name}/blobs/uploads/?digest={digest}"
            async with self.site.request("POST", path, data=layer) as response:
                assert response.status == 201
            described.append({"mediaType": "x/y", "digest": digest, "size": len(layer)})
        body = {"schemaVersion": 2, "config": described[0], "layers": described[1:]}
        return await self.put(name, tag, {**body, "mediaType": OCI_MANIFEST})

    async def put(self, name: str, reference: str, body: dict[str, Any]) -> str:
        content = json.dumps(body).encode()
        headers = {"Content-Type": body["mediaType"]}
        path = f"/v2/{name}/manifests/{reference}"
        async with self.site.request("PUT", path, data=content, headers=headers) as response:
            assert response.status == 201, await response.text()
        return str(Digest.of(content))


@pytest.fixture
def image(upstream: Upstream) -> Image:
    return upstream.image("library/alpine", "3", layers=(LAYER,))


@pytest.fixture(params=["server", "directory"])
async def shop(
    request: pytest.FixtureRequest,
    serve: Serve,
    upstream: Upstream,
    image: Image,
    receiver: Receiver,  # noqa: F811
    tmp_path: Path,
) -> Shop:
    stores = {"local": {"store": {"immutable_tags": ["v*"]}}, "edge": {"store": {}}}
    hook = {"name": "hook", "url": receiver.url, "actions": ["push", "delete", "move"]}
    site = await serve(upstream, more=stores, top={"webhooks": [hook]})
    return Shop(site, tmp_path / "entrepot.yml", request.param == "server")


async def test_delete(shop: Shop) -> None:
    await shop.push("local/team/app", "1", LAYER)
    await shop.push("local/team/app", "v1", b"fixed")
    digest = await shop.push("local/team/app", "2", b"other")
    await shop.stop()
    dry = await shop.told("delete", "local/team/app:1", "--dry-run")
    assert dry == {
        "references": ["local/team/app:1"],
        "kept": [],
        "manifests": 1,
        "blobs": 1,
        "bytes": len(LAYER),
        "dry_run": True,
    }
    result = await shop.run("delete", "local/team/app:1")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "DELETED",
        "local/team/app:1",
        "1 manifest; the next collection can free 1 blob, 6.8 KiB",
    ]
    result = await shop.run("delete", "local/team/app:1")
    cause = "nothing that is stored, and may be deleted, matches local/team/app:1"
    assert (result.exit_code, result.stderr) == (1, f"entrepot: nothing was deleted: {cause}\n")
    result = await shop.run("delete", "local/team/app")
    assert "local/team/app:2" in result.stdout
    assert "kept: local/team/app:v1: immutable" in result.stdout
    assert digest not in result.stdout


async def test_delete_by_glob_wants_a_confirmation(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        await shop.push("local/app", f"ci-{number}", b"%d" % number)
        shop.site.clock.advance(86400)
    await shop.stop()
    result = await shop.run("delete", "local/*:ci-*")
    assert (result.exit_code, "give --yes" in result.stderr) == (2, True)
    monkeypatch.setattr(stores, "is_interactive", lambda: True)
    result = await shop.run("delete", "local/*:ci-*", "--keep", "1", typed="n\n")
    assert result.exit_code == 1
    assert "WOULD BE DELETED" in result.stderr
    assert "nothing was deleted" in result.stderr
    result = await shop.run("delete", "local/*:ci-*", "--keep", "2", typed="y\n")
    assert "local/app:ci-0" in result.stdout
    words = ["local/*:ci-*", "--keep", "1", "--older-than", "1d12h", "--dry-run", "--yes"]
    assert (await shop.told("delete", *words))["references"] == ["local/app:ci-1"]


@pytest.mark.parametrize(
    ("words", "status", "cause"),
    [
        (["delete", "alpine:3"], 1, "docker.io is a cache, and not a private registry: entrepot purge"),
        (["delete", "docker.io/*", "--yes"], 1, "docker.io is a cache"),
        (
            ["delete", "local/app@*", "--keep", "1", "--yes"],
            2,
            "REF|GLOB: older_than and keep choose among tags",
        ),
        (["purge", "local/app:1"], 1, "local is a private registry, and purge only empties caches: entrepot"),
        (["purge", "local/*", "--yes"], 1, "entrepot delete local/*"),
        (["purge", "local/a*:1", "--yes"], 1, "local is a private registry"),
        (["tag", "local/app:1", "alpine:4"], 1, "docker.io is a cache, and not a private registry, which"),
        (["tag", "local/app:1", f"local/app@{Digest.of(b'')}"], 2, "DST: name a tag, not a digest"),
        (["tag", "local/app:none", "local/app:2"], 1, "local/app has no tag none"),
        (["tag", "local/app:1", "local/app:v1"], 1, "tag v1 of local/app is immutable"),
    ],
)
async def test_what_cannot_be_done(shop: Shop, words: list[str], status: int, cause: str) -> None:
    await shop.push("local/app", "1", LAYER)
    await shop.push("local/app", "v1", b"fixed")
    await shop.stop()
    result = await shop.run(*words)
    assert result.exit_code == status
    assert cause in result.stderr


async def test_purge_of_everything_leaves_private_registries(shop: Shop) -> None:
    await shop.push("local/app", "1", LAYER)
    assert (await shop.site.get("/v2/library/alpine/manifests/3"))[0] == 200
    await shop.stop()
    result = await shop.run("purge", "*", "--yes")
    assert "docker.io/library/alpine:3" in result.stdout
    assert "local" not in result.stdout
    assert (await shop.told("delete", "*", "--dry-run", "--yes"))["references"] == ["local/app:1"]


async def test_tag(shop: Shop) -> None:
    old = await shop.push("local/app", "stable", b"old")
    digest = await shop.push("local/app", "1", LAYER)
    await shop.stop()
    expected = {"repository": "local/app", "tag": "stable", "digest": digest, "former": old, "copied": 0}
    assert await shop.told("tag", "local/app:1", "local/app:stable") == expected
    again = await shop.told("tag", f"local/app@{digest}", "local/app:stable")
    assert again == {**expected, "former": None}
    result = await shop.run("tag", "local/app:1", "edge/app:1")
    lines = result.stdout.splitlines()
    assert lines == [f"edge/app:1: {digest}", "2 manifests and blobs copied"]


async def test_tag_takes_a_whole_index_along(shop: Shop) -> None:
    children = [await shop.push("local/app", each, each.encode(), LAYER) for each in ("a", "b")]
    listed = [{"mediaType": OCI_MANIFEST, "digest": each, "size": 1} for each in children]
    inner = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": listed}
    digest = await shop.put("local/app", "inner", inner)
    outer = [{"mediaType": OCI_INDEX, "digest": digest, "size": 1}, listed[0]]
    top = await shop.put("local/app", "1", {**inner, "manifests": outer})
    await shop.stop()
    found = await shop.told("tag", "local/app:1", "edge/other:1")
    assert (found["digest"], found["copied"]) == (top, 3 + 4)
    found = await shop.told("delete", "edge/other", "--dry-run")
    assert (found["references"], found["manifests"], found["blobs"]) == (["edge/other:1"], 4, 0)


async def test_tag_promotes_what_a_cache_holds(shop: Shop, image: Image, upstream: Upstream) -> None:
    assert (await shop.site.get("/v2/library/alpine/manifests/3"))[0] == 200
    for each in (image.config, *image.layers):
        assert (await shop.site.get(f"/v2/library/alpine/blobs/{each}"))[0] == 200
    upstream.requests.clear()
    await shop.stop()
    found = await shop.told("tag", "alpine:3", "local/base/alpine:3")
    assert (found["digest"], found["copied"]) == (str(image.digest), 2)
    assert not [each for each in upstream.requests if "blobs" in str(each)]


@pytest.mark.housekeeping
async def test_events_are_those_of_a_push_and_of_a_deletion(shop: Shop, receiver: Receiver) -> None:  # noqa: F811
    digest = await shop.push("local/app", "1", LAYER)
    if not shop.running:
        return  # a server that starts later delivers them
    await shop.told("tag", "local/app:1", "local/app:2")
    await shop.told("delete", "local/app:2")
    pushed = 3  # two blobs and a manifest
    found = []
    for event in (await receiver.took(pushed + 2))[pushed:]:
        target = event["target"]
        found.append((event["action"], target["repository"], target.get("tag"), target.get("digest")))
    assert found == [
        ("push", "local/app", "2", digest),
        ("delete", "local/app", "2", None),
    ]

"""The example packages: installed by pip, and used by a server in processes of its own."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from storage.bucket.owner import MARKER
from storage.oci import OCI_INDEX, OCI_MANIFEST, Digest
from tests.conftest import OPEN
from tests.processes import Place, Server, place  # noqa: F401  a fixture
from tests.upstream import Basic, Upstream

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "extensions"
NAMES = sorted(each.name for each in EXAMPLES.iterdir() if each.is_dir())
PAGE = (ROOT / "docs" / "extensions.md").read_text()


def source(name: str) -> Path:
    [found] = (EXAMPLES / name).glob("*.py")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_page_shows_the_package_as_it_is(name: str) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert source(name).read_text() in blocks
    assert f"examples/extensions/{name}" in PAGE


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory into which pip has installed all of them."""
    made, target = tmp_path_factory.mktemp("sources") / "extensions", tmp_path_factory.mktemp("installed")
    shutil.copytree(EXAMPLES, made, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    pip = (
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    )
    more = ("--disable-pip-version-check", "--no-compile", "--target", target)
    done = subprocess.run([*pip, *more, *(made / name for name in NAMES)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    yield target


@pytest.fixture
async def secrets() -> Any:
    """A server of secrets: by path what it has, for those with the token."""
    held: dict[str, dict[str, str]] = {}

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        if request.headers.get("X-Vault-Token") != "token":
            return web.json_response({"errors": ["permission denied"]}, status=403)
        if (found := held.get(request.rel_url.raw_path)) is None:
            return web.json_response({"errors": []}, status=404)
        return web.json_response({"data": {"data": found, "metadata": {"version": 1}}})

    runner = web.ServerRunner(web.Server(answer))  # type: ignore[arg-type]
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    yield held, f"http://127.0.0.1:{port}"
    await runner.cleanup()


def extended(address: str, home: Path) -> dict[str, Any]:
    """Keys at the top of a configuration in which all of them are used."""
    labels = {"labels": {"team": "", "tier": "gold"}}
    made = {
        "logins": ("credential_provider", "vault", {"address": address, "token_file": str(home / "token")}),
        "layouts": ("upstream", "layout_directory", {"directory": str(home / "layouts")}),
        "objects": ("storage", "object_directory", {"directory": str(home / "objects")}),
        "labels": ("policy_condition", "required_label", labels),
        "lines": ("event_sink", "json_lines", {"file": str(home / "events"), "sync": False}),
        "gate": ("middleware", "client_gate", {"refuse": "^old/", "site": "berlin"}),
    }
    rule = {"name": "labelled", "action": "allow", "conditions": ["labels"]}
    return {
        "extensions": {
            name: {"kind": kind, "use": use, "timeout": "60s", "settings": settings}
            for name, (kind, use, settings) in made.items()
        },
        "policy": {"rules": [{**rule, "repositories": ["docker.io/labelled/*"]}]},
        "webhooks": [{"name": "file", "extension": "lines", "actions": ["push"]}],
        "shared": {"bucket": "extension://objects"},
        "access": OPEN,
    }


@pytest.mark.clients
@pytest.mark.errors("config.refused")
async def test_all_of_them_at_once(place: Place, packages: Path, secrets: Any) -> None:  # noqa: F811
    held, address = secrets
    (place.home / "token").write_text("token\n")
    os.mkfifo(place.home / "events")  # a pipe, so that the test sees when it is written
    async with Upstream(auth=Basic("ann", "right")) as private:
        host = private.url.removeprefix("http://")
        held[f"/v1/secret/data/registries/{host}"] = {"username": "ann", "password": "right"}
        digest = private.blob("library/app", b"content")
        labelled(private)
        place.namespace["upstream"].update(url=private.url, credential_provider="logins")
        place.tree.update(extended(address, place.home))
        place.tree["namespaces"].update(local={"store": {}}, share={"upstream": {"extension": "layouts"}})
        (place.home / "objects").mkdir()
        manifest = lay_out(place.home / "layouts" / "team" / "app")
        place.environment["PYTHONPATH"] = str(packages)
        server = await place.start()
        async with aiohttp.ClientSession(server.url) as client:
            async with client.get(f"/v2/library/app/blobs/{digest}") as response:
                assert await response.read() == b"content"
                assert response.headers["X-Site"] == "berlin"
            async with client.get("/v2/", headers={"User-Agent": "old/1"}) as response:
                assert response.status == 403
                assert "this client is too old" in await response.text()
            for tag, says in LABELLED:
                async with client.get(f"/v2/labelled/app/manifests/{tag}") as response:
                    text = await response.text()
                    assert (response.status, says in text) == (403 if says else 200, True), (tag, text)
            async with client.get("/v2/share/team/app/manifests/1.0") as response:
                assert (response.content_type, await response.read()) == (OCI_MANIFEST, manifest)
            async with client.get(f"/v2/share/team/app/blobs/{Digest.of(b'{}')}") as response:
                assert await response.read() == b"{}"
            async with client.get("/v2/share/team/app/tags/list") as response:
                assert (await response.json())["tags"] == ["1.0"]
            await push_event(client, place.home / "events")
        await used(server)
        await reloaded(place, server)
        await server.stop()
    [stored] = [
        each for each in (place.home / "objects").rglob("*") if each.is_file() and each.name != MARKER
    ]
    assert stored.read_bytes() == b"pushed"


def lay_out(directory: Path) -> bytes:
    """An OCI image layout with an image; returns its manifest."""
    (directory / "blobs" / "sha256").mkdir(parents=True)
    media_type = "application/vnd.oci.image.config.v1+json"
    config = {"mediaType": media_type, "digest": str(Digest.of(b"{}")), "size": 2}
    manifest = json.dumps({"schemaVersion": 2, "config": config, "layers": []}).encode()
    for each in (b"{}", manifest):
        (directory / "blobs" / "sha256" / hashlib.sha256(each).hexdigest()).write_bytes(each)
    listed = {"mediaType": OCI_MANIFEST, "digest": str(Digest.of(manifest)), "size": len(manifest)}
    named = {**listed, "annotations": {"org.opencontainers.image.ref.name": "1.0"}}
    (directory / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [named]}))
    return manifest


async def reloaded(place: Place, server: Server) -> None:  # noqa: F811
    """A reload makes extensions anew; with one that is broken, all stays as it was."""
    settings = place.tree["extensions"]["gate"]["settings"]
    for change, event in (({"site": "munich"}, "config.reloaded"), ({"sight": "rome"}, "config.refused")):
        settings.update(change)
        place.configure()
        before = server.pids()
        server.send(signal.SIGHUP)
        found = await server.heard(event)
        if event == "config.reloaded":
            await server.gone(*before)
        async with aiohttp.ClientSession(server.url) as client, client.get("/v2/") as response:
            assert response.headers["X-Site"] == "munich"
    assert "extensions.gate.settings.sight: client_gate of entrepot-client-gate 1.0" in found["error"]


async def push_event(client: aiohttp.ClientSession, pipe: Path) -> None:
    pushed = hashlib.sha256(b"pushed").hexdigest()
    path = f"/v2/local/app/blobs/uploads/?digest=sha256:{pushed}"
    async with client.post(path, data=b"pushed") as response:
        assert response.status == 201
    event = json.loads(await asyncio.to_thread(first_line, pipe))
    assert event["type"] == "entrepot.blob.pushed"
    assert event["data"]["digest"] == f"sha256:{pushed}"


# Tags, and why each is refused.
LABELLED = [
    ("good", ""),
    ("both", ""),
    ("bare", "has no label team"),
    ("wrong", "has no label tier=gold"),
    ("mixed", "has no label tier=gold"),
    ("attested", ""),
]


def labelled(upstream: Upstream) -> None:
    """Images and indexes, by the labels that their images have."""
    labels = {
        "good": {"team": "a", "tier": "gold"},
        "other": {"team": "", "tier": "gold", "more": "x"},
        "bare": None,
        "wrong": {"team": "a", "tier": "tin"},
    }
    made = {tag: put_image(upstream, tag, {"config": {"Labels": each}}) for tag, each in labels.items()}
    statement = {"mediaType": "application/vnd.in-toto+json", **described(upstream, b"{}")}
    made["statement"] = put_image(upstream, None, {}, statement)
    for tag, names in (
        ("both", ["good", "other"]),
        ("mixed", ["good", "wrong"]),
        ("attested", ["good", "statement"]),
    ):
        children = [{"mediaType": OCI_MANIFEST, **made[name]} for name in names]
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": children}
        upstream.manifest("labelled/app", json.dumps(index).encode(), OCI_INDEX, tag)


def described(upstream: Upstream, content: bytes) -> dict[str, Any]:
    return {"digest": upstream.blob("labelled/app", content), "size": len(content)}


def put_image(upstream: Upstream, tag: str | None, config: dict[str, Any], *layers: Any) -> dict[str, Any]:
    given = {
        "mediaType": "application/vnd.oci.image.config.v1+json",
        **described(upstream, json.dumps(config).encode()),
    }
    manifest = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": given, "layers": list(layers)}
    content = json.dumps(manifest).encode()
    return {"digest": upstream.manifest("labelled/app", content, OCI_MANIFEST, tag), "size": len(content)}


def first_line(pipe: Path) -> bytes:
    with pipe.open("rb") as file:
        return file.readline()


async def used(server: Server) -> None:
    """All are, and none has failed."""
    async with aiohttp.ClientSession(server.admin_url) as client:
        async with client.get("/readyz") as response:
            assert await response.json(content_type=None) == {"status": "ready"}
        async with client.get("/api/v1/extensions") as response:
            rows = await response.json(content_type=None)
    assert sorted(each["entry_point"] for each in rows) == NAMES
    assert {(each["state"], each["failures"]) for each in rows} == {("in use", 0)}, rows
    assert all(each["calls"] for each in rows)
    assert {each["package"].removeprefix("entrepot-").replace("-", "_") for each in rows} == set(NAMES)

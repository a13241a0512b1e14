"""The example packages: installed by pip, and used by a server in processes of its own."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

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


@pytest.mark.clients
async def test_all_of_them_at_once(place: Place, packages: Path, secrets: Any) -> None:  # noqa: F811
    held, address = secrets
    (place.home / "token").write_text("token\n")
    lines = place.home / "events"  # a pipe, so that the test sees when it is written
    os.mkfifo(lines)
    async with Upstream(auth=Basic("ann", "right")) as private:
        host = private.url.removeprefix("http://")
        held[f"/v1/secret/data/registries/{host}"] = {
            "username": "ann",
            "password": "right",
        }
        digest = private.blob("library/app", b"content")
        place.namespace["upstream"].update(url=private.url, credential_provider="logins")
        place.tree.update(
            access=OPEN,
            extensions={
                "logins": {
                    "kind": "credential_provider",
                    "use": "vault",
                    "settings": {"address": address, "token_file": str(place.home / "token")},
                },
                "lines": {
                    "kind": "event_sink",
                    "use": "json_lines",
                    "settings": {"file": str(lines), "sync": False},
                },
            },
            webhooks=[{"name": "file", "extension": "lines", "actions": ["push"]}],
        )
        place.tree["namespaces"]["local"] = {"store": {}}
        place.environment["PYTHONPATH"] = str(packages)
        server = await place.start()
        async with aiohttp.ClientSession(server.url) as client:
            async with client.get(f"/v2/library/app/blobs/{digest}") as response:
                assert await response.read() == b"content"
            pushed = hashlib.sha256(b"pushed").hexdigest()
            path = f"/v2/local/app/blobs/uploads/?digest=sha256:{pushed}"
            async with client.post(path, data=b"pushed") as response:
                assert response.status == 201
        event = json.loads(await asyncio.to_thread(first_line, lines))
        assert event["type"] == "entrepot.blob.pushed"
        assert event["data"]["digest"] == f"sha256:{pushed}"
        await used(server)
        await server.stop()


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
    assert {(each["state"], each["failures"]) for each in rows} == {("in use", 0)}
    assert all(each["calls"] for each in rows)
    assert {each["package"].removeprefix("entrepot-").replace("-", "_") for each in rows} == set(NAMES)

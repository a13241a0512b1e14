"""Death at every step: a real server is killed where a gate holds it, and another starts on its disk.

Invariants: the next pull has the right bytes; what was transferred before is not transferred again, but
for the little that was not on disk yet; nothing is left behind.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import yaml

from tests.conftest import Serve, Site
from tests.events import Ear
from tests.upstream import Hold, Upstream

REPOSITORY = "library/alpine"
LAYER = os.urandom(4 << 20)

# A server that says when it comes to a step, and stays there.
SERVER = """
import asyncio, sys, threading
from pathlib import Path
from proxy.app import App
from proxy.config import load
from proxy import telemetry
from storage import files, records

telemetry.configure("json", "error")

def stop(place, name, when):
    real = getattr(place, name)
    def stopped(*arguments):
        if when(*arguments):
            print("reached", flush=True)
            threading.Event().wait()
        return real(*arguments)
    setattr(place, name, stopped)

step = sys.argv[2]
if step == "before the data is safe":
    stop(files.os, "fdatasync", lambda file: True)
elif step == "before the name":
    stop(Path, "replace", lambda path, target: "blobs" in str(target))
elif step == "before the link":
    stop(records.Records, "put", lambda self, key, value: key.startswith("link "))
elif step == "before the manifest":
    stop(records.Records, "put", lambda self, key, value: key.startswith("manifest "))
elif step == "before the tag":
    stop(records.Records, "put", lambda self, key, value: key.startswith("tag "))

async def main():
    app = App(load(Path(sys.argv[1]), {}))
    await app.start()
    print(app.url.port, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


class Doomed:
    """A server in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, url: str) -> None:
        self.process = process
        self.url = url

    async def reached(self) -> None:
        assert self.process.stdout is not None
        assert await asyncio.wait_for(self.process.stdout.readline(), 30) == b"reached\n"

    async def killed(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        await self.process.wait()


class Ground:
    def __init__(self, directory: Path, upstream: Upstream, serve: Serve) -> None:
        self.directory = directory
        self.upstream = upstream
        self.serve = serve
        self.started: list[Doomed] = []
        self.session = aiohttp.ClientSession()

    async def doomed(self, step: str = "") -> Doomed:
        path = self.directory / "doomed.yml"
        namespace = {"upstream": {"url": self.upstream.url, "progress_timeout": "60s"}}
        tree = {
            "listen": "127.0.0.1:0",
            "admin": "off",
            "disk": {"path": str(self.directory / "disk")},
            "log": {"level": "error"},
            "namespaces": {"docker.io": namespace},
        }
        path.write_text(yaml.safe_dump(tree))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", SERVER, str(path), step, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        port = int(await asyncio.wait_for(process.stdout.readline(), 30))
        self.started.append(Doomed(process, f"http://127.0.0.1:{port}"))
        return self.started[-1]

    async def pull(self, doomed: Doomed, path: str) -> bytes:
        async with self.session.get(f"{doomed.url}/v2/{REPOSITORY}/{path}") as response:
            return await response.read()

    async def heir(self) -> Site:
        return await self.serve(self.upstream, directory=self.directory / "disk")


@pytest.fixture
async def ground(tmp_path: Path, upstream: Upstream, serve: Serve) -> AsyncIterator[Ground]:
    ground = Ground(tmp_path, upstream, serve)
    yield ground
    await ground.session.close()
    for each in ground.started:
        if each.process.returncode is None:
            await each.killed()


async def pulled(site: Site, path: str) -> bytes:
    status, _, body = await site.get(f"/v2/{REPOSITORY}/{path}")
    assert status == 200
    return body


async def test_killed_at_half_of_a_fill(ground: Ground) -> None:
    digest = ground.upstream.blob(REPOSITORY, LAYER)
    hold = Hold(asyncio.Event(), after=len(LAYER) // 2)
    ground.upstream.next("GET", digest, hold)
    doomed = await ground.doomed()
    async with ground.session.get(f"{doomed.url}/v2/{REPOSITORY}/blobs/{digest}") as response:
        await response.content.readexactly(len(LAYER) // 2 - 1)  # so that is on disk
        await doomed.killed()
        with pytest.raises(aiohttp.ClientError):
            await response.read()
    site = await ground.heir()
    assert await pulled(site, f"blobs/{digest}") == LAYER
    assert ground.upstream.log[-1].endswith(f"bytes={len(LAYER) // 2}-")
    assert ground.upstream.bytes_sent <= 1.05 * len(LAYER)
    assert await pulled(site, f"blobs/{digest}") == LAYER
    assert len(ground.upstream.log) == 2


@pytest.mark.parametrize("step", ["before the data is safe", "before the name", "before the link"])
async def test_killed_in_a_commit(ground: Ground, step: str) -> None:
    digest = ground.upstream.blob(REPOSITORY, LAYER)
    doomed = await ground.doomed(step)
    # The client has its last byte already: only the disk has not.
    assert await ground.pull(doomed, f"blobs/{digest}") == LAYER
    await doomed.reached()
    await doomed.killed()
    site = await ground.heir()
    assert await pulled(site, f"blobs/{digest}") == LAYER
    # All of it was there: the upstream is asked only whether this repository may show it.
    assert [line.split()[0] for line in ground.upstream.log] == ["GET", "HEAD"]
    assert ground.upstream.bytes_sent == len(LAYER)


@pytest.mark.parametrize("step", ["before the manifest", "before the tag"])
async def test_killed_while_a_tag_is_stored(ground: Ground, step: str) -> None:
    image = ground.upstream.image(REPOSITORY, "latest")
    doomed = await ground.doomed(step)
    waiting = asyncio.create_task(ground.pull(doomed, "manifests/latest"))
    await doomed.reached()
    await doomed.killed()
    with pytest.raises(aiohttp.ClientError):
        await waiting
    site = await ground.heir()
    assert await pulled(site, "manifests/latest") == image.content
    ground.upstream.clear()
    assert await pulled(site, f"manifests/{image.digest}") == image.content
    assert await pulled(site, "manifests/latest") == image.content
    assert ground.upstream.log == []


async def test_records_that_point_at_nothing_heal(ground: Ground) -> None:
    digest = ground.upstream.blob(REPOSITORY, LAYER)
    site = await ground.heir()
    assert await pulled(site, f"blobs/{digest}") == LAYER
    await site.app.stop()  # the link is there, and the fill at its end
    for path in (ground.directory / "disk").glob("cache/blobs/*/*/*"):
        path.unlink()
    again = await ground.heir()
    assert await pulled(again, f"blobs/{digest}") == LAYER
    assert [line.split()[0] for line in ground.upstream.log] == ["GET", "GET"]


async def test_a_truncated_blob_is_noticed_before_its_status_line(ground: Ground) -> None:
    digest = ground.upstream.blob(REPOSITORY, LAYER)
    site = await ground.heir()
    assert await pulled(site, f"blobs/{digest}") == LAYER
    await site.app.stop()
    for path in (ground.directory / "disk").glob("cache/blobs/*/*/*"):
        os.truncate(path, 1000)
    again = await ground.heir()
    async with again.request("HEAD", f"/v2/{REPOSITORY}/blobs/{digest}") as response:
        assert response.headers["Content-Length"] == str(len(LAYER))
    ear = Ear()
    assert await pulled(again, f"blobs/{digest}") == LAYER
    await ear.heard("fill.committed")  # its last byte comes sooner
    # For another repository, which has no link with a size of its own, too.
    for path in (ground.directory / "disk").glob("cache/blobs/*/*/*"):
        os.truncate(path, 1000)
    ground.upstream.blob("library/other", LAYER)
    status, _, body = await again.get(f"/v2/library/other/blobs/{digest}")
    assert (status, body) == (200, LAYER)

"""Death at every step: a real server is killed where a gate holds it, and another starts on its disk.

Invariants: the next pull has the right bytes; what was transferred before is not transferred again, but
for the little that was not on disk yet; nothing is left behind.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import yaml

from storage.oci import Digest
from tests.conftest import OPEN, Serve, Site
from tests.events import Ear
from tests.preloaded import PROGRAM
from tests.upstream import Hold, Upstream

pytestmark = pytest.mark.clients

REPOSITORY = "library/alpine"
LAYER = os.urandom(4 << 20)

# A server that says when it comes to a step, and stays there.
SERVER = """
import asyncio, sys, threading
from pathlib import Path
from proxy.server.process import ServerProcess
from proxy.config.loader import load
from proxy.telemetry import metrics
from proxy.cache import parts
from proxy.web import push
from storage.disk import blobs, records
from proxy.telemetry import logs

logs.configure("json", "error")

def stop(place, name, when):
    real = getattr(place, name)
    def stopped(*arguments):
        if when(*arguments):
            print("reached", flush=True)
            threading.Event().wait()
        return real(*arguments)
    setattr(place, name, stopped)

step = sys.argv[2]
if step == "with holes":
    parts.ASSUMED = 1
elif step == "before the data is safe":
    stop(blobs.os, "fdatasync", lambda file: True)
elif step == "before the name":
    stop(Path, "replace", lambda path, target: "blobs" in str(target))
elif step == "before the link":
    stop(records.SQLiteBatch, "put", lambda self, key, value: key.startswith("link "))
elif step == "before the manifest":
    stop(records.SQLiteBatch, "put", lambda self, key, value: key.startswith("manifest "))
elif step == "before the tag":
    stop(records.SQLiteBatch, "put", lambda self, key, value: key.startswith("tag "))
elif step == "before the answer":
    stop(push, "created", lambda *arguments: True)

async def main():
    app = ServerProcess(load(Path(sys.argv[1]), {}))
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
            "namespaces": {"docker.io": namespace, "local": {"store": {}}},
            "access": OPEN,
        }
        path.write_text(yaml.safe_dump(tree))
        process = await asyncio.create_subprocess_exec(
            *PROGRAM, SERVER, str(path), step, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        port = int(await asyncio.wait_for(process.stdout.readline(), 30))
        self.started.append(Doomed(process, f"http://127.0.0.1:{port}"))
        return self.started[-1]

    async def pull(self, doomed: Doomed, path: str) -> bytes:
        async with self.session.get(f"{doomed.url}/v2/{REPOSITORY}/{path}") as response:
            return await response.read()

    async def heir(self) -> Site:
        more = {"local": {"store": {}}}
        return await self.serve(self.upstream, directory=self.directory / "disk", more=more)


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


async def test_killed_with_holes(ground: Ground) -> None:
    digest = ground.upstream.blob(REPOSITORY, LAYER)
    hold = Hold(asyncio.Event(), after=100_000)
    ground.upstream.next("GET", digest, hold)
    doomed = await ground.doomed("with holes")
    url = f"{doomed.url}/v2/{REPOSITORY}/blobs/{digest}"
    async with ground.session.get(url) as response:
        await response.content.readexactly(100_000)
        spans = [(1_000_000, 1_500_000), (3_000_000, 3_000_001), (2_000_000, 2_500_000)]
        for start, stop in spans:
            async with ground.session.get(url, headers={"Range": f"bytes={start}-{stop - 1}"}) as part:
                assert await part.read() == LAYER[start:stop]
        await doomed.killed()
        with pytest.raises(aiohttp.ClientError):
            await response.read()
    ground.upstream.clear()
    site = await ground.heir()
    assert await pulled(site, f"blobs/{digest}") == LAYER
    # No byte of what was there is transferred again.
    assert [each.range for each in ground.upstream.requests] == [
        "bytes=100000-999999",
        "bytes=1500000-1999999",
        "bytes=2500000-2999999",
        "bytes=3000001-",
    ]


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


# Pushes

CONFIG = b"{}"
TYPE = "application/vnd.oci.image.manifest.v1+json"
LOCAL = "/v2/local/app"


async def send(
    ground: Ground, url: str, method: str, path: str, status: int, body: bytes = b"", kind: str = ""
) -> str:
    """The answer's Location."""
    headers = {"Content-Type": kind} if kind else {}
    async with ground.session.request(method, url + path, data=body, headers=headers) as response:
        assert response.status == status, await response.text()
        return response.headers.get("Location", "")


async def cut(doomed: Doomed, asking: asyncio.Task[str]) -> None:
    """Kill it at its step; who was asking gets no answer."""
    await doomed.reached()
    await doomed.killed()
    with pytest.raises(aiohttp.ClientError):
        await asking


async def begun(ground: Ground, url: str, content: bytes) -> str:
    """Where an upload goes on that has all of the content."""
    place = await send(ground, url, "POST", f"{LOCAL}/blobs/uploads/", 202)
    return await send(ground, url, "PATCH", place, 202, content)


@pytest.mark.parametrize("step", ["before the data is safe", "before the name"])
async def test_killed_before_a_pushed_blob_is_in_its_place(ground: Ground, step: str) -> None:
    digest = Digest.of(LAYER)
    doomed = await ground.doomed(step)
    place = await begun(ground, doomed.url, LAYER)
    end = asyncio.create_task(send(ground, doomed.url, "PUT", f"{place}?digest={digest}", 201))
    await cut(doomed, end)
    site = await ground.heir()
    assert (await site.get(f"{LOCAL}/blobs/{digest}"))[0] == 404
    # What was taken is there, and is gone on with.
    async with site.request("GET", place) as response:
        assert (response.status, response.headers["Range"]) == (204, f"0-{len(LAYER) - 1}")
    await send(ground, site.url, "PUT", f"{place}?digest={digest}", 201)
    assert (await site.get(f"{LOCAL}/blobs/{digest}"))[2] == LAYER


async def test_killed_before_a_pushed_blob_is_shown(ground: Ground) -> None:
    digest = Digest.of(LAYER)
    doomed = await ground.doomed("before the link")
    place = await begun(ground, doomed.url, LAYER)
    end = asyncio.create_task(send(ground, doomed.url, "PUT", f"{place}?digest={digest}", 201))
    await cut(doomed, end)
    site = await ground.heir()
    assert (await site.get(f"{LOCAL}/blobs/{digest}"))[0] == 404
    await send(ground, site.url, "GET", place, 404)
    place = await begun(ground, site.url, LAYER)
    await send(ground, site.url, "PUT", f"{place}?digest={digest}", 201)
    assert (await site.get(f"{LOCAL}/blobs/{digest}"))[2] == LAYER


async def test_killed_once_a_pushed_blob_is_there(ground: Ground) -> None:
    digest = Digest.of(LAYER)
    doomed = await ground.doomed("before the answer")
    place = await begun(ground, doomed.url, LAYER)
    end = asyncio.create_task(send(ground, doomed.url, "PUT", f"{place}?digest={digest}", 201))
    await cut(doomed, end)
    site = await ground.heir()
    assert (await site.get(f"{LOCAL}/blobs/{digest}"))[2] == LAYER


@pytest.mark.parametrize("step", ["before the manifest", "before the tag", "before the answer"])
async def test_killed_while_a_manifest_is_pushed(ground: Ground, step: str) -> None:
    """All of it is there, or nothing."""
    config = Digest.of(CONFIG)
    described = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": config, "size": len(CONFIG)}
    subject = {"mediaType": TYPE, "digest": Digest.of(b"subject"), "size": 7}
    body = {"schemaVersion": 2, "mediaType": TYPE, "config": described, "layers": [], "subject": subject}
    content = json.dumps(body).encode()
    site = await ground.heir()
    place = await begun(ground, site.url, CONFIG)
    await send(ground, site.url, "PUT", f"{place}?digest={config}", 201)
    await site.app.stop()
    doomed = await ground.doomed(step)
    target = f"{LOCAL}/manifests/{Digest.of(content)}?tag=v1&tag=v2"
    push = asyncio.create_task(send(ground, doomed.url, "PUT", target, 201, content, TYPE))
    await cut(doomed, push)
    again = await ground.heir()
    there = step == "before the answer"
    status, _, listed = await again.get(f"{LOCAL}/tags/list")
    assert (status, json.loads(listed)["tags"]) == (200, ["v1", "v2"] if there else [])
    for reference in (Digest.of(content), "v1", "v2"):
        assert (await again.get(f"{LOCAL}/manifests/{reference}"))[0] == (200 if there else 404)
    referrers = json.loads((await again.get(f"{LOCAL}/referrers/{Digest.of(b'subject')}"))[2])
    assert len(referrers["manifests"]) == there
    await send(ground, again.url, "PUT", target, 201, content, TYPE)
    assert (await again.get(f"{LOCAL}/manifests/v2"))[2] == content

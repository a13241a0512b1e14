"""Bundles that go through the admin API, in and out, by hand and by the commands."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import os
import tarfile
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from click.testing import CliRunner, Result
from yarl import URL

from proxy.admin.api import bundle_routes
from proxy.cli.main import main
from proxy.transfer import bundle_export, results
from storage.oci import Digest
from tests.archives import REF_NAME, image, layout, tar
from tests.conftest import OPEN, Serve, Site
from tests.upstream import Upstream
from tests.wire import PATIENCE, connect

MADE = image(b"layer" * 1000)
NAME = "docker.io/library/alpine:3"
ARCHIVE = tar(layout([(MADE, {REF_NAME: NAME})]))
NOWHERE = "http://127.0.0.1:9"
TAR = {"Content-Type": "application/x-tar"}


class Far:
    """A server, as an administrator on another machine sees it."""

    def __init__(self, site: Site) -> None:
        self.site = site
        assert site.app.admin_url is not None
        self.url = site.app.admin_url

    async def ask(self, path: str, body: Any, **headers: str) -> tuple[int, bytes]:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        url = f"{self.url.origin()}/{path}"
        async with self.site.session.post(url, data=body, headers=given) as response:
            return response.status, await response.read()

    async def import_(self, archive: Any = ARCHIVE, query: str = "", **headers: str) -> tuple[int, Any]:
        given = headers or {"Content_Type": "application/x-tar"}
        status, body = await self.ask(f"api/v1/import{query}", archive, **given)
        return status, json.loads(body)

    async def export(self, **fields: Any) -> tuple[int, bytes]:
        return await self.ask("api/v1/export", json.dumps(fields), Content_Type="application/json")

    async def pulled(self, path: str = "/v2/library/alpine/manifests/3") -> bool:
        return (await self.site.get(path))[0] == 200

    def spooled(self) -> list[Path]:
        return list((self.site.directory / "cache" / "partial").iterdir())

    async def run(self, *words: str | Path, server: URL | None = None) -> Result:
        """A command; the program has a loop of its own."""
        config = self.site.directory / "client.yml"
        config.write_text("admin: off\n")
        command = [*map(str, words), "--server", str(server or self.url), "--config", str(config)]
        return await asyncio.to_thread(lambda: CliRunner().invoke(main, command))


@pytest.fixture
async def far(serve: Serve, tmp_path: Path) -> Far:
    return Far(await serve(NOWHERE, top={"offline": True}, directory=tmp_path / "far"))


@pytest.mark.parametrize("compressed", [False, True])
async def test_in(far: Far, compressed: bool) -> None:
    archive = gzip.compress(ARCHIVE) if compressed else ARCHIVE
    status, found = await far.import_(archive, "?dry_run=true")
    assert (status, found["dry_run"], found["blobs"]) == (200, True, 0)
    assert not await far.pulled()
    status, found = await far.import_(archive)
    assert (status, found["blobs"], found["verified"]) == (200, 2, False)
    (row,) = found["references"]
    assert (row["repository"], row["tag"]) == ("docker.io/library/alpine", "3")
    assert await far.pulled()
    assert (await far.import_(archive))[1]["blobs"] == 0
    assert far.spooled() == []


async def test_in_by_a_name_that_is_given(far: Far) -> None:
    archive = tar(layout([(MADE, {})]))
    status, found = await far.import_(archive)
    assert (status, found["code"]) == (422, "ARCHIVE_INVALID")
    status, _ = await far.import_(archive, "?name=team/app:7&pin=true")
    assert status == 200
    assert await far.pulled("/v2/team/app/manifests/7")
    async with far.site.session.get(far.url / "api/v1/pins") as response:
        assert [each["pattern"] for each in await response.json()] == ["docker.io/team/app:7"]


@pytest.mark.parametrize(
    ("query", "headers", "status", "code"),
    [
        ("?pin=yes", {}, 400, "FIELD_INVALID"),
        ("?name=team/app:7", {}, 400, "FIELD_INVALID"),  # the image has a name
        ("?platforms=amd64", {}, 400, "FIELD_INVALID"),
        ("?platforms=linux/amd64,linux/arm64", {}, 400, "FIELD_INVALID"),  # there is no index
        ("?dryrun=true", {}, 400, "FIELD_INVALID"),
        ("", {"Content_Type": "application/json"}, 415, "UNSUPPORTED"),
        ("", {"Content_Type": "text/plain"}, 415, "UNSUPPORTED"),
        ("", {"Content_Type": "application/x-tar", "Content_Encoding": "gzip"}, 415, "UNSUPPORTED"),
    ],
)
async def test_what_is_asked_wrongly(
    far: Far, query: str, headers: dict[str, str], status: int, code: str
) -> None:
    found = await far.import_(ARCHIVE, query, **headers)
    assert (found[0], found[1]["code"]) == (status, code)
    assert not await far.pulled()


async def test_not_without_the_token(serve: Serve, tmp_path: Path) -> None:
    far = Far(await serve(NOWHERE, top={"offline": True, "admin_token": "secret"}))
    for token in ("", "Bearer wrong"):
        status, found = await far.import_(ARCHIVE, Content_Type="application/x-tar", Authorization=token)
        assert (status, found["code"]) == (401, "UNAUTHORIZED")
        assert (await far.export(names=["*"]))[0] == 401
    assert not await far.pulled()
    archive = tmp_path / "archive.tar"
    archive.write_bytes(ARCHIVE)
    result = await far.run("import", archive)
    assert result.exit_code == 1 and "--token" in result.output
    result = await far.run("import", archive, "--token", "secret")
    assert result.exit_code == 0, result.output
    assert await far.pulled()


HOSTILE = {
    "cut": ARCHIVE[: len(ARCHIVE) // 2],
    "nothing": b"",
    "no tar": os.urandom(5000),
    "damaged": ARCHIVE.replace(b"layerlayer", b"layerLAYER"),
}


@pytest.mark.parametrize("kind", HOSTILE)
async def test_what_is_damaged_changes_nothing(far: Far, kind: str) -> None:
    status, found = await far.import_(HOSTILE[kind])
    assert (status, found["code"]) == (422, "ARCHIVE_INVALID"), found
    assert not await far.pulled()
    assert far.spooled() == []


async def test_what_leads_out_of_an_archive_is_refused(far: Far) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as written:
        written.addfile(tarfile.TarInfo("../index.json"))
    status, found = await far.import_(buffer.getvalue())
    assert (status, found["code"]) == (422, "ARCHIVE_INVALID")


async def test_a_request_that_is_cut_changes_nothing(far: Far) -> None:
    async with connect(str(far.url)) as wire:
        lines = ["POST /api/v1/import HTTP/1.1", f"Host: {far.url.host}", "Content-Type: application/x-tar"]
        lines += [f"Content-Length: {len(ARCHIVE)}", "", ""]
        await wire.send("\r\n".join(lines).encode() + ARCHIVE[:-1000])
        wire.writer.write_eof()
        await wire.rest()
    assert not await far.pulled()
    assert far.spooled() == []


async def test_who_sends_nothing_is_not_waited_for(far: Far, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_routes, "STALLED", 0.05)
    async with connect(str(far.url)) as wire:
        lines = ["POST /api/v1/import HTTP/1.1", f"Host: {far.url.host}", "Content-Type: application/x-tar"]
        await wire.send("\r\n".join([*lines, "Content-Length: 2000", "", ""]).encode() + ARCHIVE[:1000])
        reply = await wire.reply()
        await wire.send(ARCHIVE[1000:2000])  # too late; the server would wait for it for a while
    assert (reply.status, json.loads(reply.body)["code"]) == (422, "ARCHIVE_INVALID")
    assert not await far.pulled()


async def test_out_and_in_again(far: Far, serve: Serve, tmp_path: Path) -> None:
    await far.import_()
    status, told = await far.export(names=["alpine:3"], dry_run=True)
    planned = json.loads(told)
    assert (status, [each["reference"] for each in planned["references"]]) == (200, [NAME])
    status, bundle = await far.export(names=["alpine:3"])
    assert status == 200
    with tarfile.open(fileobj=io.BytesIO(bundle)) as found:
        index = json.load(found.extractfile("index.json") or io.BytesIO())
        contents = (found.extractfile("entrepot.json") or io.BytesIO()).read()
    assert index["manifests"][0]["annotations"][REF_NAME] == NAME
    other = Far(await serve(NOWHERE, top={"offline": True}, directory=tmp_path / "other"))
    assert (await other.import_(bundle))[0] == 200
    assert await other.pulled()
    # Of what an earlier bundle has, only manifests go along.
    status, delta = await far.export(names=["alpine:3"], since=[contents.decode()])
    assert status == 200 and len(delta) < len(bundle)
    status, told = await far.export(names=["alpine:3"], since=[contents.decode()], dry_run=True)
    assert json.loads(told)["spared"] == 2


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({}, 400, "FIELD_INVALID"),
        ({"names": ["alpine:4"]}, 404, "MANIFEST_UNKNOWN"),
        ({"names": ["alpine:3"], "platforms": ["linux"]}, 400, "FIELD_INVALID"),
        ({"names": ["alpine:3"], "used_within": "soon"}, 400, "FIELD_INVALID"),
        ({"names": ["alpine:3"], "since": ["no JSON"]}, 422, "ARCHIVE_INVALID"),
    ],
)
async def test_what_cannot_be_exported(far: Far, fields: dict[str, Any], status: int, code: str) -> None:
    await far.import_()
    found = await far.export(**fields)
    assert (found[0], json.loads(found[1])["code"]) == (status, code)


async def test_an_export_that_fails_breaks_off(far: Far, tmp_path: Path) -> None:
    await far.import_()
    for blob in (far.site.directory / "cache" / "blobs").glob("*/*/*"):
        content = bytearray(blob.read_bytes())
        content[-1] ^= 1
        blob.write_bytes(content)
    with pytest.raises(aiohttp.ClientError):
        await far.export(names=["alpine:3"])
    bundle = tmp_path / "bundle.tar"
    result = await far.run("export", bundle, "alpine:3")
    assert result.exit_code == 1, result.output
    assert not bundle.exists()
    assert not list(tmp_path.glob(".bundle*"))


async def test_a_client_that_leaves_leaves_nothing(far: Far) -> None:
    await far.import_()
    url = far.url / "api/v1/export"
    async with far.site.session.post(url, json={"names": ["alpine:3"]}) as response:
        assert response.status == 200
        await response.content.readany()
        response.close()
    assert (await far.export(names=["alpine:3"]))[0] == 200


async def test_the_commands(far: Far, serve: Serve, tmp_path: Path) -> None:
    archive, bundle = tmp_path / "archive.tar", tmp_path / "bundle.tar"
    archive.write_bytes(ARCHIVE)
    result = await far.run("import", archive)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[1].split() == [NAME, MADE.digest]
    result = await far.run("export", bundle, "alpine:3", "--json")
    assert result.exit_code == 0, result.output
    done = json.loads(result.stdout)
    with tarfile.open(bundle) as found:
        contents = (found.extractfile("entrepot.json") or io.BytesIO()).read()
    assert (done["bundle"], done["digest"]) == (str(bundle), Digest.of(contents))
    assert [each["reference"] for each in done["references"]] == [NAME]
    result = await far.run("export", bundle, "alpine:3")
    assert result.exit_code == 1 and "File exists" in result.output
    delta = tmp_path / "delta.tar"
    result = await far.run("export", delta, "alpine:3", "--since", bundle)
    assert result.exit_code == 0 and delta.stat().st_size < bundle.stat().st_size
    other = Far(await serve(NOWHERE, top={"offline": True}, directory=tmp_path / "other"))
    assert (await other.run("import", bundle)).exit_code == 0
    assert await other.pulled()
    result = await far.run("import", tmp_path)
    assert result.exit_code == 2 and "tar -C" in result.output
    result = await far.run("import", tmp_path / "none.tar")
    assert result.exit_code == 1 and "No such file" in result.output


async def test_what_was_pushed_goes_too(serve: Serve, upstream: Upstream, tmp_path: Path) -> None:
    more = {"local": {"store": {}}}
    far = Far(await serve(upstream, more=more, top={"access": OPEN}))
    status, _ = await far.import_(tar(layout([(MADE, {REF_NAME: "local/team/app:1"})])))
    assert status == 200
    assert await far.pulled("/v2/local/team/app/manifests/1")
    status, bundle = await far.export(names=["local/*"])
    assert status == 200
    other = Far(await serve(upstream, more=more, directory=tmp_path / "other"))
    assert (await other.import_(bundle))[0] == 200
    assert await other.pulled("/v2/local/team/app/manifests/1")


@pytest.mark.clients
async def test_a_large_archive_is_never_in_memory_as_a_whole(far: Far, tmp_path: Path) -> None:
    """In pieces both ways: what a piece may have is bounded, whatever there is."""
    made = image(os.urandom(20 << 20))
    archive = tmp_path / "large.tar"
    archive.write_bytes(tar(layout([(made, {REF_NAME: "docker.io/library/large:1"})])))

    async def stream() -> AsyncIterator[bytes]:
        with archive.open("rb") as file:
            while piece := file.read(1 << 16):
                yield piece

    status, _ = await far.import_(stream())
    assert status == 200
    async with far.site.session.post(far.url / "api/v1/export", json={"names": ["large:1"]}) as response:
        sizes = [len(piece) async for piece, _ in response.content.iter_chunks()]
    assert sum(sizes) > 20 << 20
    assert max(sizes) <= 1 << 20


async def test_what_came_in_is_listed_at_once(far: Far) -> None:
    async def listed() -> list[str]:
        async with far.site.session.get(far.url / "api/v1/repositories") as response:
            return [each["repository"] for each in (await response.json())["repositories"]]

    assert await listed() == []
    await far.import_()
    assert await listed() == ["docker.io/library/alpine"]


def asking(body: bytes, version: str = "1.1") -> bytes:
    """For a bundle, on a connection for nothing else."""
    lines = [f"POST /api/v1/export HTTP/{version}", "Host: 127.0.0.1", "Content-Type: application/json"]
    return "\r\n".join([*lines, "Connection: close", f"Content-Length: {len(body)}", "", ""]).encode() + body


async def test_one_that_fails_is_no_whole_one_to_old_clients_either(far: Far) -> None:
    """HTTP/1.0 ends what has no length by closing the connection; some proxies speak it."""
    await far.import_()
    for blob in (far.site.directory / "cache" / "blobs").glob("*/*/*"):
        blob.write_bytes(bytes(blob.stat().st_size))
    async with connect(str(far.url)) as wire:
        await wire.send(asking(b'{"names": ["alpine:3"]}', "1.0"))
        with pytest.raises(ConnectionResetError):
            await wire.rest()


@pytest.mark.errors("admin.failed")
async def test_what_nobody_expects_breaks_it_off_too(far: Far, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(plan: Any, sink: Any, *rest: Any) -> None:
        sink.put("oci-layout", 4, [b"some"])
        raise RuntimeError("a fault of ours")

    await far.import_()
    monkeypatch.setattr(bundle_export, "write", write)
    async with connect(str(far.url)) as wire:
        await wire.send(asking(b'{"names": ["alpine:3"]}'))
        with pytest.raises(ConnectionResetError):
            await wire.rest()


@pytest.mark.clients
async def test_clients_that_take_nothing_leave_threads_for_all_else(far: Far) -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(bundle_routes.SENDING + 1))
    made = image(os.urandom(24 << 20))  # more than sockets hold
    await far.import_(tar(layout([(made, {REF_NAME: "docker.io/library/large:1"})])))
    async with AsyncExitStack() as stack:
        wires = [
            await stack.enter_async_context(connect(str(far.url))) for _ in range(bundle_routes.SENDING + 1)
        ]
        for wire in wires:
            await wire.send(asking(b'{"names": ["large:1"]}'))
        for wire in wires[: bundle_routes.SENDING]:
            assert (await wire.head())[0] == 200
        async with asyncio.timeout(PATIENCE):
            assert (await far.import_())[0] == 200
        for wire in wires:  # the last one had to wait
            assert len(await wire.rest()) > 24 << 20


async def test_the_digest_is_that_of_the_bundle_which_was_sent(far: Far, tmp_path: Path) -> None:
    """The one that was planned was made at another time."""
    await far.import_()
    _, told = await far.export(names=["alpine:3"], dry_run=True)
    far.site.clock.advance(5)
    async with far.site.session.post(far.url / "api/v1/export", json={"names": ["alpine:3"]}) as response:
        digest, bundle = response.headers[results.DIGEST], await response.read()
    with tarfile.open(fileobj=io.BytesIO(bundle)) as found:
        contents = (found.extractfile("entrepot.json") or io.BytesIO()).read()
    assert digest == Digest.of(contents) != json.loads(told)["digest"]


async def test_what_a_proxy_ends_too_early_gets_no_name(far: Far, tmp_path: Path) -> None:
    async def shorten(request: web.Request) -> web.Response:
        async with far.site.session.post(far.url / "api/v1/export", json=await request.json()) as response:
            content = await response.read()
            cut = content[:-3000] if response.content_type == bundle_routes.TAR else content
            return web.Response(body=cut, content_type=response.content_type)

    await far.import_()
    proxy = web.Application()
    proxy.router.add_post("/api/v1/export", shorten)
    async with TestServer(proxy) as server:
        result = await far.run("export", tmp_path / "bundle.tar", "alpine:3", server=server.make_url("/"))
    assert result.exit_code == 1 and "it is truncated" in result.output
    assert list(tmp_path.glob("*bundle*")) == list(tmp_path.glob(".*bundle*")) == []

"""The server as a whole: it starts or leaves nothing behind, drains, and does what it is configured to."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from proxy.config.errors import StartError
from proxy.namespaces.composition import compose
from proxy.server.process import ServerProcess
from tests.clients.processes import free_port
from tests.conftest import Clock, Serve, Site, configuration
from tests.events import Ear
from tests.upstream import Basic, Hold, Image, Reset, Upstream
from tests.wire import connect

MANIFEST = "/v2/library/alpine/manifests/latest"
BLOB = os.urandom(1 << 20) * 2


@pytest.fixture
def image(upstream: Upstream) -> Image:
    return upstream.image("library/alpine", "latest", layers=(BLOB,))


def may_listen(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


# Starting


class Attempt:
    """A configuration that can be started again and again."""

    def __init__(self, directory: Path, **top: Any) -> None:
        self.port, self.admin = free_port(), free_port()
        tree = {
            "listen": f"127.0.0.1:{self.port}",
            "admin": f"127.0.0.1:{self.admin}",
            "disk": {"path": str(directory / "disk")},
            "namespaces": {"a.example": {"upstream": "https://a.example"}},
            **top,
        }
        self.settings = configuration(directory, tree)

    async def fails(self) -> str:
        """Why it does not start; having made sure that nothing stayed behind."""
        with pytest.raises(StartError) as raised:
            await ServerProcess(self.settings).start()
        assert may_listen(self.port)
        assert may_listen(self.admin)
        message = str(raised.value)
        assert "\n" not in message
        return message

    async def works(self) -> None:
        app = ServerProcess(self.settings)
        await app.start()
        try:
            assert app.url.port == self.port
            assert not may_listen(self.port)
        finally:
            await app.stop()
        assert may_listen(self.port)


@pytest.mark.parametrize("key", ["listen", "admin"])
async def test_a_port_in_use(tmp_path: Path, key: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        attempt = Attempt(tmp_path, **{key: address})
        cause = "Address already in use: stop what listens there (ss -ltnp shows it), or choose another port"
        assert await attempt.fails() == f"cannot listen on {address} ({key}): {cause}"


async def test_a_directory_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "disk").write_text("not a directory")
    attempt = Attempt(tmp_path)
    message = await attempt.fails()
    assert message.startswith(f"cannot store in {tmp_path}/disk (disk.path): ")
    assert "Not a directory" in message
    (tmp_path / "disk").unlink()
    await attempt.works()


@pytest.mark.parametrize("name", ["partial", "blobs", "records"])
async def test_a_directory_that_is_a_file_in_part(tmp_path: Path, name: str) -> None:
    attempt = Attempt(tmp_path)
    (tmp_path / "disk" / "cache").mkdir(parents=True)
    (tmp_path / "disk" / "cache" / name).touch()
    assert f"(disk.path): {tmp_path}/disk/cache" in (await attempt.fails()).replace("records in ", "")
    (tmp_path / "disk" / "cache" / name).unlink()
    await attempt.works()


@pytest.mark.errors("records.damaged")
async def test_records_that_are_none(tmp_path: Path) -> None:
    records = tmp_path / "disk" / "cache" / "records"
    records.mkdir(parents=True)
    (records / "cache.db").write_text("this is no database, but long enough to look like one\n" * 100)
    await Attempt(tmp_path).works()
    (aside,) = records.parent.glob("records.damaged-*")
    assert (aside / "cache.db").read_text().startswith("this is no database")


async def test_a_certificate_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    good = {"upstream": "https://a.example"}
    for file in ("/no/such.pem", str(tmp_path / "ca.pem")):
        # The namespaces before it have been made already, and are to be closed.
        bad = {"upstream": {"url": "https://b.example", "ca_file": file}}
        message = await Attempt(tmp_path, namespaces={"a.example": good, "b.example": bad}).fails()
        assert message.startswith(f"namespaces.b.example.upstream: {file}: ")


async def test_what_was_not_started_can_be_stopped(tmp_path: Path) -> None:
    await ServerProcess(Attempt(tmp_path).settings).stop()


async def test_every_address_of_the_machine(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, listen=":0")
    app = ServerProcess(attempt.settings)
    await app.start()
    try:
        async with connect(f"http://127.0.0.1:{app.url.port}") as wire:
            assert (await wire.ask("GET", "/v2/")).status == 200
    finally:
        await app.stop()


async def test_starting_and_stopping_asks_nobody(serve: Serve, upstream: Upstream) -> None:
    site = await serve(upstream)
    await site.app.stop()
    assert upstream.log == []


async def test_what_was_stored_is_served_after_a_restart_without_upstream(
    serve: Serve, upstream: Upstream, image: Image
) -> None:
    site = await serve(upstream)
    ear = Ear()
    blob = f"/v2/library/alpine/blobs/{image.layers[0]}"
    for path in (MANIFEST, blob):
        assert (await site.get(path))[0] == 200
    await ear.heard("fill.committed")
    await site.app.stop()
    await upstream.stop()
    again = await serve(upstream)
    assert (await again.get(MANIFEST))[2] == image.content
    assert (await again.get(blob))[2] == BLOB


@pytest.mark.housekeeping
async def test_partial_files_that_nobody_went_on_with_are_removed(
    serve: Serve, upstream: Upstream, tmp_path: Path, clock: Clock
) -> None:
    partial = tmp_path / "disk" / "cache" / "partial"
    partial.mkdir(parents=True)
    old, young = partial / f"sha256-{'0' * 64}", partial / f"sha256-{'1' * 64}"
    for file, age in ((old, 86401), (young, 86399)):
        file.write_bytes(b"x")
        os.utime(file, (clock() - age, clock() - age))
    ear = Ear()
    await serve(upstream)
    assert (await ear.heard("partial.reaped"))["files"] == 1
    assert list(partial.iterdir()) == [young]
    young.unlink()


@pytest.mark.parametrize("fault", ["upstream", "webhooks"])
async def test_nothing_stays_open_if_a_part_cannot_be_made(tmp_path: Path, fault: str) -> None:
    bad = {"url": "https://b.example", "ca_file": str(tmp_path / "none")}
    good = {"url": "https://c.example"}
    tree = {
        "disk": {"path": str(tmp_path / "disk")},
        "webhooks": [{"name": "w", "url": "https://w.example", "actions": ["push"]}],
        "namespaces": {
            "a.example": {"upstream": good},
            "local": {"store": {}},
            "b.example": {"upstream": bad if fault == "upstream" else good},
        },
    }
    if fault == "webhooks":
        (tmp_path / "disk").mkdir()
        (tmp_path / "disk" / "events").write_bytes(b"not a directory")
    with pytest.raises(StartError) as raised:
        compose(configuration(tmp_path, tree))
    assert str(tmp_path) in str(raised.value)
    # The error still has the frames, and with them all objects.
    opened = [os.path.realpath(each) for each in Path("/proc/self/fd").iterdir()]
    assert [each for each in opened if each.startswith(str(tmp_path))] == []


# Ready, degraded, draining


async def ready(site: Site) -> tuple[int, dict[str, str]]:
    assert site.app.admin_url is not None
    async with site.session.get(site.app.admin_url / "readyz") as response:
        return response.status, await response.json()


async def test_ready(serve: Serve, upstream: Upstream) -> None:
    assert await ready(await serve(upstream)) == (200, {"status": "ready"})


@pytest.mark.errors("disk.failed")
async def test_a_disk_that_fails_degrades_and_pulls_go_on(
    serve: Serve, upstream: Upstream, image: Image
) -> None:
    site = await serve(upstream)
    partial = site.directory / "cache" / "partial"
    shutil.rmtree(partial)
    partial.touch()  # even root cannot write below a file
    status, told = await ready(site)
    assert (status, told["status"]) == (200, "degraded")
    assert str(partial) in told["store"]
    for _ in range(2):
        assert (await site.get(f"/v2/library/alpine/blobs/{image.layers[0]}"))[2] == BLOB
    partial.unlink()
    partial.mkdir()
    assert await ready(site) == (200, {"status": "ready"})


async def hold(site: Site, upstream: Upstream, image: Image) -> tuple[Hold, Callable[[], None]]:
    gate = asyncio.Event()
    held = Hold(gate, after=1 << 20)
    upstream.next("GET", image.layers[0], held)
    return held, gate.set


async def test_draining_ends_what_was_begun_and_takes_nothing_new(
    serve: Serve, upstream: Upstream, image: Image
) -> None:
    site = await serve(upstream, top={"drain": "30s"})
    held, open_gate = await hold(site, upstream, image)
    async with connect(site.url) as wire, connect(site.url) as idle:
        assert (await idle.ask("GET", "/v2/")).status == 200
        await wire.send(
            f"GET /v2/library/alpine/blobs/{image.layers[0]} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        )
        assert (await wire.head())[0] == 200
        await held.reached.wait()
        stopping = asyncio.create_task(site.app.stop())
        assert await idle.rest() == b""  # closed, since nothing went on there
        assert await ready(site) == (503, {"status": "draining"})
        with pytest.raises(aiohttp.ClientConnectorError):
            await site.session.get(f"{site.url}/v2/")
        open_gate()
        assert await wire.read(len(BLOB)) == BLOB
        assert await wire.rest() == b""
        await stopping


@pytest.mark.parametrize("length", [True, False], ids=["length", "no length"])
async def test_what_does_not_end_in_time_is_cut_and_gone_on_with(
    serve: Serve, upstream: Upstream, image: Image, length: bool
) -> None:
    upstream.content_length = length
    site = await serve(upstream, top={"drain": "10ms"})
    held, open_gate = await hold(site, upstream, image)
    path = f"/v2/library/alpine/blobs/{image.layers[0]}"
    ear = Ear()
    async with connect(site.url) as wire:
        await wire.send(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        assert (await wire.head())[0] == 200
        await held.reached.wait()
        await site.app.stop()
        with pytest.raises(ConnectionResetError):
            await wire.rest()
    event = await ear.heard("request.served", kind="blob")
    assert (event["status"], event["detail"]) == (499, "server stopped")
    open_gate()
    upstream.content_length = True
    upstream.clear()
    again = await serve(upstream)
    assert (await again.get(path))[2] == BLOB
    (request,) = (each for each in upstream.requests if each.method == "GET")
    assert request.range is not None  # only the rest was asked for


# The configuration takes effect

USER = Basic("robot", "s3cret")


def inline(directory: Path) -> dict[str, Any]:
    return {"username": USER.user, "password": USER.password}


def password_file(directory: Path) -> dict[str, Any]:
    (directory / "password").write_text(f"{USER.password}\n")
    return {"username": USER.user, "password_file": str(directory / "password")}


@pytest.mark.parametrize("credentials", [inline, password_file])
async def test_credentials(
    serve: Serve,
    upstream: Upstream,
    image: Image,
    tmp_path: Path,
    credentials: Callable[[Path], dict[str, Any]],
) -> None:
    upstream.auth = USER
    assert (await (await serve(upstream)).get(MANIFEST))[0] == 404
    site = await serve(upstream, directory=tmp_path / "other", options=credentials(tmp_path))
    assert (await site.get(MANIFEST))[0] == 200


async def test_docker_config(serve: Serve, upstream: Upstream, image: Image, tmp_path: Path) -> None:
    upstream.auth = USER
    host = upstream.url.removeprefix("http://")
    auth = USER.header.removeprefix("Basic ")
    (tmp_path / "docker.json").write_text(f'{{"auths": {{"{host}": {{"auth": "{auth}"}}}}}}')
    site = await serve(upstream, options={"docker_config": str(tmp_path / "docker.json")})
    assert (await site.get(MANIFEST))[0] == 200


async def test_credential_helper(
    serve: Serve, upstream: Upstream, image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream.auth = USER
    program = tmp_path / "docker-credential-test"
    answer = f'{{"Username": "{USER.user}", "Secret": "{USER.password}"}}'
    program.write_text(f"#!/bin/sh\necho '{answer}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    site = await serve(upstream, options={"credential_helper": "test"})
    assert (await site.get(MANIFEST))[0] == 200


@pytest.mark.parametrize("where", ["top", "namespace"])
async def test_offline(serve: Serve, upstream: Upstream, image: Image, clock: Clock, where: str) -> None:
    site = await serve(upstream)
    await site.get(MANIFEST)
    await site.app.stop()
    upstream.clear()
    clock.advance(1e6)
    site = await serve(upstream, **({"top": {"offline": True}} if where == "top" else {"offline": True}))
    assert (await site.get(MANIFEST))[2] == image.content
    assert (await site.get("/v2/library/alpine/manifests/other"))[0] == 404
    assert upstream.log == []


async def test_freshness_by_tag(serve: Serve, upstream: Upstream, clock: Clock) -> None:
    for tag in ("v1", "dev"):
        upstream.image("library/alpine", tag)
    rules = [{"match": "v*", "fresh_for": "forever"}, {"match": "dev", "fresh_for": "1s"}]
    site = await serve(upstream, fresh_for="10m", tags=rules)
    for tag in ("v1", "dev"):
        await site.get(f"/v2/library/alpine/manifests/{tag}")
    upstream.clear()
    clock.advance(1e9)
    assert (await site.get("/v2/library/alpine/manifests/v1"))[1]["Cache-Status"] == "entrepot; hit"
    assert upstream.log == []
    await site.get("/v2/library/alpine/manifests/dev")
    assert upstream.log == ["HEAD manifest library/alpine:dev"]


@pytest.mark.parametrize(("policy", "status"), [("keep", 200), ("drop", 404)])
async def test_on_upstream_delete(
    serve: Serve, upstream: Upstream, image: Image, clock: Clock, policy: str, status: int
) -> None:
    site = await serve(upstream, on_upstream_delete=policy)
    await site.get(MANIFEST)
    upstream.delete_tag("library/alpine", "latest")
    clock.advance(601)
    assert (await site.get(MANIFEST))[0] == status


async def test_negative_for(serve: Serve, upstream: Upstream, clock: Clock) -> None:
    upstream.image("library/alpine", "latest")
    site = await serve(upstream, negative_for="20s")
    path = "/v2/library/alpine/manifests/soon"
    assert (await site.get(path))[0] == 404
    upstream.image("library/alpine", "soon")
    clock.advance(19)
    assert (await site.get(path))[0] == 404
    clock.advance(1)
    assert (await site.get(path))[0] == 200


async def test_progress_timeout(serve: Serve, upstream: Upstream, image: Image) -> None:
    # A transfer that makes no progress is cut, and gone on with by another request.
    site = await serve(upstream, options={"progress_timeout": "50ms"})
    _, open_gate = await hold(site, upstream, image)
    assert (await site.get(f"/v2/library/alpine/blobs/{image.layers[0]}"))[2] == BLOB
    open_gate()
    assert [each.range is None for each in upstream.requests] == [True, False]


async def test_a_cut_transfer_is_no_error(serve: Serve, upstream: Upstream, image: Image) -> None:
    upstream.next("GET", image.layers[0], Reset(after=1 << 20))
    site = await serve(upstream)
    assert (await site.get(f"/v2/library/alpine/blobs/{image.layers[0]}"))[2] == BLOB

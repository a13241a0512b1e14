"""`entrepot serve` with two workers that share the disk and the port: they die, are drained and replaced."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import pytest
from yarl import URL

from storage.disk.blobs import BlobFiles
from storage.disk.records import SQLiteRecords
from storage.oci import Digest, Tag
from storage.store import Store
from tests.authority import Authority
from tests.processes import Place, Server, Worker, digest, place
from tests.upstream import Bearer, Hold, Upstream

__all__ = ["place"]  # the fixture

pytestmark = pytest.mark.clients

REPOSITORY = "library/alpine"
SMALL = os.urandom(3 << 20)
HALF = 50 << 20
BIG = 2 * HALF


def blob(name: str) -> str:
    return f"/v2/{REPOSITORY}/blobs/{name}"


@pytest.fixture(scope="module")
def layer() -> bytes:
    return os.urandom(BIG)


def held(upstream: Upstream, name: str, after: int) -> Hold:
    """The next transfer of that blob stands still there."""
    hold = Hold(asyncio.Event(), after)
    upstream.next("GET", name, hold)
    return hold


# Starting

# Writes down which directories are listed by whom; Python runs it before all else.
WITNESS = """
import os, sys, threading
def heard(event, arguments):
    if event in ("os.listdir", "os.scandir"):
        main = threading.current_thread() is threading.main_thread()
        journal = os.open(os.environ["WITNESS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(journal, f"{'start' if main else 'later'} {arguments[0]}\\n".encode())
        os.close(journal)
sys.addaudithook(heard)
"""


async def test_to_start_takes_no_look_at_what_is_stored(place: Place) -> None:
    (place.home / "sitecustomize.py").write_text(WITNESS)
    journal = place.home / "journal"
    place.environment = {"PYTHONPATH": str(place.home), "WITNESS": str(journal)}
    for number in range(256):
        directory = place.directory / f"cache/blobs/sha256/{number:02x}"
        directory.mkdir(parents=True)
        (directory / f"{number:064x}").touch()
    place.tree["disk"]["scrub"] = "off"  # it would find that they are not what they are called
    server = await place.start()
    await server.workers()
    await server.stop()
    # What is counted or cleared up later is so in threads.
    listed = [line.removeprefix("start ") for line in journal.read_text().splitlines() if line[:5] == "start"]
    assert listed  # by imports
    assert [path for path in listed if path.startswith(str(place.directory))] == []


# A blob that comes in


async def test_one_transfer_is_followed_from_both_workers(place: Place, upstream: Upstream) -> None:
    name = upstream.blob(REPOSITORY, SMALL)
    hold = held(upstream, name, 1 << 20)
    server = await place.start()
    async with AsyncExitStack() as stack:
        followers = []
        for worker in [*await server.workers(), *await server.workers()]:
            response = await stack.enter_async_context(worker.ask(blob(name)))
            # All but the byte that is withheld has come to everyone before the rest is sent.
            followers.append((response, await response.content.readexactly((1 << 20) - 1)))
        hold.gate.set()
        for response, begun in followers:
            assert await digest(response, begun) == name
    assert [request.method for request in upstream.requests] == ["GET", "HEAD"]
    assert upstream.bytes_sent == len(SMALL)
    await server.heard("fill.committed")
    await server.heard("fill.followed")
    assert server.partial() == []


@pytest.mark.errors("worker.died")
async def test_a_killed_workers_fill_goes_on_in_another(
    place: Place, upstream: Upstream, layer: bytes
) -> None:
    name = upstream.blob(REPOSITORY, layer)
    hold = held(upstream, name, HALF)
    server = await place.start()
    filling, other = await server.workers()
    served = await server.metric("entrepot_requests_total")
    async with filling.ask(blob(name)) as first:
        await hold.reached.wait()
        async with other.ask(blob(name)) as response:
            begun = await response.content.readexactly(HALF - 1)
            os.kill(filling.pid, signal.SIGKILL)
            assert await digest(response, begun) == name
        with pytest.raises(aiohttp.ClientError):
            await first.read()
    assert upstream.bytes_sent <= 1.05 * BIG
    assert [request.method for request in upstream.requests] == ["GET", "HEAD", "GET"]
    await server.heard("fill.committed")
    assert server.partial() == []

    died = await server.heard("worker.died", pid=filling.pid)
    assert died["status"] == -signal.SIGKILL
    replacement = await server.heard("worker.replaced")
    assert set(server.pids()) == {other.pid, replacement["pid"]}
    for worker in await server.workers():
        async with worker.ask(blob(name)) as response:
            assert await digest(response) == name
    # What the dead one has counted still counts: two requests, of which one broke; and six.
    assert await server.metric("entrepot_requests_total") == served + 1 + 4
    assert len(upstream.requests) == 3


async def test_all_killed_at_half_of_a_fill(place: Place, upstream: Upstream, layer: bytes) -> None:
    name = upstream.blob(REPOSITORY, layer)
    held(upstream, name, HALF)
    server = await place.start()
    first, second = await server.workers()
    async with first.ask(blob(name)) as response, second.ask(blob(name)) as other:
        await response.content.readexactly(HALF - 1)  # so that is on disk
        await server.kill()
        for each in (response, other):
            with pytest.raises(aiohttp.ClientError):
                await each.read()
    await server.clear()
    server = await place.start()
    for worker in await server.workers():
        async with worker.ask(blob(name)) as response:
            assert await digest(response) == name
    gets = [request.range for request in upstream.requests if request.method == "GET"]
    assert gets == [None, f"bytes={HALF}-"]
    assert upstream.bytes_sent <= 1.05 * BIG
    await server.stop()
    assert server.partial() == []
    assert list(place.temporary.iterdir()) == []


async def test_a_blob_of_which_all_was_there_is_not_asked_for_again(place: Place, upstream: Upstream) -> None:
    name = upstream.blob(REPOSITORY, SMALL)
    held(upstream, name, len(SMALL) - 1)
    server = await place.start()
    (first, _) = await server.workers()
    async with first.ask(blob(name)) as response:
        await response.content.readexactly(len(SMALL) - 2)
        await server.kill()
    await server.clear()
    (left,) = server.partial()
    left.write_bytes(SMALL)  # as if it had been killed one byte later
    upstream.clear()
    server = await place.start()
    for worker in await server.workers():
        async with worker.ask(blob(name)) as response:
            assert await digest(response) == name
    assert {request.method for request in upstream.requests} == {"HEAD"}
    await server.stop()
    assert server.partial() == []


async def test_clients_that_leave_make_no_noise(place: Place, upstream: Upstream, layer: bytes) -> None:
    name = upstream.blob(REPOSITORY, layer)
    server = await place.start()
    (worker, _) = await server.workers()
    to = URL(server.url)
    for nth in (1, 2, 3):
        with server.alone(worker.pid):
            reader, writer = await asyncio.open_connection(to.host, to.port)
            writer.write(f"GET {blob(name)} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            await reader.readexactly(1 << 20)
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        await server.heard("request.served", nth, detail="client left")
    await server.heard("fill.committed")
    await server.stop()
    noise, server.noise[:] = "".join(server.noise), []
    assert noise == ""


# What is asked of an upstream


async def all_ask(workers: list[Worker], path: str, status: int = 200) -> None:
    for _ in range(5):
        await asyncio.gather(*(worker.get(path, status) for worker in workers))


async def test_a_tag_is_asked_for_once_in_its_time_over_both_workers(
    place: Place, upstream: Upstream
) -> None:
    image = upstream.image(REPOSITORY, "latest")
    server = await place.start()
    workers = [*await server.workers(), *await server.workers()]
    await all_ask(workers, f"/v2/{REPOSITORY}/manifests/latest")
    assert upstream.log == [f"GET manifest {REPOSITORY}:latest"]
    for period in (1, 2):
        await outdate(place, image.digest)
        await all_ask(workers, f"/v2/{REPOSITORY}/manifests/latest")
        assert upstream.log[1:] == [f"HEAD manifest {REPOSITORY}:latest"] * period


async def outdate(place: Place, name: str) -> None:
    """Let eleven minutes pass for the tag `latest`."""
    root = place.directory / "cache"
    store = Store(BlobFiles(root), SQLiteRecords(root / "records"), lambda: time.time() - 660)
    await store.point(f"docker.io/{REPOSITORY}", Tag("latest"), Digest.parse(name))
    await store.close()


async def test_manifests_and_what_is_unknown_are_asked_for_once_a_worker_at_most(
    place: Place, upstream: Upstream
) -> None:
    image = upstream.image(REPOSITORY)
    server = await place.start()
    workers = [*await server.workers(), *await server.workers()]
    await all_ask(workers, f"/v2/{REPOSITORY}/manifests/{image.digest}")
    assert 1 <= len(upstream.log) <= 2
    upstream.clear()
    absent = "sha256:" + "0" * 64
    for path in ("manifests/nosuch", f"manifests/{absent}", f"blobs/{absent}", "tags/list"):
        repository = REPOSITORY if path != "tags/list" else "library/nosuch"
        await all_ask(workers, f"/v2/{repository}/{path}", 404)
        assert 1 <= len(upstream.log) <= 2, upstream.log
        upstream.clear()


async def test_a_token_is_fetched_once_a_worker_at_most(place: Place, upstream: Upstream) -> None:
    upstream.auth = Bearer()
    image = upstream.image(REPOSITORY, "latest", [os.urandom(100 << 10) for _ in range(4)])
    server = await place.start()
    workers = await server.workers()
    paths = [f"manifests/{image.digest}", *(f"blobs/{name}" for name in image.layers)]
    for path in paths:
        await asyncio.gather(*(worker.get(f"/v2/{REPOSITORY}/{path}") for worker in workers))
    tokens = [request for request in upstream.requests if request.kind == "token"]
    assert 1 <= len(tokens) <= 2


async def test_metrics_are_of_all_workers(place: Place) -> None:
    server = await place.start()
    workers = await server.workers()
    before = await server.metric("entrepot_requests_total")
    assert before == len(workers)
    for worker, times in zip(workers, (3, 4), strict=True):
        for _ in range(times):
            await worker.get(f"/v2/{REPOSITORY}/manifests/..", 404)
    assert await server.metric("entrepot_requests_total") == before + 7


# Death


@pytest.mark.errors("worker.died")
async def test_a_worker_that_dies_again_and_again_is_waited_for_ever_longer(place: Place) -> None:
    server = await place.start()
    doomed, other = server.pids()
    for nth, wait in enumerate((1.0, 2.0, 4.0), start=1):
        os.kill(doomed, signal.SIGKILL)
        died = await server.heard("worker.died", nth)
        assert (died["pid"], died["again_in"]) == (doomed, wait)
        await (await server.worker(other)).get("/v2/")
        if wait < 4:
            doomed = (await server.heard("worker.replaced", nth))["pid"]
    # To wait keeps nobody from leaving.
    await server.stop()
    assert server.said("worker.replaced", pid=doomed) == server.said("worker.replaced")[-1:]


async def test_workers_end_when_their_parent_is_killed(place: Place, upstream: Upstream) -> None:
    name = upstream.blob(REPOSITORY, SMALL)
    hold = held(upstream, name, 1 << 20)
    server = await place.start()
    (worker, _) = await server.workers()
    async with worker.ask(blob(name)) as response:
        await hold.reached.wait()
        server.send(signal.SIGKILL)
        await refused(server.url)
        hold.gate.set()
        assert await digest(response) == name  # not without finishing what they were at
    assert await server.ended() == -signal.SIGKILL
    assert server.partial() == []
    # What only the parent could remove the next one does.
    await server.clear()
    server = await place.start()
    await server.stop()
    assert list(place.temporary.iterdir()) == []


# Ending


async def refused(url: str) -> None:
    """Wait until nobody listens there: whoever is connected before that must be cut off, not left waiting."""
    to = URL(url)
    async with asyncio.timeout(20):
        while True:
            try:
                reader, writer = await asyncio.open_connection(to.host, to.port)
            except ConnectionRefusedError:
                return
            except ConnectionResetError:  # the last to listen went while we waited to be accepted
                continue
            try:
                writer.write(b"GET /v2/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                await reader.read()
            except ConnectionError:
                pass
            finally:
                writer.transport.abort()


async def test_a_running_download_ends_before_the_server_does(place: Place, upstream: Upstream) -> None:
    name = upstream.blob(REPOSITORY, SMALL)
    hold = held(upstream, name, 1 << 20)
    server = await place.start()
    workers = await server.workers()
    async with workers[0].ask(blob(name)) as first, workers[1].ask(blob(name)) as second:
        await hold.reached.wait()
        server.send(signal.SIGTERM)
        await server.heard("server.stopping")
        await refused(server.url)  # while those two are still at it
        hold.gate.set()
        assert await digest(first) == await digest(second) == name
    assert await server.ended() == 0
    assert server.partial() == []
    assert list(place.temporary.iterdir()) == []


async def test_a_request_that_has_begun_is_answered_before_the_server_ends(place: Place) -> None:
    server = await place.start()
    pid = server.pids()[0]
    to = URL(server.url)
    with server.alone(pid):
        reader, writer = await asyncio.open_connection(to.host, to.port)
        writer.write(b"GET /v2/ HT")
        await server.worker(pid)  # accepted later, so that one is by now
    server.send(signal.SIGTERM)
    await refused(server.url)
    writer.write(b"TP/1.1\r\nHost: x\r\n\r\n")
    try:
        assert (await reader.read(12)).startswith(b"HTTP/1.1 ")
    finally:
        writer.transport.abort()
    assert await server.ended() == 0


async def test_a_held_fill_is_gone_on_with_by_the_next_start(place: Place, upstream: Upstream) -> None:
    name = upstream.blob(REPOSITORY, SMALL)
    held(upstream, name, 1 << 20)
    place.tree["drain"] = "0s"
    server = await place.start()
    workers = await server.workers()
    async with workers[0].ask(blob(name)) as first, workers[1].ask(blob(name)) as second:
        for each in (first, second):
            await each.content.readexactly((1 << 20) - 1)
        await server.stop()
        for each in (first, second):
            with pytest.raises(aiohttp.ClientError):
                await each.read()
    # Beside it there may be a note of what the readers of other processes wait for.
    (left,) = [each for each in server.partial() if each.suffix != ".wanted"]
    assert left.stat().st_size == 1 << 20
    upstream.clear()
    server = await place.start()
    for worker in await server.workers():
        async with worker.ask(blob(name)) as response:
            assert await digest(response) == name
    assert upstream.requests[0].range == f"bytes={1 << 20}-"
    assert upstream.bytes_sent == len(SMALL) - (1 << 20)
    await server.stop()
    assert server.partial() == []


# Another configuration


async def under_load(server: Server, change: Callable[[], Awaitable[None]]) -> None:
    """Run `change` while clients pull, some with a new connection each time; what is answered is right."""
    ended = False

    async def pull(kept: bool) -> int:
        count = 0
        connector = aiohttp.TCPConnector(force_close=not kept)
        async with aiohttp.ClientSession(connector=connector) as session:
            while not ended:
                try:
                    async with session.get(f"{server.url}/v2/{REPOSITORY}/manifests/latest") as response:
                        assert response.status == 200
                        await response.read()
                        count += 1
                except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
                    # Closed without an answer: every client asks again then.  Nobody listening is a failure.
                    assert not isinstance(error, aiohttp.ClientConnectorError)
        return count

    async with asyncio.TaskGroup() as group:
        pulls = [group.create_task(pull(number % 2 == 0)) for number in range(4)]
        try:
            await change()
        finally:
            ended = True
    assert all(each.result() > 0 for each in pulls)


async def test_a_new_configuration_takes_effect_and_nobody_finds_the_door_shut(
    place: Place, upstream: Upstream
) -> None:
    upstream.image(REPOSITORY, "latest")
    upstream.image("a/b", "latest")
    place.tree["drain"] = "1s"
    server = await place.start()
    before = server.pids()

    async def reload() -> None:
        for nth in (1, 2, 3):
            old = server.pids()
            place.tree["namespaces"][f"edge{nth}.example"] = {"upstream": upstream.url}
            place.configure()
            server.send(signal.SIGHUP)
            await server.heard("config.reloaded", nth)
            await server.gone(*old)

    await under_load(server, reload)
    assert not set(server.pids()) & set(before)
    for worker in await server.workers():
        await worker.get("/v2/a/b/manifests/latest?ns=edge3.example")


@pytest.mark.errors("config.refused")
async def test_a_bad_configuration_changes_nothing(place: Place, upstream: Upstream) -> None:
    upstream.image(REPOSITORY, "latest")
    place.tree["drain"] = "1s"
    server = await place.start()
    before = await server.workers()

    async def reload() -> None:
        place.tree["nonsense"] = 1
        place.configure()
        server.send(signal.SIGHUP)
        refused = await server.heard("config.refused")
        assert "nonsense: unknown key" in refused["error"]

    await under_load(server, reload)
    for worker in before:
        await worker.get(f"/v2/{REPOSITORY}/manifests/latest")
    assert set(server.pids()) == {worker.pid for worker in before}


@asynccontextmanager
async def encrypted(upstream: Upstream, certificate: dict[str, str]) -> AsyncIterator[str]:
    """`upstream` by TLS: connections are decrypted and passed on."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate["certificate"], certificate["key"])
    origin = URL(upstream.url)

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, ssl.SSLError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(origin.host, origin.port)
        await asyncio.gather(copy(reader, back), copy(there, writer))

    server = await asyncio.start_server(relay, "127.0.0.1", 0, ssl=context)
    async with server:
        yield f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.errors("worker.died")
async def test_the_authorities_of_the_system_are_those_of_the_last_configuration(
    place: Place, upstream: Upstream, tmp_path: Path
) -> None:
    """All processes share them, those that replace others too; a reload reads them again."""
    upstream.image(REPOSITORY, "latest")
    good, other = Authority(tmp_path, "good"), Authority(tmp_path, "other")
    trusted = tmp_path / "trusted.pem"
    place.environment = {"SSL_CERT_FILE": str(trusted), "SSL_CERT_DIR": str(tmp_path / "none")}
    place.tree |= {"drain": "0s", "workers": 1}
    path, own = f"/v2/{REPOSITORY}/manifests/latest", good.issue("server")
    async with encrypted(upstream, own) as first, encrypted(upstream, own) as second:
        # Two hosts: the first is left alone for a while after it has failed.
        place.tree["namespaces"] = {"a.example": {"upstream": first}, "b.example": {"upstream": second}}
        trusted.write_bytes(other.ca.read_bytes())
        server = await place.start()
        trusted.write_bytes(good.ca.read_bytes())
        os.kill(*server.pids(), signal.SIGKILL)
        await server.heard("worker.replaced")
        (worker,) = await server.workers()
        await worker.get(f"{path}?ns=a.example", 502)
        before = server.pids()
        server.send(signal.SIGHUP)
        await server.heard("config.reloaded")
        await server.gone(*before)
        (worker,) = await server.workers()
        await worker.get(f"{path}?ns=b.example")
        await server.stop()  # before the relay


async def test_downloads_outlive_a_new_configuration(place: Place, upstream: Upstream) -> None:
    name = upstream.blob(REPOSITORY, SMALL)
    hold = held(upstream, name, 1 << 20)
    server = await place.start()
    (old, _) = await server.workers()
    before = server.pids()
    async with old.ask(blob(name)) as response:
        begun = await response.content.readexactly((1 << 20) - 1)
        server.send(signal.SIGHUP)
        await server.heard("config.reloaded")
        (new, _) = [await server.worker(pid) for pid in server.pids() if pid not in before]
        async with new.ask(blob(name)) as other:
            assert await other.content.readexactly((1 << 20) - 1) == begun
            server.send(signal.SIGTERM)  # with those of two configurations at work
            await refused(server.url)
            hold.gate.set()
            assert await digest(other, begun) == name
        assert await digest(response, begun) == name
    assert await server.ended() == 0
    assert [request.method for request in upstream.requests] == ["GET", "HEAD"]


async def test_what_all_workers_have_served_is_counted_at_once(place: Place, upstream: Upstream) -> None:
    image = upstream.image(REPOSITORY, "3")
    server = await place.start()
    workers = await server.workers()
    for worker in workers:
        await worker.get(f"/v2/{REPOSITORY}/manifests/3")
    async with aiohttp.ClientSession(server.admin_url) as session:
        async with session.get("/api/v1/stats") as response:
            assert (await response.json())["total"]["requests"] == len(workers) == 2
        async with session.get("/api/v1/images") as response:
            (row,) = (await response.json())["images"]
    assert (row["digest"], row["uses"]) == (image.digest, 2)


# Its log


@pytest.mark.parametrize("log", [{}, {"access": "errors"}, {"format": "console"}], ids=str)
async def test_a_log_that_nobody_reads_any_more_changes_nothing(
    place: Place, upstream: Upstream, log: dict[str, str]
) -> None:
    image = upstream.image(REPOSITORY, "latest", (b"a layer",))
    place.tree["log"] = log
    server = await place.start()
    await server.hear_no_more()
    for pid in server.pids():
        worker = await server.worker(pid)
        for _ in range(3):
            await worker.get(f"/v2/{REPOSITORY}/manifests/latest")
            await worker.get(f"/v2/{REPOSITORY}/manifests/absent", 404)
        await worker.close()
    before = server.pids()
    server.send(signal.SIGHUP)
    await server.gone(*before)  # others have taken over
    pids = server.pids()
    assert len(pids) == 2
    for pid in pids:
        worker = await server.worker(pid)
        assert await worker.get(blob(image.layers[0])) == b"a layer"
        await worker.close()
    server.send(signal.SIGTERM)
    await server.gone(*pids)
    await server.ended()

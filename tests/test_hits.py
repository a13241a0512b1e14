"""Hits: a request that was seen before is answered as it would be if it were parsed again, to the byte.

Two servers of the same configuration, one of which remembers nothing, are asked the same in the same order,
while what they serve, who may have it, and how long it is fresh changes under their hands.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from structlog.testing import LogCapture

from proxy.access import throttle
from proxy.telemetry.metrics import Metrics
from proxy.web.hits import HitMemory, Hits
from proxy.web.listener import Connection
from proxy.web.server import DistributionAPI
from proxy.webhooks.event import Event
from storage.disk.records import SQLiteRecords
from storage.keys import LEASE, MANIFEST, PULLED, TAG, USE
from storage.oci import OCI_MANIFEST, Digest
from storage.registry import Registry
from tests.authority import Authority
from tests.conftest import OPEN, Clock, Serve, Site
from tests.processes import Place, place
from tests.test_access import token
from tests.test_bearer import PRIVATE, Server, pem
from tests.test_htpasswd import line
from tests.test_telemetry import fills_ended
from tests.upstream import Basic, Bearer, Image, Upstream
from tests.wire import Wire, connect

__all__ = ["place"]  # the fixture

SMALL, LARGE = b"a small layer" * 300, random.Random(5).randbytes(200_000)
ALPINE, APP = "library/alpine", "team/app"
ALICE = Basic("alice", "wonderland").header
AGENTS = ("containerd/1.7", "docker/27.0 go/go1.21", "skopeo/1.13", "curl/8.0", "")
ID = re.compile(rb"(?<=\r\nX-Request-Id: )[0-9a-f-]+(?=\r\n)")
DATE = re.compile(rb"(?<=\r\nDate: )[^\r]+(?=\r\n)")


@pytest.fixture
def hits(monkeypatch: pytest.MonkeyPatch) -> Counter[bool]:
    """How many requests were answered by what was remembered, and how many were not."""
    counted: Counter[bool] = Counter()
    answer = Hits.answer

    def counting(self: Hits, head: bytes, client: str, write: Callable[[bytes], None]) -> bool:
        found = answer(self, head, client, write)
        counted[found] += 1
        return found

    monkeypatch.setattr(Hits, "answer", counting)
    return counted


@dataclass
class World:
    """A server, and how it is started again; connections are opened as they are asked for."""

    start: Callable[..., Any]
    directory: Path
    site: Site
    wires: dict[int, Wire] = field(default_factory=dict)
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def wire(self, number: int) -> Wire:
        if (found := self.wires.get(number)) is None:
            found = await self.stack.enter_async_context(connect(self.site.url))
            self.wires[number] = found
        return found

    async def hang_up(self) -> None:
        self.wires = {}
        await self.stack.aclose()

    async def ask(self, number: int, head: bytes, pieces: int = 1) -> bytes:
        """The response to a request on a connection: its bytes but for what differs each time."""
        wire = await self.wire(number)
        cut = len(head) // pieces + 1
        for start in range(0, len(head), cut):
            await wire.send(head[start : start + cut])
            if pieces > 1:
                await asyncio.sleep(0)
        if b"Connection: close" in head or b" HTTP/1.0" in head:
            said = await wire.rest()
            del self.wires[number]
        else:
            said = await wire.reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"\r\nContent-Length: (\d+)\r\n", said)
            if length and not head.startswith(b"HEAD") and b" 304 " not in said[:15]:
                said += await wire.read(int(length[1]))
        return DATE.sub(b"", ID.sub(b"", said, count=1), count=1)

    async def reload(self, **changed: Any) -> None:
        await self.hang_up()
        await self.site.app.stop()
        self.site = await self.start(directory=self.directory, **changed)

    def records(self, kind: str) -> SQLiteRecords:
        """The records as another process has them."""
        return SQLiteRecords(self.directory / kind / "records")

    def blob(self, content: bytes) -> Path:
        """The file of a cached blob."""
        digest = Digest.of(content)
        return self.directory / "cache" / "blobs" / digest.algorithm / digest.encoded[:2] / digest.encoded


class Pair:
    """The two worlds: `plain` remembers nothing, `quick` does."""

    def __init__(self, plain: World, quick: World, events: LogCapture, clock: Clock) -> None:
        self.worlds = plain, quick
        self.events = events
        self.clock = clock

    async def ask(self, number: int, head: bytes, pieces: int = 1) -> bytes:
        """Ask both, and compare what they say and what they log."""
        heard = []
        for world in self.worlds:
            del self.events.entries[:]
            said = await world.ask(number, head, pieces)
            lines = [each for each in self.events.entries if each["event"] == "request.served"]
            different = {"id", "seconds"}
            if any(each["result"] == "miss" for each in lines):
                await fills_ended()
            heard.append((said, [{k: v for k, v in each.items() if k not in different} for each in lines]))
        assert heard[1][1] == heard[0][1], head
        assert heard[1][0] == heard[0][0], head
        assert heard[0][1], "it was not logged"
        return heard[0][0]

    async def each(self, work: Callable[[World], Any]) -> None:
        for world in self.worlds:
            await work(world)

    async def records(self) -> list[tuple[list[str], dict[str, bytes], float]]:
        """Of each world, the metrics of requests, what is recorded of uses, and when a blob was used last."""
        found = []
        for world in self.worlds:
            metrics = [
                text
                for text in (await world.site.metrics()).splitlines()
                if text.startswith(("entrepot_requests_total", "entrepot_sent_bytes_total"))
            ]
            await world.site.app.composition.recorder.flush()
            uses = {}
            for kind in ("cache", "private"):
                with closing(world.records(kind)) as records:
                    for each in (USE, LEASE, PULLED):
                        uses.update(records.scan(each.prefix()))
            path = world.blob(SMALL)
            found.append((metrics, uses, path.stat().st_mtime if path.exists() else 0.0))
        return found


@pytest.fixture
async def pair(
    serve: Serve, upstream: Upstream, tmp_path: Path, clock: Clock, events: LogCapture
) -> AsyncIterator[Callable[..., Any]]:
    made: list[World] = []

    async def make(access: dict[str, Any] | None = None, **keys: Any) -> Pair:
        for name, memory in (("plain", "off"), ("quick", "1MiB")):

            def start(directory: Path, memory: str = memory, **changed: Any) -> Any:
                return serve(
                    upstream,
                    directory=directory,
                    more={"local": {"store": {"sparse": True}}},
                    top={
                        "limits": {"hit_memory": memory},
                        "disk": {"path": str(directory), "collect_grace": "1h"},
                        "default_namespace": "docker.io",
                        **({"access": access} if access else {}),
                    },
                    **{**keys, **changed},
                )

            directory = tmp_path / name
            made.append(World(start, directory, await start(directory)))
        return Pair(*made, events, clock)

    yield make
    for world in made:
        await world.hang_up()


def head(method: str, path: str, *lines: str, version: str = "1.1") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/{version}", "Host: cache.test", *lines, "", ""]).encode()


class Requests:
    """Heads as clients of some kinds send them, again and again, and some that come once."""

    def __init__(self, chance: random.Random, targets: list[str]) -> None:
        self._chance = chance
        self._targets = targets
        self._usual = [self._make() for _ in range(25)]

    def next(self) -> bytes:
        chance = self._chance
        return self._make() if chance.random() < 0.15 else chance.choice(self._usual)

    def _make(self) -> bytes:
        chance = self._chance
        method = chance.choice(("GET", "GET", "GET", "HEAD"))
        path = chance.choice(self._targets)
        agent = chance.choice(AGENTS)
        lines = [f"User-Agent: {agent}"] if agent else []
        lines += chance.choice(([], [], [f"Accept: {OCI_MANIFEST}"], ["Accept: */*"]))
        if "/local/" in path or chance.random() < 0.1:
            lines += chance.choice(([f"Authorization: {ALICE}"],) * 4 + ([], ["X-Forwarded-For: 192.0.2.1"]))
        digest = path.rpartition("/")[2]
        rare = chance.random()
        if rare < 0.03:
            lines += [f'If-None-Match: "{digest}"']
        elif rare < 0.06:
            lines += [chance.choice(("Range: bytes=0-9", "Range: bytes=5-", "Range: bytes=999999999-"))]
        elif rare < 0.08:
            lines += ["Connection: close"]
        elif rare < 0.10:
            once = f"X-Once: {chance.getrandbits(64):x}"
            lines += [chance.choice(("Connection: keep-alive", "Content-Length: 0", once))]
        elif rare < 0.11:
            return head(method, path, *lines, version="1.0")
        return head(method, path, *lines)


def manifest(number: int) -> bytes:
    layer = {"mediaType": "application/octet-stream", "digest": Digest.of(SMALL), "size": len(SMALL)}
    body = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": layer, "layers": []}
    return json.dumps({**body, "annotations": {"n": str(number)}}).encode()


@dataclass
class Changes:
    """What happens to both worlds between two requests."""

    pair: Pair
    upstream: Upstream
    users: Path
    chance: random.Random
    pushed: int = 0
    images: list[Image] = field(default_factory=list)

    async def next(self) -> str:
        rights = self.revoke, self.reload, self.hang_up
        content = self.move, self.purge, self.purge_by_another, self.evict, self.damage, self.replace
        pushes = self.push, self.push, self.delete, self.delete_by_another
        work = self.chance.choice((self.time, self.time, *rights, *content, *pushes))
        await work()
        return work.__name__

    async def time(self) -> None:
        """Until tags are no longer fresh, and until leases and pulls are recorded again."""
        seconds = self.chance.choice((0.3, 0.7, 1.0, 29.5, 61.0, 300.0, 601.0, 1801.0, 5 * 3600.0))
        self.pair.clock.advance(seconds)

    async def move(self) -> None:
        image = self.upstream.image(ALPINE, "latest", (SMALL, b"%d" % self.chance.getrandbits(64)))
        self.images.append(image)

    async def purge(self) -> None:
        pattern = self.chance.choice(("docker.io/library/alpine:latest", "docker.io/*"))
        await self._admin("/api/v1/purge", {"pattern": pattern, "force": True})

    async def purge_by_another(self) -> None:
        tag, digest = TAG.key(f"docker.io/{ALPINE}", "latest"), self.images[0].digest
        chosen = self.chance.choice((tag, MANIFEST.key(f"docker.io/{ALPINE}", digest)))

        async def work(world: World) -> None:
            with closing(world.records("cache")) as records:
                records.delete(chosen)

        await self.pair.each(work)

    async def evict(self) -> None:
        async def work(world: World) -> None:
            world.blob(SMALL).unlink(missing_ok=True)

        await self.pair.each(work)

    async def damage(self) -> None:
        """The end of a file is lost."""

        async def work(world: World) -> None:
            if (path := world.blob(SMALL)).exists():
                with path.open("r+b") as file:
                    file.truncate(100)

        await self.pair.each(work)

    async def replace(self) -> None:
        """Another directory of records has the name: everything has to be fetched again."""

        async def work(world: World) -> None:
            records = world.directory / "cache" / "records"
            records.rename(records.with_name(f"records-aside-{self.chance.getrandbits(32)}"))

        state = self.chance.getstate()
        for world in self.pair.worlds:
            self.chance.setstate(state)
            await work(world)

    async def push(self) -> None:
        self.pushed += 1
        body = manifest(self.pushed)
        path = f"/v2/local/{APP}/manifests/{self.chance.choice(('1', '1', '2', str(Digest.of(body))))}"
        await self._push(path, body)

    async def _push(self, path: str, body: bytes) -> None:
        async def work(world: World) -> None:
            given = {"Content-Type": OCI_MANIFEST, "Authorization": ALICE}
            async with world.site.request("PUT", path, data=body, headers=given) as response:
                assert response.status in (201, 401)

        await self.pair.each(work)

    async def delete(self) -> None:
        async def work(world: World) -> None:
            given = {"Authorization": ALICE}
            path = f"/v2/local/{APP}/manifests/1"
            async with world.site.request("DELETE", path, headers=given) as response:
                assert response.status in (202, 401, 404)

        await self.pair.each(work)

    async def delete_by_another(self) -> None:
        async def work(world: World) -> None:
            with closing(world.records("private")) as records:
                for key in list(records.keys(TAG.prefix(f"local/{APP}"))):
                    records.delete(key)

        await self.pair.each(work)

    async def revoke(self) -> None:
        """The password is changed, or is right again."""
        right = line("alice", "wonderland")
        self.users.write_text(line("alice", "changed") if self.users.read_text() == right else right)

    async def reload(self) -> None:
        fresh_for = self.chance.choice(("10s", "10m", "1h", "forever"))
        await self.pair.each(lambda world: world.reload(fresh_for=fresh_for))

    async def hang_up(self) -> None:
        await self.pair.each(lambda world: world.hang_up())

    async def _admin(self, path: str, body: dict[str, Any]) -> None:
        async def work(world: World) -> None:
            assert world.site.app.admin_url is not None
            url = world.site.app.admin_url.with_path(path)
            async with world.site.session.post(url, json=body) as response:
                assert response.status == 200, await response.text()

        await self.pair.each(work)


@pytest.mark.clients
@pytest.mark.parametrize("seed", range(3))
async def test_both_ways_are_the_same(
    pair: Callable[..., Any],
    upstream: Upstream,
    clock: Clock,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hits: Counter[bool],
    seed: int,
) -> None:
    monkeypatch.setattr(throttle, "FREE", 1 << 30)  # nobody guesses here
    chance = random.Random(seed)
    users = tmp_path / "htpasswd"
    users.write_text(line("alice", "wonderland"))
    rules = [
        {"who": ["user:alice"], "may": ["pull", "push", "delete"]},
        {"who": ["anonymous"], "may": ["pull"], "from": ["127.0.0.0/8"], "where": [f"local/{APP}"]},
    ]
    image = upstream.image(ALPINE, "latest", (SMALL, LARGE))
    both: Pair = await pair({"htpasswd": str(users), "rules": rules}, fresh_for="10m")
    changes = Changes(both, upstream, users, chance, images=[image])
    for _ in range(2):
        await changes.push()
    pushed = Digest.of(manifest(1))
    targets = [
        *(f"/v2/{ALPINE}/manifests/{each}" for each in ("latest", "latest", image.digest, "absent")),
        *(f"/v2/{ALPINE}/blobs/{each}" for each in (Digest.of(SMALL), image.layers[1], Digest.of(b"absent"))),
        *(f"/v2/local/{APP}/manifests/{each}" for each in ("1", "2", pushed)),
        "/v2/alpine/manifests/latest?ns=docker.io",
        f"/v2/docker.io/{ALPINE}/manifests/{image.digest}",
        f"/v2/{ALPINE}/tags/list",
        "/v2/",
    ]
    requests = Requests(chance, targets)
    for _ in range(60):
        for _ in range(chance.randrange(10, 45)):
            number, pieces = chance.randrange(3), 2 if chance.random() < 0.03 else 1
            await both.ask(number, requests.next(), pieces)
        await changes.next()
    assert hits[True] > 200, hits
    plain, quick = await both.records()
    assert quick == plain
    assert quick[1]


# Who may have it


@pytest.fixture
async def wired() -> AsyncIterator[Callable[..., Any]]:
    async with AsyncExitStack() as stack:

        async def to(url: str, tls: ssl.SSLContext | None = None) -> Wire:
            return await stack.enter_async_context(connect(url, tls=tls))

        yield to


async def status(wire: Wire, request: bytes) -> int:
    await wire.send(request)
    return (await wire.reply()).status


async def pushed(site: Site, **headers: str) -> None:
    given = {"Content-Type": OCI_MANIFEST, **headers}
    path = f"/v2/local/{APP}/manifests/1"
    async with site.request("PUT", path, data=manifest(1), headers=given) as response:
        assert response.status == 201, await response.text()


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "token.pem"
    path.write_bytes(pem(PRIVATE["EC"]))
    return path


async def test_a_token_expires(
    serve: Serve,
    upstream: Upstream,
    keys: Path,
    clock: Clock,
    wired: Callable[..., Any],
    hits: Counter[bool],
) -> None:
    access = [{"type": "repository", "name": f"local/{APP}", "actions": ["*"]}]
    bearer = f"Bearer {Server(clock).issue(access=access)}"
    more = {"local": {"store": {"sparse": True}}}
    site = await serve(upstream, more=more, top={"access": token(keys)})
    await pushed(site, Authorization=bearer)
    wire = await wired(site.url)
    request = head("GET", f"/v2/local/{APP}/manifests/1", f"Authorization: {bearer}")
    assert [await status(wire, request) for _ in range(4)] == [200] * 4
    assert hits[True] == 2
    clock.advance(300 + 59)
    assert await status(wire, request) == 200
    assert hits[True] == 3
    clock.advance(2)
    assert await status(wire, request) == 401
    assert hits[True] == 3


async def test_the_key_of_a_token_is_taken_away(
    serve: Serve,
    upstream: Upstream,
    keys: Path,
    clock: Clock,
    wired: Callable[..., Any],
    hits: Counter[bool],
) -> None:
    access = [{"type": "repository", "name": f"local/{APP}", "actions": ["*"]}]
    bearer = f"Bearer {Server(clock).issue(access=access)}"
    site = await serve(upstream, more={"local": {"store": {"sparse": True}}}, top={"access": token(keys)})
    await pushed(site, Authorization=bearer)
    wire = await wired(site.url)
    request = head("GET", f"/v2/local/{APP}/manifests/1", f"Authorization: {bearer}")
    assert [await status(wire, request) for _ in range(3)] == [200] * 3
    assert hits[True] == 1
    keys.write_bytes(pem(PRIVATE["RSA"]))
    assert await status(wire, request) == 401


async def test_what_the_upstream_shows_to_the_caller_is_asked_again(
    serve: Serve, upstream: Upstream, clock: Clock, wired: Callable[..., Any], hits: Counter[bool]
) -> None:
    owner = Basic("owner", "s3cret")
    upstream.auth = Bearer(owner, anonymous=False)
    upstream.image(APP, "latest")
    options = {"username": owner.user, "password": owner.password}
    top = {"access": {"remember": "5m"}}
    site = await serve(upstream, options=options, top=top, visibility="caller", fresh_for="forever")
    wire = await wired(site.url)
    request = head("GET", f"/v2/{APP}/manifests/latest", f"Authorization: {owner.header}")
    assert [await status(wire, request) for _ in range(4)] == [200] * 4
    assert hits[True] == 1  # the first was a miss
    upstream.clear()
    clock.advance(301)
    assert await status(wire, request) == 200
    assert "HEAD manifest team/app:latest" in upstream.log
    assert hits[True] == 1
    assert await status(wire, head("GET", f"/v2/{APP}/manifests/latest")) == 401


async def test_the_address_of_a_client_is_asked_for(
    serve: Serve, upstream: Upstream, wired: Callable[..., Any], hits: Counter[bool]
) -> None:
    rules = [
        {"who": ["anonymous"], "may": ["pull"], "from": ["127.0.0.1/32"]},
        {"who": ["anonymous"], "may": ["push"]},
    ]
    more = {"local": {"store": {"sparse": True}}}
    site = await serve(upstream, more=more, top={"access": {"rules": rules}})
    await pushed(site)
    near = await wired(site.url)
    request = head("GET", f"/v2/local/{APP}/manifests/1")
    assert [await status(near, request) for _ in range(3)] == [200] * 3
    assert hits[True] == 1
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", site.app.url.port, local_addr=("127.0.0.2", 0)
    )
    with closing(writer):
        far = Wire(reader, writer)
        assert [await status(far, request) for _ in range(3)] == [403] * 3
    assert await status(near, request) == 200
    assert hits[True] == 2


async def test_a_certificate_is_not_forgotten(
    serve: Serve,
    upstream: Upstream,
    tmp_path: Path,
    events: LogCapture,
    wired: Callable[..., Any],
    hits: Counter[bool],
) -> None:
    authority = Authority(tmp_path)
    rules = [{"who": ["anonymous"], "may": ["pull", "push"]}]
    tls = {**authority.issue("server"), "client_ca": str(authority.ca)}
    more = {"local": {"store": {"sparse": True}}}
    site = await serve(upstream, more=more, top={"tls": tls, "access": {"rules": rules}})
    await pushed(site)
    request = head("GET", f"/v2/local/{APP}/manifests/1")
    nobody = await wired(site.url, authority.client())
    assert [await status(nobody, request) for _ in range(3)] == [200] * 3
    assert hits[True] == 1
    own = authority.issue("client", "ci@example.com", common_name="ci")
    known = await wired(site.url, authority.client(own))
    assert [await status(known, request) for _ in range(2)] == [200] * 2
    assert hits[True] == 1
    plain = await wired(site.url.replace("https", "http"))
    assert await status(plain, request) == 400
    served = [
        each for each in events.entries if each["event"] == "request.served" and each["method"] == "GET"
    ]
    assert [each["user"] for each in served] == ["", "", "", "ci", "ci"]


# What is a request


@pytest.fixture
async def warm(serve: Serve, upstream: Upstream, wired: Callable[..., Any]) -> tuple[Site, bytes]:
    """A server, and a request that it has seen."""
    upstream.image(ALPINE, "latest", (SMALL,))
    site = await serve(upstream, more={"local": {"store": {"sparse": True}}}, fresh_for="forever")
    request = head("GET", f"/v2/{ALPINE}/manifests/latest")
    wire = await wired(site.url)
    for _ in range(3):
        assert await status(wire, request) == 200
    return site, request


async def test_the_first_request_of_a_connection(
    warm: tuple[Site, bytes], wired: Callable[..., Any], hits: Counter[bool]
) -> None:
    site, request = warm
    assert await status(await wired(site.url), request) == 200
    assert hits[True] == 1


async def test_a_part_of_a_head_is_no_request(
    warm: tuple[Site, bytes], wired: Callable[..., Any], hits: Counter[bool]
) -> None:
    site, request = warm
    wire = await wired(site.url)
    # The second piece looks like a request, and is the value of a header.
    await wire.send(b"GET /v2/absent/absent/tags/list?ns=no.example HTTP/1.1\r\nX-Trick: ")
    await _read_by(site)
    await wire.send(request)
    assert (await wire.reply()).status == 404
    assert hits[True] == 0
    assert await status(wire, request) == 200
    assert hits[True] == 1


async def _read_by(site: Site) -> None:
    """Return once the server has read what was sent to it before."""
    async with connect(site.url) as other:
        assert (await other.ask("GET", "/v2/")).status == 200


async def test_a_body_is_no_request(
    warm: tuple[Site, bytes], wired: Callable[..., Any], hits: Counter[bool]
) -> None:
    site, request = warm
    wire = await wired(site.url)
    digest = Digest.of(request)
    path = f"/v2/local/{APP}/blobs/uploads/?digest={digest}"
    await wire.send(head("POST", path, f"Content-Length: {len(request)}"))
    await _read_by(site)
    await wire.send(request)
    assert (await wire.reply()).status == 201
    assert hits[True] == 0
    assert (await wire.ask("GET", f"/v2/local/{APP}/blobs/{digest}")).body == request
    assert await status(wire, request) == 200
    assert hits[True] == 1


async def test_several_requests_at_once(
    warm: tuple[Site, bytes], wired: Callable[..., Any], hits: Counter[bool]
) -> None:
    site, request = warm
    wire = await wired(site.url)
    await wire.send(request * 3)
    assert [(await wire.reply()).status for _ in range(3)] == [200] * 3
    assert hits[True] == 0
    assert [await status(wire, request) for _ in range(2)] == [200] * 2
    assert hits[True] == 1


@pytest.mark.parametrize("memory", ["1MiB", "off"])
async def test_small_responses_do_not_pile_up(
    serve: Serve,
    upstream: Upstream,
    wired: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    memory: str,
) -> None:
    body = random.Random(7).randbytes(60_000)
    upstream.image(ALPINE, "latest", (body,))
    site = await serve(upstream, top={"limits": {"hit_memory": memory}})
    sizes: list[int] = []
    full = asyncio.Event()
    pause, finish = Connection.pause_writing, Connection.finish_response

    def pausing(self: Connection) -> None:
        pause(self)
        full.set()

    async def finishing(self: Connection, *arguments: Any) -> Any:
        assert self.transport is not None
        sizes.append(cast(asyncio.Transport, self.transport).get_write_buffer_size())
        return await finish(self, *arguments)

    request = head("GET", f"/v2/{ALPINE}/blobs/{Digest.of(body)}")
    wire = await wired(site.url)
    for _ in range(4):
        assert await status(wire, request) == 200
    monkeypatch.setattr(Connection, "pause_writing", pausing)
    monkeypatch.setattr(Connection, "finish_response", finishing)
    await wire.send(request * 250)
    await full.wait()
    for _ in range(50):
        await _read_by(site)
    for _ in range(250):
        assert (await wire.reply()).body == body
    assert max(sizes) < 200_000


async def test_an_idle_connection_is_closed_after_a_hit_too(
    serve: Serve, upstream: Upstream, wired: Callable[..., Any], hits: Counter[bool]
) -> None:
    upstream.image(ALPINE, "latest")
    limits = {"request_timeout": "300ms", "idle_timeout": "1s"}
    site = await serve(upstream, top={"limits": limits}, fresh_for="forever")
    request = head("GET", f"/v2/{ALPINE}/manifests/latest")
    async with connect(site.url) as other:
        for _ in range(3):
            assert await status(other, request) == 200
    wire = await wired(site.url)
    assert await status(wire, request) == 200
    assert hits[True] == 1
    begun = asyncio.get_running_loop().time()
    assert await wire.rest() == b""
    assert asyncio.get_running_loop().time() - begun > 0.9  # not the time for a request


async def test_a_server_that_stops_says_so(
    warm: tuple[Site, bytes], wired: Callable[..., Any], hits: Counter[bool]
) -> None:
    site, request = warm
    idle, late = await wired(site.url), await wired(site.url)
    await _read_by(site)
    assert await status(idle, request) == 200
    before = hits[True]
    stopping = asyncio.ensure_future(site.app.stop())
    assert await idle.rest() == b""  # now it stops
    await late.send(request)
    reply = await late.reply()
    assert reply.status == 200
    assert await late.rest() == b""
    assert hits[True] == before
    await stopping


# What is remembered


async def test_no_more_is_remembered_than_there_is_memory_for(
    serve: Serve, upstream: Upstream, wired: Callable[..., Any], hits: Counter[bool]
) -> None:
    images = [upstream.image(ALPINE, str(number), (b"%d" % number,)) for number in range(4)]
    site = await serve(upstream, top={"limits": {"hit_memory": "16KiB"}}, fresh_for="forever")
    wire = await wired(site.url)
    requests = [head("GET", f"/v2/{ALPINE}/manifests/{each.digest}") for each in images]
    for _ in range(5):
        for request in requests:
            assert await status(wire, request) == 200
    assert hits[True] == 0
    for _ in range(5):
        for request in requests[:3]:
            assert await status(wire, request) == 200
    assert hits[True] == 12


async def test_who_has_access_takes_memory_too(serve: Serve, upstream: Upstream, hits: Counter[bool]) -> None:
    rules = [{"who": ["anonymous"], "may": ["pull", "push"]}]
    more = {"local": {"store": {"sparse": True}}}
    limits = {"hit_memory": "8KiB"}
    site = await serve(upstream, more=more, top={"access": {"rules": rules}, "limits": limits})
    await pushed(site)
    request = head("GET", f"/v2/local/{APP}/manifests/1")

    async def ask(times: int, *addresses: int) -> int:
        """How many of them were hits."""
        before = hits[True]
        for address in addresses:
            local = (f"127.0.0.{address}", 0)
            reader, writer = await asyncio.open_connection("127.0.0.1", site.app.url.port, local_addr=local)
            with closing(writer):
                for _ in range(times):
                    assert await status(Wire(reader, writer), request) == 200
        return hits[True] - before

    assert await ask(3, 1) == 1
    assert await ask(2, 2, 3, 4) == 3
    await ask(1, *range(1, 60))
    assert await ask(1, *range(1, 60)) < 30


@pytest.mark.parametrize(("memory", "fits"), [("64KiB", True), ("8KiB", False)])
async def test_all_listeners_share_the_memory_but_not_what_a_head_leads_to(
    serve: Serve,
    upstream: Upstream,
    wired: Callable[..., Any],
    hits: Counter[bool],
    memory: str,
    fits: bool,
) -> None:
    stores = {name: {"store": {"sparse": True}, "listen": "127.0.0.1:0"} for name in ("one", "two")}
    site = await serve(upstream, more=stores, top={"limits": {"hit_memory": memory}})
    wires = []
    for number, name in enumerate(stores):
        path = f"/v2/{name}/{APP}/manifests/1"
        given = {"Content-Type": OCI_MANIFEST}
        async with site.request("PUT", path, data=manifest(number), headers=given) as response:
            assert response.status == 201, await response.text()
        wires.append(await wired(site.app.store_urls[name]))
    request = head("GET", f"/v2/{APP}/manifests/1")

    async def ask(*order: int) -> int:
        """How many of them were hits."""
        before = hits[True]
        for number in order:
            await wires[number].send(request)
            assert (await wires[number].reply()).body == manifest(number)
        return hits[True] - before

    assert await ask(0, 1, 0, 1) == 0
    assert await ask(0, 1, 0, 1, 0, 1) == (6 if fits else 0)
    assert await ask(0, 0, 0) >= 2


@pytest.mark.parametrize("sent", ["If-None-Match: x", "Range: bytes=0-", "Content-Length: 0", "Expect: x"])
async def test_some_requests_are_never_remembered(
    serve: Serve, upstream: Upstream, wired: Callable[..., Any], hits: Counter[bool], sent: str
) -> None:
    upstream.image(ALPINE, "latest")
    site = await serve(upstream, fresh_for="forever")
    wire = await wired(site.url)
    request = head("GET", f"/v2/{ALPINE}/manifests/latest", sent)
    said = [await status(wire, request) for _ in range(4)]
    assert len(set(said)) == 1
    assert hits[True] == 0


async def test_it_is_off_where_pulls_are_reported() -> None:
    class Reporter:
        pulls = True

        async def publish(self, event: Event) -> None: ...

        def publish_later(self, event: Event) -> None: ...

    def qualify(name: str, *, ns: str | None, host: str | None, prefix: str) -> str:
        return name

    assert DistributionAPI(Registry(), qualify, Metrics(), hit_memory=HitMemory(1 << 20)).hits is not None
    assert (
        DistributionAPI(
            Registry(), qualify, Metrics(), hit_memory=HitMemory(1 << 20), reporter=Reporter()
        ).hits
        is None
    )
    assert DistributionAPI(Registry(), qualify, Metrics()).hits is None


# Several processes


@pytest.mark.clients
async def test_what_another_worker_changes_takes_effect_at_once(place: Place) -> None:
    place.tree["namespaces"]["local"] = {"store": {"sparse": True}}
    place.tree["access"] = OPEN
    server = await place.start()
    one, other = await server.workers()
    path = f"/v2/local/{APP}/manifests/1"
    asked = 0
    for number in range(20):
        body = manifest(number)
        async with other.ask(path, "PUT", body, Content_Type=OCI_MANIFEST) as response:
            assert response.status == 201
        for _ in range(4):
            assert await one.get(path) == body
            asked += 1
    async with other.ask(path, "DELETE") as response:
        assert response.status == 202
    await one.get(path, status=404)
    count = await server.metric("entrepot_requests_total", namespace="local", kind="manifest", result="none")
    assert count == asked + 21
    await server.stop()
    served = server.said("request.served", method="GET", status=200, kind="manifest")
    assert len(served) == asked
    assert len({each["id"] for each in served}) == asked

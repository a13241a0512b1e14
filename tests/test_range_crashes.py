"""`entrepot serve` that is killed while clients read ranges, each by its pattern, of upstreams of each kind.

What a client has got is on the disk: it is not asked for again, whoever is killed.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import product
from typing import Any

import aiohttp
import pytest

from storage.disk.extents import Extents
from tests.processes import Place, Server, Worker, place
from tests.ranges import KINDS, PATTERNS, SIZE, Client, Pattern, Spans, containerd, upstreams
from tests.test_fills import content_of
from tests.upstream import Fault, Hold, Request, Upstream
from tests.upstream.messages import Answer

__all__ = ["place"]  # the fixture

pytestmark = pytest.mark.clients

HELD = 910_000  # a transfer of this byte and of those before it is held before it
FAR = (1_300_000, 1_350_000)
PIECE = 64 << 10  # bytes that the upstream hands to the kernel at a time
REPOSITORY = "a/b"


class HeldAt(Fault):
    """Holds `count` transfers."""

    def __init__(self, gate: asyncio.Event) -> None:
        self.gate = gate
        self.count = 0

    def strike(self, answer: Answer, request: Request) -> Answer:
        if answer.offset < HELD < answer.offset + len(answer.content):
            self.count += not self.gate.is_set()
            return Hold(self.gate, HELD - answer.offset).strike(answer, request)
        return answer


class Subject:
    """A blob at an upstream of its own, its clients, and what the upstream is asked for it."""

    def __init__(
        self, upstream: Upstream, kind: str, pattern: Pattern, number: int, lazy: bool, gate: asyncio.Event
    ) -> None:
        self.upstream = upstream
        self.held = HeldAt(gate)
        self.pattern = pattern
        self.lazy = lazy
        self.namespace = f"s{number}.example"
        self.body = content_of(SIZE, number)
        self.digest = upstream.blob(REPOSITORY, self.body)
        upstream.next("GET", self.digest, self.held, times=1000)
        self.path = f"/v2/{self.namespace}/{REPOSITORY}/blobs/{self.digest}"
        self.sends_ranges = kind != "sends no ranges"
        self.tells_size = kind != "tells no size"
        self.delivered: Spans = []
        self.sent = self.asked = 0  # bytes and requests when somebody was killed

    @asynccontextmanager
    async def followed(self, worker: Worker) -> AsyncIterator[aiohttp.ClientResponse]:
        """A reader of what is before HELD and of what is after it, which has got the former."""
        start, header = 0, {}
        if self.lazy:
            start, header = HELD - 100_000, {"Range": f"bytes={HELD - 100_000}-{HELD + 99_999}"}
        async with worker.ask(self.path, **header) as response:
            assert await response.content.readexactly(HELD - 1 - start) == self.body[start : HELD - 1]
            self.delivered.append((start, HELD - 1))
            yield response

    async def finish(self, response: aiohttp.ClientResponse) -> None:
        stop = HELD + 100_000 if self.lazy else SIZE
        assert await response.read() == self.body[HELD - 1 : stop]

    def note(self, client: Client) -> None:
        """Somebody is killed."""
        self.delivered += client.read_spans
        self.sent, self.asked = self.upstream.bytes_sent, len(self.upstream.requests)

    def check(self, survived: bool) -> None:
        """What was asked for, and sent, since then; `survived` if the transfer of HELD may have gone on."""
        kept = Extents(self.delivered)
        asked = [
            (int(first or 0), int(last or SIZE - 1) + 1)
            for first, last in (
                re.fullmatch(r"(?:bytes=(\d+)-(\d*))?", each.range or "").groups()  # type: ignore[union-attr]
                for each in self.upstream.requests[self.asked :]
                if each.method == "GET" and each.reference == self.digest
            )
        ]
        if not self.sends_ranges:
            assert len(asked) <= 1  # its first answer is all of the blob
            assert self.upstream.bytes_sent <= self.sent + SIZE + PIECE * self.held.count
            return
        assert [kept.gap(*span) for span in asked] == asked
        if self.lazy and self.pattern is containerd:
            return  # what is under way to a reader that leaves comes again
        under_way = self.sent - kept.total + PIECE * self.held.count
        # It is closed where what others have fetched begins, and what was sent until then is dropped.
        dropped = SIZE - HELD if survived and not self.lazy else 0
        assert self.upstream.bytes_sent <= SIZE + under_way + dropped


class Crash:
    """A server with one client for each subject, and one that follows the transfer of HELD."""

    def __init__(self, place: Place, subjects: list[Subject]) -> None:
        self.place = place
        self.subjects = subjects
        self.server: Server
        self._session = aiohttp.ClientSession()

    async def close(self) -> None:
        await self._session.close()

    def request(self, method: str, path: str, **options: Any) -> Any:
        return self._session.request(method, self.server.url + path, **options)

    def clients(self) -> list[Client]:
        return [Client(self.request, each.path, each.body) for each in self.subjects]

    async def interrupted(self, gate: asyncio.Event) -> None:
        """All begin; the server, or one of three workers, is killed; the others get what they asked for."""
        self.server = await self.place.start()
        clients = self.clients()
        victim, *survivors = self.server.pids()
        async with AsyncExitStack() as stack:
            followers = []
            for number, each in enumerate(self.subjects):
                worker = await self.server.worker([victim, *survivors][number % (1 + len(survivors))])
                followers.append((worker.pid, each, await stack.enter_async_context(each.followed(worker))))
            begun = [
                asyncio.create_task(each.pattern(client))
                for each, client in zip(self.subjects, clients, strict=True)
            ]
            await asyncio.gather(
                *(
                    client.read(FAR)
                    for each, client in zip(self.subjects, clients, strict=True)
                    if each.sends_ranges and (each.tells_size or each.lazy)
                )
            )
            if survivors:
                os.kill(victim, signal.SIGKILL)
                await self.server.heard("worker.died")
            else:
                await self.server.kill()
            for each, client in zip(self.subjects, clients, strict=True):
                each.note(client)
            gate.set()
            for found in await asyncio.gather(*begun, return_exceptions=True):
                assert found is None or isinstance(found, aiohttp.ClientError), found
            for pid, each, response in followers:
                if pid == victim:
                    with pytest.raises(aiohttp.ClientError):
                        await each.finish(response)
                else:
                    await each.finish(response)
        if not survivors:
            self.server = await self.place.start()

    async def read_again(self) -> None:
        clients = self.clients()
        await asyncio.gather(
            *(each.pattern(client) for each, client in zip(self.subjects, clients, strict=True))
        )
        await asyncio.gather(*(client.all() for client in clients))


@pytest.mark.errors("worker.died")
@pytest.mark.parametrize("lazy", [False, True], ids=["default", "lazy"])
@pytest.mark.parametrize("workers", [1, 3])
async def test_what_clients_got_is_not_asked_for_again(place: Place, workers: int, lazy: bool) -> None:
    patterns, gate = list(product(KINDS, PATTERNS)), asyncio.Event()
    async with upstreams([kind for kind, _ in patterns]) as found:
        subjects = [
            Subject(upstream, kind, pattern, number, lazy, gate)
            for number, (upstream, (kind, pattern)) in enumerate(zip(found, patterns, strict=True))
        ]
        place.tree["workers"] = workers
        for each in subjects:
            place.tree["namespaces"][each.namespace] = {
                "upstream": {"url": each.upstream.url, "progress_timeout": "60s"},
                "lazy": lazy,
                "lazy_until": {"share": "100%", "clients": "never"},
            }
        crash = Crash(place, subjects)
        try:
            await crash.interrupted(gate)
            await crash.read_again()
            digests = {each.digest for each in subjects}
            await crash.server.until(
                lambda: digests <= {each["digest"] for each in crash.server.said("fill.committed")}
            )
            assert crash.server.partial() == []
        finally:
            await crash.close()
        for each in subjects:
            each.check(survived=workers > 1)

"""Random writes over HTTP to servers of several processes, which are killed: what is lost, wrong or not told.

In rounds: in each, one to eight requests come at once, to a server with three workers, or to two servers over
one bucket and one database.  Meanwhile a worker, the housekeeping, a whole server or the database may be
killed, or the bucket may be away.  After each round all is read and compared with what may be there.  At the
end a webhook must have been told of all that was acknowledged, and of tags that were set without an answer,
and of nothing that was not even begun.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, NamedTuple

import aiohttp
import click

from storage.oci import OCI_MANIFEST, Digest
from tests.bench.clients import BenchError
from tests.bench.expected import ANY, Expected, Key, Made
from tests.bench.http_servers import Disturbances, FleetDisturbances, stopped
from tests.bench.telling import ACTIONS, Telling
from tests.objects import FakeBucket
from tests.postgres import PostgresServer
from tests.processes import Place, Server
from tests.receiver import Receiver

REPOSITORIES, TAGS = ("a", "b"), ("x", "y", "v1")
SIZES = (10, 3000, 100_000)  # bytes of blobs
IMMUTABLE = ["v*"]
ACCESS = {"rules": [{"who": ["anonymous"], "may": ["pull", "push", "delete"]}]}


class Reply(NamedTuple):
    status: int
    body: bytes
    headers: Any


class Clients:
    """Clients of the servers at `urls`."""

    def __init__(self, servers: list[Server], random: Random) -> None:
        self.expected = Expected(time.time, rules=None)  # type: ignore[arg-type]
        self.telling = Telling()
        self.done: Counter[str] = Counter()
        self.disturbed = False
        self.servers = servers
        self._random = random
        self._blobs = {str(Digest.of(each)): each for each in map(random.randbytes, SIZES)}
        self._sessions: dict[str, tuple[str, bytes]] = {}  # uploads: the repository, and what is to be sent
        self._touched: Counter[str] = Counter()  # in this round, by how many operations
        self._failed: list[tuple[str, list[int]]] = []  # ends of uploads of which none succeeded
        self._client = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(force_close=True, limit=0),  # any worker may answer each request
            timeout=aiohttp.ClientTimeout(total=60),
        )
        self._client._retry_connection = False  # else a PUT that was done comes again

    async def close(self) -> None:
        await self._client.close()

    async def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> Reply:
        """Status 0 is no answer."""
        url = self._random.choice(self.servers).url + path
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            async with self._client.request(method, url, data=body or None, headers=given) as response:
                reply = Reply(response.status, await response.read(), response.headers)
        except (aiohttp.ClientError, ConnectionError, TimeoutError):
            reply = Reply(0, b"", {})
        self.done[f"{method} {reply.status or 'cut off'}"] += 1
        busy = b"being written by another request" in reply.body
        if (reply.status == 0 or reply.status >= 500) and not (self.disturbed or busy):
            self.expected.wrong.append(f"{method} {path} was answered {reply.status}: {reply.body[:300]!r}")
        return reply

    async def round(self, disturb: Callable[[], Awaitable[None]] | None) -> None:
        kinds = [self.push] * 3 + [self.begin, self.append, self.finish, self.finish_twice] * 2
        kinds += [self.mount, self.image, self.image, self.image, self.delete, self.cancel]
        chosen = [self._random.choice(kinds) for _ in range(self._random.randint(1, 8))]
        what = ", ".join(each.__name__ for each in chosen) + f" ({disturb.__name__ if disturb else ''})"
        self.disturbed = disturb is not None
        self._touched.clear()
        self._failed.clear()
        works = [each(self._random.choice(REPOSITORIES)) for each in chosen]
        await asyncio.gather(*works, *([disturb()] if disturb else []))
        if not self.disturbed:
            alone = [(path, found) for path, found in self._failed if self._touched[path] == 1]
            self.expected.wrong += [f"{what}: {path} ended with {found}" for path, found in alone]
        if disturb is not None:
            await self._settled()
        self.disturbed = False
        for (_, repository, tag), digest in self.expected.moved():
            self.telling.must.add(self.telling.may("tag.moved", repository, digest, tag))
        keys = sorted(self.expected.keys())
        seen = await asyncio.gather(*map(self._read, keys))
        found = dict(zip(keys, seen, strict=True))
        for (_, repository, tag), digest, moved in self.expected.set_unanswered(found):
            self.done["set by a request without an answer"] += 1
            for kind in ("manifest.pushed", *(["tag.moved"] if moved else [])):
                self.telling.must.add(self.telling.may(kind, repository, digest, tag))
        self.expected.compare(found, False, False, what)

    async def _settled(self) -> None:
        """Wait until all workers answer."""
        answered = 0
        while answered < 20:
            reply = await self.ask("GET", "/v2/local/a/tags/list")
            answered = answered + 1 if reply.status in (200, 404) else 0

    async def _read(self, key: Key) -> str | None:
        kind, repository, name = key
        path = f"/v2/local/{repository}/{'blobs' if kind == 'blob' else 'manifests'}/{name}"
        reply = await self.ask("GET", path)
        if reply.status == 404:
            return None
        digest = str(Digest.of(reply.body))
        return digest if reply.status == 200 else f"answered {reply.status}"

    # Blobs

    async def push(self, repository: str) -> None:
        digest, content = self._random.choice([*self._blobs.items()])
        self._may(key := ("blob", repository, digest))
        path = f"/v2/local/{repository}/blobs/uploads/?digest={digest}"
        self._pushed(await self.ask("POST", path, content), key)

    def _may(self, *keys: Key) -> None:
        """These are about to be pushed."""
        (kind, _, digest), *_ = keys
        for key in keys:
            self.expected.may(key, digest)
            tag = key[2] if key[0] == "tag" else ""
            self.telling.may(f"{kind}.pushed", key[1], digest, tag)
            self.telling.may("tag.moved", key[1], digest, tag)

    def _pushed(self, reply: Reply, *keys: Key) -> None:
        if reply.status == 201:
            for kind, repository, name in keys:
                self.expected.did((kind, repository, name), keys[0][2])
                tag = name if kind == "tag" else ""
                if kind == "tag" or len(keys) == 1:
                    what = f"{keys[0][0]}.pushed"
                    self.telling.must.add(self.telling.may(what, repository, keys[0][2], tag))

    async def begin(self, repository: str) -> None:
        reply = await self.ask("POST", f"/v2/local/{repository}/blobs/uploads/")
        if reply.status == 202:
            path = reply.headers["Location"].partition("?")[0]
            self._sessions[path] = repository, self._random.choice([*self._blobs.values()])

    async def _sent(self, path: str) -> int:
        """How many bytes an upload has; -1 if it is unknown.  Nobody can tell one byte from none."""
        reply = await self.ask("GET", path)
        if reply.status == 404:
            self._sessions.pop(path, None)
        if reply.status != 204:
            return -1
        last = int(reply.headers["Range"].partition("-")[2])
        return last + 1 if last else 0

    def _session(self) -> str:
        path = self._random.choice([*self._sessions])
        self._touched[path] += 1
        return path

    async def append(self, _: str) -> None:
        if self._sessions:
            path = self._session()
            content = self._sessions[path][1]
            if (start := await self._sent(path)) >= 0:
                stop = self._random.randrange(min(start + 2, len(content)), len(content) + 1)  # see _sent()
                span = f"{start}-{max(start, stop - 1)}"
                await self.ask("PATCH", path, content[start:stop], Content_Range=span)

    async def finish(self, _: str, times: int = 1) -> None:
        if not self._sessions:
            return
        path = self._session()
        repository, content = self._sessions[path]
        digest = str(Digest.of(content))
        if (start := await self._sent(path)) < 0:
            return
        self._may(key := ("blob", repository, digest))
        span = {"Content_Range": f"{start}-{len(content) - 1}"} if start < len(content) else {}
        whole = f"{path}?digest={digest}"
        replies = await asyncio.gather(
            *(self.ask("PUT", whole, content[start:], **span) for _ in range(times))
        )
        for each in replies:
            self._pushed(each, key)
        found = [each.status for each in replies]
        self.done[f"finish {sorted(found)}"] += 1
        if 201 not in found:
            self._failed.append((path, found))
        else:
            self._sessions.pop(path, None)

    async def finish_twice(self, repository: str) -> None:
        await self.finish(repository, 2)

    async def cancel(self, _: str) -> None:
        if self._sessions:
            await self.ask("DELETE", self._session())

    async def mount(self, repository: str) -> None:
        digest = self._random.choice([*self._blobs])
        self.expected.may(key := ("blob", repository, digest), digest)
        source = self._random.choice(REPOSITORIES)
        path = f"/v2/local/{repository}/blobs/uploads/?mount={digest}&from=local/{source}"
        told = self.telling.may("blob.mounted", repository, digest)
        if (reply := await self.ask("POST", path)).status == 201:
            self.expected.did(key, digest)
            self.telling.must.add(told)
        elif reply.status == 202:
            self.expected.unknown(("blob", source, digest), "a mount")

    # Images

    async def image(self, repository: str) -> None:
        named = self._random.sample([*self._blobs], 2)
        layers = [{"mediaType": "x/y", "digest": each, "size": len(self._blobs[each])} for each in named]
        tree = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": layers[0], "layers": layers}
        tree["annotations"] = {"n": str(self._random.randrange(2))}
        content = json.dumps(tree).encode()
        digest = str(Digest.of(content))
        self.expected.images[digest] = Made(named)
        tags = self._random.sample(TAGS, self._random.choice((0, 1, 1, 2)))
        keys: list[Key] = [("manifest", repository, digest), *(("tag", repository, tag) for tag in tags)]
        self._may(*keys)
        created = bool(tags) and self._random.random() < 0.3
        query = "&".join(f"tag={each}" for each in tags[1:])
        path = f"/v2/local/{repository}/manifests/{tags[0] if tags else digest}?{query}"
        more = {"If_None_Match": "*"} if created else {}
        reply = await self.ask("PUT", path, content, Content_Type=OCI_MANIFEST, **more)
        self._pushed(reply, *keys)
        if created and reply.status in (201, 412):
            self.expected.conditional(keys[1], ANY, reply.status == 201)
        if reply.status == 400:
            for error in json.loads(reply.body)["errors"]:
                if error["code"] == "MANIFEST_BLOB_UNKNOWN":
                    missing = error["detail"]["digest"]
                    self.expected.unknown(("blob", repository, missing), "an image")

    async def delete(self, repository: str) -> None:
        kind = self._random.choice(("blob", "manifest", "tag"))
        names = {"blob": [*self._blobs], "manifest": [*self.expected.images], "tag": [*TAGS]}[kind]
        if not names:
            return
        name = self._random.choice(names)
        for tag in TAGS if kind == "manifest" else ():
            self.expected.may(("tag", repository, tag), None)
        self.expected.may(key := (kind, repository, name), None)
        path = f"/v2/local/{repository}/{'blobs' if kind == 'blob' else 'manifests'}/{name}"
        found = ("", name) if kind == "tag" else (name, "")
        told = self.telling.may(f"{kind}.deleted", repository, *found)
        reply = await self.ask("DELETE", path)
        if reply.status == 202:
            self.expected.did(key, None)
            self.telling.must.add(told)
        elif reply.status == 404:
            self.expected.unknown(key, "a deletion")


async def sample(kind: str, seed: int, rounds: int) -> Clients:
    random = Random(seed)
    async with AsyncExitStack() as stack:
        receiver = Receiver()
        await receiver.start()
        stack.push_async_callback(receiver.stop)
        hook = {"name": "all", "url": receiver.url, "actions": ACTIONS, "format": "cloudevents"}
        more: dict[str, Any] = {}
        number, extra = 1, {}
        if kind == "fleet":
            database = PostgresServer()
            stack.callback(database.remove)
            database.start()
            stack.callback(database.stop)
            bucket = await stack.enter_async_context(FakeBucket())
            settings = bucket.settings("regis/try")
            keys = {"access_key": settings.access_key, "secret_key": settings.secret_key}
            shared = {"bucket": settings.url, "endpoint": settings.endpoint, "records": database.database()}
            more = {"shared": {**shared, **keys}}
            number, extra = 2, {"database": database, "bucket": bucket}
        places, servers = [], []
        for _ in range(number):
            home = stack.enter_context(tempfile.TemporaryDirectory(prefix="entrepot-bench-"))
            place = Place(Path(home), Path(home), SimpleNamespace(url=""))  # type: ignore[arg-type]
            place.tree |= {"workers": 3 - (number > 1), "webhooks": [hook], "access": ACCESS, **more}
            place.tree["namespaces"] = {"local": {"store": {"immutable_tags": IMMUTABLE}}}
            places.append(place)
            servers.append(await place.start())
        clients = Clients(servers, random)
        stack.push_async_callback(clients.close)
        made = FleetDisturbances if extra else Disturbances
        disturbances = made(places, servers, random, **extra)
        kinds = [disturbances.worker, disturbances.worker, disturbances.keeper, disturbances.server]
        kinds += [disturbances.database, disturbances.bucket] if extra else []  # type: ignore[attr-defined]
        for _ in range(rounds):
            await clients.round(random.choice([*kinds, *[None] * 4]))
        clients.expected.wrong += await clients.telling.compare(receiver)
        clients.expected.wrong += await stopped(clients.servers, places)
    return clients


@click.command()
@click.option("--rounds", default=60, show_default=True, help="Of each seed.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--seed", default=0, show_default=True, help="The first one.")
@click.option("--only", help="Part of the name of a kind.")
def main(rounds: int, seeds: int, seed: int, only: str | None) -> None:
    """Write at random over HTTP and compare; prints a table."""
    print("| servers | requests | cut off | 5xx | told | wrong |\n|---|--:|--:|--:|--:|--:|")
    wrong = 0
    for kind in ("workers", "fleet"):
        if only is not None and only not in kind:
            continue
        runs = [asyncio.run(sample(kind, number, rounds)) for number in range(seed, seed + seeds)]
        for each in runs:
            for text in each.expected.wrong:
                print(f"  {text}", file=sys.stderr)
        done = sum((each.done for each in runs), Counter[str]())
        print(sorted(done.items()), file=sys.stderr)
        cut = sum(count for name, count in done.items() if name.endswith("cut off"))
        failed = sum(count for name, count in done.items() if " 5" in name)
        found = sum(len(each.expected.wrong) for each in runs)
        told = sum(len(each.telling.must) for each in runs)
        print(f"| {kind} | {done.total():,} | {cut:,} | {failed:,} | {told:,} | {found} |", flush=True)
        wrong += found
    if wrong:
        raise BenchError(f"{wrong} times something was lost, wrong or not told")


if __name__ == "__main__":
    main(prog_name="python -m tests.bench.http_writes")

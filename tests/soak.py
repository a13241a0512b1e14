"""Mixed load of many clients before an upstream that fails in every way; all of it follows from a seed.

Every answer is looked at: content must be what its digest says, errors must have the specification's shape.
A connection that breaks is no answer, and no fault: clients ask again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random

import aiohttp

from tests.upstream import Corrupt, Hold, Image, Refuse, Request, Reset, Status, Truncate, Upstream

REPOSITORIES = tuple(f"team/app{number}" for number in range(4))
TAGS = ("latest", "stable")
IMAGES = 5  # in each repository
SIZES = (700, 40_000, 300_000, 3_000_000)  # bytes of layers; about
CORRUPTED = 300  # the position of a byte that is sometimes another one
SHARE = 0.02  # of the upstream's answers that each kind of fault befalls
BROKEN = (aiohttp.ClientError, ConnectionError)


class Storm:
    """Faults that strike at random while it is on; what is held goes on with `breathe`."""

    def __init__(self, upstream: Upstream, random: Random) -> None:
        self.on = False
        self._random = random
        self._gates: list[asyncio.Event] = []
        faults = [Reset(None), Reset(0), Truncate(0), Refuse()]
        faults += [Status(500), Status(503), Status(429, {"Retry-After": "1"})]
        for fault in (*faults, *map(Reset, (600, 50_000)), *map(Truncate, (500, 200_000))):
            self._let(upstream, fault, SHARE / 4)
        self._let(upstream, Corrupt(CORRUPTED), SHARE)
        for after in (None, 400, 100_000):
            gate = asyncio.Event()
            self._gates.append(gate)
            self._let(upstream, Hold(gate, after), SHARE)

    def _let(self, upstream: Upstream, fault: object, share: float) -> None:
        for method in ("GET", "HEAD"):
            upstream.next(method, lambda request: self._strikes(request, share), fault, times=1 << 40)  # type: ignore[arg-type]

    def _strikes(self, request: Request, share: float) -> bool:
        return self.on and self._random.random() < share

    def breathe(self) -> None:
        for gate in self._gates:
            gate.set()
            gate.clear()


class Load:
    """`done` counts what was done by its kind and outcome; `wrong` are faults of the server, to be none."""

    def __init__(self, url: str, upstream: Upstream, random: Random, keep_alive: bool = True) -> None:
        self._keep_alive = keep_alive
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.contents: dict[str, bytes] = {}
        self.images: dict[str, list[Image]] = {}
        self._url = url
        self._upstream = upstream
        self._random = random
        for repository in REPOSITORIES:
            self.images[repository] = [self._image(repository) for _ in range(IMAGES)]
            for tag in TAGS:
                self.move(repository, tag)

    def _image(self, repository: str) -> Image:
        layers = [
            self._random.randbytes(self._random.randrange(size // 2, size * 2))
            for size in self._random.sample(SIZES, 3)
        ]
        image = self._upstream.image(repository, None, layers)
        self.contents[image.digest] = image.content
        for digest in (image.config, *image.layers):
            self.contents[digest] = self._upstream.repositories[repository].blobs[digest]
        return image

    def move(self, repository: str, tag: str) -> None:
        """At the upstream."""
        digest = self._random.choice(self.images[repository]).digest
        self._upstream.repositories[repository].tags[tag] = digest

    @property
    def total(self) -> int:
        return sum(self.done.values())

    async def client(self, going_on: Callable[[], bool], after: Callable[[], Awaitable[None]]) -> None:
        """Do this and that while `going_on`; `after` is called after each."""
        operations = [
            self._pull,
            self._pull,
            self._some,
            self._leave,
            self._dawdle,
            self._head,
            self._nothing,
        ]
        connector = aiohttp.TCPConnector(force_close=not self._keep_alive)
        async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session:
            while going_on():
                operation = self._random.choice(operations)
                try:
                    outcome = await operation(session)
                except BROKEN:
                    outcome = "broken"
                self.done[f"{operation.__name__[1:]} {outcome}"] += 1
                await after()

    def _pick(self) -> tuple[str, Image]:
        repository = self._random.choice(REPOSITORIES)
        return repository, self._random.choice(self.images[repository])

    def _blob(self) -> tuple[str, str]:
        repository, image = self._pick()
        digest = self._random.choice((image.config, *image.layers))
        return digest, f"{self._url}/v2/{repository}/blobs/{digest}"

    async def _pull(self, session: aiohttp.ClientSession) -> str:
        """An image, as clients do it: the manifest, then what it names, at once."""
        repository, image = self._pick()
        reference = self._random.choice((*TAGS, image.digest))
        async with session.get(f"{self._url}/v2/{repository}/manifests/{reference}") as response:
            body = await response.read()
        if response.status != 200:
            return self._refused(response, body)
        digest = response.headers["Docker-Content-Digest"]
        self._check(reference in (*TAGS, digest), f"{reference} is answered with {digest}")
        self._check(body == self.contents.get(digest), f"{digest} is answered with other bytes")
        named = json.loads(body)
        urls = [
            (each["digest"], f"{self._url}/v2/{repository}/blobs/{each['digest']}")
            for each in (named["config"], *named["layers"])
        ]
        outcomes = await asyncio.gather(
            *(self.whole(session, *each) for each in urls), return_exceptions=True
        )
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return "right" if set(outcomes) == {"right"} else "refused"

    async def whole(self, session: aiohttp.ClientSession, digest: str, url: str) -> str:
        async with session.get(url) as response:
            found, body = hashlib.sha256(), b""
            async for chunk in response.content.iter_chunked(1 << 18):
                found.update(chunk)
                body = body + chunk if response.status != 200 else b""
        if response.status != 200:
            return self._refused(response, body)
        self._check(f"sha256:{found.hexdigest()}" == digest, f"{digest} is answered with other bytes")
        return "right"

    async def _some(self, session: aiohttp.ClientSession) -> str:
        """A range of a blob."""
        digest, url = self._blob()
        content = self.contents[digest]
        start = self._random.randrange(len(content))
        stop = self._random.randrange(start, len(content)) + 1
        async with session.get(url, headers={"Range": f"bytes={start}-{stop - 1}"}) as response:
            body = await response.read()
        if response.status != 206:
            return self._refused(response, body)
        self._check(
            len(body) == stop - start and alike(content, body, start), f"{digest}: other bytes in a range"
        )
        return "right"

    async def _leave(self, session: aiohttp.ClientSession) -> str:
        """In the midst of a blob."""
        digest, url = self._blob()
        content = self.contents[digest]
        async with session.get(url) as response:
            if response.status == 200:
                begun = await response.content.readexactly(self._random.randrange(len(content)))
                self._check(alike(content, begun), f"{digest} begins with other bytes")
                response.close()
                return "right"
            return self._refused(response, await response.read())

    async def _dawdle(self, session: aiohttp.ClientSession) -> str:
        """Read a blob in small pieces, others having their turns in between."""
        digest, url = self._blob()
        async with session.get(url) as response:
            if response.status != 200:
                return self._refused(response, await response.read())
            found = hashlib.sha256()
            while chunk := await response.content.read(20_000):
                found.update(chunk)
                await asyncio.sleep(0.002)
        self._check(f"sha256:{found.hexdigest()}" == digest, f"{digest} is answered with other bytes")
        return "right"

    async def _head(self, session: aiohttp.ClientSession) -> str:
        digest, url = self._blob()
        async with session.head(url) as response:
            if response.status >= 400:
                return "refused"
        self._check(int(response.headers["Content-Length"]) == len(self.contents[digest]), f"{digest}: size")
        return "right"

    async def _nothing(self, session: aiohttp.ClientSession) -> str:
        """What there is not."""
        repository, kind = self._random.choice(REPOSITORIES), self._random.choice(("manifests", "blobs"))
        name = f"sha256:{self._random.randrange(5):064x}"
        async with session.get(f"{self._url}/v2/{repository}/{kind}/{name}") as response:
            body = await response.read()
        self._check(response.status != 200, f"{name} is answered with content")
        return self._refused(response, body)

    def _refused(self, response: aiohttp.ClientResponse, body: bytes) -> str:
        answer = f"{response.status} for {response.url.path}"
        self._check(response.status in (404, 502, 503, 504), answer)
        self._check(response.headers["Content-Type"] == "application/json", f"{answer}, no JSON")
        try:
            self._check(bool(json.loads(body)["errors"][0]["code"]), f"{answer}, without a code")
        except (ValueError, LookupError):
            self._check(False, f"{answer}: {body[:200]!r}")
        return "refused"

    def _check(self, right: bool, otherwise: str) -> None:
        if not right:
            self.wrong.append(otherwise)


def alike(content: bytes, part: bytes, start: int = 0) -> bool:
    """Whether `part` is what `content` holds from `start` on.

    A part of what still comes in is sent before anybody can know whether it is right: so but for the byte
    that the storm corrupts.
    """
    right, at = bytearray(content[start : start + len(part)]), CORRUPTED - start
    if 0 <= at < len(part) == len(right):
        right[at] = part[at]
    return part == right


def drop_one(directory: Path, random: Random) -> None:
    """Remove a blob behind the server's back, so that there is always something to fetch."""
    blobs = sorted((directory / "cache" / "blobs").glob("*/*/*"))
    if blobs:
        random.choice(blobs).unlink(missing_ok=True)

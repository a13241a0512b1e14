"""How costs grow with what is stored: `python -m tests.bench.growth [number of blobs…]`.

A store of so many sparse blobs, a tenth as many manifests in 1,000 repositories, and one of 10,000 tags is
made, as a former version leaves it: without totals.  A server of the build that ENTREPOT_FORMER names, and
one of this build, are started on it, one after the other.  Prints figures for docs/benchmarks.md.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from storage.disk.blobs import BlobFiles
from storage.disk.records import SQLiteRecords
from storage.oci import OCI_MANIFEST
from storage.records import Batch
from tests.bench.peers import Process, free_port

SIZE = 4096  # bytes of a blob, none of them on the disk
LAYERS = 10  # of a manifest
REPOSITORIES, TAGS = 1000, 10_000
HITS = 2000
EVICTED = 1000  # blobs
AT_ONCE = 10_000  # records in a transaction
ASKED = hashlib.sha256(bytes(SIZE)).hexdigest()  # the blob with the digest of what all blobs hold


def name(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def make(root: Path, blobs: int) -> None:
    files = BlobFiles(root / "cache")
    for number in range(256):
        (files.root / "blobs" / "sha256" / f"{number:02x}").mkdir(parents=True)
    begun = time.time() - blobs
    for number in range(blobs + 1):
        encoded = name(number) if number < blobs else ASKED
        path = f"{files.root}/blobs/sha256/{encoded[:2]}/{encoded}"
        file = os.open(path, os.O_CREAT | os.O_WRONLY, 0o644)
        os.ftruncate(file, SIZE)
        os.close(file)
        os.utime(path, (begun + number, begun + number))
    records = SQLiteRecords(files.root / "records")
    every = iter(rows(blobs))
    while some := list(islice(every, AT_ONCE)):

        def put(batch: Batch, some: list[tuple[str, bytes]] = some) -> None:
            for key, value in some:
                batch.put(key, value)

        records.transaction(put)
    records.close()


def rows(blobs: int) -> Iterable[tuple[str, bytes]]:
    """All records."""
    now = time.time()
    for number in range(blobs // LAYERS):
        repository = f"docker.io/team/app{number % REPOSITORIES}"
        digests = [f"sha256:{name(each)}" for each in range(number * LAYERS, (number + 1) * LAYERS)]
        layers = [{"mediaType": "x", "digest": each, "size": SIZE} for each in digests]
        content = json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "layers": layers}).encode()
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        yield f"manifest {repository} {digest}", f"{OCI_MANIFEST} {now}\n".encode() + content
        yield f"tag {repository} v{number}", f"{digest} {now}".encode()
        yield from ((f"link {repository} {each}", f"{SIZE} {now}".encode()) for each in digests)
        if number == 0:
            yield f"link {repository} sha256:{ASKED}", f"{SIZE} {now}".encode()
            yield "manifest docker.io/team/tags " + digest, f"{OCI_MANIFEST} {now}\n".encode() + content
            for tag in range(TAGS):
                yield f"tag docker.io/team/tags t{tag:05}", f"{digest} {now}".encode()
            listed = json.dumps([f"t{tag:05}" for tag in range(TAGS)]).encode()
            yield "listing docker.io/team/tags tags", f"{now}\n".encode() + listed


async def timed(work: Callable[[], Awaitable[object]]) -> float:
    begun = time.perf_counter()
    await work()
    return time.perf_counter() - begun


class Measurement:
    """What a server on a directory costs; `found` are names and figures."""

    def __init__(self, command: list[str], root: Path, blobs: int) -> None:
        self.found: list[tuple[str, str]] = []
        self._evicted = min(EVICTED, blobs // 4)
        self._path = root / "entrepot.yml"
        self._command = [*command, "serve", "--config", str(self._path)]
        config = {
            "listen": f"127.0.0.1:{free_port()}",
            "admin": f"127.0.0.1:{free_port()}",
            "workers": 1,
            "log": {"format": "json"},
            "disk": {"path": str(root / "disk"), "scrub": "off", "min_free": 0, "keep_for": "300d"},
            "namespaces": {"docker.io": {"upstream": "http://127.0.0.1:9", "fresh_for": "1d"}},
        }
        self._path.write_text(yaml.safe_dump(config))
        self._port = int(str(config["listen"]).partition(":")[2])
        self._url, self._admin = (f"http://{config[each]}" for each in ("listen", "admin"))

    async def run(self) -> None:
        begun = time.perf_counter()
        server = Process("server", self._command, self._path.parent)
        try:
            server.wait_ready(self._port)
            self._add("start to first answer", time.perf_counter() - begun)
            unlimited = aiohttp.ClientTimeout(total=None)
            async with aiohttp.ClientSession(timeout=unlimited) as session:
                self._session = session
                await self._hits(server)
                await self._counted(server, begun)
                await self._look(server)
        finally:
            server.stop()
            server.log.unlink()

    def _add(self, what: str, seconds: float) -> None:
        self.found.append((what, f"{seconds * 1000:.2f} ms"))

    async def _get(self, target: str) -> Any:
        async with self._session.get(target) as answer:
            assert answer.status == 200, await answer.text()
            return await answer.read()

    async def _post(self, path: str, body: dict[str, object]) -> None:
        async with self._session.post(f"{self._admin}/api/v1/{path}", json=body) as answer:
            assert answer.status == 200, await answer.text()

    async def _hits(self, server: Process) -> None:
        for kind, path in (
            ("manifest by tag", "manifests/v0"),
            ("blob of 4 KiB", f"blobs/sha256:{ASKED}"),
        ):
            target = f"{self._url}/v2/team/app0/{path}"
            times = [await timed(lambda target=target: self._get(target)) for _ in range(HITS)]
            self._add(f"{kind}, median", statistics.median(times))

    async def _counted(self, server: Process, begun: float) -> None:
        """Wait until a directory of a former version is counted, if the server counts."""
        rows = json.loads(await self._get(f"{self._admin}/api/v1/repositories"))["repositories"]
        if rows[0]["tags"] is not None:
            return
        while b"totals.counted" not in server.log.read_bytes():  # noqa: ASYNC110  # a file tells no event
            await asyncio.sleep(0.5)
        self._add("counted in the background after", time.perf_counter() - begun)
        self._add("its processor time", server.cpu_seconds())
        self._memory("most memory of a process, counted", server)

    async def _look(self, server: Process) -> None:
        self._add(
            f"tags/list of {TAGS:,}", await timed(lambda: self._get(f"{self._url}/v2/team/tags/tags/list"))
        )
        self._add("_catalog, a page of 100", await timed(lambda: self._get(f"{self._url}/v2/_catalog?n=100")))
        stats, listing = (
            f"{self._admin}/api/v1/{each}" for each in ("stats", "repositories?match=docker.io/*")
        )
        for what, work in (
            ("ls", lambda: self._get(listing)),
            ("stats", lambda: self._get(stats)),
            (f"evict {self._evicted:,} blobs", self._evict),
            ("evict what is too old: nothing", lambda: self._post("evict", {})),
            ("evict again what is too old: nothing", lambda: self._post("evict", {})),
        ):
            before = server.cpu_seconds()
            self._add(what, await timed(work))
            self._add(f"{what}, processor time", server.cpu_seconds() - before)
        self._memory("most memory of a process", server)

    async def _evict(self) -> None:
        stored = json.loads(await self._get(f"{self._admin}/api/v1/stats?period=1d"))["stored_bytes"]
        await self._post("evict", {"to": stored - self._evicted * SIZE})

    def _memory(self, what: str, server: Process) -> None:
        self.found.append((what, f"{server.peak_bytes() >> 20} MiB"))


async def main() -> None:
    builds = {"former": [os.environ["ENTREPOT_FORMER"]]} if "ENTREPOT_FORMER" in os.environ else {}
    builds["this"] = [sys.executable, "-m", "proxy"]
    for blobs in [int(each.replace(",", "")) for each in sys.argv[1:]] or [1000, 100_000, 1_000_000]:
        with tempfile.TemporaryDirectory() as directory:
            root = Path(directory)
            await asyncio.to_thread(make, root / "disk", blobs)
            for build, command in builds.items():
                measurement = Measurement(command, root, blobs)
                await measurement.run()
                for what, figure in measurement.found:
                    print(f"{blobs:>9,} blobs  {build:<7} {what:<50} {figure:>14}", flush=True)


if __name__ == "__main__":
    asyncio.run(main())

"""How costs grow with what is stored: `python -m tests.bench.growth [number of blobs…]`.

A store of so many sparse blobs, a tenth as many manifests in 1,000 repositories, and one of 10,000 tags is
made, and a server started on it.  Prints a table for docs/benchmarks.md.
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

import aiohttp
import yaml

from storage.disk.blobs import BlobFiles
from storage.disk.records import SQLiteRecords
from storage.oci import OCI_MANIFEST
from storage.records import Batch

SIZE = 4096  # bytes of a blob, none of them on the disk
LAYERS = 10  # of a manifest
REPOSITORIES, TAGS = 1000, 10_000
HITS = 2000
EVICTED = 1000  # blobs
AT_ONCE = 10_000  # records in a transaction


def name(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def make(root: Path, blobs: int) -> None:
    files = BlobFiles(root / "cache")
    for number in range(256):
        (files.root / "blobs" / "sha256" / f"{number:02x}").mkdir(parents=True)
    begun = time.time() - blobs
    for number in range(blobs):
        encoded = name(number)
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
            yield "manifest docker.io/team/tags " + digest, f"{OCI_MANIFEST} {now}\n".encode() + content
            for tag in range(TAGS):
                yield f"tag docker.io/team/tags t{tag:05}", f"{digest} {now}".encode()
            listed = json.dumps([f"t{tag:05}" for tag in range(TAGS)]).encode()
            yield "listing docker.io/team/tags tags", f"{now}\n".encode() + listed


async def timed(work: Callable[[], Awaitable[object]]) -> float:
    begun = time.perf_counter()
    await work()
    return time.perf_counter() - begun


async def measure(blobs: int) -> list[tuple[str, float]]:
    """What is measured, and in how many seconds."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        await asyncio.to_thread(make, root / "disk", blobs)
        config = {
            "listen": "127.0.0.1:0",
            "admin": "127.0.0.1:0",
            "workers": 1,
            "log": {"level": "warning"},
            "disk": {"path": str(root / "disk"), "scrub": "off", "min_free": 0},
            "namespaces": {
                "docker.io": {"upstream": "http://127.0.0.1:9", "offline": False, "fresh_for": "1d"}
            },
        }
        path = root / "entrepot.yml"
        path.write_text(yaml.safe_dump(config))
        begun = time.perf_counter()
        server = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "proxy", "serve", "--config", str(path)), stdout=asyncio.subprocess.PIPE
        )
        assert server.stdout is not None
        line = (await server.stdout.readline()).decode()
        found = [("start-up", time.perf_counter() - begun)]
        url, admin = (word.strip(",\n") for word in line.split() if word.startswith("http"))
        try:
            async with aiohttp.ClientSession() as session:

                async def get(target: str) -> None:
                    async with session.get(target) as answer:
                        assert answer.status == 200, await answer.text()
                        await answer.read()

                async def evict() -> None:
                    body = {"to": (blobs - min(EVICTED, blobs // 2)) * SIZE}
                    async with session.post(f"{admin}/api/v1/evict", json=body) as answer:
                        assert answer.status == 200, await answer.text()

                for kind, target in (
                    ("manifest by tag, median", f"{url}/v2/team/app0/manifests/v0"),
                    ("blob of 4 KiB, median", f"{url}/v2/team/app0/blobs/sha256:{name(0)}"),
                ):
                    times = [await timed(lambda target=target: get(target)) for _ in range(HITS)]
                    found.append((kind, statistics.median(times)))
                listed = f"{url}/v2/team/tags/tags/list"
                found.append((f"tags/list of {TAGS}", await timed(lambda: get(listed))))
                found.append(("ls", await timed(lambda: get(f"{admin}/api/v1/repositories"))))
                found.append((f"evict {min(EVICTED, blobs // 2)} blobs", await timed(evict)))
        finally:
            server.terminate()
            await server.wait()
        return found


async def main() -> None:
    for blobs in [int(each) for each in sys.argv[1:]] or [1000, 100_000, 1_000_000]:
        for what, seconds in await measure(blobs):
            print(f"{blobs:>9,} blobs  {what:<26} {seconds * 1000:>10.2f} ms", flush=True)


if __name__ == "__main__":
    asyncio.run(main())

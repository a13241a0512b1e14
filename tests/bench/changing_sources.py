"""Images are copied and warmed at random while their source changes: what is said to be there, and is not.

In rounds: copies of tags into a private registry, warming of a cache, and pulls, several at once, while tags
and manifests of the source move, come and go, and it fails now and then.  What a copy says that it has copied
is what the tag stood for meanwhile, and whole at the destination.  What is warm can be pulled while the
source is away.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import aiohttp
import click
import structlog

from proxy.admin.readiness import Readiness
from proxy.admin.warm import Warmer
from proxy.cli.copy import SilentListener
from proxy.processes.state import state_of
from proxy.server.housekeeping import Housekeeper
from proxy.server.process import ServerProcess
from proxy.transfer.copy_job import CopyEndpoint, CopyJob
from proxy.transfer.copy_sources import parse_source
from proxy.transfer.results import CopyRow
from storage.oci import Digest
from tests.bench.clients import BenchError
from tests.conftest import OPEN, Clock, configuration
from tests.upstream import Image, Manifest, Reset, Status, Upstream

REPOSITORIES, TAGS = ("team/a", "team/b"), ("1", "2", "latest")
SIZES = (10, 3000, 100_000)  # bytes of layers
PAUSES = (0, 1, 60, 3600, 86400)  # seconds between two rounds


class Source:
    """A registry whose content changes; `stood` is what tags have stood for in this round."""

    def __init__(self, upstream: Upstream, random: Random) -> None:
        self.upstream = upstream
        self.stood: set[tuple[str, str, str]] = set()
        self._random = random
        self._layers = [random.randbytes(size) for size in SIZES]
        for repository in REPOSITORIES:
            for tag in TAGS:
                self.push(repository, tag)

    def note(self) -> None:
        for name, holder in self.upstream.repositories.items():
            self.stood |= {(name, tag, digest) for tag, digest in holder.tags.items()}

    def referrers(self) -> set[tuple[str, str, str]]:
        """The repository, the subject and the digest of each that is listed."""
        if not self.upstream.referrers_api:
            return set()
        found = set()
        for name, holder in self.upstream.repositories.items():
            for each in holder.manifests.values():
                subject = json.loads(each.content).get("subject")
                found |= {(name, subject["digest"], each.digest)} if subject else set()
        return found

    def push(self, repository: str, tag: str | None) -> None:
        platforms = self._random.sample(("linux/amd64", "linux/arm64"), 2)
        layers = [*self._random.sample(self._layers, 2), self._random.randbytes(2)]
        made: Manifest = self.upstream.image(repository, tag, layers, platforms[0])
        if self._random.random() < 0.3:
            other: Image = self.upstream.image(repository, None, layers[:1], platforms[1])
            made = self.upstream.index(repository, tag, [made, other])
        if self._random.random() < 0.4:
            signature = self.upstream.artifact(repository, made, "application/x.signature")
            if self._random.random() < 0.3:
                self.upstream.artifact(repository, signature, "application/x.more")

    async def change(self) -> None:
        for _ in range(self._random.randint(1, 4)):
            await asyncio.sleep(self._random.random() / 20)
            repository = self._random.choice(REPOSITORIES)
            holder = self.upstream.repositories[repository]
            what = self._random.random()
            if what < 0.5:
                self.push(repository, self._random.choice((*TAGS, None)))
            elif what < 0.65 and holder.tags:
                self.upstream.delete_tag(repository, self._random.choice(sorted(holder.tags)))
            elif what < 0.8 and holder.manifests:
                self.upstream.delete_manifest(repository, self._random.choice(sorted(holder.manifests)))
            else:
                fault = self._random.choice((Status(503), Status(500), Reset(after=5)))
                digest = self._random.choice(sorted(holder.blobs))
                self.upstream.next("GET", digest, fault)
            self.note()


class Run:
    def __init__(
        self, source: Source, app: ServerProcess, client: aiohttp.ClientSession, random: Random
    ) -> None:
        self.wrong: list[str] = []
        self.done: Counter[str] = Counter()
        self._source = source
        self._parts = app.composition
        self._url = str(app.url.origin())
        self._client = client
        self._random = random
        self._copied: list[CopyRow] = []
        self._warm: list[tuple[str, str, str | None]] = []
        self._referrers: set[tuple[str, str, str]] = set()
        parts = self._parts
        readiness = Readiness(parts.store, parts.private, parts.hosted)
        self._warmer = Warmer(parts.namespaces, readiness, state_of(parts).forget)

    async def round(self) -> None:
        self._copied.clear()
        self._warm.clear()
        self._source.stood.clear()
        self._source.note()
        self._referrers = self._source.referrers()
        kinds = [self.copy, self.copy, self.warm, self.warm, self.pull, self._source.change]
        chosen = [self._random.choice(kinds) for _ in range(self._random.randint(1, 4))]
        await asyncio.gather(*(each() for each in chosen))
        self._source.upstream._scripts.clear()
        self._referrers &= self._source.referrers()  # those that were there all the time
        for row in self._copied:
            await self._compare(row)
        await self._source.upstream.stop()
        for repository, tag, digest in self._warm:
            await self._walk(f"docker.io/{repository}", tag, digest, "warmed")
        await self._source.upstream.start()

    async def copy(self) -> None:
        repository = self._random.choice(REPOSITORIES)
        tag = self._random.choice((*TAGS, "*"))
        source = parse_source(f"{self._source.upstream.url}/{repository}:{tag}")
        destination = parse_source(f"{self._url}/local/{repository}")
        endpoints = {"source": CopyEndpoint(), "destination": CopyEndpoint()}
        found = await CopyJob([source], destination, endpoints, SilentListener()).run()
        for each in found.images:
            self.done[f"copy {each.outcome}"] += 1
            if each.outcome != "failed":
                self._copied.append(each)

    async def warm(self) -> None:
        repository, tag = self._random.choice(REPOSITORIES), self._random.choice(TAGS)
        row = await self._warmer.warm(f"docker.io/{repository}:{tag}")
        self.done["warm" if row.here else "not warm"] += 1
        if row.here:
            self._warm.append((repository, tag, None))

    async def pull(self) -> None:
        repository, tag = self._random.choice(REPOSITORIES), self._random.choice(TAGS)
        async with self._client.get(f"{self._url}/v2/docker.io/{repository}/manifests/{tag}") as response:
            self.done[f"pull {response.status}"] += 1

    async def _compare(self, row: CopyRow) -> None:
        repository, _, tag = row.source.partition("/")[2].partition(":")
        if tag in TAGS and (repository, tag, str(row.digest)) not in self._source.stood:
            self.wrong.append(f"{row.source} is {row.digest}, which it never was")
        known = {each.digest for each in self._copied if each.destination == row.destination}
        await self._walk(f"local/{repository}", tag, None if len(known) > 1 else row.digest, "copied")

    async def _walk(self, repository: str, tag: str, digest: str | None, what: str) -> None:
        steps = [tag]
        while steps:
            reference = steps.pop()
            path = f"{self._url}/v2/{repository}/manifests/{reference}"
            async with self._client.get(path) as response:
                content = await response.read()
            found = str(Digest.of(content))
            if response.status != 200 or found != (reference if ":" in reference else digest or found):
                self.wrong.append(f"{what} {repository}:{tag}: {reference} is {response.status} {found}")
                continue
            steps += await self._listed(repository, found, f"{what} {repository}:{tag}")
            tree: dict[str, Any] = json.loads(content)
            steps += [each["digest"] for each in tree.get("manifests", ())]
            for each in [tree["config"], *tree["layers"]] if "config" in tree else ():
                async with self._client.get(
                    f"{self._url}/v2/{repository}/blobs/{each['digest']}"
                ) as response:
                    if response.status != 200 or str(Digest.of(await response.read())) != each["digest"]:
                        self.wrong.append(f"{what} {repository}:{tag}: {each['digest']} is {response.status}")

    async def _listed(self, repository: str, digest: str, what: str) -> set[str]:
        """The referrers, which were there all the time."""
        expected = {
            each
            for name, subject, each in self._referrers
            if repository.endswith(f"/{name}") and subject == digest
        }
        if not expected:
            return expected
        async with self._client.get(f"{self._url}/v2/{repository}/referrers/{digest}") as response:
            listed = {each["digest"] for each in (await response.json())["manifests"]}
        if expected - listed:
            self.wrong.append(f"{what}: {digest} has {listed}, and not {expected}")
        self.done["referrers"] += len(expected)
        return expected


async def sample(seed: int, rounds: int) -> Run:
    random, clock = Random(seed), Clock()
    async with AsyncExitStack() as stack:
        stack.enter_context(patch.object(Housekeeper, "run", lambda keeper: asyncio.Event().wait()))
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="entrepot-bench-")))
        upstream = await stack.enter_async_context(Upstream(referrers_api=random.random() < 0.7))
        source = Source(upstream, random)
        cache = {"upstream": {"url": upstream.url}, "negative_for": "0s"}
        tree = {"listen": "127.0.0.1:0", "admin": "off", "disk": {"path": str(place / "disk")}}
        tree |= {"namespaces": {"docker.io": cache, "local": {"store": {}}}, "access": OPEN}  # type: ignore[dict-item]
        app = ServerProcess(configuration(place, tree), clock)
        await app.start()
        stack.push_async_callback(app.stop)
        client = await stack.enter_async_context(aiohttp.ClientSession())
        run = Run(source, app, client, random)
        for _ in range(rounds):
            await run.round()
            clock.advance(random.choice(PAUSES))
    return run


@click.command()
@click.option("--rounds", default=40, show_default=True, help="Of each seed.")
@click.option("--seeds", default=5, show_default=True)
@click.option("--seed", default=0, show_default=True, help="The first one.")
def main(rounds: int, seeds: int, seed: int) -> None:
    """Copy and warm at random, and compare; prints a table."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    done, wrong = Counter[str](), 0
    for number in range(seed, seed + seeds):
        run = asyncio.run(sample(number, rounds))
        done += run.done
        wrong += len(run.wrong)
        for each in run.wrong:
            print(f"  seed {number}: {each}", file=sys.stderr)
    print("| copied | not copied | warm | not warm | wrong |\n|--:|--:|--:|--:|--:|")
    copied = done["copy copied"] + done["copy present"]
    print(f"| {copied} | {done['copy failed']} | {done['warm']} | {done['not warm']} | {wrong} |")
    if wrong:
        raise BenchError(f"{wrong} times something was wrong")


if __name__ == "__main__":
    main(prog_name="python -m tests.bench.changing_sources")

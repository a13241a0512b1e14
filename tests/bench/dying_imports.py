"""Imports of bundles by several processes at once, which die at random steps: what is seen, lost or left.

A tag that can be seen is whole after each death.  When one import has come to its end, all of the bundle is
there, and nothing partial.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from random import Random
from typing import Any

import click
import structlog

from proxy.config.schema import Config
from proxy.namespaces.composition import Composition, compose
from proxy.transfer.bundle_export import BundleExport, Selection
from proxy.transfer.bundle_import import BundleImport
from storage.archives.exporter import named
from storage.disk.blobs import BlobFiles
from storage.disk.records import SQLiteRecords
from storage.disk.sparse import SparseUpload
from storage.errors import RegistryError
from storage.keys import TAG
from storage.oci import OCI_INDEX, OCI_MANIFEST, Digest, Manifest, Reference, Tag
from tests.bench.clients import BenchError
from tests.conftest import configuration
from tests.deaths import die_before

REPOSITORIES, TAGS = ("local/a", "local/b"), ("1", "2", "latest")
SIZES = (0, 10, 100_000, 3 << 20)  # bytes of layers
STEPS = 60  # at most, before which a process dies
UPSTREAM = {"upstream": {"url": "http://127.0.0.1:9"}}
METHODS = (  # one of their calls is the step
    (SQLiteRecords, "transaction"),
    (SQLiteRecords, "put"),
    (SparseUpload, "write_at"),
    (BlobFiles, "place"),
    (BlobFiles, "renew"),
    (Path, "unlink"),
)
PLACES: list[dict[str, Any]] = [{"store": {}}, {"store": {"keep_tags": [{"last": 1}]}}, UPSTREAM]


def configured(place: Path, namespace: dict[str, Any]) -> Config:
    place.mkdir()
    tree = {"disk": {"path": str(place / "disk")}, "offline": True, "namespaces": {"local": namespace}}
    return configuration(place, tree)


async def export(config: Config, bundle: Path, random: Random) -> None:
    """Push images at random, and export all."""
    parts = compose(config)
    registry = parts.namespaces
    try:
        for repository in REPOSITORIES:
            known: list[dict[str, Any]] = []
            for tag in TAGS:
                layers = [random.randbytes(random.choice(SIZES)) for _ in range(random.randint(1, 3))]
                described = []
                for each in layers:
                    upload = await registry.start_upload(repository)
                    await upload.write(each)
                    found = await upload.commit(Digest.of(each))
                    described.append({"mediaType": "x/y", "digest": str(found.digest), "size": found.size})
                tree: dict[str, Any] = {"schemaVersion": 2, "mediaType": OCI_MANIFEST}
                tree |= {"config": described[0], "layers": described}
                if known and random.random() < 0.3:
                    tree["subject"] = random.choice(known)
                if known and random.random() < 0.3:
                    tree = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": known[-2:]}
                manifest = Manifest.of(tree["mediaType"], json.dumps(tree).encode())
                reference: Reference = Tag(tag) if random.random() < 0.7 else manifest.digest
                await registry.push_manifest(repository, reference, manifest)
                each_described = manifest.descriptor.to_json()
                known.append(each_described)
        await BundleExport(parts).export(Selection(["*", "*@*"]), str(bundle), lambda _: named(bundle))
    finally:
        await parts.close()


async def import_(config: Config, bundle: Path) -> None:
    parts = compose(config)
    try:
        await BundleImport(parts).import_(bundle)
    finally:
        await parts.close()


def forked(number: int, config: Config, bundle: Path) -> int:
    """The pid of a process that imports, and dies at its step of that number; 0 for never."""
    sys.stderr.flush()
    if child := os.fork():
        return child
    status = 1
    try:
        if number:
            die_before(number, METHODS)
        asyncio.run(import_(config, bundle))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


async def wrong(config: Config, bundle: Path, ended: bool) -> list[str]:
    """What is seen but not whole; if an import has `ended`, also what is not there, and what is left."""
    parts = compose(config)
    found = []
    try:
        store = parts.store_of("local")
        contents = json.loads((bundle / "entrepot.json").read_bytes())
        for each in contents["references"]:
            repository, tag = each["repository"], each.get("tag")
            if ended or (tag and store.records.holds(TAG.key(repository, tag))):
                reference = Tag(tag) if tag else Digest(each["digest"])
                found += [
                    f"{repository}:{reference}: {text}"
                    async for text in missing(parts, bundle, repository, reference)
                ]
        if ended:
            left = [path for name in ("partial", "locks") for path in (store.files.root / name).iterdir()]
            found += [f"left: {each}" for each in left]
    finally:
        await parts.close()
    return found


async def missing(parts: Composition, bundle: Path, repository: str, reference: Reference) -> Any:
    steps: list[Reference] = [reference]
    while steps:
        try:
            manifest = await parts.namespaces.get_manifest(repository, steps.pop())
        except RegistryError as error:
            yield f"{error}"
            continue
        tree = json.loads(manifest.content)
        steps += [Digest(each["digest"]) for each in tree.get("manifests", ())]
        for each in tree.get("layers", ()):
            digest = Digest(each["digest"])
            try:
                blob = await parts.namespaces.get_blob(repository, digest)
            except RegistryError as error:
                yield f"{error}"
                continue
            try:
                content = b"".join([bytes(chunk) async for chunk in blob.chunks()])
            finally:
                await blob.close()
            if Digest.of(content) != digest:
                yield f"{digest} has {len(content)} other bytes"


def sample(seed: int) -> tuple[int, int, list[str]]:
    """How many imports ended and died, and what was wrong."""
    random = Random(seed)
    ended = died = 0
    with tempfile.TemporaryDirectory(prefix="entrepot-bench-") as made:
        home = configured(Path(made) / "home", PLACES[0])
        site = configured(Path(made) / "site", random.choice(PLACES))
        asyncio.run(export(home, bundle := Path(made) / "bundle", random))
        found: list[str] = []
        while not ended:
            numbers = [random.randint(1, STEPS) for _ in range(random.randint(1, 3))]
            if died > 6:
                numbers[0] = 0
            children = [forked(number, site, bundle) for number in numbers]
            for child in children:
                status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                ended, died = ended + (status == 0), died + (status == -signal.SIGKILL)
                if status not in (0, -signal.SIGKILL):
                    found.append(f"an import ended with {status}")
            found += asyncio.run(wrong(site, bundle, bool(ended)))
    return ended, died, [f"seed {seed}: {each}" for each in found]


@click.command()
@click.option("--seeds", default=40, show_default=True)
@click.option("--seed", default=0, show_default=True, help="The first one.")
def main(seeds: int, seed: int) -> None:
    """Import at random steps of dying processes, and compare; prints a table."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    begun, total, failures = time.process_time(), [0, 0], 0
    for number in range(seed, seed + seeds):
        ended, died, found = sample(number)
        total = [total[0] + ended, total[1] + died]
        failures += len(found)
        for each in found:
            print(f"  {each}", file=sys.stderr)
    seconds = time.process_time() - begun + sum(os.times()[2:4])
    print("| imports that ended | that died | wrong or left | CPU s |\n|--:|--:|--:|--:|")
    print(f"| {total[0]} | {total[1]} | {failures} | {seconds:.0f} |")
    if failures:
        raise BenchError(f"{failures} times something was wrong, or left")


if __name__ == "__main__":
    main(prog_name="python -m tests.bench.dying_imports")

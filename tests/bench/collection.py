"""What a collection costs: `python -m tests.bench.collection [number of images…]`.

A store of so many tagged images in one repository is made, each with a config, a layer of its own, two that
others have too, and a signature that refers to it; the files of the blobs are left out.  Then a process
collects it with a rule that keeps all tags, and another one with a rule that keeps half of them.  Prints a
table for docs/benchmarks.md.
"""

from __future__ import annotations

import hashlib
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from storage.disk.blobs import BlobFiles
from storage.disk.records import SQLiteRecords
from storage.keys import LINK
from storage.maintenance.collection import Collection
from storage.maintenance.leases import Leases
from storage.maintenance.retention import KeepTags, RetentionRules
from storage.oci import OCI_MANIFEST, Digest, Manifest, Tag, parse_manifest
from storage.records import Batch, batches
from storage.store import Store
from storage.values import Link

EMPTY = "application/vnd.oci.empty.v1+json"
REPOSITORY = "local/team/app"
PUSHED, NOW, GRACE = 1_700_000_000.0, 1_800_000_000.0, 86400.0  # seconds: nothing is young
AT_ONCE = 5000  # images in a transaction


def described(text: str) -> dict[str, object]:
    digest = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    return {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": digest, "size": 1000}


def image(number: int) -> Manifest:
    layers = [
        described(f"base {number % 7}"),
        described(f"runtime {number % 100}"),
        described(f"app {number}"),
    ]
    body = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": described(f"config {number}"),
        "layers": layers,
    }
    return Manifest.of(OCI_MANIFEST, json.dumps(body).encode())


def signature(number: int, subject: Manifest) -> Manifest:
    body = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": "application/vnd.example.signature",
        "config": {"mediaType": EMPTY, "digest": Digest.of(b"{}"), "size": 2},
        "layers": [described(f"signature {number}")],
        "subject": subject.descriptor.to_json(),
    }
    return Manifest.of(OCI_MANIFEST, json.dumps(body).encode())


def opened(root: Path) -> Store:
    return Store(
        BlobFiles(root, private=True), SQLiteRecords(root / "records"), lambda: PUSHED, collected=True
    )


def make(root: Path, images: int) -> None:
    store = opened(root)
    link = Link(1000, PUSHED).encode()
    for some in batches(range(images), AT_ONCE):

        def push(batch: Batch, some: list[int] = some) -> None:
            for number in some:
                manifest = image(number)
                store.put_tags(batch, REPOSITORY, {Tag(f"v1.0.{number}"): manifest.digest})
                for each in (manifest, signature(number, manifest)):
                    store.put_manifest(batch, REPOSITORY, each)
                    for blob in parse_manifest(each.content).blobs:
                        batch.put(LINK.key(REPOSITORY, blob.digest), link)

        store.records.transaction(push)
    store.records.close()


def collect(root: Path, keep: int) -> None:
    """Print how many seconds of processor time it takes, and how many MiB of memory more than before."""
    store = opened(root)
    rules = RetentionRules(keep_tags=(KeepTags((re.compile("v.*"),), keep),))
    leases = Leases(store, GRACE, lambda: NOW)
    collection = Collection(store, lambda name: rules, leases, lambda: NOW, lambda seconds: None)
    before, begun = peak(), time.process_time()
    report = collection.run()
    found = time.process_time() - begun, peak() - before, peak(), report.tags, report.links
    print(json.dumps(found))


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measured(root: Path, keep: int) -> list[float]:
    command = [sys.executable, "-m", "tests.bench.collection", "collect", str(root), str(keep)]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return list(json.loads(found.splitlines()[-1]))


def main(counts: list[int]) -> None:
    print("| images | tags removed | seconds of processor time | MiB, besides the process | MiB |")
    print("|--:|--:|--:|--:|--:|")
    for images in counts:
        with tempfile.TemporaryDirectory() as directory:
            make(Path(directory), images)
            for keep in (images, images // 2):
                seconds, grown, most, tags, _ = measured(Path(directory), keep)
                print(f"| {images:,} | {tags:,} | {seconds:.1f} | {grown:.0f} | {most:.0f} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["collect"]:
        collect(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main([int(each.replace(",", "")) for each in sys.argv[1:]] or [1_000, 10_000, 80_000])

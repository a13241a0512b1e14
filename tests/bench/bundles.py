"""Images out into a bundle and in again, beside skopeo: `python -m tests.bench.bundles [MiB] [rounds]`.

The set is of images with four layers of 25 MiB, compressed already, as they mostly are: else skopeo would
compress them.  It copies the same set image by image, since it writes no more than one into an archive.  Each
command is a process of its own, is timed from its start to its end, and has its peak of memory looked at;
before each, what others wrote is on the disk.  Prints a table for docs/benchmarks.md.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

LAYER, LAYERS = 25 << 20, 4  # bytes, and how many an image has
LOOK = 0.002  # seconds between two looks at a process's memory

# In a process of its own, which need not be small.
MAKE = """
import asyncio, gzip, json, os, sys
from pathlib import Path
from storage.disk.blobs import BlobFiles
from storage.oci import OCI_MANIFEST, Digest, Manifest, Tag
from storage.disk.records import SQLiteRecords
from storage.store import Store

async def put(store, name, content):
    upload = await store.start_upload(name)
    await upload.write(content)
    found = await upload.commit(Digest.of(content))
    return {"mediaType": "application/octet-stream", "digest": str(found.digest), "size": found.size}

async def main(root, count, layers, size):
    store = Store(BlobFiles(root), SQLiteRecords(root / "records"))
    for number in range(count):
        name = f"docker.io/team/app{number}"
        found = [await put(store, name, gzip.compress(os.urandom(size), 0)) for _ in range(layers)]
        config = {"architecture": "amd64", "os": "linux", "number": number,
                  "rootfs": {"type": "layers", "diff_ids": [each["digest"] for each in found]}}
        described = await put(store, name, json.dumps(config).encode())
        described["mediaType"] = "application/vnd.oci.image.config.v1+json"
        for each in found:
            each["mediaType"] = "application/vnd.oci.image.layer.v1.tar+gzip"
        manifest = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": described, "layers": found}
        content = json.dumps(manifest).encode()
        await store.push_manifest(name, Tag("1"), Manifest.of(OCI_MANIFEST, content))
    await store.close()

asyncio.run(main(Path(sys.argv[1]), *map(int, sys.argv[2:])))
"""


class Meter:
    """Runs commands, one after the other; how long it took, and the most memory that one of them had."""

    def __call__(self, *commands: Sequence[str | Path]) -> tuple[float, int]:
        os.sync()
        peak, begun = 0, time.monotonic()
        for command in commands:
            words = [str(word) for word in command]
            process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            found = [0]
            watching = threading.Thread(target=self._watch, args=(process, found))
            watching.start()
            assert process.stderr is not None
            said = process.stderr.read().decode()
            if process.wait():
                raise SystemExit(f"{' '.join(words)}: {said}")
            watching.join()
            peak = max(peak, found[0])
        return time.monotonic() - begun, peak

    def _watch(self, process: subprocess.Popen[bytes], found: list[int]) -> None:
        path = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            with suppress(OSError, IndexError, ValueError):
                text = path.read_text()
                found[0] = max(found[0], int(text.split("VmHWM:")[1].split()[0]) << 10)
            time.sleep(LOOK)


def configure(directory: Path, name: str) -> Path:
    path = directory / f"{name}.yml"
    tree = {
        "admin": "off",
        "offline": True,
        "disk": {"path": str(directory / name)},
        "namespaces": {"docker.io": {"upstream": "http://127.0.0.1:9"}},
    }
    path.write_text(json.dumps(tree))
    return path


def scenarios(directory: Path, count: int) -> dict[str, Callable[[], Sequence[Sequence[str | Path]]]]:
    """By their names; each is the commands, and needs what those before it made."""
    entrepot = (sys.executable, "-m", "proxy")
    home, site = configure(directory, "home"), configure(directory, "site")

    def copy(number: int, target: str) -> Sequence[str]:
        source = f"oci:{directory}/bundle:docker.io/team/app{number}:1"
        return ("skopeo", "--insecure-policy", "copy", source, target)

    def cleared(*commands: Sequence[str | Path]) -> Sequence[Sequence[str | Path]]:
        shutil.rmtree(directory / "site", ignore_errors=True)
        return commands

    return {
        "export, a directory": lambda: [(*entrepot, "export", directory / "bundle", "*", "--config", home)],
        "export, a tar": lambda: [(*entrepot, "export", directory / "bundle.tar", "*", "--config", home)],
        "skopeo, layout to layout": lambda: [
            copy(number, f"oci:{directory}/copy:app{number}") for number in range(count)
        ],
        "skopeo, layout to archives": lambda: [
            copy(number, f"oci-archive:{directory}/copy-{number}.tar:app") for number in range(count)
        ],
        "import, a directory": lambda: cleared((*entrepot, "import", directory / "bundle", "--config", site)),
        "import, a tar": lambda: cleared((*entrepot, "import", directory / "bundle.tar", "--config", site)),
        "import, all of it here": lambda: [(*entrepot, "import", directory / "bundle.tar", "--config", site)],
    }


def main(megabytes: int = 1000, rounds: int = 5) -> None:
    count = max(1, (megabytes << 20) // (LAYER * LAYERS))
    with tempfile.TemporaryDirectory(prefix="entrepot-bench-") as made:
        directory = Path(made)
        root = directory / "home" / "cache"
        arguments = [str(each) for each in (root, count, LAYERS, LAYER)]
        subprocess.run([sys.executable, "-c", MAKE, *arguments], check=True)
        meter = Meter()
        found: dict[str, list[tuple[float, int]]] = {}
        for _ in range(rounds):
            for name, commands in scenarios(directory, count).items():
                found.setdefault(name, []).append(meter(*commands()))
            for path in directory.iterdir():
                if path.name.startswith(("bundle", "copy")):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        print(f"{count} images, {count * LAYER * LAYERS >> 20} MiB; median of {rounds}")
        print("| | seconds | peak memory |\n|---|---|---|")
        for name, each in found.items():
            seconds = statistics.median(took for took, _ in each)
            print(f"| {name} | {seconds:.2f} | {max(peak for _, peak in each) >> 20} MiB |")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

"""Death in the middle of an export and of an import: real processes, killed where they are held.

Invariants: nothing bears the bundle's name, no tag has moved; called again, it is done, and what was taken in
before is not taken again.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from proxy.namespaces.composition import Composition, compose
from proxy.transfer.bundle_export import BundleExport, Selection
from proxy.transfer.bundle_import import BundleImport, ImportOptions
from proxy.transfer.results import BundleImported
from storage.archives.exporter import named
from storage.oci import Digest, Tag
from tests.archives import REF_NAME, image, layout, tar
from tests.conftest import configuration
from tests.preloaded import PROGRAM

pytestmark = pytest.mark.clients

NAME = "docker.io/library/alpine"
LAYERS = [os.urandom(16 << 20), os.urandom(3 << 20)]
MADE = image(*LAYERS)

# A command that says when it comes to a step, and stays there.
COMMAND = """
import sys, threading
from pathlib import Path
from proxy.cli.main import main
from storage.archives import exporter
from storage.disk import blobs, uploads, records
from storage import store

def stop(place, name, when):
    real = getattr(place, name)
    def stopped(*arguments):
        if when(*arguments):
            print("reached", flush=True)
            threading.Event().wait()
        return real(*arguments)
    setattr(place, name, stopped)

step = sys.argv[1]
large = lambda *arguments: arguments[2] > 1 << 20  # of put(): size
if step == "before a blob":
    stop(exporter.TarSink, "put", large)
    stop(exporter.DirectorySink, "put", large)
elif step == "before the name":
    stop(Path, "rename", lambda path, target: True)
elif step == "within a blob":
    stop(uploads.FileUpload, "_append", lambda upload, batch: upload._written > 4 << 20)
elif step == "before the data is safe":
    stop(blobs.os, "fdatasync", lambda file: blobs.os.fstat(file).st_size > 1 << 20)
elif step == "before the links":
    stop(store.Store, "put_link", lambda *arguments: True)
elif step == "before the manifests":
    stop(store.Store, "put_manifest", lambda *arguments: True)
elif step == "before the tags":
    stop(store.Store, "put_tag", lambda *arguments: True)
main(sys.argv[2:])
"""


class Ground:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.processes: list[asyncio.subprocess.Process] = []

    @property
    def config(self) -> Path:
        return self.directory / "entrepot.yml"

    def composition(self) -> Composition:
        namespaces = {"docker.io": {"upstream": {"url": "http://127.0.0.1:9"}}}
        tree = {"disk": {"path": str(self.directory / "disk")}, "offline": True, "namespaces": namespaces}
        return compose(configuration(self.directory, tree))

    async def killed(self, step: str, *words: str | Path) -> None:
        """Run the command up to that step."""
        command = [*PROGRAM, COMMAND, step, *map(str, words), "--config", str(self.config)]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        self.processes.append(process)
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), 30) == b"reached\n"
        process.send_signal(signal.SIGKILL)
        await process.wait()

    async def take(self, archive: Path) -> BundleImported:
        composition = self.composition()
        try:
            return await BundleImport(composition).import_(archive, ImportOptions())
        finally:
            await composition.close()

    async def seen(self) -> set[str]:
        """The kinds of records that there are."""
        composition = self.composition()
        try:
            kinds = ("tag", "manifest", "link")
            return {kind for kind in kinds if composition.store.records.first(f"{kind} ")}
        finally:
            await composition.close()


@pytest.fixture
async def ground(tmp_path: Path) -> AsyncIterator[Ground]:
    ground = Ground(tmp_path)
    ground.composition().store.records.close()
    archive = tmp_path / "archive.tar"
    archive.write_bytes(tar(layout([(MADE, {REF_NAME: "alpine:3"})])))
    yield ground
    for process in ground.processes:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize("name", ["bundle.tar", "bundle"])
@pytest.mark.parametrize("step", ["before a blob", "before the name"])
async def test_killed_in_an_export(ground: Ground, step: str, name: str) -> None:
    await ground.take(ground.directory / "archive.tar")
    bundle = ground.directory / name
    await ground.killed(step, "export", bundle, "alpine:3")
    assert not bundle.exists()
    assert len(list(ground.directory.glob(f".{name}.*.partial"))) == 1
    composition = ground.composition()
    selection = Selection(names=["alpine:3"])
    await BundleExport(composition).export(selection, str(bundle), lambda _: named(bundle))
    await composition.close()
    assert bundle.exists()
    assert list(ground.directory.glob(f".{name}.*.partial")) == []  # neither its own, nor the dead one's


async def test_what_lives_is_not_removed(ground: Ground) -> None:
    await ground.take(ground.directory / "archive.tar")
    bundle = ground.directory / "bundle.tar"
    with named(bundle) as sink:
        sink.put("a", 1, [b"a"])
        with named(bundle) as other:
            other.put("b", 1, [b"b"])
    assert b"a" in bundle.read_bytes()[512:]  # the last to end has the name


@pytest.mark.parametrize(
    ("step", "seen", "blobs"),
    [
        ("within a blob", set(), 3),
        ("before the data is safe", set(), 3),
        ("before the links", set(), 0),
        ("before the manifests", {"link"}, 0),
        ("before the tags", {"link", "manifest"}, 0),
    ],
)
async def test_killed_in_an_import(ground: Ground, step: str, seen: set[str], blobs: int) -> None:
    archive = ground.directory / "archive.tar"
    await ground.killed(step, "import", archive)
    assert await ground.seen() == seen
    partial = list((ground.directory / "disk" / "cache" / "partial").iterdir())
    assert bool(partial) == bool(blobs)
    landed = await ground.take(archive)
    assert landed.blobs <= blobs
    assert await ground.seen() == {"tag", "manifest", "link"}
    composition = ground.composition()
    try:
        manifest = await composition.namespaces.get_manifest(NAME, Tag("3"))
        assert manifest.content == MADE.manifest
        for each, layer in zip(json.loads(manifest.content)["layers"], LAYERS, strict=True):
            assert await content(composition, each["digest"]) == layer
    finally:
        await composition.close()


async def content(composition: Composition, digest: str) -> bytes:
    blob: Any = await composition.namespaces.get_blob(NAME, Digest(digest))
    try:
        return b"".join([chunk async for chunk in blob.chunks()])
    finally:
        await blob.close()


async def test_half_of_a_blob_is_gone_on_with(ground: Ground) -> None:
    """Who takes it next does not read again what is on the disk."""
    archive = ground.directory / "archive.tar"
    await ground.killed("within a blob", "import", archive)
    [partial] = (ground.directory / "disk" / "cache" / "partial").iterdir()
    had = partial.stat().st_size
    assert 4 << 20 < had < 16 << 20
    digest = Digest(partial.name.replace("-", ":", 1))
    composition = ground.composition()
    try:
        upload = await composition.store.files.resume(digest)
        assert upload.offset == had
        await upload.suspend()
    finally:
        await composition.close()
    await ground.take(archive)
    assert await ground.seen() == {"tag", "manifest", "link"}


async def test_interrupted_it_ends_and_leaves_nothing(ground: Ground) -> None:
    """Ctrl-C: what is partial of a bundle goes, what is partial of a blob stays."""
    await ground.take(ground.directory / "archive.tar")
    composition = ground.composition()
    bundle = ground.directory / "bundle.tar"
    reached, gate, loop = asyncio.Event(), threading.Event(), asyncio.get_running_loop()

    def tick(done: int, whole: int) -> None:
        loop.call_soon_threadsafe(reached.set)
        gate.wait()

    try:
        export = BundleExport(composition).export(
            Selection(names=["alpine:3"]), str(bundle), lambda _: named(bundle), None, tick
        )
        running = asyncio.create_task(export)
        await reached.wait()
        running.cancel()
        loop.call_later(0, loop.call_soon, gate.set)  # when it knows
        with pytest.raises(asyncio.CancelledError):
            await running
    finally:
        await composition.close()
    assert list(ground.directory.glob(".bundle*")) == []

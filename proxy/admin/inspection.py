"""A closer look at what is stored: tags in any order, the configuration of an image, the files of a layer.

Reading is no use of an image, and asks no upstream.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from proxy.admin.image_config import ImageConfig, parse_config, parse_created, read_config
from proxy.admin.inventory import Inventory
from proxy.admin.models import ConfigReport, FileRow, Found, ImageRow, LayerFiles, Sort
from proxy.namespaces.references import FieldInvalid, ReferenceReader
from storage.archives.layer import LayerListing
from storage.concurrency import run_in_thread
from storage.errors import BlobUnknown, ManifestUnknown
from storage.graph import contents
from storage.maintenance.pins import Pin
from storage.names import written
from storage.oci import Digest
from storage.store import Store


class Inspection:
    """Looks into stores; `inventory_of` gives that of a namespace.  Raises RegistryError, FieldInvalid."""

    def __init__(
        self,
        inventories: Sequence[Inventory],
        reader: ReferenceReader,
        inventory_of: Callable[[str], Inventory],
    ) -> None:
        self._inventories = inventories
        self._reader = reader
        self._inventory_of = inventory_of
        self._turn = asyncio.Semaphore()  # to list files takes a core for seconds

    async def find(self, match: str, sort: Sort, reverse: bool, offset: int, limit: int) -> Found:
        pattern = self._reader.listing("match", match)
        if pattern.parts[1] == "@":
            raise FieldInvalid("match", "expected a pattern of tags: without @")
        return await run_in_thread(self._find, pattern, sort, reverse, offset, limit)

    def _find(self, pattern: Pin, sort: Sort, reverse: bool, offset: int, limit: int) -> Found:
        entries = [entry for each in self._inventories for entry in each.entries(pattern, sort)]
        entries.sort(reverse=reverse)
        page = [(repository, tag) for _, repository, tag in entries[offset : offset + limit]]
        rows: dict[tuple[str, str | None], ImageRow] = {}
        for each in self._inventories:
            own = [name for name in page if self._inventory_of(name[0].partition("/")[0]) is each]
            rows |= {(row.repository, row.tag): row for row in each.rows(own)}
        return Found(images=[rows[name] for name in page], matched=len(entries))

    async def config(self, ref: str) -> ConfigReport:
        image = self._reader.reference("ref", ref)
        inventory = self._inventory_of(image.namespace)
        store = inventory.store
        digest = await run_in_thread(inventory.digest, image.repository, image.reference)
        if digest is None:
            raise ManifestUnknown(f"{written(image.repository, image.reference)} is not stored")
        manifest = (await run_in_thread(store.manifest, image.repository, digest))[0]
        content = contents(manifest.content)
        if content is None or content.config is None:
            raise FieldInvalid("ref", "has no configuration: name a manifest of the index by its digest")
        blob = await read_config(store, image.repository, content.config.digest)
        return config_report(str(digest), str(content.config.digest), content.annotations, blob)

    async def files(self, ref: str, search: str, offset: int, limit: int) -> LayerFiles:
        image = self._reader.reference("ref", ref)
        if not isinstance(image.reference, Digest):
            raise FieldInvalid("ref", "expected a layer by its digest, name@sha256:…")
        store = self._inventory_of(image.namespace).store
        if await run_in_thread(store.linked, image.repository, image.reference) is None:
            raise BlobUnknown(f"{image.repository} has no blob {image.reference}")
        async with self._turn:
            return await _files(store, image.repository, image.reference, search, offset, limit)


async def _files(
    store: Store, repository: str, digest: Digest, search: str, offset: int, limit: int
) -> LayerFiles:
    listing, rows, matched = LayerListing(), list[FileRow](), 0

    def read(chunk: bytes) -> None:
        nonlocal matched
        for each in listing.feed(chunk):
            if search in each.path:
                if offset <= matched < offset + limit:
                    rows.append(FileRow(**each._asdict()))
                matched += 1

    blob = await store.get_blob(repository, digest)
    try:
        async for chunk in blob.chunks():
            await run_in_thread(read, bytes(chunk))
            if listing.done:
                break
    finally:
        await blob.close()
    listing.finish()
    return LayerFiles(
        repository=repository,
        digest=str(digest),
        compression=listing.compression,
        size=blob.descriptor.size,
        unpacked=listing.read,
        files=rows,
        matched=matched,
        total=listing.count,
        cut=listing.cut,
    )


def config_report(digest: str, config: str, annotations: Mapping[str, str], content: bytes) -> ConfigReport:
    """What a configuration says, as far as it has the form of one."""
    found = parse_config(content) or ImageConfig()
    return ConfigReport(
        digest=digest,
        config=config,
        created=parse_created(found.created),
        author=found.author,
        os=found.os,
        architecture=found.architecture,
        variant=found.variant,
        user=found.user,
        directory=found.directory,
        entrypoint=found.entrypoint,
        command=found.command,
        environment=found.environment,
        ports=found.ports,
        volumes=found.volumes,
        stop_signal=found.stop_signal,
        labels=found.labels,
        annotations=dict(annotations),
        history=found.history,
    )

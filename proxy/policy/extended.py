"""Conditions of rules that are extensions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from proxy.extensions.extension import Extension
from proxy.extensions.protocols import ConditionResult, JudgedManifest
from proxy.policy.condition import Evidence, Subject
from storage.errors import RegistryError, Unavailable, Unsupported
from storage.oci import Digest

LARGEST = 4 << 20  # bytes of a blob that an extension may read


class ExtensionCondition:
    """What `extension` says of a manifest."""

    def __init__(self, extension: Extension, clock: Callable[[], float]) -> None:
        self._extension = extension
        self._clock = clock

    async def judge(self, subject: Subject) -> Evidence:
        """As Condition.judge(): raises ExtensionFailed; Unavailable if what it reads cannot be fetched."""
        source = _Source(subject, asyncio.get_running_loop())
        manifest = JudgedManifest(
            repository=subject.repository,
            digest=str(subject.manifest.digest),
            media_type=subject.manifest.media_type,
            content=subject.manifest.content,
            fetch=source.fetch,
        )
        found = await self._extension.call(
            "judge", manifest, gives=ConditionResult, excused=lambda: source.failure
        )
        return Evidence(found.met, found.reason[:1000], self._clock() + found.valid_for)


class _Source:
    """What a subject names, for the thread of an extension; `failure` is why it could not be fetched."""

    def __init__(self, subject: Subject, loop: asyncio.AbstractEventLoop) -> None:
        self._subject = subject
        self._loop = loop
        self.failure: Unavailable | None = None

    async def fetch(self, kind: str, digest: str) -> bytes:
        read = self._manifest if kind == "manifest" else self._blob
        future: Any = asyncio.run_coroutine_threadsafe(read(Digest.parse(digest)), self._loop)
        try:
            return bytes(await asyncio.wrap_future(future))
        except Unavailable as error:
            self.failure = error
            raise

    async def _manifest(self, digest: Digest) -> bytes:
        found = await self._subject.registry.get_manifest(self._subject.name, digest)
        return found.content

    async def _blob(self, digest: Digest) -> bytes:
        blob = await self._subject.registry.get_blob(self._subject.name, digest)
        try:
            if blob.descriptor.size > LARGEST:
                raise Unsupported(f"{digest} has more than {LARGEST} bytes: a condition reads no such blob")
            content = b"".join([bytes(each) async for each in blob.chunks()])
        finally:
            await blob.close()
        if Digest.of(content, digest.algorithm) != digest:
            raise RegistryError(f"{digest} is damaged")
        return content

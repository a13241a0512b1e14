"""One run of the copy command: several sources, one destination, and images copied concurrently."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from proxy.telemetry.metrics import Metrics
from proxy.transfer.blob_copy import ProgressListener, RetryPolicy
from proxy.transfer.copy import Copier, CopyOptions, CopyRoute
from proxy.transfer.copy_sources import CopyItem, CopySource, items
from proxy.transfer.results import Copied, CopyRow, Outcome
from proxy.upstream.client import UpstreamRegistry
from proxy.upstream.connect import Connect
from proxy.upstream.credentials import Credentials, DockerConfig, Inline, LoginFiles
from proxy.upstream.requests import UpstreamSettings
from storage.errors import RegistryError
from storage.names import written

IMAGES = 8  # copied at once


@dataclass(frozen=True, slots=True)
class CopyEndpoint:
    """How to connect to the source or the destination; `credentials` are user:password."""

    plain_http: bool = False
    insecure: bool = False
    credentials: str | None = None


class CopyJob:
    """Copies all images of its sources to a destination.

    `endpoints` has "source" and "destination"; `listener` receives the progress.
    """

    def __init__(
        self,
        sources: Sequence[CopySource],
        destination: CopySource,
        endpoints: Mapping[str, CopyEndpoint],
        listener: ProgressListener,
        *,
        all_tags: bool = False,
        platforms: tuple[str, ...] = (),
        no_referrers: bool = False,
        dry_run: bool = False,
        transfers: int = 4,
        auth_file: Path | None = None,
    ) -> None:
        self._sources = sources
        self._target = destination
        self._endpoints = endpoints
        self._all_tags = all_tags
        self._rules = CopyOptions(platforms, not no_referrers, dry_run, transfers)
        self._logins: Credentials = (
            DockerConfig(auth_file) if auth_file else LoginFiles(os.environ, os.getuid())
        )
        self._listener = listener
        self._rows: dict[int, CopyRow] = {}  # by the order in which the copies began
        self._numbers = itertools.count()
        self._slots = asyncio.Semaphore(IMAGES)
        self._metrics = Metrics()

    async def run(self) -> Copied:
        begun = time.monotonic()
        async with AsyncExitStack() as leaving:
            sources = {each.url: self._open(each, "source", leaving) for each in self._sources}
            destination = self._open(self._target, "destination", leaving)
            retries = RetryPolicy(self._listener)
            copier = Copier(destination, self._rules, self._listener, retries)
            leaving.push_async_callback(copier.close)  # before the registries that it uses
            async with asyncio.TaskGroup() as group:
                for each in self._sources:
                    await self._begin(each, sources[each.url], copier, group)
        done = copier.done
        return Copied(
            images=[self._rows[number] for number in sorted(self._rows)],
            manifests=done.manifests,
            tags=done.tags,
            blobs=done.blobs,
            bytes=done.bytes,
            mounted=done.mounted,
            present=done.present,
            seconds=time.monotonic() - begun,
            dry_run=self._rules.dry_run,
        )

    def _open(self, place: CopySource, end: str, leaving: AsyncExitStack) -> UpstreamRegistry:
        endpoint = self._endpoints[end]
        connect = Connect(
            plain_http=place.plain_http,
            insecure_skip_verify=endpoint.insecure,
            # The caller of a command may reach private addresses anyway, unlike the clients of a server.
            private_redirects=True,
        )
        credentials = self._logins
        if endpoint.credentials is not None:
            username, _, password = endpoint.credentials.partition(":")
            credentials = Inline(username, password)
        settings = UpstreamSettings(place.url, connect, pushed_to=end == "destination")
        registry = UpstreamRegistry(place.host, settings, [credentials], self._metrics)
        leaving.push_async_callback(registry.close)
        return registry

    async def _begin(
        self, place: CopySource, source: UpstreamRegistry, copier: Copier, group: asyncio.TaskGroup
    ) -> None:
        """Find the images of one source, and start each copy as a slot becomes free."""
        options = {"all_tags": self._all_tags, "referrers": self._rules.referrers}
        found = items(place, source, self._target, copier.retries, **options)
        try:
            async for item in found:
                await self._slots.acquire()
                group.create_task(self._copy(next(self._numbers), item, source, copier))
        except RegistryError as error:
            named = f":{place.tag}" if place.tag else ""
            number = next(self._numbers)
            self._failed(number, f"{place.host}/{place.repository}{named}", self._target.host, error)

    async def _copy(self, number: int, item: CopyItem, source: UpstreamRegistry, copier: Copier) -> None:
        to = written(f"{self._target.host}/{item.target}", item.tags[0] if item.tags else item.reference)
        within = item.copied_from.url == self._target.url
        route = CopyRoute(source, item.repository, item.target, within, item.listed)
        try:
            digest, new = await copier.copy(route, item.reference, item.tags)
        except RegistryError as error:
            self._failed(number, item.source, to, error)
            return
        finally:
            self._slots.release()
        outcome: Outcome = "copied" if new else "present"
        row = CopyRow(source=item.source, destination=to, digest=str(digest), outcome=outcome, error=None)
        self._rows[number] = row
        self._listener.note(f"{item.source}: {outcome}")

    def _failed(self, number: int, source: str, to: str, error: RegistryError) -> None:
        cause = str(error) or error.code
        row = CopyRow(source=source, destination=to, digest=None, outcome="failed", error=cause)
        self._rows[number] = row
        self._listener.note(f"{source}: {cause}")

"""Copies an image with all its platforms and signatures from one registry to another.

    python examples/copy_between_registries.py https://ghcr.io team/app 1 http://127.0.0.1:5000 team/app

What the destination has is not transferred.  Both are used without credentials.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import AsyncExitStack

from proxy.telemetry.metrics import Metrics
from proxy.transfer.blob_copy import RetryPolicy
from proxy.transfer.copy import Copier, CopyCounts, CopyOptions, CopyRoute
from proxy.upstream.client import UpstreamRegistry
from proxy.upstream.connect import Connect
from proxy.upstream.credentials import Credentials
from proxy.upstream.requests import UpstreamSettings
from storage.oci import Digest, Tag, parse_reference


class Progress:
    """Prints what the copy says; see proxy.transfer.blob_copy.ProgressListener."""

    def moved(self, digest: Digest, done: int, whole: int) -> None:
        pass

    def ended(self, digest: Digest) -> None:
        print(digest, file=sys.stderr)

    def note(self, text: str) -> None:
        print(text, file=sys.stderr)


def connect(url: str, closing: AsyncExitStack) -> UpstreamRegistry:
    settings = UpstreamSettings(url, Connect(plain_http=url.startswith("http://")))
    registry = UpstreamRegistry(url, settings, [Credentials()], Metrics())
    closing.push_async_callback(registry.close)
    return registry


async def copy(source: str, repository: str, reference: str, destination: str, target: str) -> CopyCounts:
    """Copy `reference`, a tag or a digest, of a `repository`.  Raises storage.errors.RegistryError."""
    async with AsyncExitStack() as closing:
        progress, image = Progress(), parse_reference(reference)
        copier = Copier(connect(destination, closing), CopyOptions(), progress, RetryPolicy(progress))
        closing.push_async_callback(copier.close)
        route = CopyRoute(connect(source, closing), repository, target)
        await copier.copy(route, image, [image] if isinstance(image, Tag) else [])
        return copier.done


if __name__ == "__main__":
    print(asyncio.run(copy(*sys.argv[1:])))

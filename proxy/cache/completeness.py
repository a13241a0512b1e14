"""Completeness: whether the layers of a manifest can come, if the origin is down.

Clients of the containers project (podman, buildah, skopeo, CRI-O) choose a mirror by the first manifest, and
take all blobs from there.  If one cannot come, the pull fails, although the next mirror may have it.  So they
have to be refused at the manifest.  BuildKit builds without a cache whose manifest it cannot have, but ends a
build that wants a blob of one, which it asks for only then.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from proxy.cache.fills import Fills
from proxy.cache.origin import Origin
from storage.concurrency import run_sized
from storage.errors import ManifestUnknown, StorageFailed, Unavailable
from storage.graph import Walk, attestations, contents
from storage.oci import Digest, Manifest, ManifestContent
from storage.store import Store

# Each of these programs replaces the library's own name, containers, by its own.
_CONTAINERS = re.compile(r"(?:containers|skopeo|buildah|libpod|podman|cri-o)/", re.IGNORECASE)
_BUILD_CACHE = b'"application/vnd.buildkit.cacheconfig.'  # in a manifest, or an index of older versions


class Completeness:
    """Refuses incomplete images to clients that would not ask another mirror for their blobs."""

    def __init__(self, refusing: str, origin: Origin, store: Store, fills: Fills) -> None:
        self._refusing = refusing
        self._origin = origin
        self._store = store
        self._fills = fills

    async def check(self, repository: str, manifest: Manifest, agent: str | None) -> None:
        """Raise Unavailable if content that the manifest names is not stored and cannot be fetched.

        `agent` is the client's User-Agent, None if no client is to be served.
        """
        if not self.refuses(agent, manifest.content):
            return
        name = f"{self._origin.namespace}/{repository}"
        try:
            content = await run_sized(len(manifest.content), contents, manifest.content)
            missing = None if content is None else MissingContent(self._store, name, self._here).of(content)
        except StorageFailed:
            return  # what is stored cannot be known
        if content is None or missing is None:
            return
        if not await self._origin.supplies(repository, content):
            raise Unavailable(
                f"{missing} of {name} is not stored, and {self._origin.namespace} cannot be asked for it"
            )

    def refuses(self, agent: str | None, content: bytes) -> bool:
        """Whether check() looks for what is missing of the manifest, for this client."""
        if agent is None or self._refusing == "never":
            return False
        return self._refusing == "always" or bool(_CONTAINERS.match(agent)) or _BUILD_CACHE in content

    def _here(self, name: str, digest: Digest) -> bool:
        # A fill for another repository does not help: the origin would have to permit this one.
        return self._fills.coming(name, digest) or self._store.linked(name, digest) is not None


class MissingContent:
    """Finds what a manifest names and is not in a store; `here` tells which blobs are."""

    def __init__(self, store: Store, name: str, here: Callable[[str, Digest], bool]) -> None:
        self._store = store
        self._name = name
        self._here = here

    def of(self, content: ManifestContent) -> Digest | None:
        """Something that is missing; of an index, if there is no child that is complete.

        Which child is for the client's platform is unknown.
        """
        if (missing := self._blob(content)) is not None or not content.children:
            return missing
        others = attestations(content)
        images = [each.digest for each in content.children if each.digest not in others]
        found = None
        for child in images or others:
            if (found := self._below(child)) is None:
                return None
        return found

    def _below(self, top: Digest) -> Digest | None:
        steps = Walk([top])
        for digest in steps:
            try:
                content = contents(self._store.manifest(self._name, digest)[0].content)
            except ManifestUnknown:
                return digest
            if content is None:
                continue
            if (missing := self._blob(content)) is not None:
                return missing
            steps.add(child.digest for child in content.children)
        return None

    def _blob(self, content: ManifestContent) -> Digest | None:
        for blob in content.blobs:
            if blob.distributable and not self._here(self._name, blob.digest):
                return blob.digest
        return None


def missing_in(store: Store, name: str, content: ManifestContent) -> Digest | None:
    """Something that the manifest names and is not in `store`.  Raises StorageFailed."""
    return MissingContent(store, name, lambda name, digest: store.linked(name, digest) is not None).of(
        content
    )

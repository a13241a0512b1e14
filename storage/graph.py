"""The graph of manifests: what a manifest names, and what refers to it."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Generic, TypeVar

from storage.concurrency import run_sized
from storage.errors import DigestInvalid, ManifestInvalid, ManifestUnknown, NameUnknown, Unsupported
from storage.keys import REFERRER
from storage.oci import (
    ALGORITHMS,
    Descriptor,
    Digest,
    Manifest,
    ManifestContent,
    Tag,
    digests_in,
    parse_manifest,
)
from storage.store import Store

T = TypeVar("T")

# Errors of a registry that has no referrers API.
UNLISTED = (ManifestUnknown, NameUnknown, Unsupported)
_FALLBACK_TAG = re.compile(rf"(?:{'|'.join(ALGORITHMS)})-[0-9a-f]{{64}}")
# containerd, platforms/database.go: the variant that an architecture without one stands for.
_PLAIN = {"arm64": "v8", "arm": "v7", "amd64": "v1"}


class Walk(Generic[T]):
    """A walk over a graph that reaches each node once, however often it is named.

    It reads nothing itself, so that stores, archives and remote registries are all walked by it: iterate
    over it, and `add` what each node names.
    """

    def __init__(self, nodes: Iterable[T]) -> None:
        self.reached: set[T] = set()
        self._pending = list(nodes)

    def add(self, nodes: Iterable[T]) -> None:
        self._pending += nodes

    def __iter__(self) -> Iterator[T]:
        while self._pending:
            if (node := self._pending.pop()) not in self.reached:
                self.reached.add(node)
                yield node


@dataclass(slots=True)
class ManifestTree:
    """A manifest and everything that it names, as far as it is stored.

    `missing` are the manifests that are not stored, `unread` those that may name more: see unread().  `named`
    are the digests in the text of these, whatever they are of.  `tags` are those by which clients find
    referrers.
    """

    manifests: set[Digest] = field(default_factory=set)
    blobs: dict[Digest, Descriptor] = field(default_factory=dict)
    missing: set[Digest] = field(default_factory=set)
    unread: set[Digest] = field(default_factory=set)
    named: set[Digest] = field(default_factory=set)
    tags: set[Tag] = field(default_factory=set)


def walk(store: Store, repository: str, digest: Digest, platforms: Sequence[str] = ()) -> ManifestTree:
    """Read the manifest and the manifests that it names; of an index only the children for `platforms`."""
    found, steps = ManifestTree(), Walk([digest])
    for each in steps:
        try:
            manifest, _ = store.manifest(repository, each)
        except ManifestUnknown:
            found.missing.add(each)
            continue
        found.manifests.add(each)
        content = contents(manifest.content)
        if unread(content):
            found.unread.add(each)
            found.named.update(digests_in(manifest.content) if content is None else content.unread)
        if content is not None:
            steps.add(child.digest for child in selected(content, platforms))
            found.blobs.update((blob.digest, blob) for blob in content.blobs)
    return found


def referring(store: Store, repository: str, digest: Digest) -> Iterator[tuple[Digest, Tag | None]]:
    """The known referrers of a manifest, each with the tag that lists it or None if a record does."""
    for key, _ in store.records.scan(REFERRER.prefix(repository, digest)):
        yield Digest(REFERRER.parse(key)[2]), None
    for tag in (fallback_tag(digest), *signature_tags(digest)):
        if (pointer := store.pointer(repository, tag)) is not None:
            yield pointer.digest, tag


class IndexEntries:
    """The entries of indexes, in the order of their digests.

    Those of the last index are kept: clients ask for one page of its entries after the other.
    """

    def __init__(self) -> None:
        self._last: tuple[Digest, list[Descriptor]] | None = None

    async def after(self, index: Manifest, last: str = "") -> list[Descriptor]:
        """The entries after the digest `last`.  Raises ManifestInvalid."""
        if self._last is None or self._last[0] != index.digest:
            self._last = index.digest, await run_sized(len(index.content), _entries, index.content)
        found = self._last[1]
        return found[bisect_right(found, last, key=attrgetter("digest")) :]


def _entries(index: bytes) -> list[Descriptor]:
    return sorted(parse_manifest(index).listed, key=attrgetter("digest"))


def contents(manifest: bytes) -> ManifestContent | None:
    """Parse a manifest; None if it cannot be parsed, so that what it names is unknown."""
    try:
        return parse_manifest(manifest)
    except ManifestInvalid:
        return None


def unread(content: ManifestContent | None) -> bool:
    """Whether a manifest may name content that cannot be read from it, so that none can say it is complete.

    Its type is unknown, or clients read its keys differently.
    """
    return content is None or bool(content.unread)


def named_digests(manifest: bytes) -> tuple[set[Digest], set[Digest]]:
    """The digests of the manifests and of the blobs that a manifest names; both include unread ones."""
    content = contents(manifest)
    if content is None:
        found = set(digests_in(manifest))
        return found, found
    listed, blobs = ({each.digest for each in named} for named in (content.listed, content.blobs))
    return listed | content.unread, blobs | content.unread


def selected(content: ManifestContent, platforms: Sequence[str]) -> Sequence[Descriptor]:
    """The children of an index that are for one of `platforms` or state none; all if `platforms` is empty."""
    if not platforms:
        return content.children
    return [
        child
        for child in content.children
        if child.platform is None or any(matches_platform(child.platform, each) for each in platforms)
    ]


def missing_platforms(content: ManifestContent, platforms: Sequence[str]) -> list[str]:
    """The `platforms` that no child of an index is for; none if it is not an index.

    An index with images for others of several platforms is taken for these.
    """
    return [each for each in platforms if content.children and not selected(content, [each])]


def attestations(content: ManifestContent) -> set[Digest]:
    """The children of an index that are attestations by BuildKit, whose platform is unknown/unknown."""
    return {child.digest for child in content.children if (child.platform or "").startswith("unknown/")}


def fallback_tag(digest: Digest) -> Tag:
    """The tag of the index that lists the referrers: distribution-spec, "Referrers Tag Schema"."""
    return Tag(f"{digest.algorithm[:32]}-{digest.encoded[:64]}")


def is_fallback_tag(tag: str) -> bool:
    """Whether fallback_tag() returns this tag for a digest."""
    return bool(_FALLBACK_TAG.fullmatch(tag))


def signature_tags(digest: Digest) -> list[Tag]:
    """The tags under which cosign stores signatures, attestations and SBOMs, even with a referrers API."""
    return [Tag(f"{digest.algorithm}-{digest.encoded}.{kind}") for kind in ("sig", "att", "sbom")]


def signed_by(tag: str) -> Digest | None:
    """The digest for which fallback_tag() or signature_tags() gives this tag, if it can be told from it."""
    with suppress(DigestInvalid):
        return Digest.parse(tag.partition(".")[0].replace("-", ":", 1))
    return None


def matches_platform(platform: str, wanted: str) -> bool:
    system, architecture, variant = _fields(wanted)
    found = _fields(platform)
    if not variant:
        return found[:2] == (system, architecture)
    plain = _PLAIN.get(architecture, "")
    return found[:2] == (system, architecture) and (found[2] or plain) == variant


def _fields(platform: str) -> tuple[str, str, str]:
    system, _, rest = platform.partition("/")
    architecture, _, variant = rest.partition("/")
    return system, architecture, variant

"""The graph that manifests are: what each names, and what refers to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from storage.errors import ManifestInvalid, ManifestUnknown
from storage.oci import Descriptor, Digest, ManifestContent, Tag, parse_manifest
from storage.store import Store

# containerd, platforms/database.go: what an architecture is without a variant.
_PLAIN = {"arm64": "v8", "arm": "v7", "amd64": "v1"}


@dataclass(slots=True)
class Tree:
    """What a manifest names, itself included.  `missing` are the manifests that are not stored.

    `tags` are those by which clients find what refers to it.
    """

    manifests: set[Digest] = field(default_factory=set)
    blobs: dict[Digest, Descriptor] = field(default_factory=dict)
    missing: set[Digest] = field(default_factory=set)
    tags: set[Tag] = field(default_factory=set)


def referring(store: Store, repository: str, digest: Digest) -> Iterator[tuple[Digest, Tag | None]]:
    """What is known here to refer to it, with the tag that says so, if it is one that does."""
    for key, _ in store.records.scan(f"referrers {repository} {digest} "):
        yield Digest(key.rpartition(" ")[2]), None
    for tag in (fallback_tag(digest), *signature_tags(digest)):
        if (pointer := store.pointer(repository, tag)) is not None:
            yield pointer.digest, tag


def walk(store: Store, repository: str, digest: Digest, platforms: Sequence[str] = ()) -> Tree:
    """All that the manifest names, as far as it is stored.  Each is read once, however often it is named."""
    found, todo = Tree(), [digest]
    while todo:
        digest = todo.pop()
        if digest in found.manifests or digest in found.missing:
            continue
        try:
            manifest, _ = store.manifest(repository, digest)
        except ManifestUnknown:
            found.missing.add(digest)
            continue
        found.manifests.add(digest)
        if (content := contents(manifest.content)) is not None:
            todo += [each.digest for each in selected(content, platforms)]
            found.blobs.update((each.digest, each) for each in content.blobs)
    return found


def contents(manifest: bytes) -> ManifestContent | None:
    """None: of a type that we do not know; it names nothing that we could see."""
    try:
        return parse_manifest(manifest)
    except ManifestInvalid:
        return None


def selected(content: ManifestContent, platforms: Sequence[str]) -> Sequence[Descriptor]:
    """The children of an index that are for one of `platforms`, or tell none; all, where none are given."""
    if not platforms:
        return content.children
    return [
        child
        for child in content.children
        if child.platform is None or any(matches_platform(child.platform, wanted) for wanted in platforms)
    ]


def lacking(content: ManifestContent, platforms: Sequence[str]) -> list[str]:
    """Those of `platforms` that no child of an index is for; none where it is no index."""
    return [wanted for wanted in platforms if content.children and not selected(content, [wanted])]


def attestations(content: ManifestContent) -> set[Digest]:
    """The children of an index that BuildKit wrote about others of them: for no platform, as they say."""
    return {child.digest for child in content.children if (child.platform or "").startswith("unknown/")}


def fallback_tag(digest: Digest) -> Tag:
    """Under which an index lists the referrers: distribution-spec, "Referrers Tag Schema"."""
    return Tag(f"{digest.algorithm[:32]}-{digest.encoded[:64]}")


def signature_tags(digest: Digest) -> list[Tag]:
    """Under which cosign keeps signatures, attestations and SBOMs, with a referrers API or without."""
    return [Tag(f"{digest.algorithm}-{digest.encoded}.{kind}") for kind in ("sig", "att", "sbom")]


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

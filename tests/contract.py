"""What every Registry owes, whoever it is: the one suite that all implementations pass.

A Subject is a registry under test and the ways to put content where it gets it from.  Nothing here knows
what is between the two.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Awaitable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import pytest

from storage.conditions import Conditions
from storage.errors import (
    BlobUnknown,
    BlobUploadUnknown,
    DigestInvalid,
    ManifestUnknown,
    NameUnknown,
    PreconditionFailed,
    Unsupported,
)
from storage.oci import (
    DOCKER_LIST,
    DOCKER_SCHEMA1,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    Digest,
    Manifest,
    Reference,
    Span,
    Tag,
)
from storage.registry import Registry, Upload

LARGE = bytes(range(251)) * (5 * 1_000_000 // 251)  # no power of two: no two of its parts are alike
BLOBS = [b"", b"x", b"the content of a blob", LARGE]
MANIFESTS = [
    (OCI_MANIFEST, b' {"schemaVersion" :2}\n\n'),
    (OCI_INDEX, b'{"manifests":[],"mediaType":"a/lie"}'),
    (DOCKER_LIST, '{"note":"é\\u00e9"}'.encode()),
    (DOCKER_SCHEMA1, b'{"schemaVersion":1}'),
    ("application/vnd.example.thing.v7+json", b"{}"),
    ("application/vnd.example", b"no JSON \0\xff\r\n"),
    ("application/vnd.example.empty", b""),
]
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"


class Content(Protocol):
    """Where a registry under test gets its content from, by the names that repositories have there."""

    async def blob(self, repository: str, content: bytes, algorithm: str = "sha256") -> Digest: ...

    async def manifest(self, repository: str, manifest: Manifest, tag: str | None = None) -> Digest: ...

    async def delete_blob(self, repository: str, digest: Digest) -> None: ...


@dataclass
class Subject:
    """`prefix` is what repositories' names begin with, if they are asked for here.

    `unsupported` are the methods that it does not have.  `filters`: it can be told who sees what there, and
    when it may write.
    """

    registry: Registry
    content: Content
    unsupported: frozenset[str]
    prefix: str = ""
    filters: bool = True

    def name(self, repository: str) -> str:
        return self.prefix + repository

    async def read(self, repository: str, digest: Digest, span: Span | None = None) -> bytes:
        """The bytes of `span`, else all."""
        blob = await self.registry.get_blob(self.name(repository), digest, span)
        try:
            span = span or Span(0)
            return b"".join([chunk async for chunk in blob.chunks(span.start, span.stop)])
        finally:
            await blob.close()


def manifest(number: int = 0, algorithm: str = "sha256", **more: Any) -> Manifest:
    """Another one for every `number`; what it names is not there, which is no registry's business here."""
    config = {"mediaType": EMPTY_TYPE, "digest": Digest.of(b"{}"), "size": 2}
    body = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": [config], **more}
    return Manifest.of(OCI_MANIFEST, json.dumps({**body, "number": number}, indent=1).encode(), algorithm)


def refers_to(subject: Manifest) -> dict[str, Any]:
    return {"subject": subject.descriptor.to_json()}


async def refused(asked: Awaitable[object], *errors: type[Exception]) -> None:
    with pytest.raises(errors):
        await asked


class PullContract:
    # Blobs

    @pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
    async def test_a_blob(self, subject: Subject, algorithm: str) -> None:
        for content in BLOBS:
            digest = await subject.content.blob("a/b", content, algorithm)
            expected = Descriptor("application/octet-stream", digest, len(content))
            assert await subject.registry.resolve_blob(subject.name("a/b"), digest) == expected
            for _ in range(2):
                blob = await subject.registry.get_blob(subject.name("a/b"), digest)
                assert blob.descriptor == expected
                assert b"".join([chunk async for chunk in blob.chunks()]) == content
                await blob.close()
            assert await subject.registry.resolve_blob(subject.name("a/b"), digest) == expected

    @pytest.mark.parametrize("announced", [True, False])
    async def test_a_part_of_a_blob(self, subject: Subject, announced: bool) -> None:
        """Whether it is said beforehand that only a part will be read, or not; cold and warm."""
        spans = [
            Span(0),
            Span(0, 1),
            Span(1, 70_000),
            Span(100_000, 100_001),
            Span(199_999),
            Span(3, 200_000),
        ]
        for number, span in enumerate(spans):
            content = LARGE[number : number + 200_000]
            digest = await subject.content.blob("a", content)
            for _ in range(2):
                given = span if announced else None
                blob = await subject.registry.get_blob(subject.name("a"), digest, given)
                assert blob.descriptor == Descriptor("application/octet-stream", digest, len(content))
                part = b"".join([chunk async for chunk in blob.chunks(span.start, span.stop)])
                await blob.close()
                assert part == content[span.start : span.stop], span
                assert await subject.read("a", digest) == content

    async def test_many_read_a_blob_at_once(self, subject: Subject) -> None:
        digest = await subject.content.blob("a", LARGE)
        spans = [None, Span(0), Span(1_000_000), Span(10, 3_000_000), None]
        parts = await asyncio.gather(*(subject.read("a", digest, span) for span in spans))
        for span, part in zip(spans, parts, strict=True):
            assert part == (LARGE[span.start : span.stop] if span else LARGE)

    async def test_a_blob_that_is_not_there(self, subject: Subject) -> None:
        await subject.content.blob("a", b"another")
        for algorithm in ("sha256", "sha512"):
            digest = Digest.of(b"content", algorithm)
            for ask in (subject.registry.get_blob, subject.registry.resolve_blob):
                await refused(ask(subject.name("a"), digest), BlobUnknown)
                await refused(ask(subject.name("nowhere"), digest), BlobUnknown, NameUnknown)

    async def test_a_blob_is_visible_in_its_repository_only(self, subject: Subject) -> None:
        """To know a digest is no permission."""
        digest = await subject.content.blob("a", b"content")
        await subject.content.blob("b", b"another")
        for _ in range(2):
            assert await subject.read("a", digest) == b"content"
            for ask in (subject.registry.get_blob, subject.registry.resolve_blob):
                await refused(ask(subject.name("b"), digest), BlobUnknown)
                await refused(ask(subject.name("a/b"), digest), BlobUnknown, NameUnknown)

    async def test_a_blob_of_two_repositories(self, subject: Subject) -> None:
        digest = await subject.content.blob("a", b"content")
        assert await subject.read("a", digest) == b"content"
        assert await subject.content.blob("b", b"content") == digest
        assert await subject.read("b", digest) == b"content"

    async def test_a_blob_stays_readable_when_it_is_deleted(self, subject: Subject) -> None:
        digest = await subject.content.blob("a", LARGE)
        blob = await subject.registry.get_blob(subject.name("a"), digest)
        chunks = blob.chunks()
        got = await anext(chunks)
        await subject.content.delete_blob("a", digest)
        got += b"".join([chunk async for chunk in chunks])
        await blob.close()
        assert got == LARGE

    # Manifests

    @pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
    async def test_a_manifest_by_tag_and_by_digest(self, subject: Subject, algorithm: str) -> None:
        given = manifest(1, algorithm)
        await subject.content.manifest("a/b", given, "latest")
        for _ in range(2):
            for reference in (Tag("latest"), given.digest):
                name = subject.name("a/b")
                assert await subject.registry.resolve_manifest(name, reference) == given.descriptor
                assert await subject.registry.get_manifest(name, reference) == given

    async def test_a_manifest_comes_as_it_is(self, subject: Subject) -> None:
        for media_type, content in MANIFESTS:
            given = Manifest.of(media_type, content)
            await subject.content.manifest("a", given, "latest")
            for reference in (Tag("latest"), given.digest):
                name = subject.name("a")
                assert await subject.registry.get_manifest(name, reference) == given
                assert await subject.registry.resolve_manifest(name, reference) == given.descriptor

    async def test_a_manifest_that_is_not_there(self, subject: Subject) -> None:
        await subject.content.manifest("a", manifest(1), "latest")
        absent: list[Reference] = [
            Tag("Latest"),
            Tag("sha256-0a.sig"),
            manifest(2).digest,
            manifest(1, "sha512").digest,
        ]
        for reference in absent:
            for ask in (subject.registry.get_manifest, subject.registry.resolve_manifest):
                await refused(ask(subject.name("a"), reference), ManifestUnknown)
                await refused(ask(subject.name("nowhere"), reference), ManifestUnknown, NameUnknown)

    async def test_a_manifest_is_visible_in_its_repository_only(self, subject: Subject) -> None:
        await subject.content.manifest("a", manifest(1), "latest")
        await subject.content.manifest("b", manifest(2), "other")
        for _ in range(2):
            assert await subject.registry.get_manifest(subject.name("a"), Tag("latest")) == manifest(1)
            for reference in (Tag("latest"), manifest(1).digest):
                await refused(
                    subject.registry.get_manifest(subject.name("b"), reference), ManifestUnknown, NameUnknown
                )

    async def test_a_tag_moves_and_what_it_was_stays(self, subject: Subject) -> None:
        name = subject.name("a")
        for number in (1, 2, 1):
            await subject.content.manifest("a", manifest(number), "latest")
            assert await subject.registry.get_manifest(name, Tag("latest")) == manifest(number)
            assert (await subject.registry.resolve_manifest(name, Tag("latest"))) == manifest(
                number
            ).descriptor
            assert await subject.registry.get_manifest(name, manifest(1).digest) == manifest(1)

    # Listings

    async def test_tags_in_order(self, subject: Subject) -> None:
        tags = ["1.0", "1.0-rc", "1.0.1", "A", "_x", "a", "a-b", "a.b"]
        for number, tag in enumerate(reversed(tags)):
            await subject.content.manifest("a", manifest(number % 3), tag)
        await subject.content.manifest("a/b", manifest(), "elsewhere")
        for last, limit, expected in (
            ("", None, tags),
            ("", 3, tags[:3]),
            ("", len(tags), tags),
            ("", 0, []),
            ("1.0-rc", None, tags[2:]),
            ("1.0-rc", 2, tags[2:4]),
            ("B", 1, ["_x"]),  # which need not be there
            ("a.b", None, []),
            ("z", 5, []),
        ):
            assert await subject.registry.tags(subject.name("a"), last, limit) == expected, (last, limit)

    async def test_tags_where_there_are_none(self, subject: Subject) -> None:
        await subject.content.manifest("a", manifest())
        assert await subject.registry.tags(subject.name("a")) == []
        await refused(subject.registry.tags(subject.name("nowhere")), NameUnknown)

    async def test_referrers(self, subject: Subject) -> None:
        image, name = manifest(1), subject.name("a")
        signature = manifest(2, artifactType="a/signature", annotations={"k": "é"}, **refers_to(image))
        listing = manifest(3, artifactType="a/listing", **refers_to(image))
        unnamed = manifest(4, **refers_to(image))
        elsewhere = manifest(5, artifactType="a/listing", **refers_to(listing))
        for each in (image, signature, listing, unnamed, elsewhere):
            await subject.content.manifest("a", each)
        expected = {
            each.digest: replace(each.descriptor, artifact_type=artifact_type)
            for each, artifact_type in (
                (signature, "a/signature"),
                (listing, "a/listing"),
                (unnamed, EMPTY_TYPE),
            )
        }
        found = {each.digest: each for each in await subject.registry.referrers(name, image.digest)}
        assert found == expected
        assert found[signature.digest].annotations == {"k": "é"}
        only = await subject.registry.referrers(name, image.digest, "a/listing")
        assert only == [expected[listing.digest]]
        assert await subject.registry.referrers(name, image.digest, "a/nothing") == []
        assert await subject.registry.referrers(name, signature.digest) == []
        assert await subject.registry.referrers(name, manifest(9).digest) == []

    async def test_pages_of_referrers(self, subject: Subject) -> None:
        image, name = manifest(1), subject.name("a")
        await subject.content.manifest("a", image)
        made = [manifest(2 + n, artifactType=f"a/{n % 3}", **refers_to(image)) for n in range(7)]
        for each in made:
            await subject.content.manifest("a", each)
        ask = subject.registry.referrers
        for artifact_type in (None, "a/0", "a/1", "a/9"):
            wanted = [each for n, each in enumerate(made) if artifact_type in (None, f"a/{n % 3}")]
            digests = sorted(each.digest for each in wanted)
            assert [each.digest for each in await ask(name, image.digest, artifact_type)] == digests
            for last in ("", *digests, "sha256:8", "sha512:", "a"):
                after = [each for each in digests if each > last]
                for limit in (None, 1, 3, 7, 50):
                    found = await ask(name, image.digest, artifact_type, last, limit)
                    assert [each.digest for each in found] == after[:limit], (artifact_type, last, limit)

    async def test_repositories(self, subject: Subject) -> None:
        if "repositories" in subject.unsupported:
            await refused(subject.registry.repositories(), Unsupported)
            return
        names = [subject.name(each) for each in ("a", "a-b", "a/b", "b")]
        for each in ("b", "a/b", "a", "a-b"):
            await subject.content.manifest(each, manifest(), "latest")
        assert await subject.registry.repositories() == names
        assert await subject.registry.repositories(names[0], 2) == names[1:3]
        assert await subject.registry.repositories(names[3]) == []
        assert await subject.registry.repositories(limit=0) == []

    # The rest

    async def test_what_it_does_not_do_it_refuses(self, subject: Subject) -> None:
        inherited = {
            name for name in methods() if getattr(type(subject.registry), name) is getattr(Registry, name)
        }
        assert inherited == subject.unsupported
        for name in inherited:
            await refused(call(subject.registry, name), Unsupported)

    async def test_closing_twice_is_harmless(self, subject: Subject) -> None:
        digest = await subject.content.blob("a", b"content")
        assert await subject.read("a", digest) == b"content"
        await subject.registry.close()
        await subject.registry.close()


class PushContract:
    """Of those that take pushes.  What is pushed is pulled through the same registry."""

    async def test_a_blob_is_there_when_it_is_committed(self, subject: Subject) -> None:
        digest = Digest.of(LARGE)
        upload = await self.upload(subject, LARGE)
        assert upload.offset == len(LARGE)
        assert upload.id
        await refused(subject.registry.resolve_blob(subject.name("a"), digest), BlobUnknown, NameUnknown)
        assert await upload.commit(digest) == Descriptor("application/octet-stream", digest, len(LARGE))
        assert await subject.read("a", digest) == LARGE

    async def test_a_blob_that_is_not_what_its_digest_says(self, subject: Subject) -> None:
        digest = Digest.of(b"content")
        upload = await self.upload(subject, b"Content")
        await refused(upload.commit(digest), DigestInvalid)
        await refused(subject.registry.get_blob(subject.name("a"), digest), BlobUnknown, NameUnknown)
        upload = await self.upload(subject, b"content")
        await upload.commit(digest)
        assert await subject.read("a", digest) == b"content"

    async def test_an_upload_that_is_cancelled(self, subject: Subject) -> None:
        upload = await self.upload(subject, b"content")
        await upload.cancel()
        digest = Digest.of(b"content")
        await refused(subject.registry.get_blob(subject.name("a"), digest), BlobUnknown, NameUnknown)

    async def test_a_suspended_upload_is_resumed(self, subject: Subject) -> None:
        registry, name, digest = subject.registry, subject.name("a"), Digest.of(LARGE)
        upload = await registry.start_upload(name)
        for start in range(0, len(LARGE), 1_500_000):
            await upload.write(LARGE[start : start + 1_500_000])
            await upload.suspend()
            upload = await registry.resume_upload(name, upload.id)
            assert upload.offset == min(len(LARGE), start + 1_500_000)
        await upload.commit(digest)
        assert await subject.read("a", digest) == LARGE
        await refused(registry.resume_upload(name, upload.id), BlobUploadUnknown)

    async def test_an_upload_is_of_its_repository_only(self, subject: Subject) -> None:
        registry, name = subject.registry, subject.name("a")
        upload = await registry.start_upload(name)
        await upload.suspend()
        for id in (upload.id + "x", "../" + upload.id, "none", ""):
            await refused(registry.resume_upload(name, id), BlobUploadUnknown)
        await refused(registry.resume_upload(subject.name("b"), upload.id), BlobUploadUnknown)
        await (await registry.resume_upload(name, upload.id)).cancel()
        await refused(registry.resume_upload(name, upload.id), BlobUploadUnknown)

    @pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
    async def test_an_upload_for_another_algorithm(self, subject: Subject, algorithm: str) -> None:
        for other in ("sha256", "sha512"):
            upload = await subject.registry.start_upload(subject.name("a"), None, algorithm)
            await upload.write(b"content")
            digest = Digest.of(b"content", other)
            assert (await upload.commit(digest)).digest == digest
            assert await subject.read("a", digest) == b"content"

    async def upload(self, subject: Subject, content: bytes) -> Upload:
        upload = await subject.registry.start_upload(subject.name("a"), len(content))
        for position in range(0, len(content), 1_000_000):
            await upload.write(content[position : position + 1_000_000])
        return upload

    async def test_mounting(self, subject: Subject) -> None:
        registry, source, target = subject.registry, subject.name("a"), subject.name("b")
        digest = await subject.content.blob("a", b"content")
        await refused(registry.mount_blob(target, Digest.of(b"other"), source), BlobUnknown)
        await refused(registry.mount_blob(target, digest, subject.name("c")), BlobUnknown, NameUnknown)
        await refused(registry.get_blob(target, digest), BlobUnknown, NameUnknown)
        assert await registry.mount_blob(target, digest, source) == await registry.resolve_blob(
            source, digest
        )
        assert await subject.read("b", digest) == b"content"
        await registry.delete_blob(source, digest)
        assert await subject.read("b", digest) == b"content"

    async def test_mounting_from_wherever_it_is(self, subject: Subject) -> None:
        registry, target = subject.registry, subject.name("b")
        digest = await subject.content.blob("a", b"content")
        await refused(registry.mount_blob(target, digest, visible=lambda name: False), BlobUnknown)
        await refused(registry.mount_blob(target, Digest.of(b"other")), BlobUnknown)
        if subject.filters:
            await registry.mount_blob(target, digest, visible=lambda name: name == subject.name("a"))
        else:
            await registry.mount_blob(target, digest)
        assert await subject.read("b", digest) == b"content"

    @pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
    async def test_a_manifest(self, subject: Subject, algorithm: str) -> None:
        registry, name, given = subject.registry, subject.name("a"), manifest(1, algorithm)
        assert await registry.push_manifest(name, given.digest, given) == given.descriptor
        assert await registry.get_manifest(name, given.digest) == given
        assert await registry.tags(name) == []
        assert await registry.push_manifest(name, Tag("latest"), given) == given.descriptor
        assert await registry.get_manifest(name, Tag("latest")) == given
        assert await registry.tags(name) == ["latest"]

    async def test_a_manifest_with_several_tags(self, subject: Subject) -> None:
        registry, name, given = subject.registry, subject.name("a"), manifest(1)
        await registry.push_manifest(name, given.digest, given, [Tag("v1"), Tag("v1.2")])
        assert await registry.push_manifest(name, Tag("latest"), given, [Tag("v1.2")]) == given.descriptor
        assert await registry.tags(name) == ["latest", "v1", "v1.2"]
        for tag in ("latest", "v1", "v1.2"):
            assert await registry.get_manifest(name, Tag(tag)) == given

    async def test_a_manifest_that_is_not_what_its_digest_says(self, subject: Subject) -> None:
        registry, name = subject.registry, subject.name("a")
        for algorithm in ("sha256", "sha512"):
            digest = manifest(2, algorithm).digest
            await refused(registry.push_manifest(name, digest, manifest(1)), DigestInvalid)
            await refused(registry.get_manifest(name, digest), ManifestUnknown)

    async def test_deleting(self, subject: Subject) -> None:
        registry, name, given = subject.registry, subject.name("a"), manifest(1)
        digest = await subject.content.blob("a", b"content")
        for tag in ("latest", "v1"):
            await subject.content.manifest("a", given, tag)
        await registry.delete_manifest(name, Tag("latest"))
        await refused(registry.get_manifest(name, Tag("latest")), ManifestUnknown)
        assert await registry.get_manifest(name, Tag("v1")) == given
        await registry.delete_manifest(name, given.digest)
        for reference in (Tag("v1"), given.digest):
            await refused(registry.get_manifest(name, reference), ManifestUnknown)
            await refused(registry.delete_manifest(name, reference), ManifestUnknown)
        await registry.delete_blob(name, digest)
        await refused(registry.get_blob(name, digest), BlobUnknown)
        await refused(registry.delete_blob(name, digest), BlobUnknown)

    async def test_a_precondition(self, subject: Subject) -> None:
        registry, name, first, second = subject.registry, subject.name("a"), manifest(1), manifest(2)
        tag, blob = Tag("latest"), await subject.content.blob("a", b"content")
        new, known = Conditions(none_match=frozenset("*")), Conditions(frozenset((f'"{first.digest}"',)))
        if not subject.filters:
            await refused(registry.push_manifest(name, tag, first, when=new), Unsupported)
            await refused(registry.delete_manifest(name, tag, new), Unsupported)
            await refused(registry.delete_blob(name, blob, new), Unsupported)
            return
        await refused(registry.push_manifest(name, tag, first, when=known), PreconditionFailed)
        await refused(registry.get_manifest(name, first.digest), ManifestUnknown)
        await registry.push_manifest(name, tag, first, when=new)
        await refused(registry.push_manifest(name, tag, second, when=new), PreconditionFailed)
        await registry.push_manifest(name, first.digest, first, when=known)
        await registry.push_manifest(name, tag, second, when=known)
        await refused(registry.push_manifest(name, tag, first, [Tag("v1")], known), PreconditionFailed)
        for reference in (tag, second.digest):
            await refused(registry.delete_manifest(name, reference, known), PreconditionFailed)
        assert await registry.get_manifest(name, tag) == second
        await refused(registry.delete_manifest(name, Tag("v1"), known), ManifestUnknown)
        await registry.delete_manifest(name, tag, Conditions(frozenset((f'"{second.digest}"',))))
        await refused(registry.delete_blob(name, blob, known), PreconditionFailed)
        await registry.delete_blob(name, blob, Conditions(frozenset((f'"{blob}"',))))
        await refused(registry.delete_blob(name, blob, known), BlobUnknown)

    async def test_writers_that_have_read_the_same(self, subject: Subject) -> None:
        """One of them writes."""
        if not subject.filters:
            return
        registry, name, tag = subject.registry, subject.name("a"), Tag("latest")
        when = Conditions(none_match=frozenset("*"))
        for turn in range(3):
            writes = [
                registry.push_manifest(name, tag, manifest(10 * turn + number), when=when)
                for number in range(5)
            ]
            done = await asyncio.gather(*writes, return_exceptions=True)
            (written,) = [each for each in done if isinstance(each, Descriptor)]
            assert sum(isinstance(each, PreconditionFailed) for each in done) == 4
            assert await registry.resolve_manifest(name, tag) == written
            when = Conditions(frozenset((f'"{written.digest}"',)))


ARGUMENTS: dict[str, Any] = {
    "repository": "a",
    "source": "b",
    "id": "upload",
    "digest": manifest().digest,
    "reference": Tag("latest"),
    "manifest": manifest(),
}


def methods() -> set[str]:
    """What a Registry does, but for what everything can: to close, and to have its blobs nowhere else."""
    every = {name for name, _ in inspect.getmembers(Registry, inspect.iscoroutinefunction)}
    return every - {"close", "locate_blob"}


def call(registry: Registry, name: str) -> Awaitable[object]:
    method = getattr(registry, name)
    needed = [each for each in inspect.signature(method).parameters.values() if each.default is each.empty]
    asked: Awaitable[object] = method(*(ARGUMENTS[each.name] for each in needed))
    return asked

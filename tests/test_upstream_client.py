"""Pulling from upstreams: what is asked, and answers that are wrong."""

from __future__ import annotations

import gzip
import json
import zlib
from dataclasses import replace
from typing import Any

import pytest

from proxy.telemetry.metrics import Metrics
from proxy.upstream import pages
from proxy.upstream.client import UpstreamRegistry
from proxy.upstream.requests import UpstreamSettings
from proxy.upstream.transport import RETRIES
from storage.errors import (
    BlobUnknown,
    ManifestUnknown,
    OriginDenied,
    OriginFailed,
    RegistryError,
    TooManyRequests,
    Unavailable,
    Unsupported,
)
from storage.oci import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    MANIFEST_LIMIT,
    OCI_INDEX,
    OCI_MANIFEST,
    Digest,
    Reference,
    Span,
)
from tests.upstream import (
    Bearer,
    ContentType,
    Corrupt,
    Fault,
    Gzip,
    NoDigest,
    Reset,
    RetryAfter,
    Status,
    Truncate,
    Upstream,
    WrongDigest,
    WrongLength,
    digest_of,
)
from tests.upstream_client import BODY, LATEST, Ask, read

# What is asked, and how


async def test_it_takes_at_least_one_credential() -> None:
    with pytest.raises(ValueError, match=r"docker\.io: credentials is empty"):
        UpstreamRegistry("docker.io", UpstreamSettings("https://registry-1.docker.io"), [], Metrics())


@pytest.mark.parametrize("kind", ["manifest", "tags", "token"])
@pytest.mark.parametrize("fault", [Reset(0), Reset(9), Truncate(0), Truncate(9)], ids=str)
async def test_a_small_document_that_breaks_off_is_requested_again(
    ask: Ask, upstream: Upstream, fault: Fault, kind: str
) -> None:
    image = upstream.image("a/b", "latest")
    upstream.auth = Bearer()
    upstream.next("GET", kind, fault, times=RETRIES)
    origin = ask(upstream.url)
    assert await origin.tags("a/b") == ["latest"]
    assert (await origin.get_manifest("a/b", LATEST)).digest == image.digest
    assert [each.kind for each in upstream.requests].count(kind) >= 1 + RETRIES
    upstream.next("GET", "manifest", fault, times=1 + RETRIES)
    with pytest.raises(OriginFailed, match="ended early"):
        await origin.get_manifest("a/b", LATEST)


async def test_every_request_says_what_it_takes(ask: Ask, upstream: Upstream) -> None:
    image = upstream.image("a/b", "latest")
    origin = ask(upstream.url)
    await origin.get_manifest("a/b", LATEST)
    await origin.resolve_manifest("a/b", Digest(image.digest))
    for request in upstream.requests:
        types = {each.partition(";")[0].strip() for each in request.headers["Accept"].split(",")}
        assert types >= {OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST}
        assert "application/vnd.docker.distribution.manifest.v1+prettyjws" in types
    await read(origin, image.layers[0])
    await origin.tags("a/b")
    for request in upstream.requests:
        assert request.headers["Accept-Encoding"] == "identity"
        assert "Cookie" not in request.headers


async def test_content_comes_as_it_is(ask: Ask, upstream: Upstream) -> None:
    image = upstream.image("a/b", "latest", [BODY])
    origin = ask(upstream.url + "/")
    references: list[Reference] = [LATEST, Digest(image.digest)]
    for reference in references:
        manifest = await origin.get_manifest("a/b", reference)
        assert (manifest.content, manifest.digest, manifest.media_type) == (
            image.content,
            image.digest,
            OCI_MANIFEST,
        )
        assert await origin.resolve_manifest("a/b", reference) == manifest.descriptor
    assert await read(origin, image.layers[0]) == BODY
    assert (await origin.resolve_blob("a/b", Digest(image.layers[0]))).size == len(BODY)


@pytest.mark.parametrize("span", [Span(0, 10), Span(5), Span(100, 200), Span(len(BODY) - 1)], ids=str)
@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
async def test_spans(ask: Ask, upstream: Upstream, span: Span, ranges: bool) -> None:
    digest = upstream.blob("a/b", BODY)
    upstream.ranges = ranges
    assert await read(ask(upstream.url), digest, span) == BODY[span.start : span.stop]
    last = "" if span.stop is None else span.stop - 1
    assert upstream.requests[0].range == f"bytes={span.start}-{last}"


# Answers that are not what they should be


@pytest.mark.errors("upstream.wrong_digest")
@pytest.mark.parametrize("reference", ["tag", "digest"])
async def test_a_manifest_that_is_another(ask: Ask, upstream: Upstream, reference: str) -> None:
    image = upstream.image("a/b", "latest")
    asked: Reference = LATEST if reference == "tag" else Digest(image.digest)
    upstream.next("GET", asked, Corrupt())
    with pytest.raises(Unavailable):
        await ask(upstream.url).get_manifest("a/b", asked)


@pytest.mark.parametrize("header", ["", "sha256:short", "md5:" + "0" * 32])
async def test_a_digest_header_that_is_none(ask: Ask, upstream: Upstream, header: str) -> None:
    image = upstream.image("a/b", "latest")
    upstream.next("GET", "latest", WrongDigest(header))
    upstream.next("HEAD", "latest", WrongDigest(header))
    origin = ask(upstream.url)
    assert (await origin.get_manifest("a/b", LATEST)).digest == image.digest
    assert (await origin.resolve_manifest("a/b", LATEST)).digest == image.digest


@pytest.mark.errors("upstream.wrong_digest")
async def test_head_by_digest_that_answers_another(ask: Ask, upstream: Upstream) -> None:
    image = upstream.image("a/b")
    upstream.next("HEAD", image.digest, WrongDigest())
    descriptor = await ask(upstream.url).resolve_manifest("a/b", Digest(image.digest))
    assert (descriptor.digest, descriptor.size) == (image.digest, len(image.content))


async def test_sha512(ask: Ask, upstream: Upstream) -> None:
    body = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}
    digest = upstream.manifest("a/b", body, tag="latest", algorithm="sha512")
    origin = ask(upstream.url)
    references: list[Reference] = [LATEST, Digest(digest)]
    for reference in references:
        assert (await origin.get_manifest("a/b", reference)).digest == digest
        assert (await origin.resolve_manifest("a/b", reference)).digest == digest


@pytest.mark.parametrize(
    "text",
    [f"{OCI_MANIFEST}; charset=utf-8", "application/json", "text/plain; charset=utf-8", "", "text/html"],
)
async def test_content_types_that_say_too_much_or_nothing(ask: Ask, upstream: Upstream, text: str) -> None:
    image = upstream.image("a/b", "latest")
    for method in ("GET", "HEAD"):
        upstream.next(method, "latest", ContentType(text), times=2)
    origin = ask(upstream.url)
    assert (await origin.get_manifest("a/b", LATEST)).media_type == OCI_MANIFEST
    assert (
        await origin.resolve_manifest("a/b", LATEST) == (await origin.get_manifest("a/b", LATEST)).descriptor
    )
    assert (await origin.get_manifest("a/b", LATEST)).content == image.content


async def test_a_page_for_people_is_no_manifest(ask: Ask, upstream: Upstream) -> None:
    upstream.manifest("a/b", b"<html>log in</html>", "text/html", tag="latest")
    with pytest.raises(OriginFailed, match="no manifest"):
        await ask(upstream.url).get_manifest("a/b", LATEST)


@pytest.mark.parametrize("by", [0, 1])
async def test_manifests_are_bounded(ask: Ask, upstream: Upstream, by: int) -> None:
    content = b"{" + b" " * (MANIFEST_LIMIT - 2 + by) + b"}"
    upstream.manifest("a/b", content, OCI_MANIFEST, tag="latest")
    origin = ask(upstream.url)
    if by == 0:
        assert (await origin.get_manifest("a/b", LATEST)).content == content
    else:
        with pytest.raises(OriginFailed, match="more than 4194304 bytes"):
            await origin.get_manifest("a/b", LATEST)


class Encoded(Fault):
    """A body in `name`, whatever was asked for."""

    def __init__(self, name: str, content: bytes) -> None:
        self._name, self._content = name, content

    def strike(self, answer: Any, request: Any) -> Any:
        answer.headers["Content-Encoding"] = self._name
        return replace(answer, content=self._content)


async def test_an_encoded_manifest_is_decoded(ask: Ask, upstream: Upstream) -> None:
    image = upstream.image("a/b", "latest")
    origin = ask(upstream.url)
    for name, encode in (("gzip", gzip.compress), ("x-gzip", gzip.compress), ("deflate", zlib.compress)):
        upstream.next("GET", "latest", Encoded(name, encode(image.content)))
        assert (await origin.get_manifest("a/b", LATEST)).content == image.content
    upstream.next("GET", "tags", Encoded("GZIP", gzip.compress(b'{"tags": ["x"]}')))
    assert await origin.tags("a/b") == ["x"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("gzip", None),
        ("gzip", gzip.compress(b"{}" * 1000)[:-9]),
        ("gzip", b"{}"),
        ("deflate", b"{}"),
        ("br", b"{}"),
        ("zstd", b"{}"),
        ("gzip, gzip", gzip.compress(gzip.compress(b"{}"))),
    ],
    ids=["bomb", "truncated", "not gzip", "not deflate", "br", "zstd", "twice"],
)
async def test_what_cannot_be_decoded(ask: Ask, upstream: Upstream, name: str, content: bytes | None) -> None:
    if content is None:
        content = gzip.compress(b" " * (64 << 20))
    upstream.image("a/b", "latest")
    upstream.next("GET", "latest", Encoded(name, content))
    with pytest.raises(OriginFailed):
        await ask(upstream.url).get_manifest("a/b", LATEST)


async def test_an_encoded_blob_is_refused_and_its_length_is_not_the_blobs(
    ask: Ask, upstream: Upstream
) -> None:
    image = upstream.image("a/b", "latest", [BODY])
    origin = ask(upstream.url)
    for method in ("GET", "HEAD"):
        upstream.next(method, lambda request: True, Gzip(), times=2)
    with pytest.raises(OriginFailed, match="identity"):
        await read(origin, image.layers[0])
    assert (await origin.resolve_blob("a/b", Digest(image.layers[0]))).size == -1
    assert (await origin.resolve_manifest("a/b", LATEST)).size == len(image.content)


async def test_no_length(ask: Ask, upstream: Upstream) -> None:
    digest = upstream.blob("a/b", BODY)
    upstream.content_length = False
    origin = ask(upstream.url)
    blob = await origin.get_blob("a/b", Digest(digest))
    assert blob.descriptor.size == -1
    await blob.close()
    assert await read(origin, digest) == BODY
    assert (await origin.resolve_blob("a/b", Digest(digest))).size == -1


class Chunked(Fault):
    """No Content-Length."""

    def strike(self, answer: Any, request: Any) -> Any:
        return replace(answer, chunked=True)


async def test_a_length_that_only_head_tells(ask: Ask, upstream: Upstream) -> None:
    digest = upstream.blob("a/b", BODY)
    upstream.next("GET", "blob", Chunked(), times=2)
    origin = ask(upstream.url)
    blob = await origin.get_blob("a/b", Digest(digest))
    await blob.close()
    assert blob.descriptor.size == len(BODY)
    assert await read(origin, digest) == BODY


@pytest.mark.parametrize("status", [405, 501])
async def test_an_upstream_without_head(ask: Ask, upstream: Upstream, status: int) -> None:
    image = upstream.image("a/b", "latest", [BODY])
    origin = ask(upstream.url)
    upstream.next("HEAD", lambda request: True, Status(status), times=9)
    assert (await origin.resolve_blob("a/b", Digest(image.layers[0]))).size == len(BODY)
    assert (await origin.resolve_manifest("a/b", LATEST)).digest == image.digest
    with pytest.raises(BlobUnknown):
        await origin.resolve_blob("a/b", Digest(digest_of(b"absent")))
    with pytest.raises(Unsupported):
        await origin.push_manifest("a/b", LATEST, await origin.get_manifest("a/b", LATEST))


@pytest.mark.parametrize("said", ["bytes 0-9/100", "bytes 5-9/100", "pages 10-19/100", "nonsense", ""])
async def test_a_part_that_is_another(ask: Ask, upstream: Upstream, said: str) -> None:
    digest = upstream.blob("a/b", BODY)
    upstream.next("GET", digest, Status(206, {"Content-Range": said}, BODY[:10]))
    with pytest.raises(OriginFailed, match="range"):
        await read(ask(upstream.url), digest, Span(10))


MALFORMED = [
    *("bytes ²-19/100", "bytes 10-²/100", "bytes 10-19/²", "bytes ١٠-19/100", "bytes 10-19/١٠٠"),
    *("bytes +10-19/100", "bytes 1_0-19/100", "bytes 10-19", "bytes 10-9/100", "bytes 10-19/19"),
    *(f"bytes {'0' * 5000}10-19/100", f"bytes 10-19/{'9' * 5000}", "bytes 10-19/9223372036854775808"),
    *("bytes -10-19/100", "bytes */100", "bytes 10-19/100, bytes 10-19/100"),
]


@pytest.mark.parametrize("said", MALFORMED, ids=lambda said: said[:20])
async def test_a_content_range_that_is_malformed(ask: Ask, upstream: Upstream, said: str) -> None:
    digest = upstream.blob("a/b", BODY)
    upstream.next("GET", digest, Status(206, {"Content-Range": said}, BODY[:10]))
    with pytest.raises(OriginFailed, match="malformed"):
        await read(ask(upstream.url), digest, Span(10))


@pytest.mark.parametrize("said", ["bytes 10-19/*", "Bytes 10-19/500", "bytes \t 10-19/500 "])
async def test_a_content_range_in_another_form(ask: Ask, upstream: Upstream, said: str) -> None:
    digest = upstream.blob("a/b", BODY)
    upstream.next("GET", digest, Status(206, {"Content-Range": said}, BODY[10:20]))
    blob = await ask(upstream.url).get_blob("a/b", Digest(digest), Span(10, 20))
    await blob.close()
    assert blob.descriptor.size == (len(BODY) if "*" in said else 500)


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1])
async def test_a_length_that_no_content_has(ask: Ask, upstream: Upstream, length: int) -> None:
    image = upstream.image("a/b", "latest", [BODY])
    origin = ask(upstream.url)
    for method in ("GET", "HEAD"):
        upstream.next(method, image.layers[0], WrongLength(length - (len(BODY) if method == "GET" else 0)))
    upstream.next("HEAD", "latest", WrongLength(length - len(image.content)))
    with pytest.raises(OriginFailed):
        await read(origin, image.layers[0])
    with pytest.raises(OriginFailed):
        await origin.resolve_blob("a/b", Digest(image.layers[0]))
    with pytest.raises(OriginFailed):
        await origin.resolve_manifest("a/b", LATEST)


async def test_a_part_that_nobody_asked_for(ask: Ask, upstream: Upstream) -> None:
    digest = upstream.blob("a/b", BODY)
    upstream.next("GET", digest, Status(206, {"Content-Range": "bytes 0-9/100"}, BODY[:10]))
    with pytest.raises(OriginFailed, match="range"):
        await read(ask(upstream.url), digest)


# Listings


@pytest.mark.parametrize("ignores_n", [True, False])
@pytest.mark.parametrize("page_size", [None, 1, 3, 100])
async def test_all_pages_of_tags(
    ask: Ask, upstream: Upstream, page_size: int | None, ignores_n: bool
) -> None:
    tags = [f"v{number}" for number in range(10)]
    for tag in tags:
        upstream.image("a/b", tag)
    upstream.page_size, upstream.ignores_n = page_size, ignores_n
    origin = ask(upstream.url)
    assert await origin.tags("a/b") == tags
    assert await origin.tags("a/b", last="v3", limit=2) == ["v4", "v5"]


class Answer(Fault):
    """200 with `body`, as JSON; `headers` as well."""

    def __init__(self, body: bytes, **headers: str) -> None:
        self._status = Status(200, headers, body)

    def strike(self, answer: Any, request: Any) -> Any:
        return self._status.strike(answer, request)


@pytest.mark.parametrize("body", [b'{"tags": null}', b'{"tags": []}', b'{"name": "a/b", "tags": [1, null]}'])
async def test_no_tags(ask: Ask, upstream: Upstream, body: bytes) -> None:
    upstream.image("a/b")
    upstream.next("GET", "tags", Answer(body))
    assert await ask(upstream.url).tags("a/b") == []


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'"tags"', b'{"tags": "abc"}', b"\xff", b""])
async def test_a_list_of_tags_that_is_none_is_no_empty_list(
    ask: Ask, upstream: Upstream, body: bytes
) -> None:
    upstream.image("a/b")
    upstream.next("GET", "tags", Answer(body))
    with pytest.raises(OriginFailed):
        await ask(upstream.url).tags("a/b")


async def test_a_list_does_not_go_on_elsewhere(ask: Ask, upstream: Upstream) -> None:
    upstream.image("a/b", "x")
    upstream.next("GET", "tags", Answer(b'{"tags": []}', Link=f'<{upstream.cdn_url}/>; rel="next"'))
    with pytest.raises(OriginFailed, match="another host"):
        await ask(upstream.url).tags("a/b")


async def test_a_list_without_end(ask: Ask, upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "PAGES", 5)
    upstream.image("a/b", "x")
    again = Answer(b'{"tags": []}', Link='</v2/a/b/tags/list?last=x>; rel="next"')
    upstream.next("GET", "tags", again, times=99)
    with pytest.raises(OriginFailed, match="more than 5 pages"):
        await ask(upstream.url).tags("a/b")


@pytest.mark.parametrize("page_size", [None, 1, 2])
async def test_all_pages_of_referrers(ask: Ask, upstream: Upstream, page_size: int | None) -> None:
    image = upstream.image("a/b")
    made = [upstream.artifact("a/b", image, f"application/x-{number}") for number in range(3)]
    upstream.referrers_page_size = page_size
    origin = ask(upstream.url)
    found = await origin.referrers("a/b", Digest(image.digest))
    assert [each.digest for each in found] == sorted(each.digest for each in made)
    assert {each.digest: each.artifact_type for each in found}[made[1].digest] == "application/x-1"
    [one] = await origin.referrers("a/b", Digest(image.digest), "application/x-2")
    assert one.digest == made[2].digest


async def test_no_referrers_api(ask: Ask, upstream: Upstream) -> None:
    image = upstream.image("a/b")
    upstream.referrers_api = False
    with pytest.raises(ManifestUnknown, match=image.digest.replace(":", "-")):
        await ask(upstream.url).referrers("a/b", Digest(image.digest))


@pytest.mark.parametrize(
    "fault",
    [
        Status(400),
        Status(404),
        Status(406),
        Answer(b"<html>"),
        Answer(b"{}"),
        Answer(b"[]"),
        Answer(json.dumps({"manifests": [{"digest": "x"}]}).encode()),
    ],
    ids=["400", "404", "406", "page", "no list", "list", "no descriptors"],
)
async def test_what_counts_as_no_referrers_api(ask: Ask, upstream: Upstream, fault: Fault) -> None:
    image = upstream.image("a/b")
    upstream.next("GET", "referrers", fault)
    with pytest.raises(ManifestUnknown):
        await ask(upstream.url).referrers("a/b", Digest(image.digest))


@pytest.mark.parametrize(
    ("status", "error"), [(429, TooManyRequests), (500, OriginFailed), (403, OriginDenied)]
)
async def test_what_does_not(ask: Ask, upstream: Upstream, status: int, error: type[RegistryError]) -> None:
    image = upstream.image("a/b")
    upstream.next("GET", "referrers", RetryAfter(1, status))
    with pytest.raises(error):
        await ask(upstream.url).referrers("a/b", Digest(image.digest))


async def test_no_digest_header(ask: Ask, upstream: Upstream) -> None:
    image = upstream.image("a/b", "latest")
    upstream.next("GET", "latest", NoDigest())
    upstream.next("HEAD", "latest", NoDigest())
    origin = ask(upstream.url)
    assert (await origin.resolve_manifest("a/b", LATEST)).digest == image.digest
    assert upstream.log == ["HEAD manifest a/b:latest", "GET manifest a/b:latest"]

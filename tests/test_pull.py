"""Blobs, manifests and listings over HTTP: conditions, ranges and pages."""

from __future__ import annotations

import asyncio
import json
import random
from email import message_from_bytes
from itertools import accumulate, pairwise

import pytest

from tests.conftest import Clock, Serve
from tests.distribution import ABSENT, ALPINE, BODY, JSON, code, head, push_alpine
from tests.upstream import OCI_INDEX, OCI_MANIFEST, Hold, Image, Upstream
from tests.wire import Reply, connect


@pytest.fixture
def image(upstream: Upstream) -> Image:
    return push_alpine(upstream)


# If-None-Match


@pytest.mark.parametrize(
    ("given", "matches"),
    [
        ('"{}"', True),
        ('W/"{}"', True),
        ("*", True),
        ('"other", "{}"', True),
        ('"other",W/"{}" ,"third"', True),
        ("{}", True),
        ('"other"', False),
        ('"*"', False),
        ("", False),
        ('"sha256:{}"', False),
    ],
)
async def test_if_none_match(
    serve: Serve, upstream: Upstream, image: Image, given: str, matches: bool
) -> None:
    site = await serve(upstream)
    async with connect(site.url) as wire:
        for path, digest in (
            (f"{ALPINE}/manifests/latest", image.digest),
            (f"{ALPINE}/manifests/{image.digest}", image.digest),
            (f"{ALPINE}/blobs/{image.layers[0]}", image.layers[0]),
        ):
            for method in ("GET", "HEAD"):
                line = "If-None-Match: " + given.format(digest)
                reply = await wire.ask(method, path, line, "Range: bytes=0-1")
                ranged = method == "GET" and "blobs" in path
                assert reply.status == (304 if matches else 206 if ranged else 200)
                assert reply.headers["ETag"] == f'"{digest}"'
                assert reply.headers["Docker-Content-Digest"] == digest
                assert "Cache-Control" in reply.headers
                assert "Cache-Status" in reply.headers


async def test_if_none_match_in_two_lines(serve: Serve, upstream: Upstream, image: Image) -> None:
    site = await serve(upstream)
    async with connect(site.url) as wire:
        lines = ('If-None-Match: "other"', f'If-None-Match: "{image.digest}"')
        assert (await wire.ask("GET", f"{ALPINE}/manifests/latest", *lines)).status == 304


async def test_if_none_match_transfers_no_blob(serve: Serve, upstream: Upstream, image: Image) -> None:
    site = await serve(upstream)
    status, _, body = await site.get(f"{ALPINE}/blobs/{image.layers[0]}", If_None_Match="*")
    assert (status, body) == (304, b"")
    assert [line.split()[0] for line in upstream.log] == ["HEAD"]


async def test_if_none_match_of_what_is_not_there(serve: Serve, upstream: Upstream, image: Image) -> None:
    site = await serve(upstream)
    for path in (f"manifests/{ABSENT}", f"blobs/{ABSENT}", "manifests/absent"):
        status, _, body = await site.get(f"{ALPINE}/{path}", If_None_Match="*")
        assert status == 404
        assert code(body).endswith("_UNKNOWN")


# Ranges

SIZE = len(BODY)
RANGES: list[tuple[str, list[tuple[int, int]] | None]] = [
    # None: the whole, by 200; []: 416
    ("bytes=0-0", [(0, 1)]),
    ("bytes=0-", [(0, SIZE)]),
    ("bytes=10-19", [(10, 20)]),
    ("bytes=4990-", [(4990, SIZE)]),
    ("bytes=4990-99999", [(4990, SIZE)]),
    ("bytes=-10", [(SIZE - 10, SIZE)]),
    ("bytes=-99999", [(0, SIZE)]),
    ("bytes=4990-" + "9" * 30, [(4990, SIZE)]),
    ("bytes=-" + "9" * 30, [(0, SIZE)]),
    ("Bytes=1-2", [(1, 3)]),
    ("bytes=0-1,4-5", [(0, 2), (4, 6)]),
    ("bytes= 4-5 , 0-1", [(4, 6), (0, 2)]),
    ("bytes=0-9,5-14", [(0, 10), (5, 15)]),
    ("bytes=0-9,-10", [(0, 10), (SIZE - 10, SIZE)]),
    ("bytes=0-0,9999-", [(0, 1)]),
    ("bytes=,0-1,,", [(0, 2)]),
    (
        "bytes=" + ",".join(f"{10 * n}-{10 * n + 1}" for n in range(200)),
        [(10 * n, 10 * n + 2) for n in range(200)],
    ),
    ("bytes=5000-", []),
    ("bytes=5000-6000,7000-", []),
    ("bytes=-0", []),
    ("bytes=" + "9" * 30 + "-", []),
    ("bytes=0-,0-,0-", None),  # more than there is
    ("bytes=" + ",".join(["0-0"] * 300), [(0, 1)] * 300),
    (
        "bytes=" + ",".join(f"{n}-{n}" for n in reversed(range(SIZE))),
        [(n, n + 1) for n in reversed(range(SIZE))],
    ),
    ("bytes=" + ",".join(["7-7"] * (SIZE + 1)), None),  # one byte more than there is
    (
        "bytes=" + ",".join(f"{4 * n}-{4 * n + 3}" for n in range(1023)) + ",-1",
        [*((4 * n, 4 * n + 4) for n in range(1023)), (SIZE - 1, SIZE)],
    ),
    ("bytes=2-1", []),
    ("bytes=0-1,2-1", None),
    ("bytes=-", None),
    ("bytes=a-b", None),
    ("bytes=0x1-2", None),
    ("bytes=", None),
    ("bytes 0-1", None),
    ("lines=0-1", None),
    ("bytes=0-1;2-3", None),
    ("bytes=+1-2", None),
    ("", None),
]


def check_ranges(reply: Reply, content: bytes, spans: list[tuple[int, int]] | None) -> None:
    size = len(content)
    if spans == []:
        assert reply.status == 416
        assert reply.headers["Content-Range"] == f"bytes */{size}"
        assert code(reply.body) == "RANGE_INVALID"
        return
    assert reply.headers["Content-Length"] == str(len(reply.body))
    if spans is None:
        assert (reply.status, reply.body) == (200, content)
        assert "Content-Range" not in reply.headers
        return
    assert reply.status == 206
    if len(spans) == 1:
        ((start, stop),) = spans
        assert reply.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{size}"
        assert reply.headers["Content-Type"] == "application/octet-stream"
        assert reply.body == content[start:stop]
        return
    assert "Content-Range" not in reply.headers
    check_parts(reply, content, spans)


def check_parts(reply: Reply, content: bytes, spans: list[tuple[int, int]]) -> None:
    # RFC 9110 section 14.6, by somebody else's parser
    media_type = reply.headers["Content-Type"]
    assert media_type.startswith("multipart/byteranges; boundary=")
    message = message_from_bytes(f"Content-Type: {media_type}\r\n\r\n".encode() + reply.body)
    parts = message.get_payload()
    assert [part["Content-Range"] for part in parts] == [
        f"bytes {start}-{stop - 1}/{len(content)}" for start, stop in spans
    ]
    assert {part["Content-Type"] for part in parts} == {"application/octet-stream"}
    # email takes line ends for its own, so the bytes are compared by hand.
    boundary = media_type.partition("boundary=")[2].encode()
    bodies = [part.partition(b"\r\n\r\n")[2] for part in reply.body.split(b"\r\n--" + boundary)[1:-1]]
    assert bodies == [content[start:stop] for start, stop in spans]


@pytest.mark.parametrize(("header", "spans"), RANGES, ids=[header[:30] for header, _ in RANGES])
async def test_ranges_of_a_blob_cold_and_warm(
    serve: Serve, upstream: Upstream, header: str, spans: list[tuple[int, int]] | None
) -> None:
    digest = upstream.blob("library/alpine", BODY)
    site = await serve(upstream)
    async with connect(site.url) as wire:
        for _ in ("cold", "warm"):
            reply = await wire.ask("GET", f"{ALPINE}/blobs/{digest}", f"Range: {header}")
            check_ranges(reply, BODY, spans)
    # A range never makes more than the one transfer of the whole.
    assert upstream.log == [f"GET blob library/alpine@{digest[:19]}"]


async def test_small_and_large_ranges_in_the_order_of_the_request(serve: Serve, upstream: Upstream) -> None:
    content = random.Random(12).randbytes(1_000_000)
    spans = [
        (900_000, 1_000_000),
        *((n, n + 90) for n in range(800_000, 700_000, -1000)),
        (0, 70_000),
        (69_000, 69_001),
        (100_000, 165_000),
        *((n, n + 1300) for n in range(200_000, 400_000, 2000)),
    ]
    header = ",".join(f"{start}-{stop - 1}" for start, stop in spans)
    digest = upstream.blob("library/alpine", content)
    site = await serve(upstream)
    async with connect(site.url) as wire:
        for _ in ("cold", "warm"):
            reply = await wire.ask("GET", f"{ALPINE}/blobs/{digest}", f"Range: bytes={header}")
            check_ranges(reply, content, spans)


async def test_a_partial_pull_costs_what_it_costs_elsewhere(serve: Serve, upstream: Upstream) -> None:
    """podman asks for the half of 3,000 files that it lacks, in one request; Go's servers are the measure."""
    numbers = random.Random(7)
    edges = [0, *accumulate(numbers.randrange(200, 900) for _ in range(3000))]
    spans = list(pairwise(edges))[::2]
    while len(spans) > 1023:  # the nearest are joined, with what is between them
        near = min(range(len(spans) - 1), key=lambda n: spans[n + 1][0] - spans[n][1])
        spans[near : near + 2] = [(spans[near][0], spans[near + 1][1])]
    content = numbers.randbytes(edges[-1])
    digest = upstream.blob("library/alpine", content)
    site = await serve(upstream)
    header = ",".join(f"{start}-{stop - 1}" for start, stop in spans)
    go = sum(
        len(f"\r\n--{'b' * 60}\r\nContent-Range: bytes {start}-{stop - 1}/{len(content)}\r\n")
        + len("Content-Type: application/octet-stream\r\n\r\n")
        + (stop - start)
        for start, stop in spans
    )
    async with connect(site.url) as wire:
        for _ in ("cold", "warm"):
            reply = await wire.ask("GET", f"{ALPINE}/blobs/{digest}", f"Range: bytes={header}")
            check_ranges(reply, content, spans)
            assert len(reply.body) <= 1.05 * go


async def test_ranges_that_are_there_are_sent_before_the_others(serve: Serve, upstream: Upstream) -> None:
    content = random.Random(12).randbytes(200_000)
    digest = upstream.blob("library/alpine", content)
    gate = asyncio.Event()
    upstream.next("GET", digest, Hold(gate, after=100_000))
    site = await serve(upstream)
    spans = [(1000, 1100), (50_000, 50_100), (150_000, 150_100), (2000, 2100)]
    header = ",".join(f"{start}-{stop - 1}" for start, stop in spans)
    async with connect(site.url) as wire:
        line = f"Range: bytes={header}\r\n\r\n"
        await wire.send(f"GET {ALPINE}/blobs/{digest} HTTP/1.1\r\nHost: x\r\n{line}".encode())
        status, headers = await wire.head()
        first = b""
        while content[50_000:50_100] not in first:
            first += await wire.read(1)
        gate.set()
        rest = await wire.read(int(headers["Content-Length"]) - len(first))
    check_ranges(Reply(status, headers, first + rest), content, spans)


@pytest.mark.parametrize(
    ("given", "counts"),
    [('"{}"', True), ('W/"{}"', False), ('"other"', False), ("Wed, 21 Oct 2015 07:28:00 GMT", False)],
)
async def test_if_range(serve: Serve, upstream: Upstream, image: Image, given: str, counts: bool) -> None:
    site = await serve(upstream)
    digest = image.layers[0]
    status, _, body = await site.get(
        f"{ALPINE}/blobs/{digest}", Range="bytes=1-2", If_Range=given.format(digest)
    )
    assert (status, body) == ((206, BODY[1:3]) if counts else (200, BODY))


async def test_ranges_are_for_get_of_blobs_only(serve: Serve, upstream: Upstream, image: Image) -> None:
    site = await serve(upstream)
    status, headers = await head(site, f"{ALPINE}/blobs/{image.layers[0]}", Range="bytes=1-2")
    assert (status, headers["Content-Length"]) == (200, str(SIZE))
    status, headers, body = await site.get(f"{ALPINE}/manifests/latest", Range="bytes=1-2")
    assert (status, body) == (200, image.content)
    assert "Accept-Ranges" not in headers


@pytest.mark.parametrize("size", [1, 2, 600, 100_000])
async def test_a_range_of_everything(serve: Serve, upstream: Upstream, size: int) -> None:
    # containerd sends it with every GET.
    content = b"x" * size
    digest = upstream.blob("library/alpine", content)
    image = push_alpine(upstream)
    site = await serve(upstream)
    for _ in ("cold", "warm"):
        for path in (
            f"{ALPINE}/manifests/latest",
            f"{ALPINE}/manifests/{image.digest}",
            f"{ALPINE}/tags/list",
        ):
            _, plain, whole = await site.get(path)
            status, headers, body = await site.get(path, Range="bytes=0-")
            assert (status, body) == (200, whole)
            assert headers.get("Docker-Content-Digest") == plain.get("Docker-Content-Digest")
            assert "Content-Range" not in headers
        status, headers, body = await site.get(f"{ALPINE}/blobs/{digest}", Range="bytes=0-")
        assert (status, body) == (206, content)
        assert headers["Content-Range"] == f"bytes 0-{size - 1}/{size}"
        status, _ = await head(site, f"{ALPINE}/blobs/{digest}", Range="bytes=0-")
        assert status == 200
    status, _, body = await site.get(f"{ALPINE}/manifests/none", Range="bytes=0-")
    assert (status, code(body)) == (404, "MANIFEST_UNKNOWN")


@pytest.mark.parametrize("header", ["bytes=0-", "bytes=-5", "bytes=3-4", "bytes=0-1,2-3"])
async def test_ranges_of_an_empty_blob(serve: Serve, upstream: Upstream, header: str) -> None:
    digest = upstream.blob("library/alpine", b"")
    site = await serve(upstream)
    for _ in ("cold", "warm"):
        status, headers, body = await site.get(f"{ALPINE}/blobs/{digest}", Range=header)
        assert (status, headers["Content-Length"], body) == (200, "0", b"")


# Listings


async def test_tags_page_by_page(serve: Serve, upstream: Upstream) -> None:
    names = [f"v{n}" for n in range(10)]
    for name in names:
        upstream.image("library/alpine", name)
    site = await serve(upstream, more={"edge.example": {"upstream": upstream.url}})
    for start in (
        "/v2/library/alpine/tags/list?n=3",
        "/v2/library/alpine/tags/list?n=3&ns=edge.example&x=%2F%20",
        "/v2/edge.example/library/alpine/tags/list?n=3",
        "/edge.example/v2/library/alpine/tags/list?n=3",
    ):
        pages, path = [], start
        while path:
            status, headers, body = await site.get(path)
            assert status == 200
            assert headers["Content-Type"] == JSON
            listed = json.loads(body)
            assert listed["name"] == start.partition("/tags")[0].rpartition("v2/")[2]
            pages.append(listed["tags"])
            link = headers.get("Link", "")
            if link:
                assert link.startswith("</")
                assert link.endswith('>; rel="next"')
                assert ("ns=edge.example" in link) == ("ns=" in start)
                assert ("x=%2F+" in link) == ("x=" in start)
            path = link.partition(">")[0][1:]
        assert pages == [names[:3], names[3:6], names[6:9], names[9:]]


@pytest.mark.parametrize(
    ("query", "expected", "more"),
    [
        ("", ["a", "b", "c"], False),
        ("?n=0", [], False),
        ("?n=2", ["a", "b"], True),
        ("?n=3", ["a", "b", "c"], False),
        ("?n=1000000000000000000", ["a", "b", "c"], False),
        ("?last=a", ["b", "c"], False),
        ("?last=a&n=1", ["b"], True),
        ("?last=aa&n=1", ["b"], True),
        ("?last=c&n=5", [], False),
        ("?last=%ff&n=1", [], False),
    ],
)
async def test_n_and_last(
    serve: Serve, upstream: Upstream, query: str, expected: list[str], more: bool
) -> None:
    for name in ("c", "a", "b"):
        upstream.image("library/alpine", name)
        upstream.image(f"library/{name}", "latest")
    site = await serve(upstream)
    status, headers, body = await site.get(f"{ALPINE}/tags/list{query}")
    assert (status, json.loads(body)) == (200, {"name": "library/alpine", "tags": expected})
    assert ("Link" in headers) == more
    for name in ("c", "a", "b"):
        await site.get(f"/v2/library/{name}/manifests/latest")
    last = "last=docker.io/library/"
    status, headers, body = await site.get(f"/v2/_catalog{query.replace('last=', last)}")
    assert status == 200
    if "%ff" not in query:
        assert json.loads(body) == {"repositories": [f"docker.io/library/{name}" for name in expected]}
        assert ("Link" in headers) == more


async def test_the_catalog_is_what_is_cached(serve: Serve, upstream: Upstream, image: Image) -> None:
    site = await serve(upstream)
    assert json.loads((await site.get("/v2/_catalog"))[2]) == {"repositories": []}
    await site.get(f"{ALPINE}/manifests/latest")
    upstream.clear()
    assert json.loads((await site.get("/v2/_catalog"))[2]) == {"repositories": ["docker.io/library/alpine"]}
    assert upstream.log == []


async def test_tags_are_cached_as_long_as_tags_are(
    serve: Serve, upstream: Upstream, image: Image, clock: Clock
) -> None:
    site = await serve(upstream, fresh_for="10m")
    await site.get(f"{ALPINE}/tags/list")
    clock.advance(100)
    _, headers, _ = await site.get(f"{ALPINE}/tags/list")
    assert headers["Cache-Status"] == "entrepot; hit; ttl=500"
    assert (headers["Cache-Control"], headers["Age"]) == ("public, max-age=600", "100")
    assert upstream.log == ["GET tags library/alpine"]


async def test_referrers(serve: Serve, upstream: Upstream, image: Image) -> None:
    signature = upstream.artifact("library/alpine", image, "application/vnd.example.signature", {"by": "me"})
    sbom = upstream.artifact("library/alpine", image, "application/vnd.example.sbom+json")
    site = await serve(upstream)
    path = f"{ALPINE}/referrers/{image.digest}"
    status, headers, body = await site.get(path)
    assert (status, headers["Content-Type"]) == (200, OCI_INDEX)
    assert "OCI-Filters-Applied" not in headers
    index = json.loads(body)
    assert (index["schemaVersion"], index["mediaType"]) == (2, OCI_INDEX)
    assert {each["digest"] for each in index["manifests"]} == {signature.digest, sbom.digest}
    status, headers, body = await site.get(f"{path}?artifactType=application%2Fvnd.example.signature")
    assert (status, headers["OCI-Filters-Applied"]) == (200, "artifactType")
    assert json.loads(body)["manifests"] == [
        {
            "mediaType": OCI_MANIFEST,
            "digest": signature.digest,
            "size": len(signature.content),
            "artifactType": "application/vnd.example.signature",
            "annotations": {"by": "me"},
        }
    ]
    status, _, body = await site.get(f"{path}?artifactType=none")
    assert (status, json.loads(body)["manifests"]) == (200, [])
    assert len(upstream.log) == 1


@pytest.mark.parametrize("path", [ALPINE, "/v2/library/absent"])
@pytest.mark.parametrize("api", [True, False])
async def test_no_referrers_is_404_but_never_name_unknown(
    serve: Serve, upstream: Upstream, image: Image, path: str, api: bool
) -> None:
    upstream.referrers_api = api
    site = await serve(upstream)
    status, headers, body = await site.get(f"{path}/referrers/{image.digest}")
    if api and path == ALPINE:
        assert (status, headers["Content-Type"]) == (200, OCI_INDEX)
    else:
        # oras takes NAME_UNKNOWN for a failure, any other 404 for: no such API, look for the tag.
        assert (status, code(body)) == (404, "MANIFEST_UNKNOWN")


async def test_the_fallback_tag_of_referrers_is_cached_like_tags(
    serve: Serve, upstream: Upstream, image: Image
) -> None:
    upstream.referrers_api = False
    tag = image.digest.replace(":", "-")
    index = upstream.index("library/alpine", tag, [image])
    site = await serve(upstream)
    for _ in range(2):
        status, headers, body = await site.get(f"{ALPINE}/manifests/{tag}")
        assert (status, headers["Content-Type"], body) == (200, OCI_INDEX, index.content)
    assert len(upstream.log) == 1
    assert headers["Cache-Status"] == "entrepot; hit; ttl=600"

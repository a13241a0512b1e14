"""Pushes over HTTP: every form of an upload, what is refused and how, manifests, mounts, deletion."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
from collections.abc import AsyncIterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from multidict import CIMultiDictProxy

from storage import graph
from storage.oci import (
    ARTIFACTS,
    DOCKER_LIST,
    DOCKER_MANIFEST,
    MANIFEST_LIMIT,
    OCI_INDEX,
    OCI_MANIFEST,
    Digest,
    ManifestContent,
)
from tests.conftest import OPEN, Serve, Site
from tests.events import Ear
from tests.processes import Place, Worker, place  # noqa: F401  a fixture
from tests.upstream import Corrupt, Hold, Status, Upstream
from tests.wire import connect

APP = "/v2/local/team/app"
UPLOADS = f"{APP}/blobs/uploads/"
CONTENT = os.urandom(300_000)
DIGEST = Digest.of(CONTENT)
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
OCTETS = "application/octet-stream"


class Answer:
    def __init__(self, status: int, headers: CIMultiDictProxy[str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def code(self) -> str:
        (error,) = json.loads(self.body)["errors"]
        return str(error["code"])

    @property
    def location(self) -> str:
        return self.headers["Location"]


class Client:
    """Of a server with the namespace `local`."""

    def __init__(self, site: Site) -> None:
        self.site = site

    async def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.site.request(method, path, data=body, headers=given) as response:
            return Answer(response.status, response.headers, await response.read())

    async def started(self, query: str = "") -> str:
        answer = await self.ask("POST", UPLOADS + query)
        assert answer.status == 202, answer.body
        return answer.location

    async def blob(
        self, content: bytes, repository: str = "local/team/app", algorithm: str = "sha256"
    ) -> Digest:
        digest = Digest.of(content, algorithm)
        answer = await self.ask("POST", f"/v2/{repository}/blobs/uploads/?digest={digest}", content)
        assert answer.status == 201, answer.body
        return digest

    async def manifest(self, reference: str, content: bytes, kind: str = OCI_MANIFEST) -> Answer:
        return await self.ask("PUT", f"{APP}/manifests/{reference}", content, Content_Type=kind)


@pytest.fixture
async def client(serve: Serve, upstream: Upstream) -> Client:
    return Client(await serve(upstream, more={"local": {"store": {}}}))


def image(*layers: Digest, config: Digest = Digest.of(b"{}"), **more: Any) -> bytes:  # noqa: B008
    described = [{"mediaType": OCTETS, "digest": each, "size": 1} for each in layers]
    named = {"mediaType": EMPTY_TYPE, "digest": config, "size": 2}
    body = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": named, "layers": described, **more}
    return json.dumps(body).encode()


THING = {"mediaType": "application/vnd.example.thing", "digest": Digest.of(b"{}"), "size": 2}
NEGATIVE = json.dumps({"manifests": [{**THING, "size": -1}]}).encode()


def index(*children: bytes, kind: str = OCI_INDEX, **more: Any) -> bytes:
    named = [{"mediaType": OCI_MANIFEST, "digest": Digest.of(each), "size": len(each)} for each in children]
    return json.dumps({"schemaVersion": 2, "mediaType": kind, "manifests": named, **more}).encode()


# Uploads


@pytest.mark.parametrize(
    ("agent", "scheme", "location"),
    [
        ("python-requests/2.28.1", "https", "https://registry.example/v2/local/"),
        ("python-requests/2.28.1", "http", "/v2/local/"),
        ("Go-http-client/2.0", "https", "https://registry.example/v2/local/"),
        ("Python/3.11 aiohttp/3.14.5", "https", "https://registry.example/v2/local/"),
        ("docker-registry-client-async/1.0.3", "https", "https://registry.example/v2/local/"),
        ("harbor-registry-client", "https", "https://registry.example/v2/local/"),
        ("curl/8.5.0", "https", "https://registry.example/v2/local/"),
        ("curl/8.5.0", "http", "/v2/local/"),
        (None, "https", "https://registry.example/v2/local/"),
        (None, "http", "/v2/local/"),
        ("docker/28.1", "https", "/v2/local/"),
    ],
)
async def test_a_client_that_does_not_resolve_a_location_gets_a_url(
    client: Client, agent: str | None, scheme: str, location: str
) -> None:
    headers = {"X-Forwarded-Proto": scheme, "Host": "registry.example"}
    headers.update({"User-Agent": agent} if agent else {})
    asked = client.site.request("POST", UPLOADS, headers=headers, skip_auto_headers=["User-Agent"])
    async with asked as response:
        found = response.headers["Location"]
    assert found.startswith(location)
    assert (await client.ask("DELETE", found.removeprefix("https://registry.example"))).status == 204


async def test_post_then_put(client: Client) -> None:
    answer = await client.ask("POST", UPLOADS)
    assert (answer.status, answer.body) == (202, b"")
    assert answer.headers["Range"] == "0-0"
    assert answer.location == UPLOADS + answer.headers["Docker-Upload-UUID"]
    answer = await client.ask("PUT", f"{answer.location}?digest={DIGEST}", CONTENT, Content_Type=OCTETS)
    assert (answer.status, answer.body) == (201, b"")
    assert answer.location == f"{APP}/blobs/{DIGEST}"
    assert answer.headers["Docker-Content-Digest"] == DIGEST
    assert (await client.ask("GET", answer.location)).body == CONTENT


async def test_the_sdk_of_net_begins_the_query_with_an_ampersand(client: Client) -> None:
    """It first asks for the blob by the name that the base image has at another registry."""
    answer = await client.ask("POST", f"{UPLOADS}?mount={DIGEST}&from=dotnet/runtime")
    assert answer.status == 202
    assert (await client.ask("DELETE", answer.location)).status == 204
    session = (await client.ask("POST", UPLOADS)).location
    answer = await client.ask("PATCH", session, CONTENT, Content_Type=OCTETS)
    assert answer.status == 202
    encoded = str(DIGEST).replace(":", "%3A")
    assert (await client.ask("PUT", f"{answer.location}?&digest={encoded}")).status == 201


async def test_a_client_may_append_the_digest_as_to_a_location_with_a_query(client: Client) -> None:
    session = (await client.ask("POST", UPLOADS)).location
    wrong = await client.ask("PUT", f"{session}&digest=sha256:1", CONTENT)
    assert (wrong.status, wrong.code) == (400, "DIGEST_INVALID")
    other = await client.ask("PUT", f"{session}&digest={Digest.of(b'other')}", CONTENT)
    assert (other.status, other.code) == (400, "DIGEST_INVALID")
    session = (await client.ask("POST", UPLOADS)).location
    answer = await client.ask("PUT", f"{session}&digest={DIGEST}", CONTENT)
    assert (answer.status, answer.headers["Docker-Content-Digest"]) == (201, DIGEST)
    assert (await client.ask("GET", answer.location)).body == CONTENT


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
async def test_single_post(client: Client, algorithm: str) -> None:
    digest = await client.blob(CONTENT, algorithm=algorithm)
    answer = await client.ask("GET", f"{APP}/blobs/{digest}")
    assert (answer.status, answer.body) == (200, CONTENT)


async def test_streamed_without_a_length(client: Client) -> None:
    async def stream() -> AsyncIterator[bytes]:
        for start in range(0, len(CONTENT), 7777):
            yield CONTENT[start : start + 7777]

    answer = await client.ask("PATCH", await client.started(), stream())
    assert (answer.status, answer.headers["Range"]) == (202, f"0-{len(CONTENT) - 1}")
    answer = await client.ask("PUT", f"{answer.location}?digest={DIGEST}")
    assert (await client.ask("GET", answer.location)).body == CONTENT


@pytest.mark.parametrize("last", ["PATCH", "PUT"])
async def test_chunks(client: Client, last: str) -> None:
    session = await client.started()
    ends = [100_000, 200_000, len(CONTENT)]
    for start, end in zip([0, *ends], ends, strict=False):
        span = f"{start}-{end - 1}"
        if end == len(CONTENT) and last == "PUT":
            session += f"?digest={DIGEST}"
            answer = await client.ask("PUT", session, CONTENT[start:end], Content_Range=span)
            assert answer.status == 201
            break
        answer = await client.ask("PATCH", session, CONTENT[start:end], Content_Range=span)
        assert (answer.status, answer.headers["Range"]) == (202, f"0-{end - 1}")
        session = answer.location
        status = await client.ask("GET", session)
        assert (status.status, status.headers["Range"], status.body) == (204, f"0-{end - 1}", b"")
        assert status.location == session
    else:
        assert (await client.ask("PUT", f"{session}?digest={DIGEST}")).status == 201
    assert (await client.ask("GET", f"{APP}/blobs/{DIGEST}")).body == CONTENT


@pytest.mark.parametrize("method", ["PATCH", "PUT"])
@pytest.mark.parametrize("span", ["0-9", "50-59", "11-20", "9-18"])
async def test_a_chunk_out_of_order(client: Client, method: str, span: str) -> None:
    session = await client.started()
    await client.ask("PATCH", session, CONTENT[:10])
    answer = await client.ask(method, f"{session}?digest={DIGEST}", CONTENT[:10], Content_Range=span)
    assert (answer.status, answer.code) == (416, "RANGE_INVALID")
    assert (answer.headers["Range"], answer.location) == ("0-9", session)
    # It was told where it is; it goes on from there.
    rest = f"10-{len(CONTENT) - 1}"
    answer = await client.ask("PUT", f"{session}?digest={DIGEST}", CONTENT[10:], Content_Range=rest)
    assert answer.status == 201


@pytest.mark.parametrize(
    ("span", "status", "code"),
    [
        ("0-8", 400, "SIZE_INVALID"),
        ("0-11", 400, "SIZE_INVALID"),
        ("0-10", 202, ""),  # of dockertarpusher
        ("9-0", 400, "BLOB_UPLOAD_INVALID"),
        ("ten", 400, "BLOB_UPLOAD_INVALID"),
        ("-5", 400, "BLOB_UPLOAD_INVALID"),
        ("bytes 0-9/*", 202, ""),
        ("0-9", 202, ""),
    ],
)
async def test_what_a_chunk_says_of_itself(client: Client, span: str, status: int, code: str) -> None:
    session = await client.started()
    answer = await client.ask("PATCH", session, CONTENT[:10], Content_Range=span)
    assert answer.status == status
    if code:
        assert answer.code == code
        assert (await client.ask("GET", session)).headers["Range"] == "0-0"
    await client.ask("DELETE", session)


@pytest.mark.parametrize("digest", ["", "sha256:", "sha256:baddigeststring", "md5:0", "sha256%3Axyz"])
async def test_a_digest_that_is_none_leaves_the_upload(client: Client, digest: str) -> None:
    session = await client.started()
    answer = await client.ask("PUT", f"{session}?digest={digest}", CONTENT)
    assert (answer.status, answer.code) == (400, "DIGEST_INVALID")
    assert (await client.ask("PUT", session)).code == "DIGEST_INVALID"
    assert (await client.ask("PUT", f"{session}?digest={DIGEST}", CONTENT)).status == 201


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
async def test_other_bytes_than_the_digest_says(client: Client, algorithm: str) -> None:
    wrong = Digest.of(b"other", algorithm)
    session = await client.started()
    answer = await client.ask("PUT", f"{session}?digest={wrong}", CONTENT)
    assert (answer.status, answer.code) == (400, "DIGEST_INVALID")
    assert (await client.ask("GET", session)).code == "BLOB_UPLOAD_UNKNOWN"
    answer = await client.ask("POST", f"{UPLOADS}?digest={wrong}", CONTENT)
    assert (answer.status, answer.code) == (400, "DIGEST_INVALID")
    assert (await client.ask("HEAD", f"{APP}/blobs/{wrong}")).status == 404
    assert private(client.site, "partial") == private(client.site, "blobs/*/*") == []


def private(site: Site, pattern: str) -> list[Path]:
    return list((site.directory / "private").glob(f"{pattern}/*"))


@pytest.mark.parametrize("given", ["sha512", "sha256"])
async def test_the_algorithm_may_be_told_beforehand(client: Client, given: str) -> None:
    for algorithm in ("sha256", "sha512"):
        digest = Digest.of(CONTENT, algorithm)
        session = await client.started(f"?digest-algorithm={given}")
        answer = await client.ask("PATCH", session, CONTENT[:1000])
        answer = await client.ask("PUT", f"{answer.location}?digest={digest}", CONTENT[1000:])
        assert answer.status == 201
        assert (await client.ask("GET", f"{APP}/blobs/{digest}")).body == CONTENT
    answer = await client.ask("POST", f"{UPLOADS}?digest-algorithm=md5")
    assert (answer.status, answer.code) == (400, "DIGEST_INVALID")


@pytest.mark.parametrize("body", [b"", CONTENT], ids=["empty", "with the last chunk"])
async def test_the_end_of_an_upload_may_be_repeated(client: Client, body: bytes) -> None:
    session = await client.started()
    if not body:
        await client.ask("PATCH", session, CONTENT)
    first, second = await asyncio.gather(
        *(client.ask("PUT", f"{session}?digest={DIGEST}", body) for _ in range(2))
    )
    third = await client.ask("PUT", f"{session}?digest={DIGEST}", body)  # of whom the answer did not reach
    # 404 between the blob's commit and its link.
    assert sorted([first.status, second.status]) in ([201, 201], [201, 404])
    assert (third.status, third.location) == (201, f"{APP}/blobs/{DIGEST}")
    for digest in (Digest.of(b"other"), "sha256:x"):
        assert (await client.ask("PUT", f"{session}?digest={digest}")).code == "BLOB_UPLOAD_UNKNOWN"
    await client.ask("DELETE", f"{APP}/blobs/{DIGEST}")
    assert (await client.ask("PUT", f"{session}?digest={DIGEST}", body)).code == "BLOB_UPLOAD_UNKNOWN"


async def test_a_cancelled_upload(client: Client) -> None:
    session = await client.started()
    await client.ask("PATCH", session, CONTENT)
    answer = await client.ask("DELETE", session)
    assert (answer.status, answer.body) == (204, b"")
    for method in ("GET", "HEAD", "PATCH", "PUT", "DELETE"):
        assert (await client.ask(method, f"{session}?digest={DIGEST}")).status == 404
    assert (await client.ask("GET", session)).code == "BLOB_UPLOAD_UNKNOWN"
    assert private(client.site, "partial") == []


async def test_an_upload_is_of_its_repository_only(client: Client) -> None:
    session = await client.started()
    answer = await client.ask("GET", session.replace("team/app", "team/other"))
    assert (answer.status, answer.code) == (404, "BLOB_UPLOAD_UNKNOWN")
    await client.ask("DELETE", session)


async def test_an_upload_is_resumed_after_a_cut_request(client: Client) -> None:
    session = await client.started()
    ear = Ear()
    async with connect(client.site.url) as wire:
        lines = (f"PATCH {session} HTTP/1.1", "Host: x", f"Content-Length: {len(CONTENT)}", "", "")
        await wire.send("\r\n".join(lines).encode() + CONTENT[:100_000])
    assert (await ear.heard("request.served", method="PATCH"))["status"] == 499
    answer = await client.ask("GET", session)
    have = int(answer.headers["Range"].removeprefix("0-")) + 1
    assert have <= 100_000
    rest = CONTENT[have:] if have > 1 else CONTENT
    answer = await client.ask("PUT", f"{session}?digest={DIGEST}", rest)
    assert answer.status == 201


async def test_who_sends_nothing_is_let_go(serve: Serve, upstream: Upstream) -> None:
    site = await serve(upstream, more={"local": {"store": {}}}, top={"limits": {"client_timeout": "50ms"}})
    client = Client(site)
    session = await client.started()
    async with connect(site.url) as wire:
        reply = await wire.ask("PATCH", session, "Content-Length: 10")
        assert (reply.status, json.loads(reply.body)["errors"][0]["code"]) == (408, "BLOB_UPLOAD_INVALID")
    await client.ask("DELETE", session)


async def test_a_body_is_asked_for_when_it_is_wanted(client: Client) -> None:
    session = await client.started()
    async with connect(client.site.url) as wire:
        lines = ["Host: x", "Expect: 100-continue", f"Content-Length: {len(CONTENT)}", "", ""]
        await wire.send("\r\n".join([f"PUT {session}?digest={DIGEST} HTTP/1.1", *lines]).encode())
        assert (await wire.head())[0] == 100
        await wire.send(CONTENT)
        assert (await wire.reply()).status == 201
        lines[0] = "Content-Range: 5-9"
        session = await client.started()
        await wire.send("\r\n".join([f"PUT {session}?digest={DIGEST} HTTP/1.1", "Host: x", *lines]).encode())
        assert (await wire.head())[0] == 416
    await client.ask("DELETE", session)


async def test_two_requests_for_one_upload_come_one_after_the_other(client: Client) -> None:
    session = await client.started()
    parts = [bytes([number]) * 1000 for number in range(8)]
    answers = await asyncio.gather(*(client.ask("PATCH", session, part) for part in parts))
    assert [each.status for each in answers] == [202] * 8
    whole = b"".join(parts[i] for i in sorted(range(8), key=lambda i: int(answers[i].headers["Range"][2:])))
    answer = await client.ask("PUT", f"{session}?digest={Digest.of(whole)}")
    assert answer.status == 201


async def test_one_blob_pushed_by_many_at_once(client: Client) -> None:
    answers = await asyncio.gather(
        *(client.ask("POST", f"{UPLOADS}?digest={DIGEST}", CONTENT) for _ in range(8))
    )
    assert [each.status for each in answers] == [201] * 8
    assert (await client.ask("GET", f"{APP}/blobs/{DIGEST}")).body == CONTENT
    assert private(client.site, "partial") == []


async def test_locations_keep_prefix_and_namespace(client: Client) -> None:
    for path, expected in (
        ("/local/v2/team/app/blobs/uploads/", "/local/v2/team/app/blobs/uploads/{id}"),
        ("/v2/team/app/blobs/uploads/?ns=local", "/v2/team/app/blobs/uploads/{id}?ns=local"),
    ):
        answer = await client.ask("POST", path)
        assert answer.location == expected.format(id=answer.headers["Docker-Upload-UUID"])
        separator = "&" if "?" in answer.location else "?"
        answer = await client.ask("PUT", f"{answer.location}{separator}digest={DIGEST}", CONTENT)
        assert answer.status == 201
        assert (await client.ask("GET", answer.location)).body == CONTENT


async def test_the_access_line_tells_what_was_taken(client: Client) -> None:
    ear = Ear()
    await client.blob(CONTENT)
    said = await ear.heard("request.served", method="POST")
    assert (said["received"], said["bytes"], said["namespace"]) == (len(CONTENT), 0, "local")
    assert f'entrepot_pushed_bytes_total{{namespace="local"}} {float(len(CONTENT))}' in (
        await client.site.metrics()
    )


# Mounts


async def test_a_mount(client: Client) -> None:
    await client.blob(CONTENT, "local/team/other")
    answer = await client.ask("POST", f"{UPLOADS}?mount={DIGEST}&from=local/team/other")
    assert (answer.status, answer.location) == (201, f"{APP}/blobs/{DIGEST}")
    assert answer.headers["Docker-Content-Digest"] == DIGEST
    assert (await client.ask("GET", answer.location)).body == CONTENT


async def test_a_mount_from_wherever_it_is(client: Client) -> None:
    await client.blob(CONTENT, "local/team/other")
    answer = await client.ask("POST", f"{UPLOADS}?mount={DIGEST}")
    assert answer.status == 201
    assert (await client.ask("GET", f"{APP}/blobs/{DIGEST}")).body == CONTENT


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
@pytest.mark.parametrize("size", [0, 1, 3_000_000])
@pytest.mark.parametrize("source", ["docker.io/library/alpine", "library/alpine"])
async def test_a_mount_from_a_cache(
    client: Client, upstream: Upstream, source: str, size: int, warm: bool
) -> None:
    content = bytes(size)
    digest = upstream.blob("library/alpine", content)
    if warm:
        assert (await client.ask("GET", f"/v2/library/alpine/blobs/{digest}")).body == content
    ear = Ear()
    answer = await client.ask("POST", f"{UPLOADS}?mount={digest}&from={source}")
    assert (answer.status, answer.location) == (201, f"{APP}/blobs/{digest}")
    assert answer.headers["Docker-Content-Digest"] == digest
    assert (await ear.heard("request.served", method="POST"))["detail"] == "mounted"
    await upstream.stop()
    assert (await client.ask("GET", answer.location)).body == content
    assert upstream.log == [f"GET blob library/alpine@{digest[:19]}"]
    assert private(client.site, "partial") == []


async def test_a_mount_from_a_store_into_a_cache(client: Client, upstream: Upstream) -> None:
    await client.blob(CONTENT)
    answer = await client.ask("POST", f"/v2/library/alpine/blobs/uploads/?mount={DIGEST}&from=local/team/app")
    assert answer.status == 405
    assert upstream.log == []


async def test_an_image_is_copied_out_of_a_cache(client: Client, upstream: Upstream) -> None:
    found = upstream.image("library/alpine", "latest", layers=(b"one" * 1000, b"two" * 1000))
    for digest in (found.config, *found.layers):
        answer = await client.ask("POST", f"{UPLOADS}?mount={digest}&from=docker.io/library/alpine")
        assert answer.status == 201
    assert (await client.manifest("v1", found.content)).status == 201


@pytest.mark.errors("fill.failed")  # of the corrupt one
@pytest.mark.parametrize("fault", [Status(500), Status(404), Status(403), Corrupt()])
async def test_a_mount_from_a_cache_that_cannot_get_the_blob(
    client: Client, upstream: Upstream, fault: Any
) -> None:
    digest = upstream.blob("library/alpine", CONTENT)
    upstream.next("GET", digest, fault, times=100)
    answer = await client.ask("POST", f"{UPLOADS}?mount={digest}&from=docker.io/library/alpine")
    assert answer.status == 202
    assert (await client.ask("GET", f"{APP}/blobs/{DIGEST}")).status == 404
    answer = await client.ask("PUT", f"{answer.location}?digest={DIGEST}", CONTENT)
    assert answer.status == 201


async def test_a_copy_ends_if_the_client_leaves(client: Client, upstream: Upstream) -> None:
    digest = upstream.blob("library/alpine", content := bytes(1_000_000))
    gate = asyncio.Event()
    upstream.next("GET", digest, hold := Hold(gate, after=500_000))
    ear = Ear()
    async with connect(client.site.url) as wire:
        path = f"{UPLOADS}?mount={digest}&from=docker.io/library/alpine"
        await wire.send(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode())
        await hold.reached.wait()
    assert (await ear.heard("request.served", method="POST"))["status"] == 499
    gate.set()
    assert (await client.ask("GET", f"/v2/library/alpine/blobs/{digest}")).body == content
    assert (await client.ask("GET", f"{APP}/blobs/{digest}")).status == 404
    assert private(client.site, "partial") == []


@pytest.mark.parametrize(
    "query",
    [
        f"mount={DIGEST}&from=local/nowhere",
        f"mount={DIGEST}",
        f"mount={DIGEST}&from=library/alpine",
        f"mount={DIGEST}&from=nowhere.example/x",
        f"mount={DIGEST}&from=Not%20A%20Name",
        "mount=nonsense&from=local/team/other",
    ],
    ids=[
        "from where it is not",
        "from anywhere",
        "from upstream",
        "from nowhere",
        "from no name",
        "no digest",
    ],
)
async def test_what_cannot_be_mounted_is_uploaded(client: Client, query: str) -> None:
    answer = await client.ask("POST", f"{UPLOADS}?{query}")
    assert answer.status == 202
    answer = await client.ask("PUT", f"{answer.location}?digest={DIGEST}", CONTENT)
    assert answer.status == 201


# Manifests


@pytest.mark.parametrize("kind", [OCI_MANIFEST, DOCKER_MANIFEST])
async def test_a_manifest(client: Client, kind: str) -> None:
    content = image(await client.blob(b"layer"), config=await client.blob(b"{}"), mediaType=kind)
    digest = Digest.of(content)
    for reference in ("v1", digest):
        answer = await client.manifest(reference, content, f"{kind}; charset=utf-8")
        assert (answer.status, answer.body) == (201, b"")
        assert answer.location == f"{APP}/manifests/{digest}"
        assert answer.headers["Docker-Content-Digest"] == digest
        assert "OCI-Subject" not in answer.headers
        answer = await client.ask("GET", f"{APP}/manifests/{reference}")
        assert (answer.body, answer.headers["Content-Type"]) == (content, kind)
    assert client.site is not None


async def test_nothing_of_a_store_is_fresh_by_a_guess(client: Client) -> None:
    content = image(config=await client.blob(b"{}"))
    await client.manifest("v1", content)
    answer = await client.ask("GET", f"{APP}/manifests/v1")
    assert answer.headers["Cache-Control"] == "no-cache"


async def test_a_manifest_says_itself_what_it_is(client: Client) -> None:
    content = image(config=await client.blob(b"{}"))
    async with client.site.request(
        "PUT", f"{APP}/manifests/v1", data=content, skip_auto_headers=["Content-Type"]
    ) as response:
        assert response.status == 201
    answer = await client.ask("GET", f"{APP}/manifests/v1")
    assert answer.headers["Content-Type"] == OCI_MANIFEST


async def test_what_a_manifest_names_is_to_be_there(client: Client) -> None:
    lacking = [Digest.of(b"one"), Digest.of(b"two"), Digest.of(b"{}")]
    content = image(*lacking[:2])
    answer = await client.manifest("v1", content)
    errors = json.loads(answer.body)["errors"]
    assert answer.status == 400
    assert [(each["code"], each["detail"]["digest"]) for each in errors] == [
        ("MANIFEST_BLOB_UNKNOWN", digest) for digest in (lacking[2], *lacking[:2])
    ]
    await client.blob(b"one", "local/elsewhere")  # of another repository it does not count
    await client.blob(b"two")
    await client.blob(b"{}")
    answer = await client.manifest("v1", content)
    assert [each["detail"]["digest"] for each in json.loads(answer.body)["errors"]] == [lacking[0]]
    await client.blob(b"one")
    assert (await client.manifest("v1", content)).status == 201


@pytest.mark.errors("blob.missing")  # where the scrub finds it meanwhile
async def test_a_blob_that_vanished_from_the_disk_is_lacking(client: Client) -> None:
    digest = await client.blob(b"{}")
    for path in private(client.site, "blobs/*/*"):
        path.unlink()
    assert (await client.manifest("v1", image())).code == "MANIFEST_BLOB_UNKNOWN"
    assert (await client.ask("HEAD", f"{APP}/blobs/{digest}")).status == 404
    await client.blob(b"{}")
    assert (await client.manifest("v1", image())).status == 201


@pytest.mark.parametrize("kind", [OCI_INDEX, DOCKER_LIST])
async def test_an_index(client: Client, kind: str) -> None:
    await client.blob(b"{}")
    child, other = image(), image(annotations={"a": "b"})
    content = index(child, other, kind=kind)
    nested = index(content)
    assert (await client.manifest(Digest.of(child), child)).status == 201
    assert (await client.manifest("v1", content, kind)).code == "MANIFEST_BLOB_UNKNOWN"
    assert (await client.manifest(Digest.of(other), other)).status == 201
    assert (await client.manifest("v1", content, kind)).status == 201
    assert (await client.manifest("nested", nested, OCI_INDEX)).status == 201
    assert (await client.ask("GET", f"{APP}/manifests/nested")).body == nested


async def test_an_index_of_blobs(client: Client) -> None:
    """As BuildKit exports its cache, unless it is told to write an image."""
    content = index(b"a layer", b"another")
    await client.blob(b"a layer")
    assert (await client.manifest("cache", content, OCI_INDEX)).code == "MANIFEST_BLOB_UNKNOWN"
    await client.blob(b"another")
    assert (await client.manifest("cache", content, OCI_INDEX)).status == 201


@pytest.mark.parametrize("kind", ARTIFACTS)
@pytest.mark.parametrize("declared", [True, False])
async def test_an_artifact_of_blobs(client: Client, kind: str, declared: bool) -> None:
    blob = {"mediaType": "text/plain", "digest": Digest.of(b"notes"), "size": 5}
    body = {"blobs": [blob], **({"mediaType": kind} if declared else {})}
    content = json.dumps(body).encode()
    assert (await client.manifest("v1", content, kind)).code == "MANIFEST_BLOB_UNKNOWN"
    await client.blob(b"notes")
    assert (await client.manifest("v1", content, kind)).status == 201


@pytest.mark.parametrize("kind", [OCI_MANIFEST, OCI_INDEX, "application/vnd.example.thing"])
@pytest.mark.parametrize(
    "more",
    [
        b'"layers": [], "Layers": [{"mediaType": "a/b", "digest": "%s", "size": 1}]',
        b'"LAYERS": [{"mediaType": "a/b", "digest": "%s", "size": 1}]',
        b'"manifests": [], "manifests": [{"mediaType": "a/b", "digest": "%s", "size": 1}]',
        b'"subject": {"mediaType": "a/b", "digest": "%s", "size": 1, "Digest": "none"}',
    ],
)
async def test_keys_that_clients_read_differently_are_refused(client: Client, kind: str, more: bytes) -> None:
    digest = await client.blob(b"{}")
    content = b'{"schemaVersion": 2, %s}' % (more % digest.encode())
    answer = await client.manifest("v1", content, kind)
    assert (answer.status, answer.code) == (400, "MANIFEST_INVALID")
    assert (await client.ask("GET", f"{APP}/manifests/v1")).status == 404


async def test_an_index_of_manifests_of_another_type(client: Client) -> None:
    kind, thing = "application/vnd.example.thing+json", b'{"thing": 1}'
    listed = {"mediaType": kind, "digest": Digest.of(thing), "size": len(thing)}
    content = json.dumps({"schemaVersion": 2, "manifests": [listed]}).encode()
    assert (await client.manifest("things", content, OCI_INDEX)).code == "MANIFEST_BLOB_UNKNOWN"
    assert (await client.manifest(Digest.of(thing), thing, kind)).status == 201
    assert (await client.manifest("things", content, OCI_INDEX)).status == 201


async def test_layers_that_are_had_elsewhere_need_not_be_there(client: Client) -> None:
    await client.blob(b"{}")
    for kind in (
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
    ):
        layer = {"mediaType": kind, "digest": DIGEST, "size": 5, "urls": ["https://x.example/layer"]}
        assert (await client.manifest("v1", image(layers=[layer]))).status == 201


async def test_with_sparse_anything_may_lack(serve: Serve, upstream: Upstream) -> None:
    client = Client(await serve(upstream, more={"local": {"store": {"sparse": True}}}))
    assert (await client.manifest("v1", image(DIGEST))).status == 201
    assert (await client.manifest("v2", index(image()), OCI_INDEX)).status == 201


async def test_other_types_are_kept_as_they_are(client: Client) -> None:
    await client.blob(b"{}")
    assert (await client.manifest("v1", NEGATIVE, "application/vnd.example.thing")).status == 201
    for content in (b"no JSON \0\xff", b"{}", b"[]"):
        answer = await client.manifest("v1", content, "application/vnd.example.thing")
        assert answer.status == 201
        answer = await client.ask("GET", f"{APP}/manifests/{Digest.of(content)}")
        assert (answer.body, answer.headers["Content-Type"]) == (content, "application/vnd.example.thing")


@pytest.mark.parametrize(
    ("content", "kind", "status", "code"),
    [
        (b"no JSON", OCI_MANIFEST, 400, "MANIFEST_INVALID"),
        (b"", OCI_INDEX, 400, "MANIFEST_INVALID"),
        (b'{"manifests": 7}', OCI_INDEX, 400, "MANIFEST_INVALID"),
        (NEGATIVE, OCI_INDEX, 400, "MANIFEST_INVALID"),
        (index(kind=OCI_INDEX), OCI_MANIFEST, 400, "MANIFEST_INVALID"),
        (index(kind=OCI_INDEX), "", 201, ""),
        (b"{}", "", 400, "MANIFEST_INVALID"),
        (b"x" * (MANIFEST_LIMIT + 1), OCI_MANIFEST, 413, "MANIFEST_INVALID"),
    ],
)
async def test_a_manifest_that_is_none(
    client: Client, content: bytes, kind: str, status: int, code: str
) -> None:
    answer = await client.manifest("v1", content, kind)
    assert answer.status == status
    if code:
        assert answer.code == code
        assert (await client.ask("GET", f"{APP}/manifests/v1")).status == 404


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize(
    "kind",
    [
        "application/octet-stream",
        "text/plain; charset=utf-8",
        "text/html",
        "multipart/form-data; boundary=x",
        "image/svg+xml",
        "application/xhtml+xml",
        "Application/JSON",
        "application/x-tar",
        "json",
        "application/",
        "application/x y",
    ],
)
async def test_a_type_that_is_no_manifests(client: Client, kind: str, declared: bool) -> None:
    content = image(config=await client.blob(b"{}"), **({} if declared else {"mediaType": None}))
    answer = await client.manifest("v1", content, kind)
    assert (answer.status, answer.code) == (400, "MANIFEST_INVALID")
    assert (await client.ask("GET", f"{APP}/manifests/v1")).status == 404
    assert (await client.ask("GET", f"{APP}/manifests/{Digest.of(content)}")).status == 404
    assert (await client.manifest("v1", content)).status == 201


@pytest.mark.parametrize(
    ("members", "kind"),
    [
        ({"mediaType": OCI_MANIFEST}, DOCKER_MANIFEST),
        ({"mediaType": OCI_MANIFEST}, "application/vnd.example.thing+json"),
        ({"mediaType": "application/vnd.example.thing+json"}, OCI_MANIFEST),
        ({"mediaType": OCI_MANIFEST, "layers": 7}, "application/vnd.example.thing+json"),
        ({"mediaType": "application/vnd.example.thing+json"}, OCI_INDEX),
        ({"manifests": []}, OCI_MANIFEST),
        ({"manifests": []}, DOCKER_MANIFEST),
        ({"mediaType": OCI_MANIFEST, "layers": [], "manifests": [THING]}, OCI_MANIFEST),
        ({"layers": [THING]}, OCI_INDEX),
        ({"config": THING}, DOCKER_LIST),
        ({"mediaType": OCI_INDEX, "manifests": [], "config": THING}, OCI_INDEX),
    ],
)
async def test_a_manifest_of_another_type(client: Client, members: dict[str, Any], kind: str) -> None:
    await client.blob(b"{}")
    content = json.dumps({"schemaVersion": 2, **members}).encode()
    answer = await client.manifest("v1", content, kind)
    assert (answer.status, answer.code) == (400, "MANIFEST_INVALID")
    assert (await client.ask("GET", f"{APP}/manifests/v1")).status == 404


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_no_browser_guesses_what_was_pushed(client: Client, method: str) -> None:
    await client.manifest("v1", b"<script>", "application/vnd.example.thing")
    await client.blob(CONTENT)
    for path in (f"{APP}/manifests/v1", f"{APP}/blobs/{DIGEST}", f"{APP}/tags/list", f"{APP}/manifests/none"):
        assert (await client.ask(method, path)).headers["X-Content-Type-Options"] == "nosniff"


# Content-Encoding


@pytest.mark.parametrize("coding", ["gzip", "GZIP", "deflate", "br", "zstd", "identity, gzip", "aws-chunked"])
async def test_what_is_encoded_is_refused(client: Client, coding: str) -> None:
    body = gzip.compress(CONTENT)
    session = await client.started()
    assert (await client.ask("PATCH", session, b"12345")).status == 202
    for method, path in (
        ("POST", f"{UPLOADS}?digest={Digest.of(body)}"),
        ("PATCH", session),
        ("PUT", f"{session}?digest={Digest.of(body)}"),
        ("PUT", f"{APP}/manifests/v1"),
    ):
        answer = await client.ask(method, path, body, Content_Encoding=coding, Content_Type=OCI_MANIFEST)
        assert (answer.status, answer.code) == (415, "UNSUPPORTED")
        assert answer.headers["Accept-Encoding"] == "identity"
    assert (await client.ask("GET", session)).headers["Range"] == "0-4"
    assert (await client.ask("GET", f"{APP}/blobs/{Digest.of(body)}")).status == 404
    answer = await client.ask("PUT", f"{session}?digest={Digest.of(b'12345')}", Content_Encoding="identity")
    assert answer.status == 201


async def test_a_compressed_blob_is_what_was_sent(client: Client) -> None:
    body = gzip.compress(CONTENT)
    digest = await client.blob(body)
    assert (await client.ask("GET", f"{APP}/blobs/{digest}", b"x", Content_Encoding="gzip")).body == body


async def test_a_large_manifest_without_a_length(client: Client) -> None:
    async def stream(size: int) -> AsyncIterator[bytes]:
        for _ in range(size // 1000):
            yield b" " * 1000

    answer = await client.manifest("v1", stream(MANIFEST_LIMIT + 100_000), "application/x")  # type: ignore[arg-type]
    assert (answer.status, answer.code) == (413, "MANIFEST_INVALID")
    answer = await client.manifest("v1", stream(MANIFEST_LIMIT - 1000), "application/x")  # type: ignore[arg-type]
    assert answer.status == 201


@pytest.mark.parametrize("reference", ["sha256:baddigeststring", Digest.of(b"other"), ".bad", "x" * 129])
async def test_a_reference_that_does_not_fit(client: Client, reference: str) -> None:
    await client.blob(b"{}")
    answer = await client.manifest(reference, image())
    assert answer.status == 400
    assert answer.code == ("DIGEST_INVALID" if ":" in reference else "TAG_INVALID")


async def test_several_tags_at_once(client: Client) -> None:
    await client.blob(b"{}")
    content = image()
    tags = ["v1", "v1.2", "latest", *(f"t{number}" for number in range(20))]
    query = "&".join(f"tag={tag}" for tag in tags)
    answer = await client.manifest(f"{Digest.of(content)}?{query}", content)
    assert (answer.status, answer.headers["OCI-Tag"].split(", ")) == (201, tags)
    listed = json.loads((await client.ask("GET", f"{APP}/tags/list")).body)
    assert listed == {"name": "local/team/app", "tags": sorted(tags)}
    answer = await client.manifest(f"{Digest.of(content)}?tag=ok&tag=.bad", content)
    assert (answer.status, answer.code) == (400, "TAG_INVALID")
    assert (await client.ask("GET", f"{APP}/manifests/ok")).status == 404


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
async def test_immutable_tags(serve: Serve, upstream: Upstream, method: str) -> None:
    rules = {"store": {"immutable_tags": ["v*", "re:[0-9]+"]}}
    client = Client(await serve(upstream, more={"local": rules}))
    await client.blob(b"{}")
    first, second = image(), image(annotations={"a": "b"})
    for tag in ("v1", "7", "latest"):
        assert (await client.manifest(tag, first)).status == 201
        assert (await client.manifest(tag, first)).status == 201  # the same once more moves nothing
    for tag in ("v1", "7"):
        if method == "PUT":
            answers = [await client.manifest(tag, second)]
            answers += [await client.manifest(f"{Digest.of(second)}?tag=new&tag={tag}", second)]
        else:
            answers = [await client.ask("DELETE", f"{APP}/manifests/{tag}")]
            answers += [await client.ask("DELETE", f"{APP}/manifests/{Digest.of(first)}")]
        for answer in answers:
            assert (answer.status, answer.code) == (403, "DENIED")
            assert b"immutable" in answer.body
        assert (await client.ask("GET", f"{APP}/manifests/{tag}")).body == first
    assert (await client.ask("GET", f"{APP}/manifests/new")).status == 404
    if method == "PUT":
        assert (await client.manifest("latest", second)).status == 201
    else:
        assert (await client.ask("DELETE", f"{APP}/manifests/latest")).status == 202


# Referrers


async def test_referrers(client: Client) -> None:
    await client.blob(b"{}")
    subject = image()
    described = {"mediaType": OCI_MANIFEST, "digest": Digest.of(subject), "size": len(subject)}
    signature = image(artifactType="a/signature", subject=described, annotations={"k": "v"})
    listing = index(subject=described, artifactType="a/listing")
    for content, kind in ((signature, OCI_MANIFEST), (listing, OCI_INDEX)):  # before the subject is there
        answer = await client.manifest(Digest.of(content), content, kind)
        assert answer.headers["OCI-Subject"] == Digest.of(subject)
    found = await client.ask("GET", f"{APP}/referrers/{Digest.of(subject)}")
    assert (found.status, found.headers["Content-Type"]) == (200, OCI_INDEX)
    expected = {Digest.of(signature): "a/signature", Digest.of(listing): "a/listing"}
    assert {each["digest"]: each["artifactType"] for each in json.loads(found.body)["manifests"]} == expected
    found = await client.ask("GET", f"{APP}/referrers/{Digest.of(subject)}?artifactType=a/listing")
    assert found.headers["OCI-Filters-Applied"] == "artifactType"
    assert [each["digest"] for each in json.loads(found.body)["manifests"]] == [Digest.of(listing)]
    await client.ask("DELETE", f"{APP}/manifests/{Digest.of(signature)}")
    found = await client.ask("GET", f"{APP}/referrers/{Digest.of(subject)}")
    assert [each["digest"] for each in json.loads(found.body)["manifests"]] == [Digest.of(listing)]
    found = await client.ask("GET", f"{APP}/referrers/{DIGEST}")
    assert (found.status, json.loads(found.body)["manifests"]) == (200, [])


async def test_referrers_that_a_client_listed_under_a_tag(client: Client) -> None:
    """distribution-spec, "Enabling the Referrers API": what the fallback tag names is taken in."""
    await client.blob(b"{}")
    subject, listed, lost = image(), image(annotations={"k": "v"}), image(annotations={"lost": ""})
    for each in (subject, listed, lost):
        await client.manifest(Digest.of(each), each)
    tag = str(Digest.of(subject)).replace(":", "-")
    assert (await client.manifest(tag, index(listed, lost), OCI_INDEX)).status == 201
    await client.ask("DELETE", f"{APP}/manifests/{Digest.of(lost)}")
    found = await client.ask("GET", f"{APP}/referrers/{Digest.of(subject)}")
    assert [each["digest"] for each in json.loads(found.body)["manifests"]] == [Digest.of(listed)]


async def test_pages_of_referrers_by_record_and_by_tag(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some clients list referrers under the fallback tag, others push them with a subject."""
    await client.blob(b"{}")
    subject = {"mediaType": OCI_MANIFEST, "digest": DIGEST, "size": 5}
    recorded = [image(artifactType="a/recorded", subject=subject, n=n) for n in range(5)]
    listed = [image(artifactType="a/listed", n=n) for n in range(5, 10)]
    for each in (*recorded, *listed):
        await client.manifest(Digest.of(each), each)
    both = [*listed, recorded[2]]
    assert (await client.manifest(DIGEST.replace(":", "-"), index(*both), OCI_INDEX)).status == 201
    parsed, real = [0], graph.parse_manifest

    def counted(content: bytes) -> ManifestContent:
        parsed[0] += 1
        return real(content)

    monkeypatch.setattr(graph, "parse_manifest", counted)
    digests = sorted(map(Digest.of, (*recorded, *listed)))
    last, pages = "", []
    for _ in range(4):
        found = await client.ask("GET", f"{APP}/referrers/{DIGEST}?n=3&last={last}")
        pages.append([each["digest"] for each in json.loads(found.body)["manifests"]])
        last = pages[-1][-1]
    assert pages == [digests[start : start + 3] for start in (0, 3, 6, 9)]
    assert parsed == [1]


async def test_referrers_page_by_page(client: Client) -> None:
    await client.blob(b"{}")
    described = {"mediaType": OCI_MANIFEST, "digest": DIGEST, "size": 5}
    all_of_them = [image(artifactType=f"a/{n % 2}", subject=described, n=n) for n in range(7)]
    for each in all_of_them:
        await client.manifest(Digest.of(each), each)
    for query, wanted in (("n=2", all_of_them), ("artifactType=a/1&n=2", all_of_them[1::2])):
        pages: list[list[str]] = []
        path: str | None = f"{APP}/referrers/{DIGEST}?{query}"
        while path:
            found = await client.ask("GET", path)
            assert found.status == 200
            pages.append([each["digest"] for each in json.loads(found.body)["manifests"]])
            link = found.headers.get("Link")
            path = link[1 : link.index(">")] if link else None
        assert [len(page) for page in pages] == [2] * (len(wanted) // 2) + [1] * (len(wanted) % 2)
        assert sorted(chain(*pages)) == sorted(Digest.of(each) for each in wanted)


# Deletion, and listings


async def test_deleting(client: Client) -> None:
    config = await client.blob(b"{}")
    content = image()
    for tag in ("v1", "v2", "v3"):
        await client.manifest(tag, content)
    answer = await client.ask("DELETE", f"{APP}/manifests/v1")
    assert (answer.status, answer.body, answer.headers["Content-Length"]) == (202, b"", "0")
    assert (await client.ask("GET", f"{APP}/manifests/v1")).code == "MANIFEST_UNKNOWN"
    assert (await client.ask("DELETE", f"{APP}/manifests/v1")).code == "MANIFEST_UNKNOWN"
    assert (await client.ask("GET", f"{APP}/manifests/{Digest.of(content)}")).status == 200
    assert (await client.ask("DELETE", f"{APP}/manifests/{Digest.of(content)}")).status == 202
    for reference in ("v2", Digest.of(content)):
        assert (await client.ask("GET", f"{APP}/manifests/{reference}")).status == 404
    assert json.loads((await client.ask("GET", f"{APP}/tags/list")).body)["tags"] == []
    assert (await client.ask("DELETE", f"{APP}/blobs/{config}")).status == 202
    assert (await client.ask("GET", f"{APP}/blobs/{config}")).code == "BLOB_UNKNOWN"
    assert (await client.ask("DELETE", f"{APP}/blobs/{config}")).code == "BLOB_UNKNOWN"
    assert (await client.ask("GET", f"{APP}/tags/list")).code == "NAME_UNKNOWN"


async def test_the_catalog_has_both_kinds(client: Client, upstream: Upstream) -> None:
    upstream.image("library/alpine", "latest")
    assert (await client.ask("GET", "/v2/library/alpine/manifests/latest")).status == 200
    await client.blob(b"{}")
    for name in ("team/app", "a"):
        digest = await client.blob(b"{}", f"local/{name}")
        assert digest
        answer = await client.ask("PUT", f"/v2/local/{name}/manifests/v1", image(), Content_Type=OCI_MANIFEST)
        assert answer.status == 201
    listed = json.loads((await client.ask("GET", "/v2/_catalog")).body)
    assert listed == {"repositories": ["docker.io/library/alpine", "local/a", "local/team/app"]}
    listed = json.loads((await client.ask("GET", "/v2/_catalog?n=1&last=docker.io/z")).body)
    assert listed == {"repositories": ["local/a"]}


async def test_a_store_may_be_the_default(serve: Serve, upstream: Upstream) -> None:
    client = Client(await serve(upstream, more={"local": {"store": {}}}, top={"default_namespace": "local"}))
    digest = await client.blob(b"{}", "app")
    assert (await client.ask("GET", f"/v2/local/app/blobs/{digest}")).status == 200
    assert (await client.ask("GET", f"/v2/docker.io/app/blobs/{digest}")).status == 404


async def test_the_namespace_is_told_where_it_was_asked_for(client: Client) -> None:
    await client.blob(CONTENT)
    for path in (f"blobs/{DIGEST}", "blobs/" + Digest.of(b"none"), "tags/list"):
        assert (await client.ask("GET", f"/v2/team/app/{path}?ns=local")).headers["OCI-Namespace"] == "local"
        assert "OCI-Namespace" not in (await client.ask("GET", f"{APP}/{path}")).headers


# Several processes


async def pushed(
    worker: Worker, method: str, path: str, body: bytes = b"", **headers: str
) -> tuple[int, str]:
    async with worker.ask(path, method, body, **headers) as response:
        return response.status, response.headers.get("Location", "")


@pytest.mark.clients
async def test_an_upload_is_resumed_by_any_worker(place: Place) -> None:  # noqa: F811
    place.tree |= {"access": OPEN}
    place.tree["namespaces"]["local"] = {"store": {}}
    server = await place.start()
    one, two = await server.workers()
    _, location = await pushed(one, "POST", UPLOADS)
    for number, start in enumerate(range(0, len(CONTENT), 100_000)):
        worker = (one, two)[number % 2]
        part = CONTENT[start : start + 100_000]
        status, location = await pushed(
            worker, "PATCH", location, part, Content_Range=f"{start}-{start + len(part) - 1}"
        )
        assert status == 202
    status, location = await pushed(two, "PUT", f"{location}?digest={DIGEST}")
    assert status == 201
    for worker in (one, two):
        assert await worker.get(location) == CONTENT
    await server.stop()


@pytest.mark.clients
async def test_workers_push_one_tag_at_once(place: Place) -> None:  # noqa: F811
    """Whichever is last, tag and manifest belong together."""
    place.tree |= {"access": OPEN}
    place.tree["namespaces"]["local"] = {"store": {}}
    server = await place.start()
    workers = await server.workers()
    config = f"{UPLOADS}?digest={Digest.of(b'{}')}"
    assert (await pushed(workers[0], "POST", config, b"{}"))[0] == 201
    contents = [image(n=number) for number in range(20)]

    async def push(worker: Worker, some: list[bytes]) -> None:
        for content in some:
            status, _ = await pushed(
                worker, "PUT", f"{APP}/manifests/latest", content, Content_Type=OCI_MANIFEST
            )
            assert status == 201
            found = await worker.get(f"{APP}/manifests/latest")
            assert found in contents

    await asyncio.gather(push(workers[0], contents[::2]), push(workers[1], contents[1::2]))
    for content in contents:
        assert await workers[1].get(f"{APP}/manifests/{Digest.of(content)}") == content
    await server.stop()


@pytest.mark.parametrize("span", ["14-13", "0-0", "14-14", "0--1"])
async def test_no_range_describes_an_empty_last_chunk(client: Client, span: str) -> None:
    session = await client.started()
    assert (await client.ask("PATCH", session, CONTENT)).status == 202
    answer = await client.ask("PUT", f"{session}?digest={DIGEST}", b"", **{"Content-Range": span})
    assert answer.status == 201


async def test_an_empty_blob_with_a_range(client: Client) -> None:
    session = await client.started()
    target = f"{session}?digest={Digest.of(b'')}"
    assert (await client.ask("PUT", target, b"", **{"Content-Range": "0-0"})).status == 201

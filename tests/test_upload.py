"""Pushing to upstreams: where uploads go on, who is shown what, what is not repeated, and refusals."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from multidict import CIMultiDict
from yarl import URL

from proxy.telemetry.metrics import Metrics
from proxy.upstream.body import StreamedBody
from proxy.upstream.client import UpstreamRegistry as Client
from proxy.upstream.connect import Connect
from proxy.upstream.credentials import Credentials, Inline
from proxy.upstream.errors import OriginAway
from proxy.upstream.requests import RequestSender, UpstreamSettings
from proxy.upstream.upload import SMALL, UploadSession
from storage.errors import (
    BlobUnknown,
    BlobUploadInvalid,
    BlobUploadUnknown,
    DigestInvalid,
    ManifestBlobUnknown,
    ManifestInvalid,
    ManifestTooLarge,
    ManifestUnknown,
    NameInvalid,
    NameUnknown,
    OriginDenied,
    OriginFailed,
    OriginTimeout,
    RangeInvalid,
    RegistryError,
    SizeInvalid,
    TagInvalid,
    TooManyRequests,
    Unsupported,
)
from storage.oci import OCI_MANIFEST, Digest, Manifest, Tag
from storage.registry import Upload
from tests.upstream import (
    Basic,
    Bearer,
    ExpireToken,
    Fault,
    Redirect,
    Reset,
    RetryAfter,
    Status,
    Takes,
    Upstream,
    digest_of,
)

LARGE = bytes(range(253)) * (3 * SMALL // 253)
MANIFEST = Manifest.of(OCI_MANIFEST, b'{"schemaVersion": 2, "mediaType": "%s"}' % OCI_MANIFEST.encode())
WHO = Basic("who", "secret")
Push = Callable[..., Client]


@pytest.fixture
async def push() -> AsyncIterator[Push]:
    """A client of `url`."""
    async with AsyncExitStack() as stack:

        def to(url: str, credentials: Credentials | None = None, **connect: Any) -> Client:
            pushed_to = connect.pop("pushed_to", False)
            reach = Connect(plain_http=True, **{"private_redirects": True, **connect})
            settings = UpstreamSettings(url, reach, ("localhost",), pushed_to=pushed_to)
            made = Client("up", settings, [credentials or Credentials()], Metrics())
            stack.push_async_callback(made.close)
            return made

        yield to


@pytest.fixture
async def registry() -> AsyncIterator[Upstream]:
    async with Upstream(takes=Takes()) as registry:
        yield registry


async def sent(client: Client, content: bytes, repository: str = "a", algorithm: str = "sha256") -> Digest:
    upload = await client.start_upload(repository, len(content), algorithm)
    for start in range(0, len(content), 700_000):
        await upload.write(content[start : start + 700_000])
    return (await upload.commit(Digest.of(content, algorithm))).digest


# Uploads


@pytest.mark.parametrize(
    "takes", [Takes(), Takes(absolute=True), Takes(elsewhere=True)], ids=["relative", "absolute", "elsewhere"]
)
@pytest.mark.parametrize("content", [b"", b"content", LARGE], ids=["empty", "small", "large"])
async def test_a_blob_goes_where_it_is_told(
    push: Push, registry: Upstream, takes: Takes, content: bytes
) -> None:
    """Each location as it is, its query untouched; and our credentials go to nobody else."""
    registry.takes = takes
    registry.auth = WHO
    digest = await sent(push(registry.url, Inline("who", "secret")), content)
    assert registry.repositories["a"].blobs[digest] == content
    methods = [each.method for each in registry.requests if each.kind == "upload"]
    assert methods[-1] == "PUT"
    assert ("PATCH" in methods) == (len(content) > SMALL)  # what is small is one request less
    for each in registry.requests:
        if each.kind == "upload" and each.method != "POST":
            away = each.headers["Host"] in registry.cdn_url
            assert ("Authorization" in each.headers) != away


async def test_another_algorithm_is_said_beforehand(push: Push, registry: Upstream) -> None:
    digest = await sent(push(registry.url), b"content", algorithm="sha512")
    assert registry.repositories["a"].blobs[digest] == b"content"
    assert registry.log[0] == "POST upload a?digest-algorithm=sha512"
    assert registry.requests[0].headers["Content-Length"] == "0"


async def test_an_upload_is_cancelled(push: Push, registry: Upstream) -> None:
    for content in (b"content", LARGE):
        upload = await push(registry.url).start_upload("a")
        await upload.write(content)
        await upload.cancel()
    assert registry.uploads == []
    registry.next("DELETE", "upload", Status(404))
    await (await push(registry.url).start_upload("a")).cancel()  # that it is not there is as well


async def test_a_digest_that_is_not_the_contents(push: Push, registry: Upstream) -> None:
    upload = await push(registry.url).start_upload("a")
    await upload.write(b"Content")
    with pytest.raises(DigestInvalid, match="up answered 400 for a: DIGEST_INVALID provided digest did not"):
        await upload.commit(Digest.of(b"content"))
    assert registry.uploads == []


async def test_what_is_answered_before_it_has_come_is_heeded(push: Push) -> None:
    """A registry that refuses in the middle of a body need not read the rest."""
    body = json.dumps({"errors": [{"code": "SIZE_INVALID", "message": "layers have 1 MB here"}]}).encode()
    async with Rude(early=(413, body)) as rude:
        upload = await push(rude.url).start_upload("a")
        with pytest.raises(SizeInvalid, match="layers have 1 MB here"):
            while True:
                await upload.write(b"x" * SMALL)
        await upload.cancel()
    async with Rude(early=(202, b"")) as rude:
        upload = await push(rude.url).start_upload("a")
        with pytest.raises(OriginFailed):
            while True:
                await upload.write(b"x" * SMALL)
        await upload.cancel()


async def test_a_connection_that_breaks_ends_writing(push: Push) -> None:
    async with Rude(hang_up=True) as rude:
        upload = await push(rude.url).start_upload("a")
        with pytest.raises(OriginFailed):
            while True:
                await upload.write(b"x" * SMALL)
        await upload.cancel()


async def test_who_takes_nothing_is_given_up(push: Push) -> None:
    async with Rude() as rude:
        upload = await push(rude.url, progress_timeout=0.2).start_upload("a")
        with pytest.raises(OriginTimeout):
            while True:
                await upload.write(b"x" * SMALL)
        await upload.cancel()


async def test_who_writes_slowly_is_not(push: Push, registry: Upstream) -> None:
    """Only what is to leave has its time: for what is to come nobody there is to blame."""
    upload = await push(registry.url, progress_timeout=0.05, header_timeout=0.05).start_upload("a")
    await upload.write(LARGE)
    for _ in range(3):
        await asyncio.sleep(0.1)
        await upload.write(b"x")
    await upload.commit(Digest.of(LARGE + b"xxx"))


async def test_a_writer_waits_for_who_takes() -> None:
    outgoing, sending = StreamedBody(), asyncio.get_running_loop().create_future()
    taken = aiter(outgoing)
    await outgoing.put(b"1", sending)
    second = asyncio.create_task(outgoing.put(b"2", sending))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not second.done()
    assert await anext(taken) == b"1"
    await second
    third = asyncio.create_task(outgoing.put(b"3", sending))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not third.done()
    sending.set_result(None)  # nobody will take it any more
    await third


# Locations


@pytest.mark.parametrize(
    ("home", "location", "where"),
    [
        (
            "https://r.example",
            "/v2/a/blobs/uploads/1?_s=a%2Fb",
            "https://r.example/v2/a/blobs/uploads/1?_s=a%2Fb",
        ),
        ("https://r.example", "//r.example/u", "https://r.example/u"),
        ("https://r.example", "https://s3.example/u?X=a%20b", "https://s3.example/u?X=a%20b"),
        # A registry that does not know that there is TLS before it: we stay with TLS.
        ("https://r.example", "http://r.example/u?_s=%3D", "https://r.example/u?_s=%3D"),
        ("https://r.example:8443", "http://r.example/u", "https://r.example:8443/u"),
        ("http://r.example", "http://r.example/u", "http://r.example/u"),
    ],
)
async def test_locations(home: str, location: str, where: str) -> None:
    assert (await moved(home, location)).id == where


@pytest.mark.parametrize(
    "location", ["http://other.example/u", "ftp://r.example/u", "https://r.example:99999/u", "https://[/u"]
)
async def test_locations_that_lead_nowhere(location: str) -> None:
    with pytest.raises(OriginFailed):
        await moved("https://r.example", location)


async def moved(home: str, location: str) -> UploadSession:
    sender = RequestSender("up", UpstreamSettings(home), [Credentials()], Metrics())
    try:
        session = UploadSession(sender, "a")

        class Answer:
            status = 202
            url = URL(f"{home}/v2/a/blobs/uploads/")
            headers = CIMultiDict({"Location": location})

        session._moved(Answer())  # type: ignore[arg-type]
        return session
    finally:
        await sender.close()


# Tokens


async def test_tokens_allow_what_is_done(push: Push, registry: Upstream) -> None:
    registry.auth = Bearer(WHO, anonymous=False)
    client = push(registry.url, Inline("who", "secret"))
    digest = await sent(client, LARGE)
    await client.mount_blob("b", digest, "a")
    await client.push_manifest("b", Tag("1"), MANIFEST)
    assert await client.repositories() == ["a", "b"]
    await client.delete_manifest("b", Tag("1"))
    await client.delete_blob("b", digest)
    tokens = [each.reference for each in registry.requests if each.kind == "token"]
    assert tokens == [
        "repository:a:pull,push",
        "repository:b:pull,push repository:a:pull",
        "repository:b:pull",
        "repository:b:pull,push",
        "registry:catalog:*",
        "repository:b:delete",
    ]


async def test_what_is_pushed_to_is_read_with_the_same_token(push: Push, registry: Upstream) -> None:
    registry.auth = Bearer(WHO, anonymous=False)
    client = push(registry.url, Inline("who", "secret"), pushed_to=True)
    with pytest.raises((BlobUnknown, NameUnknown)):
        await client.resolve_blob("a", Digest.of(b"content"))
    await sent(client, b"content")
    tokens = [each.reference for each in registry.requests if each.kind == "token"]
    assert tokens == ["repository:a:pull,push"]


async def test_a_token_that_lapses_meanwhile(push: Push, registry: Upstream) -> None:
    """What can be sent again is, with another one; of a stream that is over there is nothing to send."""
    registry.auth = Bearer(WHO, anonymous=False)
    client = push(registry.url, Inline("who", "secret"))
    registry.next("PUT", "upload", ExpireToken())
    await sent(client, b"content")
    registry.next("PATCH", "upload", ExpireToken())
    upload = await client.start_upload("a")
    with pytest.raises(OriginFailed):
        await upload.write(LARGE)
        await upload.commit(Digest.of(LARGE))
    await upload.cancel()


async def test_an_upload_is_cancelled_where_that_takes_another_token(push: Push, registry: Upstream) -> None:
    registry.auth = Bearer(WHO, anonymous=False)
    upload = await push(registry.url, Inline("who", "secret")).start_upload("a")
    await upload.cancel()
    assert registry.uploads == []
    tokens = [each.reference for each in registry.requests if each.kind == "token"]
    assert tokens == ["repository:a:pull,push", "repository:a:delete repository:a:pull,push"]


# Mounts, manifests, deletions


@pytest.mark.parametrize("mounts", [True, False])
async def test_mounting(push: Push, registry: Upstream, mounts: bool) -> None:
    registry.takes = Takes(mounts=mounts)
    digest = Digest(registry.blob("a/b", b"content"))
    mounting = push(registry.url).mount_blob("c", digest, "a/b")
    if mounts:
        assert (await mounting).size == len(b"content")
    else:
        with pytest.raises(BlobUnknown, match="up does not mount"):
            await mounting
    assert registry.uploads == []
    assert registry.log[0] == f"POST upload c?mount={digest[:19]}&from=a/b"


@pytest.mark.parametrize("several", [True, False])
async def test_several_tags(push: Push, registry: Upstream, several: bool) -> None:
    registry.takes = Takes(several_tags=several)
    await push(registry.url).push_manifest("a", Tag("1"), MANIFEST, [Tag("1.2"), Tag("1")])
    assert registry.repositories["a"].tags == {"1": MANIFEST.digest, "1.2": MANIFEST.digest}
    first = f"PUT manifest a@{MANIFEST.digest[:19]}?tag=1&tag=1.2"
    assert registry.log == ([first] if several else [first, "PUT manifest a:1", "PUT manifest a:1.2"])


async def test_a_manifest_that_became_another_one_is_no_success(push: Push, registry: Upstream) -> None:
    from tests.upstream import WrongDigest

    registry.next("PUT", "manifest", WrongDigest())
    with pytest.raises(OriginFailed, match="as sha256:000"):
        await push(registry.url).push_manifest("a", Tag("1"), MANIFEST)


async def test_who_deletes_nothing_says_so(push: Push, registry: Upstream) -> None:
    registry.takes = Takes(deletes=False)
    digest = Digest(registry.blob("a", b"content"))
    client = push(registry.url)
    for asked in (client.delete_blob("a", digest), client.delete_manifest("a", Tag("1"))):
        with pytest.raises(Unsupported):
            await asked


# Refusals


def said(code: str, message: str = "because", **detail: Any) -> bytes:
    return json.dumps({"errors": [{"code": code, "message": message, "detail": detail}]}).encode()


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (400, said("DIGEST_INVALID"), DigestInvalid),
        (400, said("MANIFEST_INVALID"), ManifestInvalid),
        (400, said("NAME_INVALID"), NameInvalid),
        (400, said("TAG_INVALID", "tag v1 is immutable"), TagInvalid),
        (404, said("NAME_UNKNOWN"), NameUnknown),
        (404, b"<html>", ManifestUnknown),
        (405, b"", Unsupported),
        (409, b"", ManifestInvalid),
        (412, said("PRECONDITION"), ManifestInvalid),
        (413, b"", ManifestTooLarge),
        (401, said("UNAUTHORIZED"), OriginDenied),
        (403, said("DENIED"), OriginDenied),
        (400, said("DENIED"), OriginDenied),
        (429, said("TOOMANYREQUESTS"), TooManyRequests),
        (500, b"{", OriginFailed),
        (503, said("UNAVAILABLE"), OriginAway),
        (400, b"[" * 100_000, ManifestInvalid),
        (400, b'{"errors": [7]}', ManifestInvalid),
    ],
)
async def test_refusals_of_a_manifest(
    push: Push, registry: Upstream, status: int, body: bytes, expected: type[RegistryError]
) -> None:
    registry.next("PUT", "manifest", Status(status, body=body))
    with pytest.raises(RegistryError) as refused:
        await push(registry.url).push_manifest("a", Tag("1"), MANIFEST)
    assert type(refused.value) is expected
    if b"because" in body and expected is not TooManyRequests:
        assert "because" in str(refused.value)
    assert len([each for each in registry.log if each.startswith("PUT")]) == 1


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (404, said("BLOB_UPLOAD_UNKNOWN"), BlobUploadUnknown),
        (404, b"", BlobUploadUnknown),
        (400, said("BLOB_UPLOAD_INVALID"), BlobUploadInvalid),
        (400, b"", BlobUploadInvalid),
        (400, said("SIZE_INVALID"), SizeInvalid),
        (416, b"", RangeInvalid),
        (413, b"", BlobUploadInvalid),
        (502, b"", OriginAway),
    ],
)
async def test_refusals_of_an_upload(
    push: Push, registry: Upstream, status: int, body: bytes, expected: type[RegistryError]
) -> None:
    upload = await push(registry.url).start_upload("a")
    await upload.write(b"content")
    registry.next("PUT", "upload", Status(status, body=body))
    with pytest.raises(RegistryError) as refused:
        await upload.commit(Digest.of(b"content"))
    assert type(refused.value) is expected


async def test_what_a_manifest_lacks_is_told(push: Push, registry: Upstream) -> None:
    registry.takes = Takes(checks=True)
    lacking = [digest_of(b"1"), digest_of(b"2")]
    layers = [{"mediaType": "a/layer", "digest": each, "size": 1} for each in lacking]
    body = json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "layers": layers}).encode()
    with pytest.raises(ManifestBlobUnknown) as refused:
        await push(registry.url).push_manifest("a", Tag("1"), Manifest.of(OCI_MANIFEST, body))
    assert list(refused.value.missing) == lacking


async def test_what_a_registry_says_is_one_short_line(push: Push, registry: Upstream) -> None:
    registry.next("PUT", "manifest", Status(400, body=said("MANIFEST_INVALID", "a\n\x1b[2J" + "b" * 10_000)))
    with pytest.raises(ManifestInvalid) as refused:
        await push(registry.url).push_manifest("a", Tag("1"), MANIFEST)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 400


# Nothing is repeated by itself


@pytest.mark.parametrize("fault", [Reset(after=None), Status(503), RetryAfter(0, 503)])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
async def test_what_writes_is_asked_once(push: Push, registry: Upstream, method: str, fault: Fault) -> None:
    client = push(registry.url)
    registry.image("a", "1")
    steps: dict[str, Callable[[], Awaitable[object]]] = {
        "POST": lambda: client.start_upload("a"),
        "PUT": lambda: client.push_manifest("a", Tag("2"), MANIFEST),
        "DELETE": lambda: client.delete_manifest("a", Tag("1")),
    }
    registry.next(method, lambda request: True, fault)
    with pytest.raises(OriginFailed):
        await steps[method]()
    assert len(registry.requests) == 1


async def test_a_stream_is_not_sent_elsewhere(push: Push, registry: Upstream) -> None:
    registry.next("PATCH", "upload", Redirect("/v2/elsewhere"))
    upload = await push(registry.url).start_upload("a")
    with pytest.raises(OriginFailed, match="redirected an upload while its body was sent"):
        await upload.write(LARGE)
        await upload.commit(Digest.of(LARGE))
    await upload.cancel()


async def test_an_upload_is_found_again_at_its_own_registry_only(push: Push, registry: Upstream) -> None:
    client = push(registry.url)
    upload: Upload = await client.start_upload("a")
    await upload.write(b"content")
    await upload.suspend()
    again = await client.resume_upload("a", upload.id)
    assert again.offset == len(b"content")
    await again.commit(Digest.of(b"content"))
    registry.clear()
    for id in ("http://169.254.169.254/v2/a/blobs/uploads/1", "/v2/a/blobs/uploads/1", "x", "http://[", ""):
        with pytest.raises(BlobUploadUnknown):
            await client.resume_upload("a", id)
    assert registry.log == []


class Rude:
    """A server that begins an upload, and then reads nothing of it; or answers, or hangs up, at once."""

    def __init__(self, early: tuple[int, bytes] | None = None, hang_up: bool = False) -> None:
        self._early, self._hang_up = early, hang_up
        self._leave = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Rude:
        self._server = await asyncio.start_server(self._converse, "127.0.0.1", 0, limit=1 << 16)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._leave.set()
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()
        await asyncio.sleep(0)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith(b"POST"):
                    writer.write(b"HTTP/1.1 202 Accepted\r\nLocation: /v2/a/blobs/uploads/1\r\n")
                    writer.write(b"Content-Length: 0\r\n\r\n")
                elif head.startswith(b"DELETE"):
                    writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
                elif self._early is not None:
                    status, body = self._early
                    writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body))
                    await writer.drain()
                    await self._leave.wait()
                    break
                elif not self._hang_up:
                    await self._leave.wait()
                    break
                else:
                    break
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.transport.abort()

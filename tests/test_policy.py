"""The status-code policy: what is answered in which situation, cached and not, over HTTP.

A heading names the situation.  `cached` has been pulled before and is due to be
asked for again, as far as it ever is.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from proxy.telemetry.metrics import Metrics
from proxy.web.listener import ConnectionLimits, Listener
from proxy.web.server import DistributionAPI
from storage.disk.blobs import BlobFiles
from storage.errors import Denied
from storage.oci import Digest, Manifest, Reference
from storage.registry import Registry
from tests.conftest import Clock, Serve, Site
from tests.upstream import (
    Bearer,
    Corrupt,
    Fault,
    Hold,
    Image,
    Redirect,
    Refuse,
    RetryAfter,
    Status,
    Truncate,
    Upstream,
    digest_of,
)

BODY = random.Random(3).randbytes(3_000_000)
DUE = 601.0  # seconds, after which a tag is asked for again
EVERYTHING = "tag", "digest", "blob", "tags", "referrers"
UNKNOWN = {
    "tag": "MANIFEST_UNKNOWN",
    "digest": "MANIFEST_UNKNOWN",
    "blob": "BLOB_UNKNOWN",
    "tags": "NAME_UNKNOWN",
    "referrers": "MANIFEST_UNKNOWN",
}
methods = pytest.mark.parametrize("method", ["GET", "HEAD"])
operations = pytest.mark.parametrize("operation", EVERYTHING)


def path_of(operation: str, image: Image) -> str:
    paths = {
        "tag": "manifests/latest",
        "digest": f"manifests/{image.digest}",
        "blob": f"blobs/{image.layers[0]}",
        "tags": "tags/list",
        "referrers": f"referrers/{image.digest}",
    }
    return f"/v2/a/b/{paths[operation]}"


async def answer(site: Site, method: str, path: str) -> tuple[int, Any, bytes]:
    async with site.request(method, path) as response:
        return response.status, response.headers, await response.read()


async def refusal(site: Site, operation: str, image: Image, method: str = "GET") -> tuple[int, str, Any]:
    """Status, code and headers of an error, which must have the specification's shape."""
    status, headers, body = await answer(site, method, path_of(operation, image))
    assert status >= 400
    assert headers["Content-Type"] == "application/json"
    assert "WWW-Authenticate" not in headers
    assert "Set-Cookie" not in headers
    if method == "HEAD":
        assert body == b""
        return status, "", headers
    [error] = json.loads(body)["errors"]
    assert error["message"]
    return status, error["code"], headers


async def warm(site: Site, image: Image) -> None:
    for operation in EVERYTHING:
        assert (await site.get(path_of(operation, image)))[0] == 200


def all_fail(upstream: Upstream, *faults: Fault) -> None:
    for method in ("GET", "HEAD"):
        upstream.next(method, lambda request: request.kind != "token", *faults, times=99)


# "upstream says 404"


@operations
@methods
async def test_404_uncached_is_404(serve: Serve, upstream: Upstream, operation: str, method: str) -> None:
    image = upstream.image("a/b", "latest")
    site = await serve(upstream)
    all_fail(upstream, Status(404))
    for _ in range(2):
        status, code, _ = await refusal(site, operation, image, method)
        assert (status, code) == (404, "" if method == "HEAD" else UNKNOWN[operation])
    assert len(upstream.log) == 1  # the second time it is remembered


async def test_404_of_a_tag_is_remembered_for_seconds_only(
    serve: Serve, upstream: Upstream, clock: Clock
) -> None:
    image = upstream.image("a/b")
    site = await serve(upstream)
    assert (await refusal(site, "tag", image))[0] == 404
    upstream.image("a/b", "latest")
    clock.advance(10)
    assert (await answer(site, "GET", path_of("tag", image)))[0] == 200


@methods
async def test_404_cached_is_kept_or_dropped(
    serve: Serve, upstream: Upstream, clock: Clock, tmp_path: Path, method: str
) -> None:
    image = upstream.image("a/b", "latest")
    for setting, status in (("keep", 200), ("drop", 404)):
        site = await serve(upstream, directory=tmp_path / setting, on_upstream_delete=setting)
        await warm(site, image)
        clock.advance(DUE)
        upstream.next("HEAD", "latest", Status(404))
        assert (await answer(site, method, path_of("tag", image)))[0] == status


# "upstream 401/403, nothing cached"


@pytest.mark.parametrize(
    "denied", [Status(401), Status(403), Status(401, {"WWW-Authenticate": "Basic"})], ids=str
)
@operations
@methods
async def test_401_and_403_uncached_are_404(
    serve: Serve, upstream: Upstream, operation: str, method: str, denied: Fault
) -> None:
    image = upstream.image("a/b", "latest")
    site = await serve(upstream)
    all_fail(upstream, denied)
    status, code, _ = await refusal(site, operation, image, method)
    assert (status, code) == (404, "" if method == "HEAD" else UNKNOWN[operation])


@pytest.mark.parametrize("denied", [Status(401), Status(403)], ids=str)
@operations
@methods
async def test_401_and_403_uncached_are_denied_where_bypassing_is(
    serve: Serve, upstream: Upstream, operation: str, method: str, denied: Fault
) -> None:
    image = upstream.image("a/b", "latest")
    site = await serve(upstream, top={"fallback": "deny"})
    all_fail(upstream, denied)
    status, code, _ = await refusal(site, operation, image, method)
    assert (status, code) == (403, "" if method == "HEAD" else "DENIED")


async def test_a_token_that_is_refused_is_404(serve: Serve, upstream: Upstream) -> None:
    image = upstream.image("a/b", "latest")
    upstream.auth = Bearer(realm="https://evil.example/token")
    site = await serve(upstream, options={"username": "ci", "password": "secret"})
    for operation in EVERYTHING:
        assert (await refusal(site, operation, image))[:2] == (404, UNKNOWN[operation])


@pytest.mark.parametrize("denied", [Status(401), Status(403)], ids=str)
@pytest.mark.parametrize("keeps", [True, False])
async def test_401_and_403_follow_on_upstream_delete(
    serve: Serve, upstream: Upstream, clock: Clock, denied: Fault, keeps: bool
) -> None:
    image = upstream.image("a/b", "latest")
    site = await serve(upstream, on_upstream_delete="keep" if keeps else "drop")
    await warm(site, image)
    clock.advance(DUE)
    all_fail(upstream, denied)
    for operation in ("tag",) if keeps else ():
        status, headers, content = await answer(site, "GET", path_of(operation, image))
        assert (status, content, "DENIED" in headers["Cache-Status"]) == (200, image.content, True)
    for operation in ("tags", "referrers") if keeps else ("tag", "tags", "referrers"):
        assert (await refusal(site, operation, image))[:2] == (404, UNKNOWN[operation])
    for operation in ("digest", "blob"):  # of which nothing is asked
        assert (await answer(site, "GET", path_of(operation, image)))[0] == 200


# "upstream 429, nothing cached"


@pytest.mark.parametrize(("limited", "seconds"), [(RetryAfter(7), "7"), (Status(429), None)], ids=str)
@pytest.mark.parametrize("fallback", ["allow", "deny"])
@operations
@methods
async def test_429_uncached_is_503_with_retry_after(
    serve: Serve,
    upstream: Upstream,
    operation: str,
    method: str,
    fallback: str,
    limited: Fault,
    seconds: str | None,
) -> None:
    """Who may ask another host is not kept from it for long."""
    image = upstream.image("a/b", "latest")
    site = await serve(upstream, top={"fallback": fallback})
    all_fail(upstream, limited)
    for _ in range(2):  # as remembered as well
        status, code, headers = await refusal(site, operation, image, method)
        assert (status, code) == (503, "" if method == "HEAD" else "TOOMANYREQUESTS")
        assert int(headers["Retry-After"]) >= 1
        assert ("1" if fallback == "allow" else seconds) in (None, headers["Retry-After"])
    assert len(upstream.log) == 1


# "upstream timeout/5xx, nothing cached", and what is stale where something is


@pytest.mark.parametrize("code", [500, 502, 503, 504])
@operations
@methods
async def test_5xx_uncached_is_502(
    serve: Serve, upstream: Upstream, operation: str, method: str, code: int
) -> None:
    image = upstream.image("a/b", "latest")
    site = await serve(upstream)
    all_fail(upstream, Status(code))
    status, said, _ = await refusal(site, operation, image, method)
    assert (status, said) == (502, "" if method == "HEAD" else "UNAVAILABLE")


@operations
async def test_unreachable_uncached_is_502(serve: Serve, upstream: Upstream, operation: str) -> None:
    image = upstream.image("a/b", "latest")
    site = await serve(upstream)
    await upstream.stop()
    assert (await refusal(site, operation, image))[:2] == (502, "UNAVAILABLE")


@operations
async def test_timeout_uncached_is_504(serve: Serve, upstream: Upstream, operation: str) -> None:
    image = upstream.image("a/b", "latest")
    site = await serve(upstream, options={"header_timeout": "50ms"})
    all_fail(upstream, Hold(asyncio.Event(), after=None))
    assert (await refusal(site, operation, image))[:2] == (504, "UNAVAILABLE")


@pytest.mark.parametrize(
    "fault", [Status(429), Status(500), Status(503), Refuse(), "timeout", "unreachable"], ids=str
)
@methods
async def test_429_5xx_and_timeout_cached_are_stale(
    serve: Serve, upstream: Upstream, clock: Clock, method: str, fault: Fault | str
) -> None:
    image = upstream.image("a/b", "latest")
    options = {"header_timeout": "100ms"} if fault == "timeout" else {}
    site = await serve(upstream, options=options)
    await warm(site, image)
    known = {operation: (await site.get(path_of(operation, image)))[2] for operation in EVERYTHING}
    clock.advance(DUE)
    if fault == "unreachable":
        await upstream.stop()
    else:
        all_fail(upstream, fault if isinstance(fault, Fault) else Hold(asyncio.Event(), after=None))
    for operation in EVERYTHING:
        status, _, body = await answer(site, method, path_of(operation, image))
        assert (status, body) == (200, known[operation] if method == "GET" else b"")


# "disk full, store error": stream through


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The kernel refuses to write files beyond `size` bytes: EFBIG, as ENOSPC would come."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@contextmanager
def broken_store(site: Site, part: str) -> Iterator[None]:
    """`part` of the store is a file where a directory should be."""
    path = site.directory / "cache" / part
    aside = path.with_name(f"{part}-aside")
    path.rename(aside)
    path.write_bytes(b"")
    try:
        yield
    finally:
        path.unlink()
        aside.rename(path)


@pytest.mark.errors("disk.failed")
async def test_disk_full_streams_through(serve: Serve, upstream: Upstream, small_disk: Path) -> None:
    image = upstream.image("a/b", "latest", [BODY])
    site = await serve(upstream, directory=small_disk)
    for _ in range(2):
        assert (await answer(site, "GET", path_of("blob", image)))[2] == BODY
        assert (await answer(site, "GET", path_of("tag", image)))[2] == image.content
    assert site.partial == []  # what does not fit makes way
    await site.app.stop()


@pytest.mark.errors("disk.failed")
@pytest.mark.parametrize("clients", [1, 5])
@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
async def test_disk_full_in_mid_fill_goes_on_from_the_right_byte(
    serve: Serve, upstream: Upstream, clients: int, algorithm: str
) -> None:
    digest = upstream.blob("a/b", BODY, algorithm)
    site = await serve(upstream)
    gate = asyncio.Event()
    upstream.next("GET", digest, Hold(gate, after=500_000))
    responses = [await site.request("GET", f"/v2/a/b/blobs/{digest}") for _ in range(clients)]
    with files_of_at_most(1_000_000):
        gate.set()
        assert await asyncio.gather(*(each.read() for each in responses)) == [BODY] * clients
    # The rest is asked for, not all of it again.
    asked = [request.range for request in upstream.requests]
    assert len(asked) == 1 + clients
    assert asked[0] is None
    assert all((each or "").startswith("bytes=") and each != "bytes=0-" for each in asked[1:])
    assert site.partial == []
    assert (await site.get(f"/v2/a/b/blobs/{digest}"))[2] == BODY


@pytest.mark.errors("disk.failed")
async def test_disk_full_never_completes_a_wrong_blob(serve: Serve, upstream: Upstream) -> None:
    digest = upstream.blob("a/b", BODY)
    site = await serve(upstream)
    gate = asyncio.Event()
    upstream.next("GET", digest, Hold(gate, after=500_000))
    upstream.next("GET", digest, Corrupt(at=len(BODY) - 1000))
    response = await site.request("GET", f"/v2/a/b/blobs/{digest}")
    with files_of_at_most(1_000_000):
        gate.set()
        found = bytearray()
        with pytest.raises((aiohttp.ClientError, ConnectionError)):
            async for piece in response.content.iter_any():
                found += piece
    assert len(found) < len(BODY)


@pytest.mark.errors("disk.failed")
@pytest.mark.parametrize("part", ["partial", "blobs"])
async def test_store_error_streams_through(serve: Serve, upstream: Upstream, part: str) -> None:
    image = upstream.image("a/b", "latest", [BODY])
    site = await serve(upstream)
    path = path_of("blob", image)
    with broken_store(site, part):
        for _ in range(2):
            assert (await answer(site, "GET", path))[2] == BODY
            async with site.request("HEAD", path) as response:
                assert response.headers["Content-Length"] == str(len(BODY))
        status, headers, body = await site.get(path, Range="bytes=5-104")
        assert (status, body, headers["Content-Range"]) == (206, BODY[5:105], f"bytes 5-104/{len(BODY)}")
        assert (await site.get(path, Range="bytes=-5"))[2] == BODY[-5:]
        status, _, body = await site.get(path, Range="bytes=0-4,100-104,50-54")
        assert status == 206
        assert [body.count(part) for part in (BODY[:5], BODY[100:105], BODY[50:55])] == [1, 1, 1]
        if part == "partial":  # else there is a file, of which only the name is missing
            upstream.next("GET", image.layers[0], Corrupt(at=1))
            async with site.request("GET", path) as response:
                with pytest.raises((aiohttp.ClientError, ConnectionError)):
                    await response.read()
    assert (await answer(site, "GET", path))[2] == BODY


@pytest.mark.errors("disk.failed")
async def test_records_error_streams_through(
    serve: Serve, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = upstream.image("a/b", "latest", [BODY])
    site = await serve(upstream)

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(28, os.strerror(28))

    for name in ("get", "set", "delete"):
        monkeypatch.setattr("diskcache.Cache." + name, fail)
    for operation in EVERYTHING:
        status, _, body = await answer(site, "GET", path_of(operation, image))
        assert status == 200
        if operation == "blob":
            assert body == BODY
    monkeypatch.undo()
    await warm(site, image)


@pytest.mark.errors("disk.failed")
async def test_a_commit_that_fails_spoils_no_pull(
    serve: Serve, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = upstream.image("a/b", "latest", [BODY])
    site = await serve(upstream)

    def fail(self: BlobFiles, partial: Path, file: int, digest: Digest) -> None:
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(BlobFiles, "_publish", fail)
    assert (await answer(site, "GET", path_of("blob", image)))[2] == BODY
    monkeypatch.undo()
    assert (await answer(site, "GET", path_of("blob", image)))[2] == BODY


# "proxy overloaded/draining": 503 on new requests, finish old


async def test_draining_finishes_what_is_being_served(serve: Serve, upstream: Upstream) -> None:
    image = upstream.image("a/b", "latest", [BODY])
    site = await serve(upstream, top={"drain": "20s"})
    address = site.app.url.host, site.app.url.port
    gate = asyncio.Event()
    upstream.next("GET", image.layers[0], Hold(gate, after=1000))
    idle, writer = await asyncio.open_connection(*address)
    writer.write(b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n")
    await idle.readuntil(b"{}")
    async with site.request("GET", path_of("blob", image)) as response:
        stopping = asyncio.ensure_future(site.app.stop())
        assert await idle.read() == b""  # kept connections end, once nobody listens any more
        writer.close()
        with pytest.raises(ConnectionRefusedError):  # new clients go to their next host
            await asyncio.open_connection(*address)
        gate.set()
        assert await response.read() == BODY
    await stopping


# "policy-denied"


class Forbidding(Registry):
    async def get_manifest(self, repository: str, reference: Reference) -> Manifest:
        raise Denied("a/b is not for you: see the rules of this site")


@pytest.fixture
async def forbidding() -> AsyncIterator[str]:
    def qualify(name: str, *, ns: str | None, host: str | None, prefix: str) -> str:
        return f"x/{name}"

    runner = web.ServerRunner(
        Listener(DistributionAPI(Forbidding(), qualify, Metrics()).handle, ConnectionLimits())
    )
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def test_policy_denied_is_403_and_says_why(forbidding: str) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{forbidding}/v2/a/b/manifests/latest") as response,
    ):
        assert response.status == 403
        [error] = (await response.json())["errors"]
    assert (error["code"], error["message"]) == (
        "DENIED",
        "a/b is not for you: see the rules of this site",
    )


# "failure after 200 headers sent": reset, never a clean end


@pytest.mark.errors("fill.failed")
@pytest.mark.parametrize("told", [True, False], ids=["length", "no length"])
async def test_failure_after_200_resets_the_connection(serve: Serve, upstream: Upstream, told: bool) -> None:
    digest = upstream.blob("a/b", BODY)
    upstream.content_length = told
    site = await serve(upstream)
    gate = asyncio.Event()
    upstream.next("GET", digest, Corrupt(), Hold(gate, after=1000))
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setblocking(False)
        await loop.sock_connect(client, (site.app.url.host, site.app.url.port))
        await loop.sock_sendall(client, f"GET /v2/a/b/blobs/{digest} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        found = await loop.sock_recv(client, 12)
        assert found == b"HTTP/1.1 200"
        gate.set()
        with pytest.raises(ConnectionResetError):
            while found:  # a clean end would be b""
                found = await loop.sock_recv(client, 1 << 16)


@pytest.mark.errors("fill.failed")
async def test_failure_after_200_when_the_upstream_is_gone(serve: Serve, upstream: Upstream) -> None:
    digest = upstream.blob("a/b", BODY)
    site = await serve(upstream)
    upstream.next("GET", digest, Truncate(after=1000))
    upstream.next("GET", digest, Status(404), times=99)
    async with site.request("GET", f"/v2/a/b/blobs/{digest}") as response:
        with pytest.raises((aiohttp.ClientError, ConnectionError)):
            await response.read()
    [left] = (site.directory / "cache" / "partial").iterdir()  # where the next pull goes on
    left.unlink()


# "writes"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v2/a/b/blobs/uploads/"),
        ("POST", f"/v2/a/b/blobs/uploads/?mount={digest_of(b'x')}&from=c/d"),
        ("PATCH", "/v2/a/b/blobs/uploads/some-id"),
        ("PUT", f"/v2/a/b/blobs/uploads/some-id?digest={digest_of(b'x')}"),
        ("DELETE", "/v2/a/b/blobs/uploads/some-id"),
        ("PUT", "/v2/a/b/manifests/latest"),
        ("DELETE", "/v2/a/b/manifests/latest"),
        ("DELETE", f"/v2/a/b/blobs/{digest_of(b'x')}"),
        ("PATCH", "/v2/a/b/manifests/latest"),
    ],
)
async def test_writes_are_405(serve: Serve, upstream: Upstream, method: str, path: str) -> None:
    site = await serve(upstream)
    async with site.request(method, path, data=b"x") as response:
        assert response.status == 405
        assert (await response.json())["errors"][0]["code"] == "UNSUPPORTED"
    assert upstream.log == []


# "redirects to client": none


async def test_no_redirect_reaches_the_client(serve: Serve, upstream: Upstream) -> None:
    image = upstream.image("a/b", "latest", [BODY])
    upstream.cdn = True
    upstream.next("GET", "latest", Redirect(f"/v2/a/b/manifests/{image.digest}"))
    site = await serve(upstream)
    assert (await site.get(path_of("tag", image)))[::2] == (200, image.content)
    for method in ("GET", "HEAD"):
        status, headers, _ = await answer(site, method, path_of("blob", image))
        assert (status, headers["Content-Length"]) == (200, str(len(BODY)))
        assert "Location" not in headers


async def test_digests_are_checked_before_anything_is_asked(serve: Serve, upstream: Upstream) -> None:
    site = await serve(upstream)
    assert (await site.get("/v2/a/b/blobs/sha256:short"))[0] == 400
    assert (await site.get(f"/v2/a/b/manifests/{Digest.of(b'x', 'md5')}"))[0] == 400
    assert upstream.log == []

"""A fake of the S3 API, in memory, whose answers tests can spoil.  It checks no signature.

Google's XML API is the same in all that is asked here.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeAlias
from xml.etree import ElementTree

from aiohttp import web

from storage.bucket.settings import BucketSettings
from tests.pools import PORTS

Spoil: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]


def answer(status: int, code: str, retry_after: str | None = None) -> Spoil:
    """An answer with an error."""

    async def spoil(request: web.Request) -> web.StreamResponse:
        headers = {} if retry_after is None else {"Retry-After": retry_after}
        return _error(status, code, headers)

    return spoil


def _error(status: int, code: str, headers: dict[str, str] | None = None) -> web.Response:
    body = "" if status == 404 and code == "" else f"<Error><Code>{code}</Code></Error>"
    return web.Response(status=status, text=body, content_type="application/xml", headers=headers)


@dataclass
class FakeBucket:
    """A server with one bucket, `bucket`.

    objects: the content by key, without `markers`, which name the owner and are not in `asked`
    uploads: the parts of the unfinished ones by their id; `keys` has their keys
    asked: method and key, with the range or the query, of each request; not the query that signs it
    signed: how many of them were for signed URLs
    spoilt: what answers the next requests of a method; `down` answers all of them
    """

    objects: dict[str, bytes] = field(default_factory=dict)
    markers: dict[str, bytes] = field(default_factory=dict)
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    spoilt: dict[str, list[Spoil]] = field(default_factory=dict)
    down: Spoil | None = None
    cut: int = 0  # bytes of the body of the next GET, after which the connection ends
    port: int = 0
    signed: int = 0
    conditional: bool = True  # it can put an object only if there is none, else it says that it cannot
    careless: bool = False  # it overlooks that condition

    def __post_init__(self) -> None:
        self._ending = asyncio.Event()
        self._ids = itertools.count(1)
        self._runner = web.ServerRunner(web.Server(self._handle), shutdown_timeout=0.1)  # type: ignore[arg-type]

    async def __aenter__(self) -> FakeBucket:
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]
        PORTS.add(self.port)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._ending.set()
        await self._runner.cleanup()

    async def hang(self, request: web.Request) -> web.StreamResponse:
        """No answer, as long as the client waits."""
        await self._ending.wait()
        return _error(503, "Ending")

    def settings(self, prefix: str = "pre/fix") -> BucketSettings:
        endpoint = f"http://127.0.0.1:{self.port}"
        return BucketSettings(
            url=f"s3://bucket/{prefix}", endpoint=endpoint, access_key="key", secret_key="secret"
        )

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        key = request.path.removeprefix("/bucket/")
        signed = "X-Amz-Signature" in request.query
        what = (not signed and request.query_string) or request.headers.get("Range", "")
        if key.endswith("/entrepot") and self.down is None:
            return await self._marker(request, key)
        self.asked.append(f"{request.method} {key} {what}".rstrip())
        self.signed += signed
        if self.down is not None:
            return await self.down(request)
        if spoilt := self.spoilt.get(request.method):
            return await spoilt.pop(0)(request)
        return await getattr(self, f"_{request.method.lower()}")(request, key)  # type: ignore[no-any-return]

    async def _marker(self, request: web.Request, key: str) -> web.Response:
        if request.method == "PUT":
            if (refusal := self._refusal(request, key in self.markers)) is not None:
                return refusal
            self.markers[key] = await request.read()
        elif key not in self.markers:
            return _error(404, "NoSuchKey")
        dates = {"ETag": '"e"', "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}
        return web.Response(body=self.markers[key], headers=dates)

    def _refusal(self, request: web.Request, exists: bool) -> web.Response | None:
        """The answer to a conditional put that is not done."""
        if request.headers.get("If-None-Match") != "*" or self.careless:
            return None
        if not self.conditional:
            return _error(501, "NotImplemented")
        return _error(412, "PreconditionFailed") if exists else None

    async def _put(self, request: web.Request, key: str) -> web.Response:
        body = await request.content.read()
        if (refusal := self._refusal(request, key in self.objects)) is not None:
            return refusal
        found = hashlib.sha256(body).hexdigest()
        if request.headers.get("x-amz-content-sha256", found) != found:
            return _error(400, "XAmzContentSHA256Mismatch")
        if "uploadId" in request.query:
            self.uploads[request.query["uploadId"]][int(request.query["partNumber"])] = body
        else:
            self.objects[key] = body
        return web.Response(headers={"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    async def _post(self, request: web.Request, key: str) -> web.Response:
        if "uploads" in request.query:
            number = str(next(self._ids))
            self.uploads[number], self.keys[number] = {}, key
            made = f"<UploadId>{number}</UploadId>"
            return _xml(f"<InitiateMultipartUploadResult>{made}</InitiateMultipartUploadResult>")
        if "delete" in request.query:
            keys = re.findall("<Key>(.*?)</Key>", await request.text())
            deleted = "".join(f"<Deleted><Key>{each}</Key></Deleted>" for each in keys)
            for each in keys:
                self.objects.pop(each, None)
            return _xml(f"<DeleteResult>{deleted}</DeleteResult>")
        parts = self.uploads.pop(request.query["uploadId"])
        numbers = [
            int(each.text or 0)
            for each in ElementTree.fromstring(await request.text()).iter()
            if each.tag.endswith("PartNumber")
        ]
        self.objects[key] = b"".join(parts[number] for number in numbers)
        return _xml('<CompleteMultipartUploadResult><ETag>"e"</ETag></CompleteMultipartUploadResult>')

    async def _delete(self, request: web.Request, key: str) -> web.Response:
        if "uploadId" in request.query:
            self.uploads.pop(request.query["uploadId"], None)
        else:
            self.objects.pop(key, None)
        return web.Response(status=204)

    async def _head(self, request: web.Request, key: str) -> web.StreamResponse:
        return await self._get(request, key)

    def _unfinished(self, prefix: str) -> web.Response:
        listed = "".join(
            f"<Upload><Key>{self.keys[id]}</Key><UploadId>{id}</UploadId></Upload>"
            for id in self.uploads
            if self.keys[id].startswith(prefix)
        )
        namespace = "http://s3.amazonaws.com/doc/2006-03-01/"
        return _xml(f'<ListMultipartUploadsResult xmlns="{namespace}">{listed}</ListMultipartUploadsResult>')

    async def _get(self, request: web.Request, key: str) -> web.StreamResponse:
        if "uploads" in request.query:
            return self._unfinished(request.query["prefix"])
        if (content := self.objects.get(key)) is None:
            return _error(404, "NoSuchKey")
        headers = {"ETag": '"e"', "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}
        status, size = 200, len(content)
        if (asked := re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))) is not None:
            start, last = int(asked[1]), min(int(asked[2]), size - 1)
            status, content = 206, content[start : last + 1]
            headers["Content-Range"] = f"bytes {start}-{last}/{size}"
        if request.method == "HEAD":
            headers["Content-Length"] = str(size)  # which the library leaves out of an empty one
        if not self.cut or request.method == "HEAD":
            return web.Response(status=status, body=content, headers=headers)
        response = web.StreamResponse(status=status, headers=headers)
        response.content_length = len(content)
        await response.prepare(request)
        await response.write(content[: self.cut])
        self.cut = 0
        assert request.transport is not None
        request.transport.close()
        return response


def _xml(text: str) -> web.Response:
    return web.Response(text=text, content_type="application/xml")

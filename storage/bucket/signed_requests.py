"""Requests to S3 that its client does not make, signed by Signature Version 4.

obstore lists no unfinished uploads, and tells nobody their ids.  Over http it hashes what it puts, for the
signature, which the digest of a blob spares.

https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from datetime import timedelta
from functools import reduce
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from typing import BinaryIO
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit
from urllib.request import getproxies_environment

import obstore

from storage.bucket.settings import BucketSettings, ObjectStore
from storage.tls import secure

NOTHING = hashlib.sha256().hexdigest()
CONNECTED, ANSWERED = 5.0, 60.0  # seconds for a connection, and without a byte
VALID = timedelta(minutes=5)
REST = 60.0  # seconds for which objects are not put so, after a failure


class BucketRefused(Exception):
    """The service has answered something else than success; `passing` is whether it may soon."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.passing = status in (429, 500, 502, 503, 504)


class SignedRequests:
    """Requests to the bucket of `store`, with a secret that is known.  Methods block.

    ticks: seconds of a clock that nobody sets
    """

    def __init__(
        self,
        settings: BucketSettings,
        store: ObjectStore,
        secret: str,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._store = store
        self._secret = secret
        self._ticks = ticks
        self._until = -float("inf")
        self._open: set[HTTPConnection] = set()
        # What only the environment says of encryption is for obstore to read.
        named = any(name.startswith(("AWS_SERVER_SIDE", "AWS_SSE")) for name in os.environ)
        self._better = settings.endpoint.startswith("http://") and not named

    @property
    def puts(self) -> bool:
        """Whether to put objects so is better: over http, and unless that has just failed."""
        return self._better and self._ticks() >= self._until

    def end(self) -> None:
        """Cut the connections on which something is awaited.  Thread-safe."""
        for each in list(self._open):
            with suppress(OSError, AttributeError):  # it is closed, or not yet there
                each.sock.shutdown(socket.SHUT_RDWR)

    def put(self, key: str, source: Path, size: int, hashed: str) -> None:
        """Make an object of a file with this SHA-256 by one request.  Raises BucketRefused, OSError."""
        try:
            self._put(key, source, size, hashed)
        except (BucketRefused, OSError):
            self._until = self._ticks() + REST
            raise

    def _put(self, key: str, source: Path, size: int, hashed: str) -> None:
        settings = self._settings
        # Not every service compares the content with the hash that is signed; this one they do.
        headers = {
            "x-amz-checksum-sha256": base64.b64encode(bytes.fromhex(hashed)).decode(),
            "x-amz-storage-class": settings.storage_class,
            "x-amz-server-side-encryption": settings.encryption,
            "x-amz-server-side-encryption-aws-kms-key-id": settings.encryption_key,
        }
        with source.open("rb") as file:
            self._ask("PUT", self._url(key), {}, headers, hashed, file, size)

    def abort(self, key: str) -> None:
        """Abort the uploads to this key that have not ended.  Raises BucketRefused, OSError."""
        for id in self.unfinished(key):
            self._ask("DELETE", self._url(key), {"uploadId": id})

    def unfinished(self, key: str) -> list[str]:
        """The ids of the uploads to this key that have not ended.  Raises BucketRefused, OSError."""
        from xml.etree import ElementTree  # only here: of all processes, most never list any

        url = self._url(key)
        parts = url.path.split("/")
        depth = len(f"{self._store.prefix or ''}/{key}".lstrip("/").split("/"))
        name = unquote("/".join(parts[-depth:]))
        bucket = url._replace(path="/".join(parts[:-depth]) or "/")
        answer = self._ask("GET", bucket, {"prefix": name, "uploads": ""})
        try:
            listed = ElementTree.fromstring(answer)
        except ElementTree.ParseError:
            raise BucketRefused("it lists no uploads of parts") from None
        if not listed.tag.endswith("ListMultipartUploadsResult"):
            raise BucketRefused("it lists no uploads of parts")
        return [
            upload.findtext("{*}UploadId") or ""
            for upload in listed.iterfind("{*}Upload")
            if upload.findtext("{*}Key") == name
        ]

    def _url(self, key: str) -> SplitResult:
        """The URL of an object, as obstore signs it: with the id of its keys, and their region and token."""
        return urlsplit(obstore.sign(self._store, "GET", key, VALID))

    def _ask(
        self,
        method: str,
        url: SplitResult,
        query: Mapping[str, str],
        headers: Mapping[str, str] | None = None,
        hashed: str = NOTHING,
        file: BinaryIO | None = None,
        size: int = 0,
    ) -> bytes:
        """The body of the answer.  `file` is the body of the request, of `size` bytes with this SHA-256."""
        given = dict(parse_qsl(url.query))
        access_key, _, region, *_ = given["X-Amz-Credential"].rsplit("/", 4)  # an id may have slashes
        sent = {
            "host": url.netloc,
            "x-amz-content-sha256": hashed,
            "x-amz-date": time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()),
            "x-amz-security-token": given.get("X-Amz-Security-Token", ""),
            **(headers or {}),
        }
        sent = {name: value for name, value in sent.items() if value}
        sent["authorization"] = authorize(method, url.path, query, sent, access_key, self._secret, region)
        target = f"{url.path}?{urlencode(query, quote_via=quote)}" if query else url.path
        sent["content-length"] = str(size)
        with closing(self._connect(url)) as connection:
            self._open.add(connection)
            try:
                answer, body = _exchange(connection, method, target, sent, file)
            finally:
                self._open.discard(connection)
        if method == "PUT" and answer.status == 200 and not answer.headers["etag"]:
            raise BucketRefused("ETag Header missing from response")  # it is no object storage
        if answer.status not in (200, 204) and (method, answer.status) != ("DELETE", 404):
            text = body.decode(errors="replace")
            raise BucketRefused(f"status code: {answer.status} {answer.reason}: {text}", answer.status)
        return body

    def _connect(self, url: SplitResult) -> HTTPConnection:
        if url.scheme == "http":
            return HTTPConnection(url.netloc, timeout=CONNECTED)
        context = secure(ssl.create_default_context())
        if self._settings.ca is not None:
            context.load_verify_locations(self._settings.ca)
        return HTTPSConnection(url.netloc, timeout=CONNECTED, context=context)


def _exchange(
    connection: HTTPConnection, method: str, target: str, headers: Mapping[str, str], file: BinaryIO | None
) -> tuple[HTTPResponse, bytes]:
    """The answer to a request, and its body.  Raises OSError."""
    try:
        connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        connection.sock.settimeout(ANSWERED)
        if file is not None and (size := int(headers["content-length"])):  # it refuses to send nothing
            connection.sock.sendfile(file, count=size)
        answer = connection.getresponse()
        return answer, answer.read()
    except HTTPException as error:
        raise ConnectionResetError(f"no whole answer: {error!r}") from error


def signed_requests(settings: BucketSettings, store: ObjectStore) -> SignedRequests | None:
    """What signs requests to a bucket; None if it is not of S3, behind a proxy, or its keys are not known.

    Keys that an instance or a workload identity gives are not: only obstore has them.
    """
    key, secret = settings.access_key, settings.secret_key
    if not key:
        key, secret = (os.environ.get(f"AWS_{name}", "") for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"))
    proxied = settings.proxy or getproxies_environment().keys() - {"no"}
    if not settings.url.startswith("s3://") or proxied or not (key and secret):
        return None
    return SignedRequests(settings, store, secret)


def authorize(
    method: str,
    path: str,
    query: Mapping[str, str],
    headers: Mapping[str, str],
    access_key: str,
    secret: str,
    region: str,
) -> str:
    """The header Authorization, which signs all `headers`: names in small letters, with date and hash."""
    names, date = sorted(headers), headers["x-amz-date"]
    asked = urlencode(sorted(query.items()), quote_via=quote, safe="~")
    lines = [method, path, asked, *(f"{name}:{headers[name]}" for name in names), "", ";".join(names)]
    canonical = "\n".join([*lines, headers["x-amz-content-sha256"]])
    scope = [date[:8], region, "s3", "aws4_request"]
    hashed = hashlib.sha256(canonical.encode()).hexdigest()
    text = "\n".join(["AWS4-HMAC-SHA256", date, "/".join(scope), hashed])
    signing = reduce(_sign, scope, f"AWS4{secret}".encode())
    return (
        f"AWS4-HMAC-SHA256 Credential={access_key}/{'/'.join(scope)},"
        f"SignedHeaders={';'.join(names)},Signature={_sign(signing, text).hex()}"
    )


def _sign(key: bytes, text: str) -> bytes:
    return hmac.digest(key, text.encode(), "sha256")

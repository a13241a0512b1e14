"""Errors made from an upstream's responses, and of what fails on the network.

For a refused pull the status is enough, and a proxy in between may have written the body.  For a refused push
the specification's error code says what the client must change, and the message is passed on to the client.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from typing import Any

import aiohttp
import msgspec
from yarl import URL

from proxy.config.quantities import seconds_until
from proxy.connections.failures import explain
from proxy.upstream.challenges import parse_challenges
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

ERROR_LIMIT = 64 << 10  # bytes of an error's body
MESSAGE_LIMIT = 300  # characters of a message that are passed on
DOWN = frozenset((502, 503, 504))
LOOP = 508  # RFC 5842, section 7.2
MOMENT = 3.0  # seconds at most that a host is away that restarts

_UNKNOWN: dict[str, type[RegistryError]] = {
    "blob": BlobUnknown,
    "tags": NameUnknown,
    "catalog": Unsupported,
    "upload": BlobUploadUnknown,
}
# distribution-spec, "Error Codes".
_CODES: dict[str, type[RegistryError]] = {
    each.code: each
    for each in (
        BlobUnknown,
        BlobUploadInvalid,
        BlobUploadUnknown,
        DigestInvalid,
        ManifestBlobUnknown,
        ManifestInvalid,
        ManifestUnknown,
        NameInvalid,
        NameUnknown,
        OriginDenied,
        SizeInvalid,
        TagInvalid,
        Unsupported,
    )
}


_GONE = frozenset((errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE))


class OriginAway(OriginFailed):
    """It failed as while it restarts, and may answer the next request."""


class OriginLooped(OriginFailed):
    """It asked this registry for the same, and has nothing to say of its own."""


class Interrupted(OriginFailed):
    """The body of a response ended early."""


class _UpstreamError(msgspec.Struct):
    code: str = ""
    message: str | None = None
    detail: Any = None


class _UpstreamErrors(msgspec.Struct):
    errors: list[_UpstreamError] = []


def error_from_response(
    name: str, response: aiohttp.ClientResponse, repository: str, kind: str, content: bytes = b""
) -> RegistryError:
    """The error that a response means; `content` is the body of a refused push."""
    status = response.status
    errors = _parse(content)
    message = f"{name} answered {status} for {repository}" if repository else f"{name} answered {status}"
    if errors:
        message += f": {_printable(errors[0])}"
    if status == 400 and response.url.scheme == "http" and not errors:
        message += ": if it serves https, write https:// in its URL"  # nginx and Go answer so
    if status == 401 and _forgotten(response):
        return OriginFailed(f"{message}: it does not accept the token that was issued for it")
    if status in (401, 403):
        if status == 403 and not errors:
            message += ": it does not accept these credentials"
        return OriginDenied(message)
    if status == LOOP:
        return OriginLooped(f"{message}: the URL of this upstream leads back to this server")
    if status == 429:
        seconds = seconds_until(response.headers, time.time)
        return TooManyRequests(f"{name} limits our requests", retry_after=seconds)
    if status == 416:
        return RangeInvalid(message)
    if status in (405, 501) and response.method != "GET":
        return Unsupported(message)
    if response.method not in ("GET", "HEAD") and 400 <= status < 500:
        return _push_error(message, status, kind, errors)
    if status in (404, 410) or (kind == "referrers" and 400 <= status < 500):
        return _UNKNOWN.get(kind, ManifestUnknown)(message)
    seconds = seconds_until(response.headers, time.time)
    away = status in DOWN and (seconds or 0.0) <= MOMENT
    return (OriginAway if away else OriginFailed)(message, retry_after=seconds)


def _forgotten(response: aiohttp.ClientResponse) -> bool:
    """Whether a token is refused whatever it is for: it says nothing of what was asked for.

    RFC 6750, section 3.1.  What a token does not allow is `insufficient_scope`, also with Distribution's 401.
    """
    sent = response.request_info.headers.get("Authorization", "")
    challenges = parse_challenges(response.headers.getall("WWW-Authenticate", ()))
    return sent.startswith("Bearer ") and any(
        each.scheme == "bearer" and each.parameters.get("error") == "invalid_token" for each in challenges
    )


def _push_error(message: str, status: int, kind: str, errors: list[_UpstreamError]) -> RegistryError:
    error = _CODES.get(errors[0].code) if errors else None
    if error is ManifestBlobUnknown:
        return ManifestBlobUnknown(message, missing=_missing(errors))
    if kind == "manifest" and status == 413:
        return ManifestTooLarge(message)
    if error is None and status in (404, 410):
        error = _UNKNOWN.get(kind, ManifestUnknown)
    # Whatever it is, trying again does not help.
    return (error or (ManifestInvalid if kind == "manifest" else BlobUploadInvalid))(message)


def _parse(content: bytes) -> list[_UpstreamError]:
    try:
        return msgspec.json.decode(content, type=_UpstreamErrors).errors if content else []
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return []


def _printable(error: _UpstreamError) -> str:
    text = f"{error.code} {error.message or ''}".strip()[:MESSAGE_LIMIT]
    return "".join(each if each.isprintable() else " " for each in text)


def _missing(errors: list[_UpstreamError]) -> Iterator[str]:
    for each in errors:
        if each.code == ManifestBlobUnknown.code and isinstance(each.detail, dict):
            digest = each.detail.get("digest", each.detail.get("Digest"))
            if isinstance(digest, str):
                yield digest[:200]


def result_of(status: int) -> str:
    """The result of a request to an upstream, as metrics name it; `status` is 0 without a response."""
    if status == 0 or status >= 500:
        return "failed" if status else "unreachable"
    if status < 400:
        return "ok"
    return {401: "denied", 403: "denied", 404: "unknown", 429: "limited"}.get(status, "refused")


def error_from_failure(name: str, error: BaseException, url: URL | None, home: URL) -> RegistryError:
    """The error for a request to `url` that failed on the network, or for a body without `url`."""
    if isinstance(error, TimeoutError) and not isinstance(error, aiohttp.ConnectionTimeoutError):
        return OriginTimeout(f"{name} did not answer in time")
    failure = explain(error, url)
    failed = OriginAway if is_brief(error) else OriginFailed
    if isinstance(error, aiohttp.ClientResponseError | aiohttp.ClientPayloadError):
        return failed(f"{name}: {failure}")
    elsewhere = url is not None and url.origin() != home
    where = f" at {url.host_port_subcomponent}" if url is not None and elsewhere else ""
    kind = OriginTimeout if isinstance(error, TimeoutError) else failed
    return kind(f"{name} cannot be reached{where}: {failure}")


def is_final(error: BaseException) -> bool:
    """Whether a request failed in a way that others would, too."""
    return isinstance(error, TimeoutError | aiohttp.ClientConnectorError)


def is_brief(error: BaseException) -> bool:
    """Whether a request failed as while a server restarts: its host is there, the program is not."""
    if isinstance(error, aiohttp.ClientOSError):
        return error.errno in _GONE
    return isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientPayloadError | ConnectionError)

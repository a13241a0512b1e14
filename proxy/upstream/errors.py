"""What an upstream's status means here: the one place where it is translated.

Of a refused pull the status says it all, and whoever speaks HTTP in between may have written the body.  Of a
refused push the specification's error code says what is to be changed, and its message is for who pushed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import aiohttp
import msgspec

from proxy.config.quantities import seconds_until
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
    RangeInvalid,
    RegistryError,
    SizeInvalid,
    TagInvalid,
    TooManyRequests,
    Unsupported,
)

ERROR_LIMIT = 64 << 10  # bytes of an error's body
SAID = 300  # characters of what a registry says

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


class _Error(msgspec.Struct):
    code: str = ""
    message: str | None = None
    detail: Any = None


class _Errors(msgspec.Struct):
    errors: list[_Error] = []


def error_from_response(
    name: str, response: aiohttp.ClientResponse, repository: str, kind: str, content: bytes = b""
) -> RegistryError:
    """`content` is the body of what refuses a push; a pull's is not looked at."""
    status = response.status
    told = _told(content)
    said = f"{name} answered {status} for {repository}" if repository else f"{name} answered {status}"
    if told:
        said += f": {_clean(told[0])}"
    if status in (401, 403):
        return OriginDenied(f"{said}: it refuses these credentials" if status == 403 and not told else said)
    if status == 429:
        seconds = seconds_until(response.headers, time.time)
        return TooManyRequests(f"{name} limits our requests", retry_after=seconds)
    if status == 416:
        return RangeInvalid(said)
    if status in (405, 501) and response.method != "GET":
        return Unsupported(said)
    if response.method not in ("GET", "HEAD") and 400 <= status < 500:
        return _of_a_push(said, status, kind, told)
    if status in (404, 410) or (kind == "referrers" and 400 <= status < 500):
        return _UNKNOWN.get(kind, ManifestUnknown)(said)
    return OriginFailed(said, retry_after=seconds_until(response.headers, time.time))


def _of_a_push(said: str, status: int, kind: str, told: list[_Error]) -> RegistryError:
    error = _CODES.get(told[0].code) if told else None
    if error is ManifestBlobUnknown:
        return ManifestBlobUnknown(said, missing=_missing(told))
    if kind == "manifest" and status == 413:
        return ManifestTooLarge(said)
    if error is None and status in (404, 410):
        error = _UNKNOWN.get(kind, ManifestUnknown)
    # Whatever it is, it is no failure to be tried again.
    return (error or (ManifestInvalid if kind == "manifest" else BlobUploadInvalid))(said)


def _told(content: bytes) -> list[_Error]:
    try:
        return msgspec.json.decode(content, type=_Errors).errors if content else []
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return []


def _clean(error: _Error) -> str:
    text = f"{error.code} {error.message or ''}".strip()[:SAID]
    return "".join(each if each.isprintable() else " " for each in text)


def _missing(told: list[_Error]) -> Iterator[str]:
    for each in told:
        if each.code == ManifestBlobUnknown.code and isinstance(each.detail, dict):
            digest = each.detail.get("digest", each.detail.get("Digest"))
            if isinstance(digest, str):
                yield digest[:200]

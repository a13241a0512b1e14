"""The errors of a registry: the one table of codes and statuses.

    RegistryError                  UNKNOWN                    500
    ├── PathUnknown                UNSUPPORTED                404   no such endpoint
    ├── NameUnknown                NAME_UNKNOWN               404
    ├── NameInvalid                NAME_INVALID               400
    ├── TagInvalid                 TAG_INVALID                400
    ├── DigestInvalid              DIGEST_INVALID             400
    ├── ManifestUnknown            MANIFEST_UNKNOWN           404
    ├── ManifestInvalid            MANIFEST_INVALID           400
    │   └── ManifestTooLarge       MANIFEST_INVALID           413
    ├── ManifestBlobUnknown        MANIFEST_BLOB_UNKNOWN      400   it names content that is not stored
    ├── BlobUnknown                BLOB_UNKNOWN               404
    ├── BlobUploadUnknown          BLOB_UPLOAD_UNKNOWN        404
    ├── BlobUploadInvalid          BLOB_UPLOAD_INVALID        400
    │   └── UploadStalled          BLOB_UPLOAD_INVALID        408   no more bytes arrived
    ├── SizeInvalid                SIZE_INVALID               400
    ├── ArchiveInvalid             ARCHIVE_INVALID            422   damaged, or not an archive
    ├── Incomplete                 INCOMPLETE                 409   content to export is not stored
    ├── PreconditionFailed         PRECONDITION_FAILED        412   If-Match or If-None-Match is false
    ├── RangeInvalid               RANGE_INVALID              416
    ├── PaginationNumberInvalid    PAGINATION_NUMBER_INVALID  400
    ├── Unsupported                UNSUPPORTED                405
    ├── CodingUnsupported          UNSUPPORTED                415   a body with Content-Encoding
    ├── Misdirected                UNSUPPORTED                421   asked of the wrong replica
    ├── LoopDetected               UNAVAILABLE                508   an upstream leads back to this registry
    ├── Unauthorized               UNAUTHORIZED               401   with a challenge
    ├── TokenRequestInvalid        UNSUPPORTED                400   a request for a token that is none
    │   └── GrantTypeUnsupported   UNSUPPORTED                400   by a grant type that there is not
    ├── Throttled                  TOOMANYREQUESTS            429   too many wrong passwords
    ├── Denied                     DENIED                     403
    │   └── OriginDenied           DENIED                     403   the origin answered 401 or 403; see below
    │       └── OriginForbidden    DENIED                     403   though it accepted the credentials
    ├── StorageFailed              UNKNOWN                    500   our disk, where no origin helps; see below
    │   └── StorageUnavailable     UNAVAILABLE                503   the database of records, for now
    └── Unavailable                UNAVAILABLE                503   the origin cannot be asked now
        ├── BlobUncertain          UNAVAILABLE                503   nor whether its content should be there
        ├── TooManyRequests        TOOMANYREQUESTS            503   the origin answered 429; with Retry-After
        ├── OriginFailed           UNAVAILABLE                502   connection refused or cut, 5xx, nonsense
        └── OriginTimeout          UNAVAILABLE                504

The statuses are those of the answers to our own clients.  A 429 of the origin becomes 503: containerd repeats
a request five times without delay after a 429, and tries its next host at once after a 503.  The HTTP server
answers a 404 for a 401 or 403 of the origin, unless bypassing the cache is to be denied: a 401 would make the
client send its credentials to us, and after a 404 it asks the origin with its own credentials.
A disk that is full is answered 507 (RFC 4918 §11.5), and one that is read-only 503.

Codes: distribution-spec, "Error Codes"; codes that it does not list are those of Distribution.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from typing import Self


class RegistryError(Exception):
    """An error of a registry.

    The message is a sentence for the operator.  Clients get `public`, which is the same sentence unless that
    names a path of the server.  `retry_after` is in seconds, or None.  `remembered` is True if the origin
    gave this answer to an earlier request and was not asked again.
    """

    code = "UNKNOWN"
    status = 500

    def __init__(
        self, message: str = "", *, retry_after: float | None = None, public: str | None = None
    ) -> None:
        super().__init__(message)
        self.public = message if public is None else public
        self.retry_after = retry_after
        self.remembered = False

    def copy(self, remembered: bool = False) -> Self:
        """A copy without a traceback."""
        copy = type(self)(str(self), retry_after=self.retry_after)
        copy.remembered = remembered
        copy.public, copy.status = self.public, self.status
        return copy


class PathUnknown(RegistryError):
    code, status = "UNSUPPORTED", 404


class NameUnknown(RegistryError):
    """The registry has no such repository, or does not show it to this client."""

    code, status = "NAME_UNKNOWN", 404


class NameInvalid(RegistryError):
    code, status = "NAME_INVALID", 400


class TagInvalid(RegistryError):
    code, status = "TAG_INVALID", 400


class DigestInvalid(RegistryError):
    """A digest is malformed, or content does not match it."""

    code, status = "DIGEST_INVALID", 400


class ManifestUnknown(RegistryError):
    """The repository has no such manifest or tag."""

    code, status = "MANIFEST_UNKNOWN", 404


class ManifestInvalid(RegistryError):
    """Content is no manifest of its media type."""

    code, status = "MANIFEST_INVALID", 400


class ManifestTooLarge(ManifestInvalid):
    status = 413


class ManifestBlobUnknown(RegistryError):
    """A manifest names content that is not in its repository; `missing` are the digests."""

    code, status = "MANIFEST_BLOB_UNKNOWN", 400

    def __init__(
        self, message: str = "", *, missing: Iterable[str] = (), retry_after: float | None = None
    ) -> None:
        super().__init__(message, retry_after=retry_after)
        self.missing = tuple(missing)


class BlobUnknown(RegistryError):
    """The repository has no such blob."""

    code, status = "BLOB_UNKNOWN", 404


class BlobUploadUnknown(RegistryError):
    code, status = "BLOB_UPLOAD_UNKNOWN", 404


class BlobUploadInvalid(RegistryError):
    code, status = "BLOB_UPLOAD_INVALID", 400


class UploadStalled(BlobUploadInvalid):
    status = 408


class SizeInvalid(RegistryError):
    code, status = "SIZE_INVALID", 400


class ArchiveInvalid(RegistryError):
    code, status = "ARCHIVE_INVALID", 422


class Incomplete(RegistryError):
    code, status = "INCOMPLETE", 409


class PreconditionFailed(RegistryError):
    code, status = "PRECONDITION_FAILED", 412


class RangeInvalid(RegistryError):
    code, status = "RANGE_INVALID", 416


class PaginationNumberInvalid(RegistryError):
    code, status = "PAGINATION_NUMBER_INVALID", 400


class Unsupported(RegistryError):
    """The registry does not do this, for anybody."""

    code, status = "UNSUPPORTED", 405


class CodingUnsupported(RegistryError):
    code, status = "UNSUPPORTED", 415


class Misdirected(RegistryError):
    code, status = "UNSUPPORTED", 421


class LoopDetected(RegistryError):
    """The request comes from this registry: an answer would have to wait for itself."""

    code, status = "UNAVAILABLE", 508


class Unauthorized(RegistryError):
    """The client must authenticate; `challenges` are values of WWW-Authenticate (RFC 9110 §11.6.1)."""

    code, status = "UNAUTHORIZED", 401

    def __init__(
        self, message: str = "", *, challenges: Iterable[str] = (), retry_after: float | None = None
    ) -> None:
        super().__init__(message, retry_after=retry_after)
        self.challenges = tuple(challenges)


class TokenRequestInvalid(RegistryError):
    """A request for a token cannot be read, or asks for what there is not."""

    code, status = "UNSUPPORTED", 400


class GrantTypeUnsupported(TokenRequestInvalid):
    """RFC 6749, section 5.2."""


class Throttled(RegistryError):
    code, status = "TOOMANYREQUESTS", 429


class Denied(RegistryError):
    """This client may not do this."""

    code, status = "DENIED", 403


class OriginDenied(Denied):
    pass


class OriginForbidden(OriginDenied):
    pass


_STATUSES = {
    os.strerror(errno.ENOSPC): 507,
    os.strerror(errno.EDQUOT): 507,
    os.strerror(errno.EROFS): 503,
}


class StorageFailed(RegistryError):
    """The disk failed.  `cause` is what clients may know of it: no path."""

    def __init__(self, message: str = "", *, cause: str = "", retry_after: float | None = None) -> None:
        public = (
            f"the storage of this registry failed: {cause}"
            if cause
            else "the storage of this registry failed"
        )
        super().__init__(message, retry_after=retry_after, public=public)
        self.status = _STATUSES.get(cause, self.status)


class StorageUnavailable(StorageFailed):
    """A server that stores something for us cannot be used now; what was sent may be stored or not."""

    code = "UNAVAILABLE"

    def __init__(self, message: str = "", *, cause: str = "", retry_after: float | None = None) -> None:
        super().__init__(message, cause=cause, retry_after=retry_after)
        self.status = 503


class Unavailable(RegistryError):
    """The registry cannot answer now; it may later."""

    code, status = "UNAVAILABLE", 503


class BlobUncertain(Unavailable):
    """The content of a blob is missing, and whether it is still to be there cannot be asked now.

    A client that learned of no blob would give up; one that pushes would push it again.
    """

    def __init__(
        self, message: str = "", *, retry_after: float | None = 5.0, public: str | None = None
    ) -> None:
        super().__init__(message, retry_after=retry_after, public=public)


class TooManyRequests(Unavailable):
    code, status = "TOOMANYREQUESTS", 503


class OriginFailed(Unavailable):
    code, status = "UNAVAILABLE", 502


class OriginTimeout(Unavailable):
    code, status = "UNAVAILABLE", 504

"""A fake upstream registry: in memory, on its own loopback sockets, written from the specification.

    async with Upstream(cdn=True) as upstream:
        image = upstream.image("library/alpine", "latest")
        upstream.next("GET", image.layers[0], Reset(after=5))
        ...
        assert upstream.log == ["HEAD manifest library/alpine:latest"]

It imports nothing of the project, so that a misreading of the specification cannot cancel itself out, and it
speaks HTTP/1.1 itself, because no server library lies about lengths or dies in mid-sentence.  Every request
is recorded on arrival, whatever becomes of it.  Faults meet only requests that were let in: one that is
answered with a challenge consumes none.
"""

from tests.upstream.content import (
    DOCKER_LIST,
    OCI_CONFIG,
    OCI_EMPTY,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
    Image,
    Manifest,
    digest_of,
)
from tests.upstream.door import Basic, Bearer
from tests.upstream.faults import (
    ContentType,
    Corrupt,
    ExpireToken,
    Fault,
    Gzip,
    Hold,
    NoDigest,
    Redirect,
    Refuse,
    Reset,
    RetryAfter,
    Status,
    Truncate,
    WrongDigest,
    WrongLength,
)
from tests.upstream.messages import Request
from tests.upstream.pushing import Takes
from tests.upstream.registry import Upstream, What

__all__ = [
    "DOCKER_LIST",
    "OCI_CONFIG",
    "OCI_EMPTY",
    "OCI_INDEX",
    "OCI_LAYER",
    "OCI_MANIFEST",
    "Basic",
    "Bearer",
    "ContentType",
    "Corrupt",
    "ExpireToken",
    "Fault",
    "Gzip",
    "Hold",
    "Image",
    "Manifest",
    "NoDigest",
    "Redirect",
    "Refuse",
    "Request",
    "Reset",
    "RetryAfter",
    "Status",
    "Takes",
    "Truncate",
    "Upstream",
    "What",
    "WrongDigest",
    "WrongLength",
    "digest_of",
]

"""Which artifacts hold documents alone, such as signatures, attestations and SBOMs: no client runs these.

Their types have to say so, and their content as well: clients recognize an archive by its first bytes,
whatever its type is.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from contextlib import suppress

from storage.errors import BlobUnknown, NameUnknown
from storage.oci import Digest, ManifestContent
from storage.registry import Registry

REMEMBERED = 20_000  # blobs
HEADER = 512  # bytes of the header of a tar: POSIX.1-2017, pax, "ustar Interchange Format"
_CHECKSUM = slice(148, 156)  # in that
_TYPE = re.compile(r"text/.*|application/(?:.*\+)?(?:json|xml)|application/cose")
_MARK = b"\xef\xbb\xbf"  # of the order of bytes: RFC 3629, section 6
_TEXT = re.compile(rb"[\t\n\r -~]{0,4}")
_COSE = (b"\x84", b"\xd2")  # RFC 9052, section 2: an array of four, without and with its tag


class Documents:
    """Tells of the content of `registry` whether it is documents alone."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._known: OrderedDict[Digest, bool] = OrderedDict()

    async def alone(self, repository: str, content: ManifestContent) -> bool:
        """Whether all blobs of a manifest are documents, its config among them.

        Raises Unavailable if one cannot be fetched now.
        """
        if not claims_documents(content):
            return False
        return all([await self._is_document(repository, each.digest) for each in content.blobs])

    async def _is_document(self, repository: str, digest: Digest) -> bool:
        if (known := self._known.get(digest)) is not None:
            return known
        try:
            found = is_document(await self._head(repository, digest))
        except (BlobUnknown, NameUnknown):
            return False
        self._known[digest] = found
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return found

    async def _head(self, repository: str, digest: Digest) -> bytes:
        """The first bytes of a blob, which is read to its end: only then it is known to be that blob.

        Raises BlobUnknown if it is another one.
        """
        blob, head = await self._registry.get_blob(repository, digest), b""
        hashing = hashlib.new(digest.algorithm)
        try:
            async for each in blob.chunks():
                head += bytes(each[: HEADER - len(head)])
                hashing.update(each)
        finally:
            await blob.close()
        if hashing.hexdigest() != digest.encoded:
            raise BlobUnknown(f"{digest} is damaged")
        return head


def claims_documents(content: ManifestContent) -> bool:
    """Whether a manifest gives each of its layers the type of a document."""
    return all(_TYPE.fullmatch(each.media_type) for each in content.layers)


def is_document(head: bytes) -> bool:
    """Whether content with these first bytes is text or COSE, and neither compressed nor a tar."""
    if head.startswith(b"BZh") or _is_tar(head):
        return False
    return head.startswith(_COSE) or _TEXT.fullmatch(head.removeprefix(_MARK)[:4]) is not None


def _is_tar(head: bytes) -> bool:
    """Whether it is the header of a tar, with its checksum: a tar without a compression may be all text."""
    if len(head) < HEADER:
        return False
    field, rest = head[_CHECKSUM], head[: _CHECKSUM.start] + b" " * 8 + head[_CHECKSUM.stop :]
    claimed = [int.from_bytes(field[1:])] if field[:1] == b"\x80" else []
    with suppress(ValueError):
        claimed.append(int(field.strip(b" \0").partition(b"\0")[0], 8))
    return not {sum(rest), sum(each - 256 if each > 127 else each for each in rest)}.isdisjoint(claimed)

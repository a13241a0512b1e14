"""Whose objects those of a bucket are: an object names the records that know what they are for.

    <prefix>/entrepot     the identity of the records, which they have as the record `identity`

With other records, blobs would seem to be missing, and what they push would be mixed with what is there.
"""

from __future__ import annotations

import secrets

import structlog

from storage.bucket.objects import Bucket, ObjectUnknown
from storage.errors import StorageFailed
from storage.keys import IDENTITY
from storage.records import Batch, Records

log = structlog.get_logger()

MARKER = "entrepot"


class ForeignBucket(StorageFailed):
    """The bucket belongs to other records."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name} belongs to other records: use those, or another prefix; if they are lost, delete its"
            f" object {MARKER}",
            cause="its bucket is that of other records",
        )


class BucketOwner:
    """Whether a bucket belongs to records.  Methods block, and raise Unavailable."""

    def __init__(self, bucket: Bucket, records: Records) -> None:
        self._bucket = bucket
        self._records = records
        self._ours = False
        self._logged = False

    def check(self) -> None:
        """Make the bucket that of the records.  Raises ForeignBucket if it is that of others."""
        if self._ours:
            return
        identity = self._records.get(IDENTITY.key()) or self._records.transaction(_identify)
        if (found := self._marked()) is None:
            self._bucket.create(MARKER, identity)  # unless another process does so first
            found = self._marked()
        if found != identity:
            if not self._logged:  # each push asks
                log.error("bucket.foreign", bucket=self._bucket.name, action="nothing is put into it")
                self._logged = True
            raise ForeignBucket(self._bucket.name)
        self._ours = True

    def _marked(self) -> bytes | None:
        try:
            return self._bucket.read(MARKER)
        except ObjectUnknown:
            return None


def _identify(batch: Batch) -> bytes:
    if (found := batch.get(IDENTITY.key())) is None:
        batch.put(IDENTITY.key(), found := secrets.token_hex(16).encode())
    return found

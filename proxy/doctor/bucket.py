"""The check of the bucket: that objects can be put, read, looked at, and deleted.

They are put whole, in parts, and only if there is none: the object that names the owner of a bucket is.
"""

from __future__ import annotations

import asyncio
import secrets
import tempfile
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from proxy.config.shared import SharedConfig
from proxy.connections.failures import reason
from proxy.doctor.checks import Check, check_skew, failed, ok, warning
from storage.bucket.failures import BucketFailed, explain
from storage.disk.records import SQLiteRecords
from storage.errors import StorageFailed, Unavailable
from storage.keys import IDENTITY
from storage.records import Records

if TYPE_CHECKING:
    from storage.bucket.objects import Bucket, BucketHealth

CONTENT = b"entrepot doctor"
MAX_SKEW = 60.0  # seconds; S3 refuses requests of a clock that is 15 minutes off
INSTALL = "install entrepot[fleet]"
# What is needed for each step, by its name.
ADVICE = {
    "connecting": "compare docs/fleet.md",
    "put": "make the bucket, and give the permission to put objects (s3:PutObject)",
    "get": "give the permission to get objects (s3:GetObject)",
    "put in parts": "give the permission to put and to abort uploads of parts (s3:AbortMultipartUpload)",
    "delete": "give the permission to delete objects (s3:DeleteObject)",
    "put if there is none": "permit to put objects, on conditions too (s3:PutObject, If-None-Match)",
    "look": "give the permission to list the bucket (s3:ListBucket), so that missing objects show as such",
}
UNCONDITIONAL = "it replaces objects that are to be put only if there is none"
ALONE = (
    "give each registry a prefix of its own: of two that use one for the first time at the same moment, both"
    " may take it for theirs, and one refuses pushes later; all else works"
)
LIFECYCLE = (
    "let a lifecycle rule of the bucket abort incomplete uploads after a day (AbortIncompleteMultipartUpload)"
)


async def check(shared: SharedConfig, private: Path | None = None) -> list[Check]:
    """The check of the bucket, if there is one.  Its objects are deleted again.

    private: the directory of the private registry, if the bucket has its content
    """
    if shared.bucket is None or shared.extension is not None:  # which is checked as an extension
        return []
    probe = _BucketProbe(shared)
    try:
        await probe.run()
    except ImportError as error:
        return [failed("bucket", shared.bucket, f"obstore cannot be loaded: {error}", INSTALL)]
    except BucketFailed as error:
        failure = error.failure
        message = f"{probe.step} fails: the bucket {failure.cause}: {failure.detail}"
        advice = ADVICE[probe.step] if failure.right else failure.advice
        return [failed("bucket", shared.bucket, message, advice)]
    except (Unavailable, ValueError, OSError) as error:
        why = reason(error) if isinstance(error, OSError) else error
        return [failed("bucket", shared.bucket, f"{probe.step} fails: {why}", ADVICE[probe.step])]
    skew = check_skew(shared.bucket, probe.ahead, MAX_SKEW)
    rights = ok(
        "bucket", shared.bucket, "objects can be put, also if there is none, read, looked at and deleted"
    )
    if not probe.conditional:
        rights = warning("bucket", shared.bucket, UNCONDITIONAL, ALONE)
    found = [rights, *skew, await asyncio.to_thread(_interrupted, shared)]
    if private is not None and await asyncio.to_thread(_is_foreign, shared, private):
        advice = "use those records, or another prefix; if they are lost, delete its object entrepot"
        found.append(failed("bucket", shared.bucket, "it belongs to other records", advice))
    return found


def _interrupted(shared: SharedConfig) -> Check:
    """Who removes the parts of an upload whose writer has died."""
    from storage.bucket.signed_requests import BucketRefused, signed_requests

    settings, name = shared.settings(), str(shared.bucket)
    if name.startswith("az:"):
        return ok("bucket", name, "the service removes the parts of interrupted uploads after a week")
    requests = signed_requests(settings, settings.connect())
    if requests is None:
        why = "its keys are not set, or a proxy is" if name.startswith("s3:") else "it is Google's"
        return ok(
            "bucket", name, f"the server cannot remove the parts of interrupted uploads ({why}): {LIFECYCLE}"
        )
    try:
        requests.unfinished("doctor/parts")
    except (BucketRefused, OSError) as error:
        failure = explain(error, "abort", "doctor/parts")
        message = f"the parts of interrupted uploads stay: the bucket {failure.cause}: {failure.detail}"
        return warning("bucket", name, message, f"{failure.advice}, or {LIFECYCLE}")
    return ok("bucket", name, "the parts of interrupted uploads are removed after a day")


def _is_foreign(shared: SharedConfig, private: Path) -> bool:
    """Whether the bucket belongs to other records, as far as that can be known now."""
    from storage.bucket.objects import Bucket, ObjectUnknown
    from storage.bucket.owner import MARKER

    name = str(shared.bucket)
    try:
        marker = Bucket(shared.settings().connect(), name, _unreported(name)).read(MARKER)
        if shared.records is None and not (private / "records").exists():
            return True
        with closing(_records(shared, private)) as records:
            return records.get(IDENTITY.key()) != marker
    except (ObjectUnknown, ImportError, StorageFailed, Unavailable):  # another check says so
        return False


def _records(shared: SharedConfig, private: Path) -> Records:
    if shared.records is None:
        return SQLiteRecords(private / "records", durable=True)
    from storage.postgres.records import PostgresRecords  # only with a database

    return PostgresRecords(str(shared.records), connections=1)


class _BucketProbe:
    """Does once what the server does; `step` is what it does now.

    The clock of the bucket is `ahead` of ours by so many seconds; `conditional` is whether it keeps an object
    when another is to be put only if there is none.
    """

    def __init__(self, shared: SharedConfig) -> None:
        self.step = "connecting"
        self.ahead = 0.0
        self.conditional = False
        self._shared = shared

    async def run(self) -> None:
        from storage.bucket.objects import PART, Bucket

        settings, name = self._shared.settings(), str(self._shared.bucket)
        with tempfile.TemporaryDirectory() as directory:
            bucket = Bucket(settings.connect(), name, _unreported(name), settings.storage_class)
            key, source = f"doctor/{secrets.token_hex(8)}", Path(directory) / "object"
            for self.step, size in (("put", len(CONTENT)), ("put in parts", PART + 1)):
                content = CONTENT.ljust(size, b"\0")
                source.write_bytes(content)
                await bucket.put(key, source, size)
                put_at = time.time()
                self.step = "get"
                try:
                    self.ahead = await _compare(bucket, key, content) + 0.5 - put_at
                except BaseException:
                    with suppress(Unavailable):
                        await asyncio.to_thread(bucket.delete, key)
                    raise
                self.step = "delete"
                await asyncio.to_thread(bucket.delete, key)
        await asyncio.to_thread(self._put_twice, bucket, key)
        self.step = "look"
        if await bucket.size(key) is not None:
            raise ValueError("the object that was deleted is still there")

    def _put_twice(self, bucket: Bucket, key: str) -> None:
        self.step = "put if there is none"
        bucket.create(key, CONTENT)
        try:
            bucket.create(key, CONTENT[::-1])
            self.conditional = bucket.read(key) == CONTENT
        except BaseException:
            with suppress(Unavailable):
                bucket.delete(key)
            raise
        self.step = "delete"
        bucket.delete(key)


def _unreported(name: str) -> BucketHealth:
    """The health of a bucket of which only the caller learns."""
    from storage.bucket.objects import BucketHealth
    from storage.disk.troubles import Troubles

    class Unreported(BucketHealth):
        def failed(self, error: BaseException, action: str = "", key: str = "") -> BucketFailed:
            return self.error(error, action, key)

    return Unreported(name, Path(), time.time, Troubles())


async def _compare(bucket: Bucket, key: str, content: bytes) -> float:
    """When the object was made, in whole seconds.  Raises ValueError unless a range of it is right."""
    from storage.bucket.objects import ObjectUnknown

    start, stop = len(content) // 2, len(content) - 1
    try:
        opened = await bucket.get(key, start, stop)
    except ObjectUnknown:
        raise ValueError("the object that was put is not there") from None
    if b"".join([bytes(each) async for each in opened.chunks]) != content[start:stop]:
        raise ValueError("a range of the object is not what was put")
    return opened.made_at

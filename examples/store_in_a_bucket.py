"""Keeps files as blobs of a bucket, with their records on the disk.  It needs the extra `fleet`.

    python examples/store_in_a_bucket.py s3://BUCKET/PREFIX DIRECTORY REPOSITORY FILE...

Credentials are those that the cloud's own tools find.  DIRECTORY has the records and what is being uploaded.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from storage import Bucket, BucketBlobs, BucketSettings, Descriptor, Digest, SQLiteRecords, Store, healthy


def open_store(settings: BucketSettings, directory: Path) -> Store:
    bucket = Bucket(settings.connect(), settings.url, healthy(settings.url, directory))
    records = SQLiteRecords(directory / "records", durable=True)
    return Store(BucketBlobs(bucket, records, directory), records)


async def push(store: Store, repository: str, content: bytes) -> Descriptor:
    upload = await store.start_upload(repository, len(content))
    await upload.write(content)
    return await upload.commit(Digest.of(content))


async def main(url: str, directory: str, repository: str, *files: str) -> None:
    store = open_store(BucketSettings(url=url), Path(directory))
    try:
        for name in files:
            descriptor = await push(store, repository, Path(name).read_bytes())
            print(descriptor.digest, name)
    finally:
        await store.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

"""A move that is killed before each of its steps in turn, until one comes to its end.

    python -m tests.moving CONFIGURATION shared|local

After some deaths a server is pushed a blob: what was acknowledged must be there in the end.  Prints how often
it was killed, and the digests that were pushed.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

from proxy.config.loader import load
from proxy.config.schema import Config
from proxy.namespaces.private import private_store
from proxy.transfer.engine_moves import EngineMoves
from storage.oci import Digest
from tests.deaths import die_before

LATER = 3600.0  # seconds: whatever a move has paused has ended


def dying_at(number: int) -> None:
    """Have this process die before its step of that number."""
    from storage.bucket.objects import Bucket
    from storage.disk.blobs import BlobFiles
    from storage.disk.records import SQLiteRecords
    from storage.disk.uploads import FileUpload
    from storage.postgres.records import PostgresRecords

    methods = [
        (SQLiteRecords, "transaction"),
        (SQLiteRecords, "put"),
        (PostgresRecords, "transaction"),
        (Bucket, "put"),
        (FileUpload, "write"),
        (BlobFiles, "place"),
        (Path, "unlink"),
    ]
    die_before(number, methods)


async def move(config: Config, shared: bool) -> None:
    async with EngineMoves(config, shared) as moves:
        for _, job in moves.jobs(caches=True):
            report = await job.run()
            assert not report.damaged, report.damaged
        await moves.settle()


async def push(config: Config, content: bytes) -> Digest:
    """As a server that is started later."""
    store = private_store(config, lambda: time.time() + LATER)
    try:
        upload = await store.start_upload("local/pushed")
        await upload.write(content)
        return (await upload.commit(Digest.of(content))).digest
    finally:
        await store.close()


def forked(work: Callable[[], Awaitable[object]], prepare: Callable[[], None] = lambda: None) -> int:
    """The status of a process that does the work; negative for a signal."""
    child = os.fork()
    if child == 0:
        prepare()
        asyncio.run(work())  # type: ignore[arg-type]
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(path: Path, shared: bool) -> None:
    config = load(path)
    pushed = []
    for number in itertools.count(1):
        status = forked(partial(move, config, shared), partial(dying_at, number))
        if status == 0:
            break
        assert status == -signal.SIGKILL, status
        if number % 5:
            continue
        content = f"pushed after death {number}".encode()
        assert forked(partial(push, config, content)) == 0
        pushed.append(str(Digest.of(content)))
    print(number - 1, *pushed)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "shared")

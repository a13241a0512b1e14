#!/usr/bin/env bash
# Expected: MinIO does as S3 does, or answers an error: a list has all keys; an object is not deleted where `If-Match` is false; the list
#   of unfinished uploads takes any prefix of keys.
# Actual: where the bucket has `app` and `app/1`, lists have `app` alone, also that for the prefix `app/`, until `app` is
#   deleted; GET finds both all the time. DELETE with an `If-Match` that is false deletes, with 204 (a PUT with one is refused, and so is
#   the completion of an upload). The list of unfinished uploads for a prefix has those alone whose key is that prefix; without a
#   prefix it has all.
# Versions: github.com/minio/minio v0.0.0-20260212201848-7aac2a2c5b7c (Go module, the last one), Go 1.26; boto3 1.44.8 (PyPI). The
#   server has one drive. It builds for some minutes.
# Why a registry cache must care: what is cleaned up by lists misses objects, or takes them for lost, so no key may be a folder of another
#   one. A lease that is given up by a conditional deletion takes that of another server. Look for unfinished uploads by
#   whole keys.
set -euo pipefail
work=$(mktemp -d)
export GOMODCACHE="$work/modules" GOBIN="$work" GOFLAGS="-modcacherw -p=2" CGO_ENABLED=0
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip -q install --disable-pip-version-check boto3==1.44.8
go install github.com/minio/minio@v0.0.0-20260212201848-7aac2a2c5b7c 2> /dev/null
timeout 100 venv/bin/python - <<'PYTHON'
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

with ExitStack() as stack:
    ports = [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(2)]
address, console = (f"127.0.0.1:{port}" for port in ports)
environment = {**os.environ, "MINIO_ROOT_USER": "user", "MINIO_ROOT_PASSWORD": "of-this-server", "MINIO_BROWSER": "off"}
s3 = boto3.client(
    "s3",
    endpoint_url=f"http://{address}",
    aws_access_key_id="user",
    aws_secret_access_key="of-this-server",
    region_name="us-east-1",
    config=Config(retries={"max_attempts": 8}),
)


def put(key: str) -> None:
    s3.put_object(Bucket="bucket", Key=key, Body=b"x")


def keys(prefix: str = "") -> list[str]:
    return [each["Key"] for each in s3.list_objects_v2(Bucket="bucket", Prefix=prefix).get("Contents", [])]


def uploads(prefix: str) -> list[str]:
    found = s3.list_multipart_uploads(Bucket="bucket", Prefix=prefix)
    return [each["Key"] for each in found.get("Uploads", [])]


def status(operation: str, key: str, **given: object) -> int:
    try:
        answer = getattr(s3, operation)(Bucket="bucket", Key=key, **given)
    except ClientError as error:
        answer = error.response
    return answer["ResponseMetadata"]["HTTPStatusCode"]


def run() -> dict[str, object]:
    s3.create_bucket(Bucket="bucket")
    seen: dict[str, object] = {}
    put("app/1")
    put("app")
    seen["app/1 and app are there: the list"] = keys()
    seen["the list for app/"] = keys("app/")
    seen["GET app/1"] = status("get_object", "app/1")
    s3.delete_object(Bucket="bucket", Key="app")
    seen["app is deleted: the list"] = keys()
    put("lease")
    other = '"00000000000000000000000000000000"'
    seen["PUT lease, If-Match is false"] = status("put_object", "lease", Body=b"y", IfMatch=other)
    seen["DELETE lease, If-Match is false"] = status("delete_object", "lease", IfMatch=other)
    seen["GET lease"] = status("get_object", "lease")
    for key in ("blobs/1", "blobs/2"):
        s3.create_multipart_upload(Bucket="bucket", Key=key)
    for prefix in ("", "blobs/", "blobs/1"):
        seen[f"unfinished uploads for {prefix!r}"] = uploads(prefix)
    return seen


command = ["./minio", "server", "--quiet", "--address", address, "--console-address", console, "data"]
server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
try:
    for _ in range(200):
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", ports[0])) == 0:
                break
        time.sleep(0.1)
    time.sleep(2)  # it answers 503 at first
    seen = run()
finally:
    server.terminate()
    server.wait(30)
print(*(f"{what}: {answer}" for what, answer in seen.items()), sep="\n")
holds = list(seen.values()) == [
    ["app"],
    [],
    200,
    ["app/1"],
    412,
    204,
    404,
    ["blobs/1", "blobs/2"],
    [],
    ["blobs/1"],
]
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

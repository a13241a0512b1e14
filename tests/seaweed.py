"""SeaweedFS, a real server of the S3 API, for the tests that use a bucket."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.pools import PORTS

if TYPE_CHECKING:
    from storage.bucket.settings import BucketSettings

ACCESS_KEY, SECRET_KEY = "a-key", "its-secret"
_ACTIONS = ["Admin", "Read", "Write", "List", "Tagging"]
_IDENTITY = {"credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}], "actions": _ACTIONS}
ATTEMPTS = 3
_PORTS = ("master", "volume", "filer", "s3")


class Seaweed:
    """A running server.  All tests have the bucket `tests`: each has volumes of its own on the disk.

    `volumes` is how many there may be, of 64 MiB.
    """

    def __init__(self, directory: Path, volumes: int = 100) -> None:
        self.directory = directory
        self._volumes = volumes
        for attempt in range(ATTEMPTS):
            self._choose_ports()
            if not (said := self._start()):
                return
            if attempt == ATTEMPTS - 1:  # else another program has taken a port meanwhile
                pytest.fail(f"SeaweedFS did not start: {said}")

    def _choose_ports(self) -> None:
        with ExitStack() as stack:
            free = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(8)]
            ports = [each.getsockname()[1] for each in free]
        self._ports = dict(zip(_PORTS, zip(ports[::2], ports[1::2], strict=True), strict=True))
        PORTS.add(self._ports["s3"][0])
        self.endpoint = f"http://127.0.0.1:{self._ports['s3'][0]}"

    def start(self) -> None:
        """Start it again, and wait until it answers."""
        if said := self._start():
            pytest.fail(f"SeaweedFS did not start: {said}")

    def _start(self) -> str:
        """Start it, and wait until it answers; what it has said if it has ended instead."""
        self.directory.mkdir(exist_ok=True)
        identities = self.directory / "identities.json"
        identities.write_text(json.dumps({"identities": [{"name": "tests", **_IDENTITY}]}))
        ports = [
            f"-{name}.port{kind}={port}"
            for name, both in self._ports.items()
            for kind, port in zip(("", ".grpc"), both, strict=True)
        ]
        options = [
            *("-dir", str(self.directory), "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"),
            *("-s3", f"-s3.config={identities}", "-s3.port.iceberg=0", "-s3.port.lance=0"),
            *("-master.volumeSizeLimitMB=64", f"-volume.max={self._volumes}", *ports),
            "-master.electionTimeout=300ms",  # one that is started again waits for it, up to twice
        ]
        program = [shutil.which("weed") or str(Path(sys.executable).with_name("weed")), "server", *options]
        self.process = subprocess.Popen(program, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        assert self.process.stderr is not None
        said = []
        for line in self.process.stderr:
            said.append(line)
            if "Start Seaweed S3 API Server" in line:
                break
        else:
            self.process.wait()
            self.process.stderr.close()
            return "".join(said[-10:]) or "nothing was said"
        # What it says later must not fill the pipe.
        self._reader = threading.Thread(target=self.process.stderr.read, daemon=True)
        self._reader.start()
        return ""

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()

    def settings(self, bucket: str, prefix: str = "") -> BucketSettings:
        from storage.bucket.settings import BucketSettings

        return BucketSettings(
            url=f"s3://{bucket}/{prefix}",
            endpoint=self.endpoint,
            access_key=ACCESS_KEY,
            secret_key=SECRET_KEY,
            region="us-east-1",
        )

    def bucket(self, name: str) -> str:
        """Make a bucket, and return its name."""
        import obstore

        url = obstore.sign(self.settings(name).connect(), "PUT", "", timedelta(minutes=1))
        with urllib.request.urlopen(urllib.request.Request(url, method="PUT")) as answer:
            assert answer.status == 200
        return name


def require_seaweed() -> None:
    """Skip the test where SeaweedFS is not installed; fail it if ENTREPOT_REQUIRE_CLIENTS=1 asks for all."""
    if shutil.which("weed") or Path(sys.executable).with_name("weed").exists():
        return
    if os.environ.get("ENTREPOT_REQUIRE_CLIENTS") == "1":
        pytest.fail("weed is not installed")
    pytest.skip("weed is not installed")


@contextmanager
def seaweed_server(directory: Path, volumes: int = 100) -> Iterator[Seaweed]:
    require_seaweed()
    server = Seaweed(directory, volumes)
    try:
        server.bucket("tests")
        yield server
    finally:
        server.kill()

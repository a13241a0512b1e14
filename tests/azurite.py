"""Azurite, a real server of Azure's blob API, for the tests that use a bucket."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
import shutil
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.pools import PORTS

if TYPE_CHECKING:
    from storage.bucket.settings import BucketSettings

ACCOUNT, KEY = "tests", base64.b64encode(b"a key of tests").decode()
CONTAINER = "box"
API = "2023-11-03"


class Azurite:
    """A running server, with a container."""

    def __init__(self, program: str, directory: Path) -> None:
        options = [
            "--blobHost",
            "127.0.0.1",
            "--blobPort",
            "0",
            "--inMemoryPersistence",
            "--disableTelemetry",
        ]
        self.process = subprocess.Popen(
            [program, *options],
            cwd=directory,
            env={"PATH": os.environ["PATH"], "HOME": str(directory), "AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.process.stdout is not None
        said = []
        for line in self.process.stdout:
            said.append(line)
            if found := re.search(r"listens on http://127\.0\.0\.1:(\d+)", line):
                break
        else:
            pytest.fail(f"Azurite did not start: {said}")
        PORTS.add(int(found[1]))
        self.endpoint = f"http://127.0.0.1:{found[1]}/{ACCOUNT}"
        # What it says later must not fill the pipe.
        self._reader = threading.Thread(target=self.process.stdout.read, daemon=True)
        self._reader.start()
        self._make(CONTAINER)

    def _make(self, container: str) -> None:
        """Make a container: by a request with a shared key, which the client of the registry cannot."""
        headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": API}
        canonical = "".join(f"{name}:{value}\n" for name, value in headers.items())
        resource = f"/{ACCOUNT}/{ACCOUNT}/{container}\nrestype:container"
        text = "PUT" + "\n" * 12 + canonical + resource
        signature = base64.b64encode(
            hmac.digest(base64.b64decode(KEY), text.encode(), hashlib.sha256)
        ).decode()
        request = urllib.request.Request(
            f"{self.endpoint}/{container}?restype=container",
            method="PUT",
            headers={**headers, "Authorization": f"SharedKey {ACCOUNT}:{signature}", "Content-Length": "0"},
        )
        with urllib.request.urlopen(request) as answer:
            assert answer.status == 201

    def settings(self, prefix: str) -> BucketSettings:
        from storage.bucket.settings import BucketSettings

        url = f"az://{CONTAINER}/{prefix}"
        return BucketSettings(url=url, endpoint=self.endpoint, access_key=ACCOUNT, secret_key=KEY)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


def _program() -> str:
    """Where it is; without it the test is skipped, or fails if ENTREPOT_REQUIRE_CLIENTS=1 asks for all."""
    ours = Path(__file__).parent.parent / ".venv" / "azurite" / "node_modules" / ".bin" / "azurite-blob"
    found = shutil.which("azurite-blob") or (str(ours) if ours.exists() else None)
    if found is not None and shutil.which("node"):
        return found
    if os.environ.get("ENTREPOT_REQUIRE_CLIENTS") == "1":
        pytest.fail("Azurite is not installed")
    pytest.skip("Azurite is not installed")


@contextmanager
def azurite_server(directory: Path) -> Iterator[Azurite]:
    server = Azurite(_program(), directory)
    try:
        yield server
    finally:
        server.stop()

"""The tools that sign and verify, and the registries that they do it at."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

ACCEPTED = ", ".join(
    f"application/vnd.{each}+json"
    for each in (
        "oci.image.manifest.v1",
        "oci.image.index.v1",
        "docker.distribution.manifest.v2",
        "docker.distribution.manifest.list.v2",
    )
)
NOTATION_POLICY = {
    "version": "1.0",
    "trustPolicies": [
        {
            "name": "all",
            "registryScopes": ["*"],
            "signatureVerification": {"level": "strict"},
            "trustStores": ["ca:test"],
            "trustedIdentities": ["*"],
        }
    ],
}


@dataclass
class Ran:
    """A command that ended: its exit code, and what it said."""

    code: int
    said: str


@dataclass
class Tools:
    """cosign and notation, which keep everything in `home`; `commands` are what was typed in."""

    home: Path
    commands: list[str] = field(default_factory=list)

    def run(self, *arguments: str, stdin: str | None = None, check: bool = True, **more: str) -> Ran:
        """Run a command, with `more` in its environment.  Raises RuntimeError if it must not fail."""
        given = [f"{name}={value}" for name, value in more.items()]
        self.commands.append(" ".join([*given, *arguments]).replace(str(self.home) + "/", ""))
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "XDG_CONFIG_HOME": str(self.home / "config"),
            "COSIGN_PASSWORD": "",
            **more,
        }
        ended = subprocess.run(
            arguments,
            cwd=self.home,
            env=environment,
            input=stdin,
            text=True,
            capture_output=True,
            timeout=120,
        )
        said = (ended.stdout + ended.stderr).strip()
        if check and ended.returncode:
            raise RuntimeError(f"{' '.join(arguments)}\n{said}")
        return Ran(ended.returncode, said)

    def verify_with_cosign(self, image: str, *arguments: str) -> Ran:
        return self.run("cosign", "verify", "--allow-http-registry", *arguments, image, check=False)

    def verify_with_notation(self, image: str, authority: Path) -> Ran:
        """Verify against one file of certificates."""
        config = self.home / "config" / "notation"
        store = config / "truststore" / "x509" / "ca" / "test"
        shutil.rmtree(store, ignore_errors=True)
        store.mkdir(parents=True)
        shutil.copy(authority, store / "ca.pem")
        for name in ("trustpolicy.json", "trustpolicy.oci.json"):
            (config / name).write_text(json.dumps(NOTATION_POLICY))
        return self.run("notation", "verify", "--insecure-registry", image, check=False)


def found(*names: str) -> bool:
    return all(shutil.which(each) for each in names)


class HTTPRegistry:
    """A registry at a loopback address, used as tools do."""

    def __init__(self, host: str) -> None:
        self.host = host

    def request(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, bytes, Any]:
        url = path if path.startswith("http") else f"http://{self.host}{path}"
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(url, body, given, method=method)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, answer.read(), answer.headers
        except urllib.error.HTTPError as error:
            return error.code, error.read(), error.headers

    def push_blob(self, repository: str, content: bytes, digest: str) -> None:
        _, _, headers = self.request("POST", f"/v2/{repository}/blobs/uploads/", b"")
        location = headers["Location"]
        join = "&" if "?" in location else "?"
        status, said, _ = self.request(
            "PUT", f"{location}{join}digest={digest}", content, Content_Type="application/octet-stream"
        )
        assert status == 201, said

    def push_manifest(self, repository: str, reference: str, media_type: str, content: bytes) -> None:
        status, said, _ = self.request(
            "PUT", f"/v2/{repository}/manifests/{reference}", content, Content_Type=media_type
        )
        assert status == 201, said

    def manifest(self, repository: str, reference: str) -> tuple[str, bytes] | None:
        status, content, headers = self.request(
            "GET", f"/v2/{repository}/manifests/{reference}", Accept=ACCEPTED
        )
        return (headers["Content-Type"], content) if status == 200 else None

    def blob(self, repository: str, digest: str) -> bytes:
        status, content, _ = self.request("GET", f"/v2/{repository}/blobs/{digest}")
        assert status == 200, content
        return content

    def listed(self, repository: str, path: str) -> Any:
        status, content, _ = self.request("GET", f"/v2/{repository}/{path}")
        return json.loads(content) if status == 200 else {}


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@contextmanager
def process(*arguments: str, port: int) -> Iterator[None]:
    """A server that listens at `port`, for as long as the block runs."""
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(200):
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    time.sleep(0.1)
            yield
        finally:
            server.terminate()


@contextmanager
def served(app: web.Application) -> Iterator[str]:
    """The URL of an application that a thread serves."""
    loop, port = asyncio.new_event_loop(), free_port()
    runner = web.AppRunner(app)

    async def start() -> None:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()

    loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(runner.cleanup())
        loop.close()


def token(issuer: str, subject: str) -> str:
    """A token that names an identity, and that nobody has signed."""
    claims = {"iss": issuer, "sub": subject, "aud": "sigstore", "exp": int(time.time()) + 3600}
    if "@" in subject:
        claims |= {"email": subject, "email_verified": True}
    parts = [json.dumps(each).encode() for each in ({"alg": "ES256"}, claims)] + [b"none"]
    return ".".join(base64.urlsafe_b64encode(each).rstrip(b"=").decode() for each in parts)

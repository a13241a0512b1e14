"""A test pull through the server: with the requests of each client, and by the client itself.

The operator chooses the image, which the server may have to fetch from its upstream.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import aiohttp
import msgspec
from yarl import URL

from proxy.config.image_names import ImageName
from proxy.config.quantities import plural
from proxy.config.wellknown import DOCKER_HUB
from proxy.connections.failures import reason
from proxy.doctor.checks import Check, failed, ok, warning
from proxy.doctor.machine import Machine
from proxy.doctor.running import REQUESTS, metrics
from proxy.setup.engines import CONTAINERD
from storage.errors import RegistryError
from storage.oci import DOCKER_LIST, DOCKER_MANIFEST, MANIFEST_LIMIT, OCI_INDEX, OCI_MANIFEST, Digest

ACCEPT = ", ".join((OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST))
PULL_TIMEOUT = 300.0  # seconds for a client's own pull
PULLERS = {
    "docker": ("docker", "pull", "--quiet"),
    "containerd": ("ctr", "images", "pull"),
    "podman": ("podman", "pull", "--quiet"),
}


class _Unexpected(Exception):
    """An answer was not as expected.  The message is half a sentence."""


async def check(session: aiohttp.ClientSession, machine: Machine, client: str, name: ImageName) -> Check:
    """Request an image's manifests, and the headers of a blob, with the requests that the client sends."""
    try:
        summary = await _TestPull(session, machine, client, name).run()
    except _Unexpected as error:
        advice = f"run entrepot why {name} on the server, or name another image with --canary"
        return failed("canary", client, str(error), advice)
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        message = f"{name}: {reason(error)}"
        return failed("canary", client, message, "check that no firewall blocks this machine from the server")
    return ok("canary", client, f"{name} is served: {summary}")


class _TestPull:
    """The requests of one client that pulls one image."""

    def __init__(
        self, session: aiohttp.ClientSession, machine: Machine, client: str, name: ImageName
    ) -> None:
        self._session, self._site, self._client, self._name = session, machine.site, client, name

    def _url(self, path: str) -> URL:
        """The URL by which the client names the registry."""
        name, base = self._name, self._site.base
        if self._client == "containerd":
            return URL(f"{base}/v2/{name.repository}/{path}").with_query(ns=name.host)
        if self._client == "docker" and name.host == DOCKER_HUB:
            prefix = "" if self._site.hub else f"/{DOCKER_HUB}"
            return URL(f"{base}{prefix}/v2/{name.repository}/{path}")
        return URL(f"{base}/v2/{name.host}/{name.repository}/{path}")

    async def run(self) -> str:
        """The cache status and the id of the manifest's request.  Raises _Unexpected."""
        name = self._name
        if self._client != "containerd":
            await self._ask("GET", URL(f"{self._site.base}/v2/"), fine=(200, 401))
        reference: str = name.reference
        if self._client != "podman" and ":" not in reference:
            headers, _ = await self._ask("HEAD", self._url(f"manifests/{reference}"))
            if not headers.get("Docker-Content-Digest") or "Content-Length" not in headers:
                raise _Unexpected(
                    f"{name}: the answer to HEAD has no digest or no length: is a proxy in between?"
                )
            reference = headers["Docker-Content-Digest"]
        headers, content = await self._ask("GET", self._url(f"manifests/{reference}"))
        status = headers.get("Cache-Status", "no Cache-Status")
        request = headers.get("X-Request-Id", "?")
        tree = self._manifest(headers.get("Docker-Content-Digest", reference), content)
        if isinstance(tree.get("manifests"), list) and tree["manifests"]:
            child = _digest(tree["manifests"][0])
            _, content = await self._ask("GET", self._url(f"manifests/{child}"))
            tree = self._manifest(child, content)
        if config := _digest(tree.get("config")):
            await self._ask("HEAD", self._url(f"blobs/{config}"))
        return f"{status}, request {request}"

    async def _ask(
        self, method: str, url: URL, fine: Sequence[int] = (200,)
    ) -> tuple[Mapping[str, str], bytes]:
        async with self._session.request(
            method, url, headers={"Accept": ACCEPT}, allow_redirects=False
        ) as response:
            content = await response.content.read(MANIFEST_LIMIT)
            while more := await response.content.read(MANIFEST_LIMIT - len(content)):
                content += more
            if response.status not in fine:
                raise _Unexpected(
                    f"{self._name}: {method} {url.path} is answered {response.status}{_reason(content)}"
                )
            return response.headers, content

    def _manifest(self, digest: str, content: bytes) -> dict[str, Any]:
        try:
            right = Digest.of(content, Digest.parse(digest).algorithm) == digest
            tree = msgspec.json.decode(content)
        except (RegistryError, msgspec.DecodeError, UnicodeDecodeError):
            right, tree = False, None
        if not right or not isinstance(tree, dict):
            raise _Unexpected(
                f"{self._name}: the content does not match {digest or 'any digest'}: is a proxy in between?"
            )
        return tree


def _digest(descriptor: object) -> str:
    return str(descriptor.get("digest", "")) if isinstance(descriptor, dict) else ""


class _ErrorEntry(msgspec.Struct):
    code: str = ""
    message: str = ""


class _ErrorBody(msgspec.Struct):
    errors: list[_ErrorEntry]


def _reason(content: bytes) -> str:
    with suppress(msgspec.DecodeError, UnicodeDecodeError, IndexError):
        error = msgspec.json.decode(content, type=_ErrorBody).errors[0]
        return f" {error.code}: {error.message[:200]}"
    return ""


async def pull(
    session: aiohttp.ClientSession, machine: Machine, client: str, name: ImageName, admin: URL | None
) -> Check | None:
    """Pull with the client's own program; None if that is not installed.

    If `admin` is given and answers, the server's metrics show whether the pull reached it.
    """
    words = [*PULLERS[client], str(name)]
    if client == "containerd":  # by default ctr does not read it
        words.insert(-1, f"--hosts-dir={machine.path(CONTAINERD)}/certs.d")
    if not shutil.which(words[0]):
        return None
    before = await _requests(session, admin)
    status, last = await _run(words)
    if status:
        return failed(
            "pull",
            client,
            f"{' '.join(words)} ends with status {status}: {last}",
            "solve what its last line reports",
        )
    after = await _requests(session, admin)
    if before is None or after is None:
        message = f"{name} was pulled, perhaps not through the server"
        return warning("pull", client, message, "give the admin address of the server with --server URL")
    if after > before:
        return ok(
            "pull", client, f"{name} was pulled through the server: {plural(int(after - before), 'request')}"
        )
    advice = "see the checks above for what bypasses the server; a client may need a restart"
    return failed("pull", client, f"{name} was pulled, but the server was not asked", advice)


async def _requests(session: aiohttp.ClientSession, admin: URL | None) -> float | None:
    """The number of requests for content that the server has answered, or None if it is unknown."""
    if admin is None:
        return None
    try:
        found = await metrics(session, admin)
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
        return None
    return sum(each.value for each in found if each.name == REQUESTS and each.labels.get("kind") != "base")


async def _run(words: list[str]) -> tuple[int, str]:
    """The exit status, and the last line on standard error."""
    process = await asyncio.create_subprocess_exec(
        *words,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ,
    )
    try:
        async with asyncio.timeout(PULL_TIMEOUT):
            _, errors = await process.communicate()
    except TimeoutError:
        return 1, f"no end within {PULL_TIMEOUT:.0f} s"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    lines = errors.decode(errors="replace").strip().splitlines()
    return process.returncode or 0, lines[-1] if lines else "nothing"

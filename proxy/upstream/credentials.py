"""Sources of the user name and secret for an upstream.

    Credentials     none: anonymous
    Inline          the configuration
    PasswordFile    a file that holds the password
    DockerConfig    Docker's config.json: auths, credHelpers, credsStore
    Helper          a program docker-credential-<name>

Secrets rotate: a file is read again when it has changed, a program is run again after some minutes and after
forget().  No secret, and no output of a program, appears in an error, an event or a repr.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import msgspec
import structlog

from proxy.config.values import HELPER
from proxy.config.watched_file import WatchedFile
from proxy.config.wellknown import DOCKER_HUB, DOCKER_HUB_ALIASES
from storage.errors import OriginDenied

log = structlog.get_logger()

T = TypeVar("T")

# Docker Hub has several names, and Docker keeps its credentials under the address of its former API.
HUB_KEY = "https://index.docker.io/v1/"
HUB_HOSTS = frozenset((DOCKER_HUB, *DOCKER_HUB_ALIASES))

HELPER_LIFETIME = 300.0  # seconds; the output does not state how long it is valid
HELPER_TIMEOUT = 30.0  # seconds
# docker-credential-helpers, credentials/error.go: the message for a host without credentials.
_NOT_FOUND = b"credentials not found in native keychain"


@dataclass(frozen=True)
class Credential:
    """A user name with a password, or with an `identity_token`: a refresh token for the token realm."""

    username: str
    password: str = field(default="", repr=False)
    identity_token: str | None = field(default=None, repr=False)

    def basic(self) -> str | None:
        """The Authorization value (RFC 7617, in UTF-8), or None if there is only an identity token."""
        if self.identity_token and not self.password:
            return None
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


class Credentials:
    """No credentials, for any host.

    `account` tells their account from others at the same place of the configuration, without a secret.
    """

    account = ""

    async def get(self, host: str) -> Credential | None:
        """The credential for `host` (with its port, if it has one), or None for anonymous requests.

        Raises OriginDenied if the source cannot be read.
        """
        return None

    def forget(self) -> None:
        """Have the next get() read the source again, since the last credential was refused."""


class Inline(Credentials):
    """A user name and password from the configuration."""

    def __init__(self, username: str, password: str) -> None:
        self._credential = Credential(username, password)
        self.account = username

    async def get(self, host: str) -> Credential | None:
        return self._credential


class PasswordFile(Credentials):
    """A user name, with the content of the file at `path` as password, without the newline at its end."""

    def __init__(self, username: str, path: Path) -> None:
        def parse(content: bytes) -> Credential:
            password = content.decode().rstrip("\r\n")
            if not password:
                raise ValueError("it is empty")
            return Credential(username, password)

        self._file = _CredentialFile("password file", path, parse)
        self.account = username

    async def get(self, host: str) -> Credential | None:
        return self._file.current()


class _CredentialFile(Generic[T]):
    """The parsed content of a file, parsed again when the file has changed.  `parse` raises ValueError."""

    def __init__(self, kind: str, path: Path, parse: Callable[[bytes], T]) -> None:
        self.kind, self.source, self._file = kind, f"{kind} {path}", WatchedFile(path, parse)

    def current(self) -> T:
        try:
            return self._file.current()
        except OSError as error:
            raise _unusable(self.source, error.strerror or type(error).__name__, self.kind) from None
        except UnicodeDecodeError:  # its message would quote the content
            raise _unusable(self.source, "it is not UTF-8", self.kind) from None
        except ValueError as error:
            raise _unusable(self.source, str(error), self.kind) from None


def _unusable(source: str, reason: str, public: str = "") -> OriginDenied:
    """The error for a source of credentials that fails.  Clients get `public` instead, if it is given."""
    log.error("credentials.failed", source=source, reason=reason)
    message = f"no credentials for the upstream: {source}: {reason}"
    return OriginDenied(message, public=f"no credentials for the upstream: {public}" if public else None)


class Helper(Credentials):
    """Runs `docker-credential-<name> get`, found in PATH, one run at a time.

    Its output is kept for `lifetime` seconds; a program without output for `timeout` seconds is killed.
    Raises ValueError if `name` is not valid in a file name.
    """

    def __init__(
        self,
        name: str,
        *,
        lifetime: float = HELPER_LIFETIME,
        timeout: float = HELPER_TIMEOUT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not HELPER.fullmatch(name):
            raise ValueError(f"{name[:100]!r} is not the name of a credential helper")
        self._program = self.account = f"docker-credential-{name}"
        self._lifetime, self._timeout, self._clock = lifetime, timeout, clock
        self._lock = asyncio.Lock()
        self._answers: dict[str, _HelperOutput] = {}

    async def get(self, host: str) -> Credential | None:
        before = self._answers.get(host)
        async with self._lock:
            answer = self._answers.get(host)
            # An answer that came while we waited for the lock counts for us too, even an error: else all
            # that wait for a program that hangs would wait for its timeout one after the other.
            if answer is None or (answer is before and not self._clock() < answer.until):
                answer = self._answers[host] = await self._ask(host)
        if answer.error:
            raise OriginDenied(answer.error)
        return answer.credential

    def forget(self) -> None:
        self._answers.clear()

    async def _ask(self, host: str) -> _HelperOutput:
        try:
            credential = await self._run(HUB_KEY if host in HUB_HOSTS else host)
        except OriginDenied as error:
            return _HelperOutput(until=self._clock(), error=str(error))
        return _HelperOutput(until=self._clock() + self._lifetime, credential=credential)

    async def _run(self, key: str) -> Credential | None:
        """Write the server's address, read JSON: docker-credential-helpers, "Development"."""
        source = f"credential helper {self._program}"
        try:
            async with asyncio.timeout(self._timeout):
                status, output = await _run([self._program, "get"], key.encode())
        except TimeoutError:
            raise _unusable(source, f"no answer within {self._timeout:g} s") from None
        except OSError as error:
            raise _unusable(source, error.strerror or type(error).__name__) from None
        if status != 0:
            if _NOT_FOUND in output:
                return None
            raise _unusable(source, f"ended with status {status}")
        try:
            found = msgspec.json.decode(output, type=_JSONHelped)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise _unusable(source, "its answer is not JSON with Username and Secret") from None
        if found.username == "<token>":
            return Credential("", identity_token=found.secret)
        return Credential(found.username, found.secret)


@dataclass(frozen=True)
class _HelperOutput:
    """The outcome of one run, which counts until `until`."""

    until: float
    credential: Credential | None = None
    error: str | None = None


class _JSONHelped(msgspec.Struct, rename="pascal"):
    username: str
    secret: str


async def _run(command: list[str], stdin: bytes) -> tuple[int, bytes]:
    """Run a program: its exit status and output; if the call is cancelled, it is killed with its children."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        output, _ = await process.communicate(stdin)
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    return process.returncode or 0, output


class DockerConfig(Credentials):
    """Docker's config.json, or another tool's file of the same form, such as podman's auth.json.

    As in Docker, a host's own helper comes before `credsStore`, and both before `auths`.  `helper` makes the
    Credentials for the name of a helper.
    """

    def __init__(self, path: Path, *, helper: Callable[[str], Credentials] = Helper) -> None:
        self._helpers: dict[str, Credentials] = {}
        self._file = _CredentialFile("Docker configuration", path, self._parse)
        self.account = str(path)
        self._new_helper = helper

    async def get(self, host: str) -> Credential | None:
        config = self._file.current()
        helper = self._helpers.get(_find(config.cred_helpers, host) or config.creds_store)
        if helper and (found := await helper.get(host)):
            return found
        auth = _find(config.auths, host)
        try:
            return auth.credential() if auth else None
        except ValueError as error:
            raise _unusable(f"{self._file.source}, auths of {host}", str(error), self._file.kind) from None

    def forget(self) -> None:
        for helper in self._helpers.values():
            helper.forget()

    def _parse(self, content: bytes) -> _JSONConfig:
        try:
            config = msgspec.json.decode(content, type=_JSONConfig)
        except (msgspec.DecodeError, RecursionError) as error:
            raise ValueError(str(error)) from None
        names = {*config.cred_helpers.values(), config.creds_store} - {""}
        self._helpers = {name: self._new_helper(name) for name in names}
        return config


class _JSONAuth(msgspec.Struct):
    auth: str = ""
    username: str = ""
    password: str = ""
    identitytoken: str = ""

    def credential(self) -> Credential | None:
        """None for the empty entry that Docker writes if a helper has the secret.  Raises ValueError."""
        username, password = self.username, self.password
        if self.auth:
            try:
                # RFC 7617: the first colon ends the user name.
                username, colon, password = base64.b64decode(self.auth, validate=True).decode().partition(":")
            except ValueError:  # or its subclass; its message may quote the content
                colon = ""
            if not colon:
                raise ValueError("auth is not base64 of user:password")
        if not username and not self.identitytoken:
            return None
        return Credential(username, password, self.identitytoken or None)


class _JSONConfig(msgspec.Struct, rename="camel"):
    auths: dict[str, _JSONAuth] = {}
    creds_store: str = ""
    cred_helpers: dict[str, str] = {}


def _find(entries: Mapping[str, T], host: str) -> T | None:
    """The entry for `host`: Docker writes host, scheme://host, scheme://host/v1/, podman also host/path."""
    hosts = HUB_HOSTS if host in HUB_HOSTS else {host}
    for key in (HUB_KEY, *sorted(HUB_HOSTS)) if host in HUB_HOSTS else (host,):
        if key in entries:
            return entries[key]
    for key, entry in entries.items():
        if (key.partition("://")[2] or key).partition("/")[0] in hosts:
            return entry
    return None

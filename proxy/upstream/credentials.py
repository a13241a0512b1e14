"""Sources of the user name and secret for an upstream.

    Credentials     none: anonymous
    Inline          the configuration
    PasswordFile    a file that holds the password
    DockerConfig    Docker's config.json: auths, credHelpers, credsStore
    LoginFiles      all such files in which docker and podman look for logins
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
from collections.abc import Callable, Iterator, Mapping
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

# Docker Hub has several names.  Docker keeps its credentials under the address of its former API, podman in
# a helper under its name.
HUB_KEY = "https://index.docker.io/v1/"
HUB_HOSTS = frozenset((DOCKER_HUB, *DOCKER_HUB_ALIASES))
_HUB_HELPED = (HUB_KEY, DOCKER_HUB)

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

    async def get(self, host: str, repository: str = "") -> Credential | None:
        """The credential for `host` (with its port, if it has one), or None for anonymous requests.

        `repository` is the one that it is for; empty if it is for none, or for any.  Raises OriginDenied if
        the source cannot be read.
        """
        return None

    def forget(self) -> None:
        """Have the next get() read the source again, since the last credential was refused."""


class Inline(Credentials):
    """A user name and password from the configuration."""

    def __init__(self, username: str, password: str) -> None:
        self._credential = Credential(username, password)
        self.account = username

    async def get(self, host: str, repository: str = "") -> Credential | None:
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

    async def get(self, host: str, repository: str = "") -> Credential | None:
        return self._file.current()


class _CredentialFile(Generic[T]):
    """The parsed content of a file, parsed again when the file has changed.  `parse` raises ValueError."""

    def __init__(self, kind: str, path: Path, parse: Callable[[bytes], T]) -> None:
        self.kind, self.source, self._file = kind, f"{kind} {path}", WatchedFile(path, parse)

    def current(self) -> T:
        try:
            return self._file.current()
        except OSError as error:
            raise _unusable(self.source, error.strerror or "it cannot be read", self.kind) from None
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

    async def get(self, host: str, repository: str = "") -> Credential | None:
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
        credential = None
        try:
            for key in _HUB_HELPED if host in HUB_HOSTS else (host,):
                credential = credential or await self._run(key)
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
            raise _unusable(source, error.strerror or "it cannot be run") from None
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

    As in Docker, a host's own helper comes before `credsStore`, and both before `auths`.  As in podman, a key
    may have a path: the longest one that fits wins, containers-auth.json(5).  `helper` makes the Credentials
    for the name of a helper.
    """

    def __init__(self, path: Path, *, helper: Callable[[str], Credentials] = Helper) -> None:
        self._helpers: dict[str, Credentials] = {}
        self._file = _CredentialFile("Docker configuration", path, self._parse)
        self.account = str(path)
        self._new_helper = helper

    async def get(self, host: str, repository: str = "") -> Credential | None:
        config = self._file.current()
        wide, name = _find(config.cred_helpers, host, repository) or (0, config.creds_store)
        length, auth = _find(config.auths, host, repository) or (0, _JSONAuth())
        helper = self._helpers.get(name, Credentials())
        if length <= wide and (found := await helper.get(host)):
            return found
        try:
            login = auth.credential()
        except ValueError as error:
            where = f"{host}/{repository}".rstrip("/")
            raise _unusable(f"{self._file.source}, auths of {where}", str(error), self._file.kind) from None
        return login or (await helper.get(host) if length > wide else None)

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


def _find(entries: Mapping[str, T], host: str, repository: str) -> tuple[int, T] | None:
    """The entry that fits best, and the length of the path in its key.

    Docker writes host, scheme://host and scheme://host/v1/, podman also host/path.
    """
    hub = host in HUB_HOSTS
    exact = (HUB_KEY, *sorted(HUB_HOSTS)) if hub else (host,)
    found: list[tuple[int, int, T]] = []
    for key, entry in entries.items():
        scheme, _, address = key.rpartition("://")
        server, _, path = address.partition("/")
        path = "" if scheme else path.strip("/")
        if server not in (HUB_HOSTS if hub else {host}):
            continue
        if path and repository and not f"{repository}/".startswith(f"{path}/"):
            continue
        # Without a repository, a login for a part of the registry is better than none.
        length = len(path) if repository else -bool(path)
        found.append((length, -exact.index(key) if key in exact else -len(exact), entry))
    if not found:
        return None
    length, _, entry = max(found, key=lambda each: each[:2])
    return length, entry


class LoginFiles(Credentials):
    """The files in which docker, podman, buildah and skopeo look for logins, as far as they exist.

    The first that has a login wins, as containers-auth.json(5) says.
    """

    def __init__(self, environ: Mapping[str, str], user: int) -> None:
        self.paths = [path for path in _login_files(environ, user) if _is_readable(path)]
        self._files = [DockerConfig(path) for path in self.paths]

    async def get(self, host: str, repository: str = "") -> Credential | None:
        for each in self._files:
            if found := await each.get(host, repository):
                return found
        return None

    def forget(self) -> None:
        for each in self._files:
            each.forget()


def _login_files(environ: Mapping[str, str], user: int) -> Iterator[Path]:
    home = Path(environ.get("HOME") or "/")
    if configured := environ.get("REGISTRY_AUTH_FILE"):
        yield Path(configured)
    if runtime := environ.get("XDG_RUNTIME_DIR"):
        yield Path(runtime, "containers", "auth.json")
    yield Path(f"/run/containers/{user}/auth.json")
    yield Path(environ.get("XDG_CONFIG_HOME") or home / ".config", "containers", "auth.json")
    yield Path(environ.get("DOCKER_CONFIG") or home / ".docker", "config.json")


def _is_readable(path: Path) -> bool:
    return os.access(path, os.R_OK) and path.is_file()

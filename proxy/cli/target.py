"""What a command works on: a running server through its admin API, or the directory."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from yarl import URL

from proxy.admin.api.client import CONNECT, AdminClient, OperationFailed
from proxy.admin.operations import Operations
from proxy.cli.console import warn
from proxy.config.errors import StartError
from proxy.config.hosts import local_url, parse_server
from proxy.config.schema import Config
from proxy.connections.failures import explain, file_fault
from proxy.connections.trust import shared_context
from proxy.web.tls import pinned

if TYPE_CHECKING:
    from proxy.namespaces.composition import Composition


@asynccontextmanager
async def reach(
    config: Config,
    server: str | None,
    token: str | None,
    ca_file: Path | None = None,
    *,
    make: bool = False,
) -> AsyncIterator[Operations]:
    """The operations of the server at `server`, else of the configured server if it runs, else on its
    directory.

    Only a refused connection leads to the directory: a server that answers with an error, or not in time, is
    running, and knows more than its directory does.  With `make`, a missing directory is made.  Errors of the
    operations leave the block as OperationFailed.
    """
    url = _address(server) if server else admin_url(config)
    if url is not None and await _listens(url, must=server is not None):
        async with _client(config, url, server, token, ca_file) as client:
            yield client
        return
    async with _directory(config, url, make) as operations:
        yield operations


@asynccontextmanager
async def connected(
    config: Config, server: str, token: str | None, ca_file: Path | None = None
) -> AsyncIterator[AdminClient]:
    """A client of the server at `server`.  Raises OperationFailed."""
    url = _address(server)
    await _listens(url, must=True)
    async with _client(config, url, server, token, ca_file) as client:
        yield client


@asynccontextmanager
async def if_running(
    config: Config, server: str | None, token: str | None, ca_file: Path | None = None
) -> AsyncIterator[AdminClient | None]:
    """A client of the server at `server`, else of the configured one, or None if that does not run.

    Raises OperationFailed.
    """
    url = _address(server) if server else admin_url(config)
    if url is None or not await _listens(url, must=server is not None):
        yield None
        return
    async with _client(config, url, server, token, ca_file) as client:
        yield client


@asynccontextmanager
async def _client(
    config: Config, url: URL, server: str | None, token: str | None, ca_file: Path | None
) -> AsyncIterator[AdminClient]:
    """A client of the server at `url`.

    With https the certificate must be signed by one of `ca_file`.  Without that file it must be the one
    that the configuration names, or for a `server` that was given, one that this machine trusts.  Raises
    OperationFailed.
    """
    from aiohttp import ClientSession, ClientTimeout, TCPConnector

    timeout = ClientTimeout(total=None, sock_connect=CONNECT)
    trusted = _trusted(config, server, ca_file) if url.scheme == "https" else True
    async with ClientSession(timeout=timeout, connector=TCPConnector(ssl=trusted)) as session:
        yield AdminClient(session, url, token or config.admin_token, warn)


def _address(server: str) -> URL:
    try:
        return parse_server(server)
    except ValueError as error:
        raise OperationFailed(str(error), usage=True) from None


def admin_url(config: Config) -> URL | None:
    """The address of the admin API of a server with this configuration on this machine, if it has one."""
    if config.admin is None or not config.admin.port:
        return None
    return local_url("https" if config.admin_tls() else "http", config.admin)


def _trusted(config: Config, server: str | None, ca_file: Path | None) -> ssl.SSLContext:
    """Raises OperationFailed."""
    tls = config.admin_tls()
    try:
        if ca_file is not None or server or tls is None:
            return shared_context(ca_file)
        return pinned(tls.certificate)
    except StartError as error:
        raise OperationFailed(str(error), "DENIED") from error
    except OSError as error:
        raise OperationFailed(f"--ca-file {ca_file}: {file_fault(error)}", usage=True) from error


async def _listens(url: URL, must: bool) -> bool:
    """Whether a server listens.  Raises OperationFailed if it must and does not, or if that is unclear."""
    try:
        # It tries each address of a name, and raises the error of the last one.
        connection = await asyncio.to_thread(socket.create_connection, (url.host, url.port), CONNECT)
    except OSError as error:
        if isinstance(error, ConnectionRefusedError) and not must:
            return False
        raise OperationFailed(f"no server at {url}: {explain(error, url)}", "UNREACHABLE") from error
    connection.close()
    return True


@asynccontextmanager
async def _directory(config: Config, url: URL | None, make: bool) -> AsyncIterator[Operations]:
    tried = f"nothing listens at {url}, and " if url else ""
    async with composed(config, make, tried) as composition:
        if config.peers is not None:
            warn("this works on the directory alone; other replicas are not asked, nor told")
        from proxy.admin.local_operations import LocalOperations
        from proxy.processes.server_processes import ServerProcesses
        from proxy.processes.state import state_of

        # Without `heal`, which would ask upstreams: damaged content is fetched when a client pulls it.
        operations = LocalOperations(composition, ServerProcesses(state_of(composition), None))
        try:
            yield operations
        finally:
            await operations.close()


@asynccontextmanager
async def composed(config: Config, make: bool = False, tried: str = "") -> AsyncIterator[Composition]:
    """The composition on the directory, whether a server uses it or not.

    With `make`, a missing directory is made; without, its error begins with what was `tried`.  Errors leave
    the block as OperationFailed.
    """
    root = config.disk.path
    try:
        there = any((root / kind).is_dir() for kind in ("cache", "private"))
    except OSError as error:
        raise OperationFailed(f"{root}: {error.strerror}", "DENIED") from error
    if not there and not make:  # a command that only reads must not make it
        nothing = f"{tried}there is no cache in {config.disk.path} (disk.path)"
        raise OperationFailed(f"{nothing}: start a server (entrepot serve), or correct these", "NOT_RUNNING")
    from proxy.namespaces.composition import compose
    from proxy.namespaces.references import FieldInvalid
    from storage.errors import RegistryError

    try:
        composition = compose(config)
        try:
            yield composition
        finally:
            await composition.close()
    except FieldInvalid as error:
        raise OperationFailed(str(error), "FIELD_INVALID", usage=True) from error
    except RegistryError as error:
        raise OperationFailed(str(error) or error.code, error.code, usage=error.status == 400) from error
    except StartError as error:
        raise OperationFailed(str(error), "UNKNOWN") from error

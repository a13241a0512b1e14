"""Requests for operations among the replicas of a fleet: a body in JSON, at the port of clients.

    POST /entrepot/operations      FleetRequest; its answer is that of the operation

They carry the secret of the fleet, and are never passed on to a third replica.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import aiohttp
import msgspec
from yarl import URL

from proxy.connections.failures import explain
from proxy.upstream.connect import Connect
from proxy.upstream.peers import PEER

T = TypeVar("T")

PATH = "/entrepot/operations"
EXCHANGE, STATE = "exchange", "state"  # operations among replicas: they exchange acts, or tell their state
UNKNOWN = frozenset(("NAME_UNKNOWN", "MANIFEST_UNKNOWN", "BLOB_UNKNOWN"))


class Unanswered(Exception):
    """A replica has not done what it was asked to; the message says which, and why."""


class NotThere(Exception):
    """A replica does not have what an operation is about."""


class FleetRequest(msgspec.Struct, frozen=True):
    """The operation, its arguments, and the URL of the replica that asks.

    An act is about a `subject`, and was done `at` a time, in seconds since the epoch.
    """

    operation: str
    arguments: dict[str, Any] = {}
    sender: str = ""
    subject: str = ""
    at: float = 0.0


class ReplicaState(msgspec.Struct, frozen=True):
    """What a replica says of itself: its version, and what /readyz says."""

    version: str
    health: dict[str, str]


class RefusedRequest(msgspec.Struct, frozen=True):
    """The body of an answer that is an error."""

    error: str
    code: str


class ReplicaClient:
    """Asks other replicas.  Must be closed.

    headers: gives those of each request
    """

    def __init__(self, connect: Connect, headers: Callable[[], Mapping[str, str]]) -> None:
        self._connect = connect
        self._headers = headers
        self._session: aiohttp.ClientSession | None = None  # made with the first request

    async def ask(self, url: str, request: FleetRequest, kind: Callable[[bytes], T], patience: float) -> T:
        """The answer of the replica at `url`, read by `kind`.  Raises Unanswered, NotThere.

        patience: seconds until it must have come
        """
        target = URL(url) / PATH.removeprefix("/")
        try:
            async with self._opened().post(
                target,
                data=msgspec.json.encode(request),
                headers={**self._headers(), "Content-Type": "application/json"},
                timeout=aiohttp.ClientTimeout(total=patience, sock_connect=self._connect.connect_timeout),
                allow_redirects=False,
                server_hostname=self._connect.server_name,
            ) as response:
                content = await response.read()
        except aiohttp.ConnectionTimeoutError as error:
            raise Unanswered(f"{url} cannot be reached: {explain(error, target)}") from None
        except TimeoutError:
            raise Unanswered(f"{url} has not answered within {patience:.0f} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise Unanswered(f"{url} cannot be reached: {explain(error, target)}") from None
        if PEER not in response.headers:
            raise Unanswered(f"{url} does not take the secret, or has another version")
        try:
            if response.status == 200:
                return kind(content)
            refused = msgspec.json.decode(content, type=RefusedRequest)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise Unanswered(f"{url} has another version: its answer cannot be read") from None
        if refused.code in UNKNOWN:
            raise NotThere(refused.error)
        raise Unanswered(f"{url}: {refused.error}")

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(ssl=self._connect.ssl_context(), limit=0, force_close=True)
            self._session = aiohttp.ClientSession(
                connector=connector, cookie_jar=aiohttp.DummyCookieJar(), headers={"User-Agent": "entrepot"}
            )
        return self._session

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

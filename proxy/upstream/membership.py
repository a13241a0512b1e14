"""The replicas of a fleet: their URLs, and which of them this server is.

A name is resolved again now and then, in the background.  While it cannot be resolved, the replicas that were
known are still used: one that is gone costs a request that fails, as any upstream that is down.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress

import structlog
from yarl import URL

from proxy.config.peers import PeersConfig

log = structlog.get_logger()

REFRESH = 5.0  # seconds after which a name is resolved again
PATIENCE = 2.0  # seconds to wait for the answer

Resolve = Callable[[str, int], Awaitable[list[str]]]


async def resolve_all(name: str, port: int) -> list[str]:
    """All addresses of a name.  Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(name, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def is_of_this_machine(address: str) -> bool:
    """Whether an interface of this machine has the address."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as trial:
        try:
            trial.bind((address, 0))
        except OSError:
            return False
    return True


class Membership:
    """The replicas that `settings` name.

    port: at which this server listens
    host: the address at which it does so, by which it differs from others on this machine; empty for all
    encrypted: whether replicas that are found by a name are reached by https

    urls: those of all replicas
    own: that of this server, None while it is unknown
    """

    def __init__(
        self,
        settings: PeersConfig,
        port: int,
        *,
        host: str = "",
        encrypted: bool = False,
        resolve: Resolve = resolve_all,
        local: Callable[[str], bool] = is_of_this_machine,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        self.urls: tuple[str, ...] = settings.urls
        self.own = settings.own
        self._settings = settings
        self._port = port
        self._host = host
        self._scheme = "https" if encrypted else "http"
        self._resolve = resolve
        self._local = local
        self._ticks = ticks
        self._looked_at: float | None = None
        self._looking: asyncio.Task[None] | None = None
        self._answered = False  # the first look has ended
        self._failing = False
        self._told: tuple[tuple[str, ...], str | None] | None = None  # what was logged last

    async def refresh(self) -> None:
        """Have `urls` and `own` looked up if that is due; only the first look is waited for."""
        if self._settings.dns is None and self.own is not None:
            return
        now = self._ticks()
        due = self._looked_at is None or not 0 <= now - self._looked_at < REFRESH
        if due and (self._looking is None or self._looking.done()):
            self._looked_at = now
            self._looking = asyncio.create_task(self._look())
        if not self._answered and self._looking is not None:
            await asyncio.wait([self._looking])

    async def _look(self) -> None:
        try:
            async with asyncio.timeout(PATIENCE):
                found = await self._find()
        except (OSError, TimeoutError, UnicodeError) as error:
            if not self._failing:
                log.warning("peers.unresolved", error=str(error) or "the name service did not answer in time")
            self._failing = True
            return
        finally:
            self._answered = True
        self._failing = False
        self.urls, self.own = found
        if found != self._told:
            self._told = found
            log.info("peers.changed", peers=list(self.urls), own=self.own)
            if self.own is None:
                log.warning("peers.self_unknown", peers=list(self.urls))

    async def _find(self) -> tuple[tuple[str, ...], str | None]:
        own = self._settings.own
        if self._settings.dns is None:
            return self.urls, await self._ours(self.urls)
        name, port = self._settings.dns
        addresses = one_family(await self._resolve(name, port))
        urls = {address: self._url(address, port) for address in addresses}
        if own is None and port == self._port:
            local = {address: url for address, url in urls.items() if self._local(address)}
            own = local.get(self._host, next(iter(local.values()), None))
        return tuple(sorted(urls.values())), own

    async def _ours(self, urls: Iterable[str]) -> str | None:
        """The URL that leads to this server: to `host`, or else the first that leads to this machine."""
        first = None
        for text in urls:
            url = URL(text)
            if url.port == self._port and url.host is not None:
                with suppress(OSError):
                    addresses = await self._resolve(url.host, url.port)
                    if any(map(self._local, addresses)):
                        if not self._host or self._host in addresses:
                            return text
                        first = first or text
        return first

    def _url(self, address: str, port: int) -> str:
        return str(URL.build(scheme=self._scheme, host=address, port=port).origin())

    async def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)


def one_family(addresses: Iterable[str]) -> list[str]:
    """Those of IPv4, or else of IPv6: with both, each replica would be there twice."""
    found = sorted(set(addresses))
    return [each for each in found if ":" not in each] or found

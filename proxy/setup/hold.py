"""The configuration of a client that is in place only while the server answers.

A client whose server does not answer then asks the registries themselves, without a delay.  If this process
is killed, the files stay; then the client is refused a connection, and asks the registry after that.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import aiohttp
from yarl import URL

from proxy.connections.failures import explain
from proxy.connections.trust import client_context
from proxy.setup.install import Change, InstallPlan, Refused, install, plan_install, read
from proxy.setup.site import Setup, Site

CLIENTS = ("containerd", "microk8s", "podman")  # those that read all their files at each pull
INTERVAL = 10.0  # seconds between two requests to a server that answers
SOON = 2.0  # seconds between two requests to one that does not
TIMEOUT = 2.0  # seconds for an answer
FAILURES = 3  # so many in a row until the files are taken out


class HeldSetup:
    """Installs a Setup below `root` while a server answers, and takes it out when it does not.

    It takes out what it has installed, or has found as it would install it, unless somebody has changed it
    since.  `say` gets a line for each change.
    """

    def __init__(self, setup: Setup, root: Path, say: Callable[[str], None]) -> None:
        self._setup = setup
        self._root = root
        self._say = say
        self._held: dict[Path, str] = {}
        self._adopt(plan_install(setup, root))  # what a killed process has left
        self._failures = FAILURES - 1 if self._held else 0  # it has not seen the server answer

    def answered(self) -> None:
        """Install what is not there.  Raises Refused, which names the file, and OSError."""
        self._failures = 0
        planned = plan_install(self._setup, self._root)
        for path, _, cause in planned.refused:
            raise Refused(f"{path}: {cause}")
        for backup in install(planned.changes):
            self._say(f"backup: {backup}")
        for change in planned.changes:
            self._say(f"written: {change.path}")
        self._adopt(plan_install(self._setup, self._root))

    def failed(self, cause: str) -> None:
        """Take all out at the last of so many failures."""
        self._failures += 1
        if self._failures == 1 and not self._held:
            self._say(f"waiting for the server: {cause}")
        if self._failures == FAILURES and self._held:
            self._say(f"the server does not answer: {cause}")
            self.close()

    def close(self) -> None:
        """Take all out."""
        for path, content in self._held.items():
            try:
                if (now := read(path)) == content:
                    install([Change(path, content, None, kept=False)])
                    self._say(f"removed: {path}")
                elif now is not None:
                    self._say(f"left as it is: {path}, which somebody has changed")
            except (Refused, OSError) as error:
                self._say(f"cannot be removed: {path}: {error}")
        self._held.clear()

    def _adopt(self, planned: InstallPlan) -> None:
        self._held |= {path: read(path) or "" for path in planned.right}


async def hold(held: HeldSetup, site: Site, ended: asyncio.Event) -> None:
    """Ask the server again and again until `ended`.  Raises Refused, which names the file, and OSError."""
    url = URL(f"{site.base}/v2/")
    async with _session(site) as session:
        try:
            while not ended.is_set():
                if cause := await _fault(session, url):
                    held.failed(cause)
                else:
                    held.answered()
                with suppress(TimeoutError):
                    await asyncio.wait_for(ended.wait(), SOON if cause else INTERVAL)
        finally:
            held.close()


def _session(site: Site) -> aiohttp.ClientSession:
    trusted: ssl.SSLContext | bool = True
    if not site.plain:
        trusted = client_context()
        if site.ca:
            trusted.load_verify_locations(cadata=site.ca)
    timeout = aiohttp.ClientTimeout(total=TIMEOUT)
    # A connection for each request, as clients begin one for each pull: one that is open proves little.
    connector = aiohttp.TCPConnector(ssl=trusted, force_close=True)
    return aiohttp.ClientSession(timeout=timeout, connector=connector)


async def _fault(session: aiohttp.ClientSession, url: URL) -> str:
    """Why the server would serve no pull, or nothing if it would."""
    try:
        async with session.get(url, allow_redirects=False) as response:
            return "" if response.status in (200, 401) else f"{url} answers {response.status}"
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        return f"{url}: {explain(error, url).cause}"

"""The address that a request comes from, and its own URL, by its connection and the headers that proxies add.

Only trusted proxies are believed.  A request through any other proxy has no address: it matches no range, and
does not come from this machine even if the proxy runs here.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from functools import lru_cache

from aiohttp import HttpVersion11, web
from multidict import CIMultiDictProxy

from proxy.access.rules import IPAddress
from proxy.config.hosts import Network

# Any of these headers shows that a request has passed a proxy.
_MARKS = ("X-Forwarded-For", "Forwarded", "X-Real-IP", "X-Forwarded-Host", "X-Forwarded-Proto", "Via")
_FOR = re.compile(r'(?i)(?:^|;)\s*for\s*=\s*(?:"([^"]*)"|([^;\s"]*))\s*(?=;|$)')


class ClientAddresses:
    """Finds the addresses of clients.

    `trusted` are the networks of proxies that state their clients in X-Forwarded-For or Forwarded.
    """

    def __init__(self, trusted: Sequence[Network] = ()) -> None:
        self._trusted = tuple(trusted)

    def of(self, peer: str | None, headers: CIMultiDictProxy[str]) -> IPAddress | None:
        """The address of the client; None if it is unknown."""
        address = parse(peer or "")
        if address is None or not self._is_trusted(address):
            return None if any(mark in headers for mark in _MARKS) else address
        forwarded, plain = headers.getall("Forwarded", []), headers.getall("X-Forwarded-For", [])
        if bool(forwarded) == bool(plain):
            # Neither: the proxy does not state its client.  Both: one of them was sent by the client itself.
            return None
        hops = _elements(forwarded) if forwarded else [each.strip() for each in ",".join(plain).split(",")]
        for hop in reversed(hops):
            address = parse(hop)
            if address is None or not self._is_trusted(address):
                return address
        return address  # all are proxies: the first one is the client

    def is_local(self, request: web.BaseRequest) -> bool:
        """Whether a program on this machine sent the request, without a proxy.

        Most proxies show themselves by a header, by the Host that they pass on, or by HTTP/1.0.  A page in a
        browser has an Origin; its Host is not a loopback one, whatever the page's name resolves to.
        """
        address = self.of(request.remote, request.headers)
        host = request.headers.get("Host", "")
        named = parse(host)
        return (
            address is not None
            and address.is_loopback
            and (named.is_loopback if named else host.partition(":")[0] == "localhost")
            and request.version >= HttpVersion11
            and "Origin" not in request.headers
        )

    def _is_trusted(self, address: IPAddress) -> bool:
        return any(address in each for each in self._trusted)


def absolute(request: web.BaseRequest, path: str) -> str:
    """The URL of `path`, as this client reaches the server, behind a proxy too."""
    secure = request.headers.get("X-Forwarded-Proto", request.scheme) == "https"
    host = request.host.encode("ascii", "replace").decode()
    return f"{'https' if secure else 'http'}://{host}{path}"


@lru_cache(maxsize=1000)
def parse(text: str) -> IPAddress | None:
    """Parse an address with or without a port; return None for anything else."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        return address.ipv4_mapped
    return address


def _elements(values: Sequence[str]) -> list[str]:
    """The parameter `for` of each element, in order; "" for an element without it.  RFC 7239, section 4."""
    found = []
    for element in ",".join(values).split(","):
        match = _FOR.search(element.strip())
        found.append((match[1] or match[2] or "") if match else "")
    return found

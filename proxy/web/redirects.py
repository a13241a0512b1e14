"""Which requests for blobs may be answered by a redirect to the bucket."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from aiohttp import web

from proxy.telemetry.exchange import Exchange
from proxy.web.ranges import Range

ASKED = "Entrepot-Redirect"  # the header by which a client says `never`


class Redirects:
    """Tells clients that can follow a redirect; `never_for` are patterns of the User-Agent of others."""

    def __init__(self, never_for: Sequence[re.Pattern[str]]) -> None:
        self._never_for = never_for

    def allows(self, request: web.BaseRequest, ranges: Sequence[Range], exchange: Exchange) -> bool:
        """Whether a GET may be answered so.

        Buckets answer several ranges with the whole object, and know no digest in If-Range.  Other replicas
        ask for what is here.
        """
        if exchange.peer or len(ranges) > 1 or "If-Range" in request.headers:
            return False
        if request.headers.get(ASKED, "").lower() == "never":
            return False
        return not any(each.fullmatch(exchange.agent or "") for each in self._never_for)


def carries_login(request: web.BaseRequest, url: str) -> bool:
    """Whether the client may send the login of its request along to the URL.

    Go's HTTP client, which podman and others leave that to, does so for every port of the host that it
    asked, and for hosts below it.  The bucket would learn the login, and S3 refuses a second login.
    """
    if "Authorization" not in request.headers:
        return False
    here, there = _host(request.headers.get("Host", "")), _host(urlsplit(url).netloc)
    return there == here or there.endswith(f".{here}")


def _host(netloc: str) -> str:
    """The name or address, without a port."""
    return re.sub(r":\d*$", "", netloc).lower()

"""Where the server sends clients for tokens: whether they get there, and do not show passwords on the way."""

from __future__ import annotations

import aiohttp
from yarl import URL

from proxy.connections.failures import explain
from proxy.doctor.checks import Check, failed, ok
from proxy.setup.site import Site
from proxy.upstream.challenges import parse_challenges

NAME = "tokens"
REALM = "set access.token_endpoint.realm, or have the proxy in front pass on Host and send X-Forwarded-Proto"


async def check(session: aiohttp.ClientSession, site: Site) -> Check | None:
    """None if the server sends a client that only asks who it is to no token endpoint."""
    async with session.get(f"{site.base}/v2/", allow_redirects=False) as response:
        offered = parse_challenges(response.headers.getall("WWW-Authenticate", []))
    bearer = next((each.parameters for each in offered if each.scheme == "bearer"), None)
    if bearer is None:
        return None
    realm = bearer.get("realm", "")
    if site.url.scheme == "https" and not realm.startswith("https://"):
        message = f"clients are sent to {realm}, and their passwords cross the network in plain text"
        return failed(NAME, site.base, message, REALM)
    try:
        url = URL(realm).update_query(service=bearer.get("service", ""))
        async with session.get(url, allow_redirects=False) as response:
            status = response.status
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        cause = explain(error, URL(realm)).cause if not isinstance(error, ValueError) else "is no URL"
        return failed(NAME, site.base, f"clients are sent to {realm}, which cannot be asked: {cause}", REALM)
    if status not in (200, 401):  # other token servers want a login
        return failed(NAME, site.base, f"clients are sent to {realm}, which answers {status}", REALM)
    return ok(NAME, site.base, f"clients get tokens at {realm}")

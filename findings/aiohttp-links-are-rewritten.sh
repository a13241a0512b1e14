#!/usr/bin/env bash
# Expected: `response.links` of aiohttp gives the next page's URL as the server wrote it, made absolute, if the
#   session has requote_redirect_url=False, which is the switch for URLs that a server signed or made opaque;
#   and finds a link whatever the case of `rel` and "next", which RFC 8288 (2.1.1, 3.3) does not distinguish.
# Actual: the switch is for redirects alone. `links` normalises the URL: `%2F` becomes `/`, `%3a` becomes `:`,
#   `%7E` becomes `~`, `%2C` becomes `,` in the query that is then sent; `encoded=True` cannot be asked for. Its
#   keys are the parameter as it is written, so links.get("next") misses rel="Next", rel="last next" and REL=next,
#   and the listing ends after one page without an error. requests 2.34.2 leaves the URL alone; its keys are
#   as case-sensitive.
# Versions: aiohttp 3.14.5, requests 2.34.2 (PyPI).
# Why a registry cache must care: the URL of an upstream's next page is to be followed as it is; a server that
#   compares or signs the raw query refuses the page, and one that writes rel="Next" seems to have a single page.
#   Read the header itself, and join its URL with URL(…, encoded=True).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install --disable-pip-version-check aiohttp==3.14.5 yarl==1.25.1 requests==2.34.2
timeout 60 "$work/venv/bin/python" - <<'PYTHON'
import asyncio
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import aiohttp
import requests
import yarl

PAGE = "/v2/app/tags/list"
QUERY = "last=lib%2Fa%3Ab&token=x%2By%7Ez%2C%3a%3D"
HEADERS = {
    "opaque": f'<{PAGE}?{QUERY}>; rel="next"',
    "Next": f'<{PAGE}?last=v1>; rel="Next"',
    "two-relations": f'<{PAGE}?last=v1>; rel="last next"',
    "REL": f"<{PAGE}?last=v1>; REL=next",
    "plain": f"<{PAGE}?last=v1>; rel=next",
}


class Registry(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.path = self.path
        self.send_response(200)
        if link := HEADERS.get(self.path.rpartition("/")[2]):
            self.send_header("Link", link)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *args: object) -> None:
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
threading.Thread(target=server.serve_forever, daemon=True).start()
origin = f"http://127.0.0.1:{server.server_port}"


async def by_aiohttp() -> dict[str, str | None]:
    """The request for the next page, for each header."""
    sent: dict[str, str | None] = {}
    async with aiohttp.ClientSession(requote_redirect_url=False) as session:
        for name in HEADERS:
            async with session.get(f"{origin}/{name}") as response:
                link = response.links.get("next")
            sent[name] = None
            if link:
                async with session.get(link["url"]):
                    sent[name] = server.path
    return sent


def by_requests() -> dict[str, str | None]:
    links = {name: requests.get(f"{origin}/{name}", timeout=10).links.get("next") for name in HEADERS}
    return {name: link["url"] if link else None for name, link in links.items()}


print(f"aiohttp {aiohttp.__version__}, yarl {yarl.__version__}, requests {requests.__version__}")
seen, compared = asyncio.run(by_aiohttp()), by_requests()
for name, header in HEADERS.items():
    print(f"Link: {header}\n  aiohttp asks for {seen[name]}\n  requests gives   {compared[name]}")

holds = (
    seen["plain"] == compared["plain"] == f"{PAGE}?last=v1"
    and compared["opaque"] == f"{PAGE}?{QUERY}"
    and seen["opaque"] == f"{PAGE}?last=lib/a:b&token=x%2By~z,:%3D"
    and all(each[name] is None for each in (seen, compared) for name in ("Next", "two-relations", "REL"))
)
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

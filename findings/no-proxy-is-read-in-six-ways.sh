#!/usr/bin/env bash
# Expected: `NO_PROXY` means the same to all programs: a name or an address, with or without the port of the registry, a domain after `.` or
#   `*.`, a network in CIDR; and requests to `localhost` go past the proxy without it.
# Actual: the name or the address alone, and a domain after `.`, are read alike by all. With the port, as images have the name of a
#   registry, curl and aiohttp read neither, and requests no address. `*.` is read by skopeo and axios alone, a network by neither
#   aiohttp nor urllib. What a program does not read is ignored: its request goes to the proxy. So do requests to
#   `localhost`, but for skopeo's.
# Versions: skopeo 1.9.3+ds1-1+b10 (Debian 12), whose rule is that of all programs in Go; the curl that is there (7.88.1); requests 2.34.2, aiohttp
#   3.14.5 with `trust_env` (PyPI); urllib of the Python that is there (3.11); axios 1.21.1 (npm), Node 20.
# Why a registry cache must care: in a network with a proxy, some clients pull from the cache, and others ask the proxy for it, which
#   refuses, or fetches from afar what is near. Give each name and each address alone, without the port, and `localhost`. A server
#   that is both sides of this reads no such variable, but a key of its configuration.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get -qq -o APT::Sandbox::User=root download skopeo=1.9.3+ds1-1+b10 libgpgme11 libassuan0 libdevmapper1.02.1
for each in *.deb; do dpkg -x "$each" root; done
python3 -m venv venv
venv/bin/pip -q install --disable-pip-version-check requests==2.34.2 aiohttp==3.14.5
npm --silent --no-fund --no-audit install axios@1.21.1 > /dev/null
cat > ask.py <<'PYTHON'
import asyncio
import sys
import urllib.request

import aiohttp
import requests


async def ask(url: str) -> None:
    async with aiohttp.ClientSession(trust_env=True) as session, session.get(url):
        pass


library, url = sys.argv[1:]
{"aiohttp": lambda url: asyncio.run(ask(url)), "requests": requests.get, "urllib": urllib.request.urlopen}[library](url)
PYTHON
cat > ask.js <<'JS'
require("axios").get(process.argv[2]).catch(() => {});
JS
cat > finding.py <<'PYTHON'
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

seen: list[str] = []


class Proxy(BaseHTTPRequestHandler):
    def refuse(self) -> None:
        seen.append(self.path)
        self.send_response(502)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_CONNECT = refuse

    def log_message(self, *arguments: object) -> None:
        pass


NAME, ADDRESS, HERE = "registry.corp.example:5000", "10.1.2.3:5000", "localhost:5000"
CASES = [
    (NAME, "registry.corp.example"),
    (NAME, ".corp.example"),
    (NAME, "*.corp.example"),
    (NAME, NAME),
    (ADDRESS, "10.1.2.3"),
    (ADDRESS, ADDRESS),
    (ADDRESS, "10.0.0.0/8"),
    (HERE, ""),
]
CLIENTS = {
    "skopeo": ["root/usr/bin/skopeo", "inspect", "--tls-verify=false", "docker://{}/app:1"],
    "curl": ["curl", "-s", "http://{}/v2/"],
    "requests": ["venv/bin/python", "ask.py", "requests", "http://{}/v2/"],
    "aiohttp": ["venv/bin/python", "ask.py", "aiohttp", "http://{}/v2/"],
    "urllib": ["venv/bin/python", "ask.py", "urllib", "http://{}/v2/"],
    "axios": ["node", "ask.js", "http://{}/v2/"],
}
proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
threading.Thread(target=proxy.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{proxy.server_port}"
libraries = ":".join(f"{os.getcwd()}/root{each}/x86_64-linux-gnu" for each in ("/lib", "/usr/lib"))
kept = {"PATH": os.environ["PATH"], "HOME": os.getcwd(), "LD_LIBRARY_PATH": libraries}
names = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy")


def goes_past(client: str, registry: str, value: str) -> bool:
    seen.clear()
    own = {**kept, **dict.fromkeys(names, url), "NO_PROXY": value, "no_proxy": value}
    subprocess.run([each.format(registry) for each in CLIENTS[client]], env=own, capture_output=True, timeout=30)
    return not seen


found = {case: [each for each in CLIENTS if goes_past(each, *case)] for case in CASES}
for (registry, value), past in found.items():
    print(f"{registry}, NO_PROXY={value}: past the proxy go {', '.join(past)}")
without = [sorted(set(CLIENTS) - set(past)) for past in found.values()]
holds = without == [
    [],
    [],
    ["aiohttp", "curl", "requests", "urllib"],
    ["aiohttp", "curl"],
    [],
    ["aiohttp", "curl", "requests"],
    ["aiohttp", "urllib"],
    ["aiohttp", "axios", "curl", "requests", "urllib"],
]
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON
unshare -rn sh -c 'ip link set lo up && timeout 200 python3 finding.py'

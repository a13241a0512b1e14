#!/usr/bin/env bash
# Expected: oras-py, which got a token from the registry's token service, sends it: `Authorization: Bearer …`. An entry in
#   ~/.netrc, as curl and git read it, is of no concern to a client with logins of its own, or at most the login
#   where there is no other.
# Actual: each request that oras-py makes, that for the token too, has the login of ~/.netrc in place of its own header:
#   requests, by which it asks, lets the file win over an `Authorization` that the caller sets. So even a pull that needs
#   no login ends with "Unauthorized". The entry is for a host name, and counts for all its ports. python-dxf sends it too.
# Versions: oras 0.2.43, python-dxf 12.1.1, requests 2.34.2 (PyPI).
# Why a registry cache must care: it is sent Basic logins that are meant for other services of its host, and sees them refused
#   again and again, which looks like guessing. What is open to all must ignore a login; who forwards logins to an upstream
#   hands that one on. A program that asks by requests sets `trust_env = False`, or `auth` on the session.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install --disable-pip-version-check oras==0.2.43 python-dxf==12.1.1 requests==2.34.2
mkdir "$work/home"
cd "$work/home"
HOME="$work/home" DOCKER_CONFIG="$work/home" NO_PROXY="*" timeout 120 "$work/venv/bin/python" - <<'PYTHON'
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import dxf
import oras.client

seen: list[str] = []


class Registry(BaseHTTPRequestHandler):
    """A token opens it, which everybody gets."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        sent = self.headers["Authorization"] or "nothing"
        seen.append(f"{self.path.split('?')[0]} {sent}")
        if self.path.startswith("/token"):
            return self.answer(200, {"token": "opens", "access_token": "opens"})
        if sent == "Bearer opens":
            return self.answer(200, {"name": "app", "tags": ["v1"]})
        return self.answer(401, {"errors": [{"code": "UNAUTHORIZED", "message": "log in"}]})

    def answer(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        if status == 401:
            realm = f"http://127.0.0.1:{self.server.server_port}/token"
            self.send_header("WWW-Authenticate", f'Bearer realm="{realm}",service="app",scope="repository:app:pull"')
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
threading.Thread(target=server.serve_forever, daemon=True).start()
host = f"127.0.0.1:{server.server_port}"


def tags() -> str:
    seen.clear()
    client = oras.client.OrasClient(hostname=host, insecure=True, auth_backend="token")
    try:
        result = f"tags {client.get_tags(f'{host}/app:v1')}"
    except ValueError as error:
        result = f"error, {str(error).rsplit(': ', 1)[-1]}"
    print(f"  {result}\n    " + "\n    ".join(seen))
    return result


def alias() -> list[str]:
    seen.clear()
    try:
        dxf.DXF(host, "app", lambda *_: None, insecure=True).list_aliases()
    except Exception as error:  # noqa: BLE001 -- what it sends is what counts
        print(f"  python-dxf: {type(error).__name__}: {'; '.join(seen)}")
    return list(seen)


print(f"oras {oras.__version__}; without ~/.netrc:")
without = tags()
with open(".netrc", "w") as file:
    file.write("machine 127.0.0.1 login bob password for-git\n")
os.chmod(".netrc", 0o600)
print("with bob's login for this host in ~/.netrc:")
beside = tags()
asked = list(seen)
holds = (
    without == "tags ['v1']"
    and beside == "error, Unauthorized"
    and len(asked) == 3
    and all("Basic" in each for each in [*asked, *alias()])
)
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

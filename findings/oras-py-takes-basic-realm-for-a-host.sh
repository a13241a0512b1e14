#!/usr/bin/env bash
# Expected: oras-py, given user and password, sends them to a registry that asks for them by `WWW-Authenticate: Basic
#   realm="Team registry"`. The realm is a text for people (RFC 7617).
# Actual: its default, auth_backend="token", takes the realm of each challenge for the URL of a token service, whatever
#   the scheme: it sends user and password to `http://Team registry`, that is, to the host of that name, if there is one,
#   and tries six times, longer each time. They never get to the registry, which waits for them.
#   With auth_backend="basic" they do.
# Versions: oras 0.2.43 (PyPI).
# Why a registry cache must care: logins that work with every other client fail here, and the log of the registry shows
#   requests without one. A realm must not be the name of a host that should not see passwords: no host name at all.
#   A token endpoint of the registry's own helps such clients.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install --disable-pip-version-check oras==0.2.43
HOME="$work" DOCKER_CONFIG="$work" NO_PROXY="*" timeout 120 "$work/venv/bin/python" - <<'PYTHON'
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import oras.client

time.sleep = lambda _: None  # between its tries
seen: list[str] = []


class Host(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        login = self.headers["Authorization"]
        name = "the registry" if self.server is registry else "the host that the realm names"
        seen.append(f"{name}: {self.path.split('?')[0]}, {login or 'no login'}")
        opened = login is not None
        body = json.dumps({"name": "app", "tags": ["v1"], "errors": []}).encode()
        self.send_response(200 if opened and self.server is registry else 401)
        if self.server is registry and not opened:
            self.send_header("WWW-Authenticate", f'Basic realm="localhost:{other.server_port}"')
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def start() -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


registry, other = start(), start()
name = f"127.0.0.1:{registry.server_port}"


def tags(backend: str) -> str:
    seen.clear()
    client = oras.client.OrasClient(hostname=name, insecure=True, auth_backend=backend)
    client.auth.set_basic_auth("alice", "wonderland")
    try:
        result = f"tags {client.get_tags(f'{name}/app:v1')}"
    except ValueError as error:
        result = f"error, {str(error).rsplit(': ', 1)[-1]}"
    print(f"auth_backend={backend!r}: {result}\n  " + "\n  ".join(seen))
    return result


print(f"oras {oras.__version__}")
by_token = tags("token")
sent = [each for each in seen if "Basic" in each]
by_basic = tags("basic")
holds = (
    by_token.startswith("error")
    and sent != []
    and all(each.startswith("the host that the realm names: /, Basic") for each in sent)
    and by_basic == "tags ['v1']"
)
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

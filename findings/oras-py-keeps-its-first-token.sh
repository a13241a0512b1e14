#!/usr/bin/env bash
# Expected: oras-py, which looks by HEAD whether a blob is there before it pushes it, gets a token for that, and another where
#   the push is answered 401 with a challenge for `pull,push` (`error="insufficient_scope"`), as the distribution token
#   specification has it.
# Actual: it sends the first token once more, and fails with "Issue retrieving session url": only a 403 makes it
#   ask for a new one. So it cannot push where tokens are limited to what was asked for, though user and password are
#   right; where each token allows all that the user may do, it can.
# Versions: oras 0.2.43 (PyPI).
# Why a registry cache must care: in front of an upstream whose tokens are wide, such pushes worked, and with its own
#   narrow tokens they do not; the message names neither token nor scope. Such clients need Basic
#   (auth_backend="basic"), beside the token service.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install --disable-pip-version-check oras==0.2.43
cd "$work"
HOME="$work" DOCKER_CONFIG="$work" NO_PROXY="*" timeout 120 "$work/venv/bin/python" - <<'PYTHON'
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import oras.client

time.sleep = lambda _: None  # between its tries
wide = False  # whether a token allows more than was asked for
seen: list[str] = []


class Registry(BaseHTTPRequestHandler):
    """Its tokens are the actions that they allow."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        url = urlsplit(self.path)
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        if url.path == "/token":
            actions = parse_qs(url.query)["scope"][0].rpartition(":")[2]
            seen.append(f"a token for {actions}")
            token = "pull,push" if wide else actions
            return self.answer(200, json.dumps({"token": token, "access_token": token}).encode())
        actions = "pull" if self.command in ("GET", "HEAD") else "pull,push"
        allowed = set(actions.split(",")) <= set(token.split(","))
        seen.append(f"{self.command} with {token or 'nothing'}: {'allowed' if allowed else '401'}")
        if not allowed:
            error = ',error="insufficient_scope"' if token else ""
            realm = f'realm="http://127.0.0.1:{self.server.server_port}/token",service="app"'
            scope = f'scope="repository:app:{actions}"'
            return self.answer(401, b"{}", WWW_Authenticate=f"Bearer {realm},{scope}{error}")
        if self.command == "HEAD":
            return self.answer(404, b"")
        return self.answer(202 if self.command == "POST" else 201, b"", Location="/v2/app/blobs/uploads/1")

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
threading.Thread(target=server.serve_forever, daemon=True).start()
host = f"127.0.0.1:{server.server_port}"
with open("file.txt", "w") as file:
    file.write("text\n")


def push() -> str:
    seen.clear()
    client = oras.client.OrasClient(hostname=host, insecure=True, auth_backend="token")
    client.auth.set_basic_auth("alice", "wonderland")
    try:
        return f"pushed, {client.push(target=f'{host}/app:v1', files=['file.txt']).status_code}"
    except ValueError as error:
        return f"fails: {str(error).partition(':')[0]}"


print(f"oras {oras.__version__}")
narrow = push()
requests = list(seen)
print(f"tokens for what was asked for: {narrow}\n  " + "\n  ".join(requests))
wide = True
broad = push()
print(f"tokens for all that the user may do: {broad}")
holds = (
    narrow == "fails: Issue retrieving session url"
    and "a token for pull" in requests
    and "a token for pull,push" not in requests
    and requests[-1] == "POST with pull: 401"
    and broad == "pushed, 201"
)
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

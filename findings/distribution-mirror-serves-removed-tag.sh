#!/usr/bin/env bash
# Expected: a pull-through registry that asks its upstream on each pull by tag (it does) passes on a 404,
#   because the tag is removed, and falls back to its own copy only if the upstream is out of reach.
# Actual: Distribution in proxy mode takes any failure for the tag as a reason to answer with the manifest that
#   it stored: 200 without a `Warning`, an `Age` or another header that says so. For a tag that it never
#   stored, 404, 429 and 500 all come out as 404 MANIFEST_UNKNOWN.
# Versions: docker-registry 2.8.2+ds1-1 (Debian 12).
# Why a registry cache must care: with such a registry as its upstream it never sees that a tag is removed,
#   and takes a limit of requests for an absence: the absence must be remembered for seconds, not for hours.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get -qq -o APT::Sandbox::User=root download docker-registry=2.8.2+ds1-1
dpkg -x docker-registry_*.deb root
export REGISTRY="$work/root/usr/bin/docker-registry"
"$REGISTRY" --version
timeout 120 python3 - <<'PYTHON'
import hashlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

OCI = "application/vnd.oci.image"
CONFIG = b'{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}'


def digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


MANIFEST = json.dumps(
    {
        "schemaVersion": 2,
        "mediaType": f"{OCI}.manifest.v1+json",
        "config": {"mediaType": f"{OCI}.config.v1+json", "digest": digest(CONFIG), "size": len(CONFIG)},
        "layers": [],
    }
).encode()
CODES = {404: "MANIFEST_UNKNOWN", 429: "TOOMANYREQUESTS", 500: "UNKNOWN"}


class Upstream(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    status = 200  # of every answer for a manifest
    asked = 0

    def do_GET(self) -> None:
        status, kind, body = 200, "application/json", b"{}"
        headers = {}
        if "/manifests/" in self.path:
            Upstream.asked += 1
            status, kind, body = Upstream.status, f"{OCI}.manifest.v1+json", MANIFEST
            headers["Docker-Content-Digest"] = digest(MANIFEST)
            if status != 200:
                kind, headers = "application/json", {}
                body = json.dumps({"errors": [{"code": CODES[status], "message": "no"}]}).encode()
        elif "/blobs/" in self.path:
            kind, body = "application/octet-stream", CONFIG
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, *args: object) -> None:
        pass  # Distribution resets connections that it does not need any more


def pull(port: int, tag: str) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", f"/v2/app/manifests/{tag}", headers={"Accept": f"{OCI}.manifest.v1+json"})
    response = connection.getresponse()
    body = response.read()
    connection.close()
    code = "the manifest" if response.status == 200 else json.loads(body)["errors"][0]["code"]
    return response.status, code, dict(response.getheaders())


upstream = Server(("127.0.0.1", 0), Upstream)
threading.Thread(target=upstream.serve_forever, daemon=True).start()
with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
with open("config.yml", "w") as config:
    config.write(
        f"version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n"
        f"storage: {{filesystem: {{rootdirectory: {os.getcwd()}/data}}, delete: {{enabled: true}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}'}}\nproxy: {{remoteurl: 'http://127.0.0.1:{upstream.server_port}'}}\n"
    )
with open("log", "wb") as log:
    registry = subprocess.Popen([os.environ["REGISTRY"], "serve", "config.yml"], stdout=log, stderr=log)
holds = True
try:
    for _ in range(100):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            time.sleep(0.1)
    for status in (200, 404, 429, 500):
        Upstream.status, before = status, Upstream.asked
        stored = pull(port, "v1")
        asked = Upstream.asked - before
        unknown = pull(port, f"other-{status}") if status != 200 else None
        print(f"upstream answers {status}: asked {asked} time(s); the stored tag: {stored[0]} {stored[1]}")
        holds &= stored[0] == 200 and asked > 0
        holds &= not {"Warning", "Age"} & set(stored[2])
        if unknown:
            print(f"  a tag that is not stored: {unknown[0]} {unknown[1]}")
            holds &= unknown[:2] == (404, "MANIFEST_UNKNOWN")
finally:
    registry.terminate()
    registry.wait(10)
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

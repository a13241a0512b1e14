#!/usr/bin/env bash
# Expected: nginx with `proxy_cache` in front of a registry passes HEAD on as HEAD, or answers it from the cache: HEAD
#   is how clients ask whether a blob is there and what a tag stands for, without transferring or counting as a pull.
# Actual: by default (`proxy_cache_convert_head on`) the registry gets a GET for each HEAD that is not cached: the whole
#   blob is transferred and stored, whoever asked. `proxy_cache_convert_head off` passes HEAD on; the key of the cache
#   needs `$request_method` then, as nginx's documentation says.
# Versions: nginx 1.22.1-9+deb12u11 (Debian 12).
# Why a registry cache must care: behind such an nginx, or with one before its upstream, each push asks by HEAD for the
#   layers that it has, and moves them; a check of a tag by HEAD, which Docker Hub does not count, counts as a pull
#   there.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get -qq -o APT::Sandbox::User=root download nginx=1.22.1-9+deb12u11
dpkg -x nginx*.deb root
export PROXY="$work/root/usr/sbin/nginx"
"$PROXY" -v
timeout 60 python3 - <<'PYTHON'
import hashlib
import http.client
import http.server
import os
import queue
import socket
import subprocess
import sys
import threading
import time

BLOB = bytes(8_000_000)
PATH = f"/v2/app/blobs/sha256:{hashlib.sha256(BLOB).hexdigest()}"
SETTINGS = {
    "default": "",
    "convert_head off, method in the key": "proxy_cache_convert_head off; proxy_cache_key $request_method$uri;",
}
sent: queue.SimpleQueue[str] = queue.SimpleQueue()


class Registry(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(BLOB)))
        self.end_headers()
        body = BLOB if self.command == "GET" else b""
        self.wfile.write(body)
        sent.put(f"{self.command}: {len(body)} bytes")

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


def ask(port: int, method: str) -> str:
    """The method, the status and the body's length."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request(method, PATH)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return f"{method} {response.status}, {len(body)} bytes"


registry = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Registry)
threading.Thread(target=registry.serve_forever, daemon=True).start()
here = os.getcwd()
temporary = " ".join(f"{kind}_temp_path {here}/tmp;" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
seen = {}
for number, (name, setting) in enumerate(SETTINGS.items()):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with open("nginx.conf", "w") as config:
        config.write(
            f"daemon off; master_process off; pid {here}/pid; error_log {here}/error.log;\nevents {{}}\n"
            f"http {{ access_log off; {temporary} proxy_cache_path {here}/cache{number} keys_zone=blobs:1m;\n"
            f"server {{ listen 127.0.0.1:{port};\n"
            f"location / {{ proxy_pass http://127.0.0.1:{registry.server_port}; proxy_cache blobs;\n"
            f"proxy_cache_valid 200 10m; {setting} }} }} }}\n"
        )
    nginx = subprocess.Popen([os.environ["PROXY"], "-p", here, "-e", f"{here}/error.log", "-c", f"{here}/nginx.conf"])
    try:
        for _ in range(100):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        steps = [f"client {ask(port, 'HEAD')}", f"registry {sent.get(timeout=20)}"]
        if setting:
            steps.append(f"client {ask(port, 'GET')}")
            steps.append(f"registry {sent.get(timeout=20)}")
    finally:
        nginx.terminate()
        nginx.wait(10)
    assert sent.empty()
    seen[name] = steps
    print(f"{name}: {'; '.join(steps)}")
whole = f"{len(BLOB)} bytes"
holds = seen == {
    "default": ["client HEAD 200, 0 bytes", f"registry GET: {whole}"],
    "convert_head off, method in the key": [
        "client HEAD 200, 0 bytes",
        "registry HEAD: 0 bytes",
        f"client GET 200, {whole}",
        f"registry GET: {whole}",
    ],
}
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

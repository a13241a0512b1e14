#!/usr/bin/env bash
# Expected: a reverse proxy whose server closes the connection within a response ends its own response as incomplete (RFC 9112, 8): without
#   the last chunk, if it has no Content-Length.
# Actual: Caddy does so where there is a Content-Length. A response in chunks that is cut off gets its last chunk from Caddy: the client sees a
#   complete response with status 200, of fewer bytes. nginx ends it as incomplete. With `encode gzip`, HEAD for a JSON document has
#   the length of 20 bytes, which is that of compressed nothing, beside the ETag and digest of the whole.
# Versions: caddy 2.6.2-5, nginx 1.22.1-9+deb12u11 (Debian 12). Caddy 2.11.9 does neither.
# Why a registry cache must care: behind Caddy a restart cuts lists short, and blobs that are passed on without a length, and no client can
#   tell, unless it knows the digest. Send each response with its length, or compare what came with one that is known. As a client, believe
#   no length of HEAD if it says `Content-Encoding`.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
for each in caddy=2.6.2-5 nginx=1.22.1-9+deb12u11; do
    apt-get -qq -o APT::Sandbox::User=root download "$each"
done
for each in *.deb; do dpkg -x "$each" root; done
mkdir logs
export HOME="$work" XDG_DATA_HOME="$work" XDG_CONFIG_HOME="$work"
timeout 60 python3 - <<'PYTHON'
import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

DOCUMENT = b'{"tags": [' + b'"1", ' * 1000 + b'"1"]}'
RESPONSES = {
    "/length": (b"Content-Length: 100\r\n\r\n", b"hello"),
    "/chunks": (b"Transfer-Encoding: chunked\r\n\r\n", b"5\r\nhello\r\n"),
    "/json": (b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(DOCUMENT), DOCUMENT),
}
with ExitStack() as stack:
    free = [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(3)]
caddy, compressing, nginx = free
server = socket.create_server(("127.0.0.1", 0))
upstream = "127.0.0.1:{1}".format(*server.getsockname())


def serve() -> None:
    """Answer each connection once, and close it: within the response, but for /json."""
    while True:
        connection, _ = server.accept()
        with connection, connection.makefile("rb") as reader:
            words = reader.readline().split()
            if not words:
                continue
            while reader.readline().strip():
                pass
            head, body = RESPONSES[words[1].decode()]
            connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n" + head)
            if words[0] != b"HEAD":
                connection.sendall(body)


def ask(port: int, method: str, path: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, headers={"Accept-Encoding": "gzip"})
    answer = connection.getresponse()
    if method == "HEAD":
        return f"{answer.status}, a length of {answer.headers['Content-Length']}"
    try:
        return f"{answer.status}, complete, {len(answer.read())} bytes"
    except (http.client.IncompleteRead, ConnectionError) as error:
        return f"{answer.status}, {type(error).__name__}"


threading.Thread(target=serve, daemon=True).start()
Path("Caddyfile").write_text(
    "{\n    admin off\n    auto_https off\n}\n"
    f"http://127.0.0.1:{caddy} {{\n    reverse_proxy {upstream}\n}}\n"
    f"http://127.0.0.1:{compressing} {{\n    encode gzip\n    reverse_proxy {upstream}\n}}\n"
)
temporary = " ".join(f"{each}_temp_path logs;" for each in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
location = f"location / {{ proxy_pass http://{upstream}; proxy_http_version 1.1; }}"
Path("nginx.conf").write_text(
    f"pid {os.getcwd()}/nginx.pid; daemon off; error_log logs/error.log; events {{ }}"
    f" http {{ access_log off; {temporary} server {{ listen 127.0.0.1:{nginx}; {location} }} }}"
)
commands = [
    ["root/usr/bin/caddy", "run", "--config", "Caddyfile", "--adapter", "caddyfile"],
    ["root/usr/sbin/nginx", "-p", os.getcwd(), "-c", "nginx.conf"],
]
proxies = [subprocess.Popen(each, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for each in commands]
try:
    for port in free:
        for _ in range(100):
            with socket.socket() as tried:
                if tried.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
    seen = {
        "Caddy, cut within a length": ask(caddy, "GET", "/length"),
        "Caddy, cut within chunks": ask(caddy, "GET", "/chunks"),
        "nginx, cut within a length": ask(nginx, "GET", "/length"),
        "nginx, cut within chunks": ask(nginx, "GET", "/chunks"),
        "Caddy, HEAD of JSON": ask(caddy, "HEAD", "/json"),
        "Caddy with gzip, HEAD of JSON": ask(compressing, "HEAD", "/json"),
    }
finally:
    for each in proxies:
        each.terminate()
        each.wait(20)
print(*(f"{what}: {answer}" for what, answer in seen.items()), sep="\n")
cut = "200, IncompleteRead"
holds = list(seen.values()) == [
    cut,
    "200, complete, 5 bytes",
    cut,
    cut,
    f"200, a length of {len(DOCUMENT)}",
    "200, a length of 20",
]
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

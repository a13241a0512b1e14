#!/usr/bin/env bash
# Expected: lighttpd's mod_proxy passes a response on as it comes, or nginx's way: stored for a slow client, while this reads it. It answers
#   502 if its server closes a connection without an answer, and ends a response incomplete that its server did not complete.
# Actual: by default, the client gets no byte, not even the status, until the last byte of the body has come from the server, and an
#   upload reaches the server when all of it is there: a layer is stored whole in between, both ways, and then sent. With
#   `server.stream-response-body = 1` and `server.stream-request-body = 1` it does as expected. Without them, a response in chunks that is
#   cut off gets the length that has come, and is complete for the client. A close without an answer is a 500 in both cases.
# Versions: lighttpd 1.4.69-1 (Debian 12).
# Why a registry cache must care: containerd waits half a minute for a status, so that behind it the first pull of a large layer fails, and
#   each one begins when the cache has ended. Set both lines, and send each response with its length.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get -qq -o APT::Sandbox::User=root download lighttpd=1.4.69-1
dpkg -x lighttpd_*.deb root
timeout 60 python3 - <<'PYTHON'
import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

STREAM = "server.stream-response-body = 1\nserver.stream-request-body = 1\n"
server = socket.create_server(("127.0.0.1", 0))
go_on, arrived, answered = threading.Event(), threading.Event(), threading.Event()


def answer(connection: socket.socket) -> None:
    with connection, connection.makefile("rb") as reader:
        words = reader.readline().split()
        while reader.readline().strip():
            pass
        if words[1] == b"/layer":
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\n" + bytes(100_000))
            go_on.wait(20)
            connection.sendall(bytes(100_000))
        elif words[1] == b"/chunks":
            connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
            answered.wait(2)
        elif words[0] == b"PUT":
            arrived.set()
            reader.read(200_000)
            connection.sendall(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")


def serve() -> None:
    while True:
        threading.Thread(target=answer, args=server.accept()[:1], daemon=True).start()


def ask(port: int, path: str) -> str:
    answered.clear()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", path)
    response = connection.getresponse()
    answered.set()
    try:
        return f"{response.status}, complete, {len(response.read())} bytes"
    except http.client.IncompleteRead:
        return f"{response.status}, incomplete"


def ask_for_layer(port: int) -> str:
    """Whether the status comes while the server has sent half of the body, and waits for two seconds."""
    go_on.clear()
    timer = threading.Timer(2, go_on.set)
    timer.start()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/layer")
    response = connection.getresponse()
    when = "after" if go_on.is_set() else "before"
    go_on.set()
    timer.cancel()
    return f"{response.status} {when} the server has sent all, {len(response.read())} bytes"


def upload(port: int) -> str:
    """Whether the server gets the request while the client has sent half of the body, and waits for two seconds."""
    arrived.clear()
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"PUT /upload HTTP/1.1\r\nHost: registry\r\nContent-Length: 200000\r\n\r\n" + bytes(100_000))
        when = "before" if arrived.wait(2) else "after"
        client.sendall(bytes(100_000))
        status = client.recv(1000).split()[1].decode()
    return f"{status}, reaches the server {when} the client has sent all"


def run(lines: str) -> list[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    host, behind = server.getsockname()
    Path("lighttpd.conf").write_text(
        f'server.document-root = "{os.getcwd()}"\nserver.bind = "127.0.0.1"\nserver.port = {port}\n'
        f'server.upload-dirs = ("{os.getcwd()}")\nserver.errorlog = "{os.getcwd()}/error.log"\n'
        f'server.modules = ("mod_proxy")\nproxy.server = ("" => (("host" => "{host}", "port" => {behind})))\n{lines}'
    )
    proxy = subprocess.Popen(["root/usr/sbin/lighttpd", "-D", "-f", "lighttpd.conf", "-m", "root/usr/lib/lighttpd"])
    try:
        for _ in range(100):
            with socket.socket() as tried:
                if tried.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        return [ask_for_layer(port), upload(port), ask(port, "/chunks"), ask(port, "/none")]
    finally:
        proxy.terminate()
        proxy.wait(20)


threading.Thread(target=serve, daemon=True).start()
NONE = "500, complete, 365 bytes"
KINDS = ["a layer", "an upload", "a response cut within chunks", "a close without an answer"]
seen = {"by default": run(""), "with both lines": run(STREAM)}
for how, found in seen.items():
    print(f"{how}:", *(f"  {kind}: {what}" for kind, what in zip(KINDS, found)), sep="\n")
holds = list(seen.values()) == [
    ["200 after the server has sent all, 200000 bytes", "201, reaches the server after the client has sent all", "200, complete, 5 bytes", NONE],
    ["200 before the server has sent all, 200000 bytes", "201, reaches the server before the client has sent all", "200, incomplete", NONE],
]
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

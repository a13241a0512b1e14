#!/usr/bin/env bash
# Expected: nginx as a reverse proxy, whose client is slower than the server behind it, stores at most a file of
#   `proxy_max_temp_file_size` (1 GiB by default) for it, and then reads on from the server as fast as the client reads.
# Actual: when the file is full, nginx takes nothing more from the server until the client has read all of the file. With
#   the default and a client of 10 Mbit/s that is a quarter of an hour. With `proxy_buffering off`, or with
#   `proxy_max_temp_file_size 0`, the server waits no longer than it takes the client to read a few hundred KiB.
# Versions: nginx 1.22.1-9+deb12u11 (Debian 12).
# Why a registry cache must care: a limit for clients that take nothing of a response cuts off healthy downloads of blobs
#   over 1 GiB, and only these. Behind nginx it needs `proxy_buffering off`, or a limit longer than slow clients need for
#   1 GiB. Until then nginx has up to 1 GiB on its disk for each of these downloads.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get -qq -o APT::Sandbox::User=root download nginx=1.22.1-9+deb12u11
dpkg -x nginx*.deb root
export PROXY="$work/root/usr/sbin/nginx"
"$PROXY" -v
timeout 120 python3 - <<'PYTHON'
import os
import socket
import subprocess
import sys
import threading
import time

MIB = 1 << 20
SIZE = 32 * MIB
SETTINGS = {
    "a file of 16 MiB": "proxy_max_temp_file_size 16m;",
    "no file": "proxy_max_temp_file_size 0;",
    "no buffering": "proxy_buffering off;",
}
received = 0  # by the client
longest = 0  # what the client received while the server could send nothing


def serve(server: socket.socket) -> None:
    """One response to each connection, as fast as it is taken."""
    global longest
    while True:
        connection = server.accept()[0]
        if not connection.recv(65536):
            continue
        connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {SIZE}\r\nConnection: close\r\n\r\n".encode())
        left = SIZE
        while left:
            before = received
            left -= connection.send(bytes(min(left, 65536)))
            longest = max(longest, received - before)
        connection.close()


def connect(port: int) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    client.settimeout(60)
    client.connect(("127.0.0.1", port))
    return client


server = socket.create_server(("127.0.0.1", 0))
server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
threading.Thread(target=serve, args=(server,), daemon=True).start()
here = os.getcwd()
temporary = " ".join(f"{kind}_temp_path {here}/tmp;" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
seen = {}
for name, setting in SETTINGS.items():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with open("nginx.conf", "w") as config:
        config.write(
            f"daemon off; master_process off; pid {here}/pid; error_log {here}/error.log;\nevents {{}}\n"
            f"http {{ access_log off; {temporary}\nserver {{ listen 127.0.0.1:{port} sndbuf=64k;\n"
            f"location / {{ proxy_pass http://127.0.0.1:{server.getsockname()[1]}; {setting} }} }} }}\n"
        )
    nginx = subprocess.Popen([os.environ["PROXY"], "-p", here, "-e", f"{here}/error.log", "-c", f"{here}/nginx.conf"])
    try:
        for _ in range(100):
            try:
                client = connect(port)
                break
            except OSError:
                time.sleep(0.1)
        received = longest = 0
        client.sendall(b"GET / HTTP/1.1\r\nHost: registry\r\nConnection: close\r\n\r\n")
        while data := client.recv(65536):
            received += len(data)
            time.sleep(0.002)  # slower than the server
        client.close()
        assert received > SIZE
    finally:
        nginx.terminate()
        nginx.wait(10)
    seen[name] = longest / MIB
    print(f"{name}: the server waits while the client reads {seen[name]:.1f} MiB")
pause, *others = seen.values()
holds = pause > 8 and max(others) < 4
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

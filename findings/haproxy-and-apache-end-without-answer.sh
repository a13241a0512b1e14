#!/usr/bin/env bash
# Expected: a reverse proxy whose server closes the connection before it answers, as one that restarts does, sends the request
#   to it again, or answers 502.
# Actual: HAProxy and Apache do so only for the first request of a client's connection. For each further one they close that
#   connection without a byte, as if the client had waited too long, and for POST and PATCH as well: the client sees an end
#   of file and no status. nginx answers 502 each time.
# Versions: haproxy 2.6.12-1+deb12u4, apache2-bin 2.4.71-1~deb12u1, nginx 1.22.1-9+deb12u11 (Debian 12), with no settings but
#   timeouts and the address of the server.
# Why a registry cache must care: a client that repeats what is answered 502 or 503 does not repeat this, and each layer but the first
#   goes over such a connection. Neither its own log nor that of the client names the proxy. A server that restarts should
#   answer what it has accepted, and `Connection: close` before it closes; as a client, take the end of a kept
#   connection without a byte for a failure like 502.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
cd "$work"
apt-get -qq -o APT::Sandbox::User=root download haproxy=2.6.12-1+deb12u4 liblua5.3-0 libopentracing-c-wrapper0 libopentracing1 \
    apache2-bin=2.4.71-1~deb12u1 libapr1 libaprutil1 nginx=1.22.1-9+deb12u11
for package in *.deb; do dpkg -x "$package" root; done
export LD_LIBRARY_PATH="$work/root/usr/lib/x86_64-linux-gnu:$work/root/lib/x86_64-linux-gnu"
root/usr/sbin/haproxy -v | sed -n 1p
root/usr/sbin/apache2 -v | sed -n 1p
root/usr/sbin/nginx -v
timeout 120 python3 - <<'PYTHON'
import os
import socket
import subprocess
import sys
import threading
import time

HERE = os.getcwd()
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
BODY = b"Content-Length: 0\r\n"
MODULES = {"mpm_event": "mpm_event", "authz_core": "authz_core", "proxy": "proxy", "proxy_http": "proxy_http"}


def serve(connection: socket.socket) -> None:
    """Answers requests, but closes instead of an answer to one for /closed."""
    with connection:
        while head := connection.recv(65536):
            if b" /closed " in head:
                return
            connection.sendall(ANSWER)


def accept(server: socket.socket) -> None:
    while True:
        threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


server = socket.create_server(("127.0.0.1", 0))
threading.Thread(target=accept, args=(server,), daemon=True).start()
behind = f"127.0.0.1:{server.getsockname()[1]}"


def haproxy(port: int) -> tuple[str, list[str]]:
    return (
        "defaults\n mode http\n timeout connect 5s\n timeout client 50s\n timeout server 50s\n"
        f"frontend clients\n bind 127.0.0.1:{port}\n default_backend registry\n"
        f"backend registry\n server registry {behind}\n",
        ["haproxy", "-f", f"{HERE}/haproxy.conf"],
    )


def apache2(port: int) -> tuple[str, list[str]]:
    modules = "".join(f"LoadModule {each}_module {HERE}/root/usr/lib/apache2/modules/mod_{each}.so\n" for each in MODULES)
    return (
        f"ServerRoot {HERE}\nPidFile {HERE}/apache.pid\nListen 127.0.0.1:{port}\nServerName proxy\n"
        f"ErrorLog {HERE}/apache.log\nMutex file:{HERE}\nUser nobody\nGroup nogroup\n{modules}"
        f"ProxyPass / http://{behind}/\n",
        ["apache2", "-D", "FOREGROUND", "-f", f"{HERE}/apache2.conf"],
    )


def nginx(port: int) -> tuple[str, list[str]]:
    temporary = " ".join(f"{kind}_temp_path {HERE}/tmp;" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    return (
        f"daemon off; master_process off; pid {HERE}/nginx.pid; error_log {HERE}/nginx.log;\nevents {{}}\n"
        f"http {{ access_log off; {temporary}\nupstream registry {{ server {behind}; keepalive 4; }}\n"
        f"server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://registry;\n"
        'proxy_http_version 1.1; proxy_set_header Connection ""; } } }\n',
        ["nginx", "-p", HERE, "-e", f"{HERE}/nginx.log", "-c", f"{HERE}/nginx.conf"],
    )


def connect(port: int) -> socket.socket:
    for _ in range(100):
        try:
            return socket.create_connection(("127.0.0.1", port), 20)
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the proxy does not listen")


def ask(client: socket.socket, method: str, path: str) -> str:
    client.sendall(f"{method} {path} HTTP/1.1\r\nHost: registry\r\n".encode() + BODY + b"\r\n")
    answer = client.recv(65536)
    return answer.split(b" ", 2)[1].decode() if answer else "closed"


found = {}
for make in (haproxy, apache2, nginx):
    name, port = make.__name__, free_port()
    text, command = make(port)
    with open(f"{name}.conf", "w") as file:
        file.write(text)
    running = subprocess.Popen([f"{HERE}/root/usr/sbin/{command[0]}", *command[1:]], stderr=subprocess.DEVNULL)
    try:
        for method in ("GET", "POST", "PATCH"):
            with connect(port) as client:
                first = ask(client, method, "/closed")
            with connect(port) as client:
                assert ask(client, method, "/open") == "200"
                found[name, method] = (first, ask(client, method, "/closed"))
            print(f"{name}, {method}: first request of a connection {first}, second {found[name, method][1]}")
    finally:
        running.terminate()
        running.wait(20)
expected = {(name, each): ("502", "closed") for name in ("haproxy", "apache2") for each in ("GET", "POST", "PATCH")}
expected |= {("nginx", each): ("502", "502") for each in ("GET", "POST", "PATCH")}
print("as stated" if found == expected else f"CHANGED: {found}")
sys.exit(found != expected)
PYTHON

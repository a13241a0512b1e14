#!/usr/bin/env bash
# Expected: a registry whose answer for a tag depends on `Accept` says so by `Vary: Accept` (RFC 9110, 12.5.5), so that
#   an HTTP cache in front of it keeps the two answers apart.
# Actual: Distribution answers a tag of a manifest list with the list to a client that accepts lists, and with the
#   linux/amd64 manifest in it to one that does not: one URL, two digests, two types, no Vary. nginx with
#   proxy_cache then gives what came first to everybody: a client on arm64 gets the amd64 manifest, as
#   200 and with a right Docker-Content-Digest, so no check by digest finds it.
# Versions: docker-registry 2.8.2+ds1-1, nginx 1.22.1-9+deb12u11 (Debian 12).
# Why a registry cache must care: `Vary` is no help with registries. A cache must always send its own `Accept` with
#   all types, keep a tag as that answer, and never as the answer to a client's own `Accept`; and no
#   proxy between it and the upstream may cache manifests by URL.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get -qq -o APT::Sandbox::User=root download docker-registry=2.8.2+ds1-1 nginx=1.22.1-9+deb12u11
for package in *.deb; do dpkg -x "$package" root; done
export REGISTRY="$work/root/usr/bin/docker-registry" NGINX="$work/root/usr/sbin/nginx"
"$REGISTRY" --version
"$NGINX" -v 2>&1
timeout 120 python3 - <<'PYTHON'
import hashlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time

DOCKER = "application/vnd.docker"
LIST, MANIFEST = f"{DOCKER}.distribution.manifest.list.v2+json", f"{DOCKER}.distribution.manifest.v2+json"
KINDS = {LIST: "list", MANIFEST: "manifest"}


def descriptor(kind: str, content: bytes) -> dict[str, object]:
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    return {"mediaType": kind, "digest": digest, "size": len(content)}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def ask(
    port: int, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response, content


registry_port, nginx_port = free_port(), free_port()
here = os.getcwd()
with open("config.yml", "w") as config:
    config.write(
        f"version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n"
        f"storage: {{filesystem: {{rootdirectory: {here}/data}}}}\nhttp: {{addr: '127.0.0.1:{registry_port}'}}\n"
    )
temporary = " ".join(f"{kind}_temp_path {here}/tmp;" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
with open("nginx.conf", "w") as config:
    config.write(
        f"daemon off; master_process off; pid {here}/pid; error_log {here}/error.log;\nevents {{}}\n"
        f"http {{ access_log off; {temporary} proxy_cache_path {here}/cache keys_zone=all:1m;\n"
        f"server {{ listen 127.0.0.1:{nginx_port}; location / {{ proxy_pass http://127.0.0.1:{registry_port};\n"
        f"proxy_set_header Host $http_host; proxy_cache all; proxy_cache_valid 200 1m; }} }} }}\n"
    )
commands = (
    [os.environ["REGISTRY"], "serve", f"{here}/config.yml"],
    [os.environ["NGINX"], "-p", here, "-e", f"{here}/error.log", "-c", f"{here}/nginx.conf"],
)
processes = []
holds = True
try:
    with open("log", "wb") as log:
        processes += [subprocess.Popen(each, stdout=log, stderr=log) for each in commands]
    for port in (registry_port, nginx_port):
        for _ in range(100):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
    entries = []
    for architecture in ("arm64", "amd64"):
        rootfs = {"type": "layers", "diff_ids": []}
        blob = json.dumps({"architecture": architecture, "os": "linux", "rootfs": rootfs}).encode()
        config = descriptor(f"{DOCKER}.container.image.v1+json", blob)
        place = ask(registry_port, "POST", "/v2/app/blobs/uploads/")[0].headers["Location"]
        path = place.split(str(registry_port))[1]
        assert ask(registry_port, "PUT", f"{path}&digest={config['digest']}", blob)[0].status == 201
        document = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": []}
        content = json.dumps(document).encode()
        entry = descriptor(MANIFEST, content)
        answer = ask(registry_port, "PUT", f"/v2/app/manifests/{entry['digest']}", content, Content_Type=MANIFEST)
        assert answer[0].status == 201
        entries.append({**entry, "platform": {"architecture": architecture, "os": "linux"}})
    content = json.dumps({"schemaVersion": 2, "mediaType": LIST, "manifests": entries}).encode()
    whole = descriptor(LIST, content)["digest"]
    for tag in ("v1", "v2"):
        assert ask(registry_port, "PUT", f"/v2/app/manifests/{tag}", content, Content_Type=LIST)[0].status == 201
    amd64 = entries[1]["digest"]

    def get(port: int, tag: str, accept: str) -> str:
        """What comes back: list or manifest."""
        global holds
        response, body = ask(port, "GET", f"/v2/app/manifests/{tag}", Accept=accept)
        kind, digest = KINDS[response.headers["Content-Type"]], response.headers["Docker-Content-Digest"]
        holds &= response.status == 200 and "Vary" not in response.headers
        holds &= digest == f"sha256:{hashlib.sha256(body).hexdigest()}" == (whole if kind == "list" else amd64)
        where = "registry" if port == registry_port else "nginx"
        print(f"{where}, {tag}, accepts {accept}: {kind} {digest[:19]}…, Vary: {response.headers['Vary']}")
        return kind

    both = f"{LIST}, {MANIFEST}"
    direct = [get(registry_port, "v1", both), get(registry_port, "v1", MANIFEST)]
    cached = [get(nginx_port, "v1", MANIFEST), get(nginx_port, "v1", both)]
    reverse = [get(nginx_port, "v2", both), get(nginx_port, "v2", MANIFEST)]
    holds &= direct == ["list", "manifest"] and cached == ["manifest"] * 2 and reverse == ["list"] * 2
finally:
    for process in processes:
        process.terminate()
        process.wait(10)
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

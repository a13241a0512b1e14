#!/usr/bin/env bash
# Expected: with `gzip on` for JSON in nginx before a registry, a client that keeps the ETag of a manifest and
#   sends it back gets 304 while the manifest is unchanged, as RFC 9110 (13.1.2) has it: If-None-Match compares
#   weakly, so W/"x" matches "x"; and a HEAD still says how long the manifest is.
# Actual: nginx makes the ETag weak and passes the client's weak one on as it is; Distribution compares the header as
#   a string with its strong ETag, takes no list either, and answers 200 with the whole manifest each time. A HEAD
#   that accepts gzip has no Content-Length. Go's clients send no Accept-Encoding with HEAD and see nothing of it;
#   requests and aiohttp do.
# Versions: docker-registry 2.8.2+ds1-1, nginx 1.22.1-9+deb12u11 (Debian 12).
# Why a registry cache must care: as a client it must ask for `identity`, and revalidate by HEAD and
#   Docker-Content-Digest, which survives, rather than hope for 304; as a server it must compare weakly, lists too.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get -qq -o APT::Sandbox::User=root download docker-registry=2.8.2+ds1-1 nginx=1.22.1-9+deb12u11
for package in *.deb; do dpkg -x "$package" root; done
export REGISTRY="$work/root/usr/bin/docker-registry" NGINX="$work/root/usr/sbin/nginx"
"$REGISTRY" --version
"$NGINX" -v
timeout 120 python3 - <<'PYTHON'
import hashlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time

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
        "annotations": {"org.opencontainers.image.description": "long enough to be compressed " * 40},
    }
).encode()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def ask(port: int, method: str, path: str, body: bytes | None = None, **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.putrequest(method, path, skip_accept_encoding=True)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    response = connection.getresponse()
    response.read()
    connection.close()
    return response


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
        f"http {{ access_log off; {temporary} gzip on; gzip_proxied any; gzip_types {OCI}.manifest.v1+json;\n"
        f"server {{ listen 127.0.0.1:{nginx_port};\n"
        f"location / {{ proxy_pass http://127.0.0.1:{registry_port}; proxy_set_header Host $http_host; }} }} }}\n"
    )
commands = (
    [os.environ["REGISTRY"], "serve", f"{here}/config.yml"],
    [os.environ["NGINX"], "-p", here, "-e", f"{here}/error.log", "-c", f"{here}/nginx.conf"],
)
processes = []
results = {}
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
    place = ask(registry_port, "POST", "/v2/app/blobs/uploads/", b"").headers["Location"].split(str(registry_port))[1]
    assert ask(registry_port, "PUT", f"{place}&digest={digest(CONFIG)}", CONFIG).status == 201
    path, kind = "/v2/app/manifests/v1", f"{OCI}.manifest.v1+json"
    assert ask(registry_port, "PUT", path, MANIFEST, Content_Type=kind).status == 201
    for server, port in (("registry alone", registry_port), ("behind nginx", nginx_port)):
        for coding in ("identity", "gzip"):
            accept = {"Accept": kind, "Accept_Encoding": coding}
            etag = ask(port, "GET", path, **accept).headers["ETag"]
            again = ask(port, "GET", path, **accept, If_None_Match=etag).status
            listed = ask(port, "GET", path, **accept, If_None_Match=f'"other", {etag}').status
            head = ask(port, "HEAD", path, **accept).headers
            assert head["Docker-Content-Digest"] == digest(MANIFEST)
            results[server, coding] = (etag.startswith("W/"), again, listed, head["Content-Length"])
            print(
                f"{server}, {coding}: ETag {etag[:20]}…; If-None-Match: {again}, in a list: {listed};"
                f" HEAD has Content-Length {head['Content-Length']}"
            )
finally:
    for process in processes:
        process.terminate()
        process.wait(10)
whole = (False, 304, 200, str(len(MANIFEST)))
holds = results.pop(("behind nginx", "gzip")) == (True, 200, 200, None) and set(results.values()) == {whole}
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

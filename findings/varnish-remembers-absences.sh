#!/usr/bin/env bash
# Expected: Varnish, as it comes, in front of a registry makes pulls faster at most. It stores no answer with status 404 that no header
#   allows to store, so that an image that was pushed can be pulled.
# Actual: as RFC 9111 (4.2.2) and RFC 9110 (15.1) allow, it keeps what has no `Cache-Control` for two minutes (`default_ttl`), and 404
#   too. Distribution sends none with its errors, tags and lists. Each client that pushes asks by HEAD first whether the registry
#   has the blob or the tag: so the push succeeds, and for two minutes afterwards the image is unknown. A tag that moves stays
#   what it was.
# Versions: varnish 7.1.1-2+deb12u1, docker-registry 2.8.2+ds1-1 (Debian 12), libjemalloc2 5.3.0-1 and the C compiler that is there.
# Why a registry cache must care: it must send `Cache-Control: no-store` with each error, and let nobody keep tags and lists: an HTTP
#   cache in front of it that nobody thinks of does the same. As a client behind one, it cannot tell that an absence
#   is over: it asks again soon.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
for each in varnish=7.1.1-2+deb12u1 libvarnishapi3=7.1.1-2+deb12u1 libjemalloc2=5.3.0-1 docker-registry=2.8.2+ds1-1; do
    apt-get -qq -o APT::Sandbox::User=root download "$each"
done
for each in *.deb; do dpkg -x "$each" root; done
timeout 60 python3 - <<'PYTHON'
import hashlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

OCI = "application/vnd.oci.image"
LIBRARIES = f"{os.getcwd()}/root/usr/lib/x86_64-linux-gnu"
with ExitStack() as stack:
    ports = [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(2)]
registry, varnish = (f"127.0.0.1:{port}" for port in ports)


def ask(host: str, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(host)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    answer.read()
    return answer.status, answer.headers.get("Location") or answer.headers.get("Docker-Content-Digest") or ""


def wait_for(host: str) -> None:
    for _ in range(100):
        try:
            socket.create_connection(("127.0.0.1", int(host.rpartition(":")[2]))).close()
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("varnishd does not listen")


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def manifest(text: str) -> bytes:
    config = {"mediaType": f"{OCI}.config.v1+json", "digest": digest_of(b"{}"), "size": 2}
    described = {"schemaVersion": 2, "mediaType": f"{OCI}.manifest.v1+json", "config": config, "layers": []}
    return json.dumps({**described, "annotations": {"example.com/text": text}}).encode()


def push(host: str, content: bytes) -> str:
    """What clients ask before a push, then the push; the answers through `host`."""
    blob, tag, kind = f"/v2/app/blobs/{digest_of(b'{}')}", "/v2/app/manifests/1", f"{OCI}.manifest.v1+json"
    seen = [ask(host, "HEAD", blob)[0], ask(host, "HEAD", tag, Accept=kind)[0]]
    location = ask(host, "POST", "/v2/app/blobs/uploads/")[1].partition("/v2/")[2]
    octets = {"Content-Type": "application/octet-stream"}
    seen.append(ask(host, "PUT", f"/v2/{location}&digest={digest_of(b'{}')}", b"{}", **octets)[0])
    seen.append(ask(host, "PUT", tag, content, **{"Content-Type": kind})[0])
    status, digest = ask(host, "GET", tag, Accept=kind)
    found = {digest_of(FIRST): "the first image", digest_of(SECOND): "the second image"}.get(digest, "none")
    seen += [ask(host, "GET", blob)[0], status]
    return f"{seen}, the tag is {found}"


with open("registry.yml", "w") as file:
    storage = {"filesystem": {"rootdirectory": os.path.abspath("data")}}
    log = {"accesslog": {"disabled": True}}
    json.dump({"version": "0.1", "storage": storage, "http": {"addr": registry}, "log": log}, file)
first = subprocess.Popen(["root/usr/bin/docker-registry", "serve", "registry.yml"], stderr=subprocess.PIPE, text=True)
assert first.stderr is not None
if not any("listening on" in line for line in first.stderr):
    raise SystemExit("docker-registry ended")
threading.Thread(target=first.stderr.read, daemon=True).start()
second = subprocess.Popen(
    ["root/usr/sbin/varnishd", "-F", "-n", os.path.abspath("varnish"), "-j", "none", "-a", varnish, "-b", registry]
    + ["-p", f"vmod_path={LIBRARIES}/varnish/vmods"],
    env={**os.environ, "LD_LIBRARY_PATH": f"{LIBRARIES}:{LIBRARIES}/varnish"},
    stderr=subprocess.PIPE,
    stdout=subprocess.DEVNULL,
    text=True,
)
assert second.stderr is not None
FIRST, SECOND = manifest("first"), manifest("second")
try:
    if not any("Child" in line and "Started" in line for line in second.stderr):
        raise SystemExit("varnishd ended")
    threading.Thread(target=second.stderr.read, daemon=True).start()
    wait_for(varnish)
    through = push(varnish, FIRST)
    straight = push(registry, SECOND)
    later = ask(varnish, "GET", "/v2/app/tags/list")[0], ask(varnish, "HEAD", "/v2/app/manifests/1")[0]
finally:
    for each in (second, first):
        each.terminate()
        each.wait(20)
print("HEAD of blob and tag, their PUTs, then GET of both:")
print(f"through Varnish {through}\nwithout it {straight}")
print(f"through Varnish then: the list of tags {later[0]}, the tag {later[1]}")
holds = through == "[404, 404, 201, 201, 404, 404], the tag is none"
holds = holds and straight == "[200, 200, 201, 201, 200, 200], the tag is the second image" and later == (200, 404)
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

#!/usr/bin/env bash
# Expected: `skopeo copy` from registry to registry moves the manifest and its blobs as they are; a digest that
#   is pinned somewhere names the copy as well as the source.
# Actual: a layer of the type `application/vnd.oci.image.layer.v1.tar`, not compressed, which the image specification
#   requires every implementation to support, is compressed on the way, and a new manifest written: the copy has
#   another digest, and exit code and output say nothing of it. Images of gzip or zstd layers stay byte for byte.
#   `--preserve-digests` keeps this image too.
# Versions: skopeo 1.9.3+ds1-1+b10 (Debian 12).
# Why a registry cache must care: an image that was copied into a private registry may not be found there by its
#   upstream's digest, and its signatures and referrers, which name that, are lost from sight. A registry shares
#   no bytes between the two. Mirrors that are filled by copying need `--preserve-digests`.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get -qq -o APT::Sandbox::User=root download skopeo=1.9.3+ds1-1+b10 libgpgme11 libassuan0 libdevmapper1.02.1
for package in *.deb; do dpkg -x "$package" root; done
export LD_LIBRARY_PATH="$work/root/usr/lib/x86_64-linux-gnu:$work/root/lib/x86_64-linux-gnu"
mkdir -m 777 memory # root's is in /var/lib, which is left alone: skopeo runs as another user
chmod 755 . root
export HOME="$work/memory" XDG_DATA_HOME="$work/memory" XDG_RUNTIME_DIR="$work/memory"
export SKOPEO="$work/root/usr/bin/skopeo" AS=""
[ "$(id -u)" != 0 ] || AS="setpriv --reuid 65534 --regid 65534 --clear-groups"
"$SKOPEO" --version
timeout 120 python3 - <<'PYTHON'
import gzip
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

OCI = "application/vnd.oci.image"


def digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def descriptor(kind: str, content: bytes) -> dict[str, object]:
    return {"mediaType": f"{OCI}.{kind}", "digest": digest(content), "size": len(content)}


TAR = bytes(10_240)  # an empty archive
LAYERS = {"tar": TAR, "tar+gzip": gzip.compress(TAR, mtime=0)}
CONFIG = json.dumps(
    {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [digest(TAR)]}}
).encode()
MANIFESTS = {
    kind.replace("+", "-"): json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": f"{OCI}.manifest.v1+json",
            "config": descriptor("config.v1+json", CONFIG),
            "layers": [descriptor(f"layer.v1.{kind}", layer)],
        }
    ).encode()
    for kind, layer in LAYERS.items()
}
BLOBS = {digest(each): each for each in (*LAYERS.values(), CONFIG)}


class Registry(BaseHTTPRequestHandler):
    """Holds the repository `source`, and takes what is pushed to another without checking it."""

    protocol_version = "HTTP/1.1"

    def body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def do_GET(self) -> None:
        content, path = self.body(), self.path.partition("?")[0]
        status, body, kind = 404, b"{}", "application/octet-stream"
        last = path.split("/")[-1]
        if path == "/v2/":
            status = 200
        elif self.command in ("POST", "PATCH"):
            status = 202
        elif self.command == "PUT":
            status = 201
            if "/manifests/" in path:
                self.server.pushed = content
        elif path.startswith("/v2/source/manifests/"):
            status, body, kind = 200, MANIFESTS[last], f"{OCI}.manifest.v1+json"
        elif path.startswith("/v2/source/blobs/"):
            status, body = 200, BLOBS[last]
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if status in (201, 202):
            self.send_header("Location", "/v2/target/blobs/uploads/1")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_POST = do_PATCH = do_PUT = do_GET

    def log_message(self, *args: object) -> None:
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
threading.Thread(target=server.serve_forever, daemon=True).start()
host = f"docker://127.0.0.1:{server.server_port}"
options = "--insecure-policy copy --src-tls-verify=false --dest-tls-verify=false"


def copy(tag: str, *more: str) -> bytes:
    command = [*os.environ["AS"].split(), os.environ["SKOPEO"], *options.split(), *more]
    subprocess.run(
        [*command, f"{host}/source:{tag}", f"{host}/target:{tag}"], capture_output=True, timeout=60, check=True
    )
    layer = json.loads(server.pushed)["layers"][0]
    same = server.pushed == MANIFESTS[tag]
    print(f"{tag} {' '.join(more)}: manifest {'the same' if same else 'ANOTHER'}; layer {layer['mediaType']}")
    return server.pushed


holds = (
    copy("tar-gzip") == MANIFESTS["tar-gzip"]
    and (copied := copy("tar")) != MANIFESTS["tar"]
    and json.loads(copied)["layers"][0]["mediaType"] == f"{OCI}.layer.v1.tar+gzip"
    and copy("tar", "--preserve-digests") == MANIFESTS["tar"]
)
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

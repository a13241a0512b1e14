#!/usr/bin/env bash
# Expected: an image that names a layer by sha512, a registered algorithm of the image specification, or is asked for by such a
#   digest, is verified by that algorithm, as containerd, go-containerregistry, oras-go and regclient do.
# Actual: the library of skopeo, podman and CRI-O always computes sha256. It parses a sha512 digest, asks the registry for it, and gets the right bytes; then
#   `dir:` reports an internal error of a blob that was "saved with digest sha256:…", and a manifest that is asked for by
#   sha512 "does not match provided manifest digest". The same image by sha256 is copied.
# Version: skopeo 1.9.3+ds1-1+b10 (Debian 12).
# Why a registry cache must care: what is pushed as sha512 is right, and is refused by these clients with an error that looks
#   like damage. A registry cannot convert it. Where they pull, push as sha256; look at the algorithm before you look for damage.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get -qq -o APT::Sandbox::User=root download skopeo=1.9.3+ds1-1+b10 libgpgme11 libassuan0 libdevmapper1.02.1
for package in *.deb; do dpkg -x "$package" root; done
export LD_LIBRARY_PATH="$work/root/usr/lib/x86_64-linux-gnu:$work/root/lib/x86_64-linux-gnu"
export HOME="$work" SKOPEO="$work/root/usr/bin/skopeo"
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
TAR = bytes(1024)  # an empty archive
LAYER = gzip.compress(TAR, mtime=0)


def digest(content: bytes, algorithm: str = "sha256") -> str:
    return f"{algorithm}:{hashlib.new(algorithm, content).hexdigest()}"


def image(algorithm: str) -> bytes:
    """The manifest of an image whose layer is named by that algorithm."""
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [digest(TAR)]}}
    parts = []
    for kind, content, by in (
        ("config.v1+json", json.dumps(config).encode(), "sha256"),
        ("layer.v1.tar+gzip", LAYER, algorithm),
    ):
        contents[digest(content, by)] = (content, "application/octet-stream")
        parts.append({"mediaType": f"{OCI}.{kind}", "digest": digest(content, by), "size": len(content)})
    named = {"schemaVersion": 2, "mediaType": f"{OCI}.manifest.v1+json", "config": parts[0], "layers": parts[1:]}
    return json.dumps(named).encode()


class Registry(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        content, kind = contents.get(self.path.rpartition("/")[2], (b"{}", "application/json"))
        asked.append(self.path)
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


asked: list[str] = []
contents: dict[str, tuple[bytes, str]] = {}
for algorithm in ("sha256", "sha512"):
    manifest = (image(algorithm), f"{OCI}.manifest.v1+json")
    contents[f"layer-{algorithm}"] = manifest
    if algorithm == "sha256":
        contents |= {digest(manifest[0], each): manifest for each in ("sha256", "sha512")}
registry = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
threading.Thread(target=registry.serve_forever, daemon=True).start()
name = f"docker://127.0.0.1:{registry.server_port}/app"
by_digest = {each: digest(contents["layer-sha256"][0], each) for each in ("sha256", "sha512")}
PULLS = {
    "layer by sha256": f"{name}:layer-sha256",
    "layer by sha512": f"{name}:layer-sha512",
    "manifest by sha256": f"{name}@{by_digest['sha256']}",
    "manifest by sha512": f"{name}@{by_digest['sha512']}",
}
copy = [os.environ["SKOPEO"], "--insecure-policy", "copy", "-q", "--src-tls-verify=false"]
said = {}
for number, (what, image_name) in enumerate(PULLS.items()):
    done = subprocess.run([*copy, image_name, f"dir:{number}"], capture_output=True, text=True, timeout=60)
    said[what] = "" if done.returncode == 0 else done.stderr.partition("msg=")[2].strip()
    print(f"{what}: {said[what] or 'copied'}")
holds = (
    said["layer by sha256"] == said["manifest by sha256"] == ""
    and "saved with digest sha256:" in said["layer by sha512"]
    and "does not match provided manifest digest" in said["manifest by sha512"]
    and any("/blobs/sha512:" in path for path in asked)
)
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

#!/usr/bin/env bash
# Expected: `skopeo copy --all` of an index none of whose manifests changes writes the same index, as it does for the
#   indexes of images, whatever their white space; and with `--preserve-digests` it is what can be relied on.
# Actual: an index that has `artifactType`, as the image specification 1.1 defines it, for itself or for one of its
#   manifests, is written anew without it, and so with another digest. Nothing is said of that. `--preserve-digests`
#   fails: the index "must be converted to type" that it has. The manifests below it keep their `artifactType`, and their
#   digests. The same library of 2026 (go.podman.io/image/v5 v5.42.1) keeps all of it.
# Versions: skopeo 1.9.3+ds1-1+b10 (Debian 12).
# Why a registry cache must care: a mirror that is filled so has images that look right, and artifacts that clients refuse:
#   OpenTofu says of a provider "unexpected artifact type", though all its bytes are there. Who sees that in a cache looks
#   for a fault there: compare the digest of the index with that at the source.
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
INDEX, MANIFEST = f"{OCI}.index.v1+json", f"{OCI}.manifest.v1+json"
KIND = "application/vnd.opentofu.provider"
stored: dict[str, bytes] = {}  # blobs and manifests by their digest, indexes by their repository


def store(content: bytes) -> dict[str, object]:
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    stored[digest] = content
    return {"digest": digest, "size": len(content)}


def make(repository: str, kind: dict[str, str], indent: int | None) -> None:
    """An index of one manifest."""
    tar = bytes(1024)  # an empty archive
    layer = {"mediaType": f"{OCI}.layer.v1.tar+gzip", **store(gzip.compress(tar, mtime=0))}
    rootfs = {"type": "layers", "diff_ids": [store(tar)["digest"]]}
    config = store(json.dumps({"architecture": "amd64", "os": "linux", "rootfs": rootfs}).encode())
    image = {"schemaVersion": 2, "mediaType": MANIFEST, **kind}
    image |= {"config": {"mediaType": f"{OCI}.config.v1+json", **config}, "layers": [layer]}
    one = {"mediaType": MANIFEST, **store(json.dumps(image).encode()), **kind}
    one["platform"] = {"architecture": "amd64", "os": "linux"}
    index = {"schemaVersion": 2, "mediaType": INDEX, **kind, "manifests": [one]}
    stored[repository] = json.dumps(index, indent=indent).encode()


class Registry(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"] or 0))
        *_, repository, kind, reference = ["", "", *self.path.split("/")][-5:]
        if self.command == "PUT" and not reference.startswith("sha256:"):
            stored[repository] = content
        found = stored.get(reference, stored.get(repository, b"{}") if kind == "manifests" else b"{}")
        self.send_response(201 if self.command == "PUT" else 200)
        self.send_header("Content-Type", INDEX if kind == "manifests" and reference == "v1" else MANIFEST)
        self.send_header("Content-Length", str(len(found)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(found)

    do_HEAD = do_PUT = do_GET

    def log_message(self, *args: object) -> None:
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
threading.Thread(target=server.serve_forever, daemon=True).start()
host = f"docker://127.0.0.1:{server.server_port}"


def copy(*options: str) -> str:
    stored.pop("copy", None)
    words = ["--insecure-policy", "copy", "--all", "--src-tls-verify=false", "--dest-tls-verify=false", *options]
    done = subprocess.run(
        [*os.environ["AS"].split(), os.environ["SKOPEO"], *words, f"{host}/source:v1", f"{host}/copy:v1"],
        capture_output=True, text=True, timeout=60,
    )
    if done.returncode:
        return "fails: must be converted" if "must be converted to type" in done.stderr else done.stderr
    left = stored["copy"].count(b"artifactType")
    return f"{'the same' if stored['copy'] == stored['source'] else 'another'} index, artifactType {left} times"


seen = []
for name, kind in {"an image": {}, "an artifact": {"artifactType": KIND}}.items():
    for indent in (None, 2):
        make("source", kind, indent)
        seen.append([copy(), copy("--preserve-digests")])
        print(f"{name}, {'indented' if indent else 'on one line'}: {seen[-1][0]}; --preserve-digests: {seen[-1][1]}")
image = ["the same index, artifactType 0 times"] * 2
artifact = ["another index, artifactType 0 times", "fails: must be converted"]
holds = seen == [image, image, artifact, artifact]
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

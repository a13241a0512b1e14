#!/usr/bin/env bash
# Expected: `cosign copy` copies an image with its signatures, as its help says; and `cosign load` takes what `cosign save` has written.
# Actual: of a signature in the format that cosign 3 makes by default, a bundle that refers to the image, `cosign copy` copies
#   nothing, and succeeds: "no signatures found" at the destination. It stores the image itself there by the tag
#   `sha256-<hex>`, by which clients look for an index of the referrers where a registry has no API for them. `cosign save` writes the
#   bundle, and `cosign load` fails: it pushes the manifest of the bundle without its content. `oras cp -r` copies both.
# Versions: github.com/sigstore/cosign/v3 v3.1.3, oras.land/oras v1.3.6 (Go modules), Go 1.26; docker-registry 2.8.2+ds1-1
#   (Debian 12).
# Why a registry cache must care: images that were mirrored so are refused where signatures are required, though the source is signed.
#   What reads the tag `sha256-<hex>` must expect an image there, which is no index, and no error. Copy by a tool that
#   follows referrers.
set -euo pipefail
work=$(mktemp -d)
export GOMODCACHE="$work/modules" GOBIN="$work" GOFLAGS="-modcacherw -p=2" CGO_ENABLED=0
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get -qq -o APT::Sandbox::User=root download docker-registry=2.8.2+ds1-1
dpkg -x docker-registry_*.deb root
go install github.com/sigstore/cosign/v3/cmd/cosign@v3.1.3 2> /dev/null
go install oras.land/oras/cmd/oras@v1.3.6 2> /dev/null
export HOME="$work" COSIGN_PASSWORD=""
timeout 120 python3 - <<'PYTHON'
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

OCI = "application/vnd.oci.image"
layout = Path("layout")
blobs = layout / "blobs/sha256"
blobs.mkdir(parents=True)


def store(kind: str, content: bytes) -> dict[str, object]:
    hexadecimal = hashlib.sha256(content).hexdigest()
    (blobs / hexadecimal).write_bytes(content)
    return {"mediaType": f"{OCI}.{kind}", "digest": f"sha256:{hexadecimal}", "size": len(content)}


def run(*command: str) -> tuple[int, str]:
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


layer = store("layer.v1.tar", bytes(10240))
rootfs = {"type": "layers", "diff_ids": [layer["digest"]]}
config = store("config.v1+json", json.dumps({"architecture": "amd64", "os": "linux", "rootfs": rootfs}).encode())
kind = f"{OCI}.manifest.v1+json"
described = {"schemaVersion": 2, "mediaType": kind, "config": config, "layers": [layer]}
image = store("manifest.v1+json", json.dumps(described).encode())
(layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [image]}))
(layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
digest = str(image["digest"])
with socket.create_server(("127.0.0.1", 0)) as free:
    host = f"127.0.0.1:{free.getsockname()[1]}"
storage = {"filesystem": {"rootdirectory": os.path.abspath("data")}}
log = {"accesslog": {"disabled": True}}
Path("registry.yml").write_text(
    json.dumps({"version": "0.1", "storage": storage, "http": {"addr": host}, "log": log})
)
server = subprocess.Popen(["root/usr/bin/docker-registry", "serve", "registry.yml"], stderr=subprocess.PIPE, text=True)
assert server.stderr is not None
if not any("listening on" in line for line in server.stderr):
    raise SystemExit("docker-registry ended")
threading.Thread(target=server.stderr.read, daemon=True).start()
HTTP, OFFLINE = "--allow-http-registry", "--insecure-ignore-tlog"


def verified(name: str) -> str:
    code, said = run("./cosign", "verify", "--key=cosign.pub", OFFLINE, HTTP, f"{host}/{name}@{digest}")
    return "verified" if code == 0 else "no signatures found" if "no signatures found" in said else said


def at_the_tag(name: str) -> str:
    """What is at the tag by which referrers are looked for."""
    url = f"http://{host}/v2/{name}/manifests/{digest.replace(':', '-')}"
    accept = {"Accept": f"{kind}, {OCI}.index.v1+json"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=accept)) as answer:
        found = answer.headers["Docker-Content-Digest"]
    return "the image" if found == digest else "an index"


try:
    without_log = ["--use-signing-config=false", "--tlog-upload=false"]
    for command in (
        ["./oras", "cp", "--from-oci-layout", "--to-plain-http", f"layout@{digest}", f"{host}/app:1"],
        ["./cosign", "generate-key-pair"],
        ["./cosign", "sign", "--yes", "--key=cosign.key", *without_log, HTTP, f"{host}/app@{digest}"],
        ["./cosign", "copy", HTTP, f"{host}/app:1", f"{host}/by-cosign:1"],
        ["./oras", "cp", "-r", "--from-plain-http", "--to-plain-http", f"{host}/app:1", f"{host}/by-oras:1"],
        ["./cosign", "save", HTTP, "--dir=saved", f"{host}/app:1"],
    ):
        code, said = run(*command)
        assert code == 0, said
    names = ("app", "by-cosign", "by-oras")
    seen = {name: (verified(name), at_the_tag(name)) for name in names}
    code, said = run("./cosign", "load", HTTP, "--dir=saved", f"{host}/loaded:1")
    seen["cosign load"] = ("fails" if code else "succeeds", "MANIFEST_BLOB_UNKNOWN" if "MANIFEST_BLOB_UNKNOWN" in said else said)
finally:
    server.terminate()
    server.wait(20)
for what, (outcome, found) in seen.items():
    print(f"{what}: {outcome}, {found}" if what == "cosign load" else f"{what}: {outcome}; at the tag sha256-… is {found}")
holds = seen == {
    "app": ("verified", "an index"),
    "by-cosign": ("no signatures found", "the image"),
    "by-oras": ("verified", "an index"),
    "cosign load": ("fails", "MANIFEST_BLOB_UNKNOWN"),
}
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

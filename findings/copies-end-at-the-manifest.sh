#!/usr/bin/env bash
# Expected: an image that is copied or pushed again is whole at the destination afterwards, or the command fails: what the registry
#   has lost of it, such as a layer, is uploaded again.
# Actual: crane and regctl ask by HEAD for the manifest of the tag alone; if its digest is the right one, they upload nothing and
#   report success. `crane push` from files does the same. oras asks for the manifest too, uploads no blob, and puts the tag: that fails only
#   where the registry checks again what the manifest names. skopeo asks for each blob and uploads what is not there, and so does
#   regctl with `--force-recursive`.
# Versions: github.com/google/go-containerregistry v0.22.1, github.com/regclient/regclient v0.11.7, oras.land/oras v1.3.6 (Go
#   modules), Go 1.26; skopeo 1.9.3+ds1-1+b10, docker-registry 2.8.2+ds1-1 (Debian 12).
# Why a registry cache must care: "push it again" repairs a registry that has lost a blob only by clients that ask for blobs. Say so, or
#   answer HEAD for the manifest with 404 meanwhile. A copy that reports success is no proof that the image can be pulled;
#   check each put of a manifest against the blobs that are there.
set -euo pipefail
work=$(mktemp -d)
export GOMODCACHE="$work/modules" GOBIN="$work" GOFLAGS="-modcacherw -p=2" CGO_ENABLED=0
trap 'rm -rf "$work"' EXIT
cd "$work"
for each in skopeo=1.9.3+ds1-1+b10 docker-registry=2.8.2+ds1-1; do
    apt-get -qq -o APT::Sandbox::User=root download "$each"
done
for each in *.deb; do dpkg -x "$each" root; done
go install github.com/google/go-containerregistry/cmd/crane@v0.22.1 2> /dev/null
go install github.com/regclient/regclient/cmd/regctl@v0.11.7 2> /dev/null
go install oras.land/oras/cmd/oras@v1.3.6 2> /dev/null
export HOME="$work" XDG_RUNTIME_DIR="$work"
timeout 200 python3 - <<'PYTHON'
import gzip
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

OCI = "application/vnd.oci.image"
TYPES = {"config": f"{OCI}.config.v1+json", "layer": f"{OCI}.layer.v1.tar+gzip", "manifest": f"{OCI}.manifest.v1+json"}
layout = Path("layout")
blobs = layout / "blobs/sha256"
blobs.mkdir(parents=True)


def store(kind: str, content: bytes) -> dict[str, object]:
    digest = hashlib.sha256(content).hexdigest()
    (blobs / digest).write_bytes(content)
    return {"mediaType": TYPES[kind], "digest": f"sha256:{digest}", "size": len(content)}


archive = bytes(10240)  # an empty one
layer = store("layer", gzip.compress(archive, mtime=0))
rootfs = {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(archive).hexdigest()}"]}
config = store("config", json.dumps({"architecture": "amd64", "os": "linux", "config": {}, "rootfs": rootfs}).encode())
manifest = {"schemaVersion": 2, "mediaType": TYPES["manifest"], "config": config, "layers": [layer]}
image = store("manifest", json.dumps(manifest).encode())
(layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [image]}))
(layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
FROM, TO = "{source}/app:1", "{target}/app:1"
HOSTS = ["--host", "reg={source},tls=disabled", "--host", "reg={target},tls=disabled"]
NOT_TLS = ["--src-tls-verify=false", "--dest-tls-verify=false", "--insecure-policy"]
COMMANDS = {
    "crane copy": ["./crane", "copy", "--insecure", FROM, TO],
    "crane push": ["./crane", "push", "--insecure", "layout", TO],
    "regctl image copy": ["./regctl", "image", "copy", *HOSTS, FROM, TO],
    "regctl image copy --force-recursive": ["./regctl", "image", "copy", "--force-recursive", *HOSTS, FROM, TO],
    "oras cp": ["./oras", "cp", "--from-plain-http", "--to-plain-http", FROM, TO],
    "skopeo copy": ["root/usr/bin/skopeo", "copy", *NOT_TLS, f"docker://{FROM}", f"docker://{TO}"],
}


class Registry:
    def __init__(self, name: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.host = f"127.0.0.1:{free.getsockname()[1]}"
        storage = {"filesystem": {"rootdirectory": os.path.abspath(name)}, "delete": {"enabled": True}}
        Path(f"{name}.yml").write_text(
            json.dumps({"version": "0.1", "storage": storage, "http": {"addr": self.host}, "log": {"accesslog": {"disabled": True}}})
        )
        command = ["root/usr/bin/docker-registry", "serve", f"{name}.yml"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        if not any("listening on" in line for line in self.process.stderr):
            raise SystemExit("docker-registry ended")
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def ask(self, method: str) -> int:
        """The status of a request for the layer."""
        url = f"http://{self.host}/v2/app/blobs/{layer['digest']}"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method=method)) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code


def run(command: list[str], target: str) -> str:
    texts = [each.format(source=source.host, target=target) for each in command]
    done = subprocess.run(texts, capture_output=True, text=True)
    return "succeeds" if done.returncode == 0 else "fails"


source = Registry("source")
assert run(["./crane", "push", "--insecure", "layout", TO], source.host) == "succeeds"
seen = {}
registries = [source]
try:
    for number, (what, command) in enumerate(COMMANDS.items()):
        target = Registry(f"target{number}")
        registries.append(target)
        assert run(command, target.host) == "succeeds" and target.ask("DELETE") == 202, what
        seen[what] = f"{run(command, target.host)}, the layer is {target.ask('HEAD')}"
finally:
    for each in registries:
        each.process.terminate()
        each.process.wait(20)
print("after the registry has lost a layer, a second")
print(*(f"{what} {outcome}" for what, outcome in seen.items()), sep="\n")
holds = list(seen.values()) == [
    "succeeds, the layer is 404",
    "succeeds, the layer is 404",
    "succeeds, the layer is 404",
    "succeeds, the layer is 200",
    "fails, the layer is 404",
    "succeeds, the layer is 200",
]
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

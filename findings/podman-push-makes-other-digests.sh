#!/usr/bin/env bash
# Expected: an image that podman has pulled and pushes to another registry, or saves to an archive, without changing it, has the digests
#   that it was pulled by.
# Actual: podman keeps layers unpacked, and compresses them anew, by its own gzip: another layer of other size, another manifest. Only a
#   registry of which it remembers that it has the original layer, as the one that it pulled from, gets a manifest that names that. So one
#   image has several digests; the image id, which is the digest of the configuration, stays.
# Versions: podman 4.3.1+ds1-8+deb12u1+b3, docker-registry 2.8.2+ds1-1 (Debian 12). It needs root.
# Why a registry cache must care: an image that is carried by `podman pull` and `push`, or `save`, to a private registry behind
#   it shares no layer with the image of the cache: both are stored and pulled. Signatures and attestations of the original digest do
#   not fit, and references by digest are not found. Copy by skopeo, crane or oras, which move the bytes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
for each in podman=4.3.1+ds1-8+deb12u1+b3 docker-registry=2.8.2+ds1-1; do
    apt-get -qq -o APT::Sandbox::User=root download "$each"
done
for each in *.deb; do dpkg -x "$each" root; done
echo '{"default": [{"type": "insecureAcceptAnything"}]}' > policy.json
export HOME="$work" XDG_RUNTIME_DIR="$work"
timeout 200 python3 - <<'PYTHON'
import gzip
import hashlib
import io
import json
import os
import random
import socket
import subprocess
import sys
import tarfile
import threading
import urllib.request
from pathlib import Path

OCI = "application/vnd.oci.image"
PODMAN = ["root/usr/bin/podman", "--root=storage", "--runroot=run", "--storage-driver=vfs"]


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


class Registry:
    def __init__(self, name: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.host = f"127.0.0.1:{free.getsockname()[1]}"
        storage = {"filesystem": {"rootdirectory": os.path.abspath(name)}}
        log = {"accesslog": {"disabled": True}}
        Path(f"{name}.yml").write_text(
            json.dumps({"version": "0.1", "storage": storage, "http": {"addr": self.host}, "log": log})
        )
        command = ["root/usr/bin/docker-registry", "serve", f"{name}.yml"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        if not any("listening on" in line for line in self.process.stderr):
            raise SystemExit("docker-registry ended")
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[bytes, str]:
        url = path if path.startswith("http") else f"http://{self.host}/v2/app/{path}"
        with urllib.request.urlopen(urllib.request.Request(url, body, headers, method=method)) as answer:
            return answer.read(), answer.headers.get("Location", "")

    def put(self, kind: str, content: bytes) -> dict[str, object]:
        upload = self.ask("POST", "blobs/uploads/")[1]
        self.ask("PUT", f"{upload}&digest={digest_of(content)}", content, **{"Content-Type": "application/octet-stream"})
        return {"mediaType": f"{OCI}.{kind}", "digest": digest_of(content), "size": len(content)}

    def image(self, tag: str) -> bytes:
        return self.ask("GET", f"manifests/{tag}", Accept=f"{OCI}.manifest.v1+json")[0]


def podman(*arguments: str) -> None:
    subprocess.run([*PODMAN, *arguments], check=True, capture_output=True)


def shown(manifest: bytes) -> tuple[str, str, str]:
    found = json.loads(manifest)
    return digest_of(manifest), found["layers"][0]["digest"], found["config"]["digest"]


registries = [Registry("first"), Registry("second")]
first, second = registries
try:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        content = random.Random(1).randbytes(1000) * 100
        member = tarfile.TarInfo("file")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    layer = first.put("layer.v1.tar+gzip", gzip.compress(archive.getvalue(), mtime=0))
    rootfs = {"type": "layers", "diff_ids": [digest_of(archive.getvalue())]}
    settings = {"architecture": "amd64", "os": "linux", "config": {}, "rootfs": rootfs}
    config = first.put("config.v1+json", json.dumps(settings).encode())
    kind = f"{OCI}.manifest.v1+json"
    image = json.dumps({"schemaVersion": 2, "mediaType": kind, "config": config, "layers": [layer]}).encode()
    first.ask("PUT", "manifests/1", image, **{"Content-Type": kind})
    podman("pull", "--signature-policy=policy.json", "--tls-verify=false", f"{first.host}/app:1")
    for registry in registries:
        to = f"docker://{registry.host}/app:pushed"
        podman("push", "--signature-policy=policy.json", "--tls-verify=false", f"{first.host}/app:1", to)
    podman("save", "--signature-policy=policy.json", "--format=oci-archive", "--output=saved.tar", f"{first.host}/app:1")
    with tarfile.open("saved.tar") as tar:
        index = json.loads(tar.extractfile("index.json").read())
        name = index["manifests"][0]["digest"].removeprefix("sha256:")
        saved = tar.extractfile(f"blobs/sha256/{name}").read()
    seen = {
        "pulled": shown(image),
        "pushed to where it came from": shown(first.image("pushed")),
        "pushed to another registry": shown(second.image("pushed")),
        "saved": shown(saved),
    }
finally:
    for each in registries:
        each.process.terminate()
        each.process.wait(20)
for what, digests in seen.items():
    print(f"{what}:", *(f"{name} {each[7:19]}" for name, each in zip(("manifest", "layer", "config"), digests)))
pulled, back, pushed, archived = seen.values()
holds = back[1:] == pulled[1:] and pushed == archived and pushed[2] == pulled[2]
holds = holds and pushed[0] != pulled[0] and pushed[1] != pulled[1]
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

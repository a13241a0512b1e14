#!/usr/bin/env bash
# Expected: `skopeo copy` between two repositories of one registry, whose source it is told, asks the registry to
#   mount each blob (`POST …/uploads/?mount=…&from=SOURCE`), so that no bytes move.
# Actual: a mount comes from the memory of earlier copies (blob-info-cache), not from the command. The first copy
#   downloads and uploads every byte, after two HEADs of each layer at the target. The next copy to a third
#   repository sends HEADs to repositories of earlier copies that its command does not name, then mounts the layer;
#   if the registry answers 202 instead, it deletes that upload and begins another. Configs are never mounted.
# Versions: skopeo 1.9.3+ds1-1+b10 (Debian 12).
# Why a registry cache must care: a promotion from repository to repository by a job in a fresh container is a
#   full download and upload each time, and an absence seen by HEAD ends within the same copy. HEADs in
#   repositories that nobody pulls from are no pulls, and `from` may name a repository that is gone.
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
from urllib.parse import parse_qs

OCI = "application/vnd.oci.image"


def digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


TAR = bytes(1024)  # an empty archive
LAYER = gzip.compress(TAR, mtime=0)
CONFIG = json.dumps(
    {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [digest(TAR)]}}
).encode()
MANIFEST = json.dumps(
    {
        "schemaVersion": 2,
        "mediaType": f"{OCI}.manifest.v1+json",
        "config": {"mediaType": f"{OCI}.config.v1+json", "digest": digest(CONFIG), "size": len(CONFIG)},
        "layers": [{"mediaType": f"{OCI}.layer.v1.tar+gzip", "digest": digest(LAYER), "size": len(LAYER)}],
    }
).encode()
NAMES = {digest(LAYER): "LAYER", digest(CONFIG): "CONFIG"}
stored = {("first", digest(LAYER)): LAYER, ("first", digest(CONFIG)): CONFIG}
manifests = {"first": MANIFEST}
mounting = True
seen: list[str] = []


class Registry(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"] or 0))
        path, _, query = self.path.partition("?")
        values = {name: each[0] for name, each in parse_qs(query).items()}
        if path == "/v2/":
            return self.answer(200)
        repository, kind, last = path.split("/")[2], path.split("/")[3], path.split("/")[-1]
        if kind == "manifests":
            if self.command == "PUT":
                manifests[repository] = content
                return self.answer(201)
            found = manifests.get(repository)
            return self.answer(200 if found else 404, found or b"{}", Content_Type=f"{OCI}.manifest.v1+json")
        what = NAMES.get(values.get("mount") or values.get("digest") or last, "upload")
        source = f" mount from {values['from']}" if "from" in values else ""
        seen.append(f"{self.command} {repository} {what}{source}")
        if "/uploads/" in path:
            return self.upload(repository, last, values, content)
        found = stored.get((repository, last))
        return self.answer(200 if found else 404, found or b"{}", Content_Type="application/octet-stream")

    def upload(self, repository: str, last: str, values: dict[str, str], content: bytes) -> None:
        place = {"Location": f"/v2/{repository}/blobs/uploads/{len(seen)}", "Range": "0-0"}
        if "mount" in values and mounting and (blob := stored.get((values["from"], values["mount"]))):
            stored[repository, values["mount"]] = blob
            return self.answer(201, Location=f"/v2/{repository}/blobs/{values['mount']}")
        if self.command == "PATCH":
            self.server.content = content
        if self.command == "PUT":
            assert digest(self.server.content) == values["digest"]
            stored[repository, values["digest"]] = self.server.content
        self.answer({"PUT": 201, "DELETE": 204}.get(self.command, 202), **place)

    do_HEAD = do_POST = do_PATCH = do_PUT = do_DELETE = do_GET

    def log_message(self, *args: object) -> None:
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
threading.Thread(target=server.serve_forever, daemon=True).start()


def copy(target: str) -> list[str]:
    """The requests for blobs."""
    seen.clear()
    host = f"docker://127.0.0.1:{server.server_port}"
    command = f"--insecure-policy copy --src-tls-verify=false --dest-tls-verify=false {host}/first:v1 {host}/{target}:v1"
    subprocess.run(
        [*os.environ["AS"].split(), os.environ["SKOPEO"], *command.split()],
        capture_output=True, timeout=60, check=True,
    )
    print(f"first -> {target}: {'; '.join(seen)}")
    return list(seen)


second, third = copy("second"), copy("third")
mounting = False
print("The registry does not mount any more:")
fourth = copy("fourth")
mount = "mount from"
holds = (
    not any(mount in each for each in second)
    and second.count("HEAD second LAYER") == 2
    and "GET first LAYER" in second
    and "HEAD second LAYER" in third
    and any(each.startswith(f"POST third LAYER {mount}") for each in third)
    and "GET first LAYER" not in third
    and "GET first CONFIG" in third
    and not any(f"CONFIG {mount}" in each for each in third)
    and any(each.startswith(f"POST fourth LAYER {mount}") for each in fourth)
    and "DELETE fourth upload" in fourth
    and "GET first LAYER" in fourth
)
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

#!/usr/bin/env bash
# Expected: `docker manifest inspect`, by which scripts find out whether a tag exists, asks the daemon, as `docker pull` does, so that
#   the mirrors and registries of `daemon.json` apply; and it costs a request of the tag, or two.
# Actual: the command asks the registry itself, also where no daemon runs: no mirror is asked, and a registry without TLS needs
#   `--insecure`. For an image of several platforms it asks for the index twice by its tag, and for the manifest and the configuration of
#   each platform, though it prints the index alone, also without `--verbose`. A tag that is absent it asks for four times.
# Versions: docker.io 20.10.24+dfsg1-1+deb12u1+b6 (Debian 12); Docker's own 28.2.2 asks the same.
# Why a registry cache must care: a check whether an image is there goes past the cache of a machine that pulls through it, and one of
#   ten platforms costs Docker Hub 12 requests for manifests, each of which may count as a pull. Name the cache in the
#   reference, and ask by one HEAD, as `crane digest` does.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get -qq -o APT::Sandbox::User=root download docker.io=20.10.24+dfsg1-1+deb12u1+b6
dpkg -x docker.io_*.deb root
timeout 60 python3 - <<'PYTHON'
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TYPES = {
    "config": "application/vnd.docker.container.image.v1+json",
    "manifest": "application/vnd.docker.distribution.manifest.v2+json",
    "index": "application/vnd.docker.distribution.manifest.list.v2+json",
}
PLATFORMS = ["amd64", "arm64", "ppc64le"]
content: dict[str, tuple[str, bytes]] = {}  # type and bytes, by name
asked: list[str] = []


def store(kind: str, value: dict[str, object], name: str = "") -> dict[str, object]:
    media_type, body = TYPES[kind], json.dumps(value).encode()
    digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
    content[digest] = content[name or digest] = (media_type, body)
    return {"mediaType": media_type, "digest": digest, "size": len(body)}


def manifest(architecture: str) -> dict[str, object]:
    platform = {"os": "linux", "architecture": architecture}
    config = store("config", {**platform, "config": {}, "rootfs": {"type": "layers", "diff_ids": []}})
    kind = {"schemaVersion": 2, "mediaType": TYPES["manifest"]}
    return {**store("manifest", {**kind, "config": config, "layers": []}), "platform": platform}


class Registry(BaseHTTPRequestHandler):
    default_request_version = "HTTP/1.0"  # for a handshake of TLS, which is answered with a status

    def do_GET(self) -> None:
        what, name = self.path.split("/")[-2:]
        media_type, body = content.get(name, ("application/json", b"{}"))
        if name:  # not /v2/
            by = "tag" if what == "manifests" and ":" not in name else "digest"
            asked.append(f"{self.command} of {what} by {by}")
        self.send_response(404 if name and name not in content else 200)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Docker-Distribution-Api-Version", "registry/2.0")
        if what == "manifests":
            self.send_header("Docker-Content-Digest", f"sha256:{hashlib.sha256(body).hexdigest()}")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *arguments: object) -> None:
        pass


index = {"schemaVersion": 2, "mediaType": TYPES["index"]}
store("index", {**index, "manifests": [manifest(each) for each in PLATFORMS]}, "1")
server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
threading.Thread(target=server.serve_forever, daemon=True).start()
environment = {**os.environ, "DOCKER_HOST": f"unix://{os.getcwd()}/none", "HOME": os.getcwd()}


def inspect(tag: str) -> dict[str, int]:
    asked.clear()
    image = f"127.0.0.1:{server.server_port}/app:{tag}"
    command = ["root/usr/bin/docker", "manifest", "inspect", "--insecure", image]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    outcome = f"prints {json.loads(done.stdout)['mediaType']}" if done.returncode == 0 else done.stderr.split(":")[0]
    print(f"{tag}: {outcome.strip()}, without a daemon")
    return dict(Counter(asked))


seen = {"an index of three platforms": inspect("1"), "a tag that is absent": inspect("absent")}
for what, requests in seen.items():
    print(f"{what}:", *(f"  {number} {kind}" for kind, number in requests.items()), sep="\n")
holds = list(seen.values()) == [
    {"GET of manifests by tag": 2, "GET of manifests by digest": 3, "GET of blobs by digest": 3},
    {"GET of manifests by tag": 4},
]
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

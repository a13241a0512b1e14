#!/usr/bin/env bash
# Expected: `skopeo sync` of a list of repositories (`--src yaml`) copies them, each under its name, with all platforms; or it fails, if a
#   registry cannot be reached or a repository is not there.
# Actual: where the tags of a repository have to be listed, and cannot be, as its registry is down or does not know it, it is skipped with a
#   line in the log, and the command succeeds. (A listed tag that is absent ends it.) Of the name the last component is kept: `team/app` and
#   `other/app` both become `app`, and one replaces the other. With `--scoped` the whole name is kept, but that of a registry with a
#   port is then "invalid reference format". Without `--all` one platform is copied, and the digest of the tag is another one.
# Version: skopeo 1.9.3+ds1-1+b10 (Debian 12); the source of 2026 (0201b1c) skips such repositories too.
# Why a registry cache must care: a mirror or a bundle that is made so may be without whole repositories, or has another image by a name, after
#   a run that succeeded. Compare what has come with a list of what should have: tags and digests.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get -qq -o APT::Sandbox::User=root download skopeo=1.9.3+ds1-1+b10 libgpgme11 libassuan0 libdevmapper1.02.1
for each in *.deb; do dpkg -x "$each" root; done
export LD_LIBRARY_PATH="$work/root/usr/lib/x86_64-linux-gnu:$work/root/lib/x86_64-linux-gnu"
export HOME="$work" XDG_RUNTIME_DIR="$work"
timeout 100 python3 - <<'PYTHON'
import hashlib
import json
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

OCI = "application/vnd.oci.image"


def digest_of(body: bytes) -> str:
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


class Registry:
    def __init__(self) -> None:
        self.content: dict[tuple[str, str], tuple[str, bytes]] = {}  # by repository and reference
        self.upload = b""
        kind = type("Handler", (Handler,), {"registry": self})
        server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
        self.host = f"127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()

    def store(self, repository: str, kind: str, value: dict[str, object], tag: str = "") -> dict[str, object]:
        media_type = f"{OCI}.{kind}.v1+json"
        body = json.dumps({"schemaVersion": 2, "mediaType": media_type, **value}).encode()
        self.content[repository, digest_of(body)] = self.content[repository, tag or digest_of(body)] = (media_type, body)
        return {"mediaType": media_type, "digest": digest_of(body), "size": len(body)}

    def image(self, repository: str, tag: str = "", architecture: str = "amd64") -> dict[str, object]:
        platform = {"architecture": architecture, "os": "linux"}
        rootfs = {"type": "layers", "diff_ids": []}
        config = self.store(repository, "config", {**platform, "author": repository, "config": {}, "rootfs": rootfs})
        return {**self.store(repository, "manifest", {"config": config, "layers": []}, tag), "platform": platform}

    def tags(self) -> dict[str, str]:
        """The digest of each tag, by its name."""
        named = {each: body for each, (_, body) in self.content.items() if ":" not in each[1]}
        return {f"{repository}:{tag}": digest_of(body) for (repository, tag), body in named.items()}


class Handler(BaseHTTPRequestHandler):
    registry: Registry
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"  # for a handshake of TLS, which is answered with a status

    def answer(self, status: int, media_type: str = "application/json", body: bytes = b"{}", location: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(body)))
        if location:
            self.send_header("Location", location)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def read(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def named(self) -> tuple[str, str]:
        found = re.fullmatch(r"/v2/(.+)/(?:manifests|blobs|tags|blobs/uploads)/([^/?]*).*", self.path)
        return (found[1], found[2]) if found else ("", "")

    def do_GET(self) -> None:
        repository, reference = self.named()
        content = self.registry.content
        tags = [tag for name, tag in content if name == repository and ":" not in tag]
        if self.path == "/v2/":
            self.answer(200)
        elif self.path.endswith("/tags/list") and tags:
            self.answer(200, body=json.dumps({"name": repository, "tags": tags}).encode())
        elif (repository, reference) in content:
            self.answer(200, *content[repository, reference])
        else:
            self.answer(404, body=b'{"errors": [{"code": "NAME_UNKNOWN", "message": "not here"}]}')

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.read()
        self.registry.upload = b""
        self.answer(202, location=f"{self.path}1")

    def do_PATCH(self) -> None:
        self.registry.upload += self.read()
        self.answer(202, location=self.path)

    def do_PUT(self) -> None:
        repository, reference = self.named()
        body = self.read()
        if "/manifests/" in self.path:
            self.registry.content[repository, reference] = (self.headers["Content-Type"], body)
        else:
            body = self.registry.upload + body
        self.registry.content[repository, digest_of(body)] = (self.headers["Content-Type"] or "", body)
        self.answer(201)

    def log_message(self, *arguments: object) -> None:
        pass


def sync(sources: dict[str, dict[str, list[str]]], *options: str) -> str:
    """What the command says, and the tags at the target."""
    target.content.clear()
    Path("list.yml").write_text(json.dumps({host: {"tls-verify": False, "images": images} for host, images in sources.items()}))
    insecure = ["--insecure-policy", "sync", "--dest-tls-verify=false", *options]
    command = ["root/usr/bin/skopeo", *insecure, "--src", "yaml", "--dest", "docker", "list.yml", f"{target.host}/mirror"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return "fails: " + re.findall(r'([^:"]*)"\n*$', done.stderr)[0].strip()
    return f"succeeds: {', '.join(sorted(target.tags())) or 'nothing'}"


source, target = Registry(), Registry()
for name in ("team/app", "other/app"):
    source.image(name, "1")
platforms = [source.image("team/many", "", each) for each in ("amd64", "arm64")]
source.store("team/many", "index", {"manifests": platforms}, "1")
with socket.create_server(("127.0.0.1", 0)) as free:
    down = f"127.0.0.1:{free.getsockname()[1]}"
seen = {
    "a registry that is down": sync({down: {"team/base": []}, source.host: {"team/app": []}}),
    "a repository that is unknown": sync({source.host: {"team/unknown": [], "team/app": []}}),
    "a tag that is unknown": sync({source.host: {"team/app": ["unknown"]}}),
    "team/app, other/app": sync({source.host: {"team/app": ["1"], "other/app": ["1"]}}),
    "the same, --scoped": sync({source.host: {"team/app": ["1"], "other/app": ["1"]}}, "--scoped"),
}
for options in ([], ["--all"]):
    sync({source.host: {"team/many": ["1"]}}, *options)
    same = target.tags().get("mirror/many:1") == source.tags()["team/many:1"]
    seen[" ".join(["an index", *options])] = "the same digest" if same else "another digest"
print(*(f"{what}: {found}" for what, found in seen.items()), sep="\n")
holds = list(seen.values()) == [
    "succeeds: mirror/app:1",
    "succeeds: mirror/app:1",
    "fails: not here",
    "succeeds: mirror/app:1",
    "fails: invalid reference format",
    "another digest",
    "the same digest",
]
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

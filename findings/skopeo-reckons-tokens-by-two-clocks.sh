#!/usr/bin/env bash
# Expected: a token that is answered with `expires_in: 60` is used for a minute after it came, whatever the clocks of the
#   registry and of the client say: `issued_at`, which the token specification has as optional, is for the log.
# Actual: skopeo adds `expires_in` to `issued_at`, which is the time of the server, and compares that with its own time. If its
#   clock is ahead by more than the token lasts, it asks for a new token before each request. If its clock is behind, it
#   sends a token that has ended, and does not ask for another after the 401: a copy that takes longer than a token
#   fails. Without `issued_at` it does both right. Podman and Buildah use the same library, whose version of 2026
#   (go.podman.io/image/v5 v5.42.1) has the same lines.
# Version: skopeo 1.9.3+ds1-1+b10 (Debian 12).
# Why a registry cache must care: where it issues tokens, `issued_at` makes its clients depend on clocks that agree; leave it
#   out. As a client, count from when the token came.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get -qq -o APT::Sandbox::User=root download skopeo=1.9.3+ds1-1+b10 libgpgme11 libassuan0 libdevmapper1.02.1
for package in *.deb; do dpkg -x "$package" root; done
export LD_LIBRARY_PATH="$work/root/usr/lib/x86_64-linux-gnu:$work/root/lib/x86_64-linux-gnu"
export HOME="$work" SKOPEO="$work/root/usr/bin/skopeo"
"$SKOPEO" --version
timeout 300 python3 - <<'PYTHON'
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

OCI = "application/vnd.oci.image"
LIFETIME = 60  # seconds; skopeo takes no token for shorter


def digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


CONFIG = json.dumps({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}}).encode()
MANIFEST = json.dumps(
    {
        "schemaVersion": 2,
        "mediaType": f"{OCI}.manifest.v1+json",
        "config": {"mediaType": f"{OCI}.config.v1+json", "digest": digest(CONFIG), "size": len(CONFIG)},
        "layers": [],
    }
).encode()


class Registry(BaseHTTPRequestHandler):
    """Asks for a token of a clock that is `skew` seconds ahead of ours, or does not say when it was issued."""

    protocol_version = "HTTP/1.1"
    skew: int | None = 0
    slow = 0  # seconds until the manifest comes
    issued: dict[str, float] = {}  # when, by our clock
    refused = 0

    def do_GET(self) -> None:
        if self.path.startswith("/token"):
            token = f"token-{len(self.issued)}"
            self.issued[token] = time.time()
            answer: dict[str, object] = {"token": token, "expires_in": LIFETIME}
            if self.skew is not None:
                answer["issued_at"] = datetime.fromtimestamp(time.time() + self.skew, UTC).isoformat(timespec="seconds")
            return self.answer(200, json.dumps(answer).encode(), "application/json")
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if time.time() - self.issued.get(given, 0) > LIFETIME:
            type(self).refused += bool(given)
            return self.answer(401, b"{}", "application/json")
        if "/manifests/" in self.path:
            time.sleep(self.slow)
            return self.answer(200, MANIFEST, f"{OCI}.manifest.v1+json")
        self.answer(200, CONFIG, "application/octet-stream")

    def answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        host = self.headers["Host"]
        if status == 401:
            challenge = f'Bearer realm="http://{host}/token",service="{host}",scope="repository:app:pull"'
            self.send_header("WWW-Authenticate", challenge)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
threading.Thread(target=server.serve_forever, daemon=True).start()
copy = [os.environ["SKOPEO"], "--insecure-policy", "copy", "-q", "--src-tls-verify=false"]


def run(skew: int | None, slow: int) -> tuple[str, int, int]:
    Registry.skew, Registry.slow, Registry.refused = skew, slow, 0
    Registry.issued.clear()
    name = f"dir:{os.environ['HOME']}/copy"
    done = subprocess.run([*copy, f"docker://127.0.0.1:{server.server_port}/app:1", name], capture_output=True, text=True)
    seen = ("goes well" if done.returncode == 0 else "fails", len(Registry.issued), Registry.refused)
    clock = "unsaid" if skew is None else f"{skew:+} s"
    print(f"clock of the server {clock}, manifest after {slow} s: {seen[0]}, {seen[1]} tokens, {seen[2]} refused")
    return seen


holds = [
    run(0, 0) == ("goes well", 1, 0),
    run(-600, 0) == ("goes well", 2, 0),
    run(600, LIFETIME + 2) == ("fails", 1, 1),
    run(None, LIFETIME + 2) == ("goes well", 2, 0),
]
print("as stated" if all(holds) else "CHANGED")
sys.exit(not all(holds))
PYTHON

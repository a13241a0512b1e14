#!/usr/bin/env bash
# Expected: a client that follows `Link` to the next page of a tag list looks for rel="next" (RFC 8288), and
#   resolves a relative reference against the URL of the page (RFC 3986).
# Actual: skopeo takes the first link of the header whatever its relation, rel="prev" too, keeps its path
#   and query alone, and asks the same registry for them. So a link to another host is asked of the first
#   one, and the valid relative reference `?last=v2` becomes `GET /?last=v2`, outside `/v2/`: the listing
#   fails with the answer to that. Podman and Buildah use the same library.
# Versions: skopeo 1.9.3+ds1-1+b10 (Debian 12).
# Why a registry cache must care: it writes this header anew for its own names. Only an absolute path
#   (`</v2/app/tags/list?…>; rel="next"`), alone in the header, pages every client; an upstream's own
#   header must not be passed on, nor a second relation be put before "next".
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
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LINKS = {  # the header, and the second request that it leads to
    "absolute path": ('</v2/app/tags/list?last=v2>; rel="next"', "/v2/app/tags/list?last=v2"),
    "query alone": ('<?last=v2>; rel="next"', "/?last=v2"),
    "another relation": ('</v2/app/tags/list?last=v2>; rel="prev"', "/v2/app/tags/list?last=v2"),
    "a relation before next": ('</help>; rel="help", </v2/app/tags/list?last=v2>; rel="next"', "/help"),
    "another host": ('<http://registry.invalid/v2/app/tags/list?last=v2>; rel="next"', "/v2/app/tags/list?last=v2"),
}


class Registry(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        self.server.paths.append(self.path)
        body, status = b"{}", 200 if path.startswith("/v2/") else 404
        if path == "/v2/app/tags/list":
            body = json.dumps({"name": "app", "tags": ["v3"] if query else ["v1", "v2"]}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if path.endswith("/tags/list") and not query:
            self.send_header("Link", self.server.link)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
threading.Thread(target=server.serve_forever, daemon=True).start()
holds = True
for what, (server.link, expected) in LINKS.items():
    server.paths = []
    done = subprocess.run(
        [os.environ["SKOPEO"], "list-tags", "--tls-verify=false", f"docker://127.0.0.1:{server.server_port}/app"],
        capture_output=True, text=True, timeout=30, check=False,
    )
    asked = server.paths[-1]
    print(f"{what}: Link: {server.link}\n  second request: GET {asked}, exit {done.returncode}")
    holds &= asked == expected and (done.returncode == 0) == expected.startswith("/v2/")
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

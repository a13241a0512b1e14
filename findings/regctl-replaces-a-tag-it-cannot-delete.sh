#!/usr/bin/env bash
# Expected: `regctl tag delete` asks the registry to delete the tag; where that is refused, the command fails, and the tag stays as
#   it is.
# Actual: after any answer but success, also 403, 429 and 500, it pushes a small image of its own to the tag, and asks for the deletion
#   of that image by digest. Where this is refused too, the command fails, and the tag is that image from then on. For
#   registries that delete by digest alone it is a way to delete one of several tags.
# Versions: github.com/regclient/regclient v0.11.7 (Go module), Go 1.26; docker-registry 2.8.2+ds1-1 (Debian 12), which deletes nothing
#   by default.
# Why a registry cache must care: who may push but not delete loses a tag by a deletion that was refused, and so does one who meets
#   a limit of requests. Nodes then pull the small image, for which a cache asks as for any other; webhooks tell of
#   a push, and not of a deletion. Rules that forbid to move tags protect them; those that forbid deletions do not.
set -euo pipefail
work=$(mktemp -d)
export GOMODCACHE="$work/modules" GOBIN="$work" GOFLAGS="-modcacherw -p=2" CGO_ENABLED=0
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get -qq -o APT::Sandbox::User=root download docker-registry=2.8.2+ds1-1
dpkg -x docker-registry_*.deb root
go install github.com/regclient/regclient/cmd/regctl@v0.11.7 2> /dev/null
export HOME="$work"
timeout 120 python3 - <<'PYTHON'
import hashlib
import http.client
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

OCI = "application/vnd.oci.image.manifest.v1+json"
EMPTY = b"{}"
DIGEST = f"sha256:{hashlib.sha256(EMPTY).hexdigest()}"
BLOB = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": DIGEST, "size": len(EMPTY)}
IMAGE = json.dumps({"schemaVersion": 2, "mediaType": OCI, "config": BLOB, "layers": [BLOB]}).encode()
with socket.create_server(("127.0.0.1", 0)) as free:
    registry = "127.0.0.1:{1}".format(*free.getsockname())


def ask(method: str, path: str, body: bytes = b"", **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection(registry)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    return answer, answer.read()


class Refusing(http.server.BaseHTTPRequestHandler):
    """A proxy in front of the registry that refuses deletions, unless `refusal` is 0."""

    refusal = 0
    asked: list[str] = []

    def forward(self) -> None:
        self.asked.append(f"{self.command} {self.path.partition('?')[0].rpartition('/app/')[2]}"[:40])
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name: ", ".join(self.headers.get_all(name, [])) for name in set(self.headers) - {"Content-Length"}}
        if self.command == "DELETE" and self.refusal:
            status, content, given = self.refusal, b"", {}
        else:
            answer, content = ask(self.command, self.path, body, **headers)
            status, given = answer.status, dict(answer.getheaders())
        self.send_response(status)
        for name, value in given.items():
            if name in ("Location", "Docker-Content-Digest", "Docker-Upload-Uuid", "Range", "Content-Type"):
                self.send_header(name, value)
        self.send_header("Content-Length", given.get("Content-Length", str(len(content))))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = forward

    def log_message(self, *_: object) -> None:
        pass


Path("registry.yml").write_text(
    json.dumps(
        {
            "version": "0.1",
            "storage": {"filesystem": {"rootdirectory": os.path.abspath("data")}},
            "http": {"addr": registry},
            "log": {"accesslog": {"disabled": True}},
        }
    )
)
server = subprocess.Popen(["root/usr/bin/docker-registry", "serve", "registry.yml"], stderr=subprocess.PIPE, text=True)
assert server.stderr is not None
if not any("listening on" in line for line in server.stderr):
    raise SystemExit("docker-registry ended")
threading.Thread(target=server.stderr.read, daemon=True).start()
proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
threading.Thread(target=proxy.serve_forever, daemon=True).start()
host = f"127.0.0.1:{proxy.server_port}"
holds = True
try:
    upload = ask("POST", "/v2/app/blobs/uploads/")[0].headers["Location"]
    ask("PUT", f"{upload}&digest={DIGEST}", EMPTY)
    for tag, refusal in (("a", 0), ("b", 403), ("c", 429)):
        assert ask("PUT", f"/v2/app/manifests/{tag}", IMAGE, **{"Content-Type": OCI})[0].status == 201
        Refusing.refusal = refusal
        Refusing.asked.clear()
        command = ["./regctl", "tag", "delete", "--host", f"reg={host},tls=disabled", f"{host}/app:{tag}"]
        done = subprocess.run(command, capture_output=True, text=True)
        stays = ask("GET", f"/v2/app/manifests/{tag}", Accept=OCI)[1] == IMAGE
        says = "as Debian's registry is, 405" if not refusal else str(refusal)
        print(f"deletions are refused ({says}): regctl {'fails' if done.returncode else 'succeeds'},")
        print(f"  the tag is {'the image' if stays else 'another image'}, after", ", ".join(Refusing.asked))
        holds = holds and done.returncode != 0 and not stays and f"PUT manifests/{tag}" in Refusing.asked
finally:
    server.terminate()
    server.wait(20)
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

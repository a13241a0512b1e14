#!/usr/bin/env bash
# Expected: `crane pull --format=oci` into a layout that has the tag already, which has moved since, replaces what the layout has under this
#   name, as skopeo, oras and regctl do when they write to one; or readers agree on which of two entries a name means.
# Actual: crane appends an entry to index.json each time, by default without a name, also where the same image is in it. With
#   `--annotate-ref` both entries have the same `org.opencontainers.image.ref.name`. skopeo (and podman by its library) then takes the
#   first, which is the former image, without an error; oras takes the last, which is the new one.
# Versions: github.com/google/go-containerregistry v0.22.1, oras.land/oras v1.3.6 (Go modules), Go 1.26; skopeo
#   1.9.3+ds1-1+b10 (Debian 12).
# Why a registry cache must care: layouts are how images come to where no network is. A layout that was updated by crane
#   loads the new image by one tool and the old one by another, under one name. What imports layouts has to refuse a name that two
#   images have, or say which it took; pull into an empty directory.
set -euo pipefail
work=$(mktemp -d)
export GOMODCACHE="$work/modules" GOBIN="$work" GOFLAGS="-modcacherw -p=2" CGO_ENABLED=0
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get -qq -o APT::Sandbox::User=root download skopeo=1.9.3+ds1-1+b10
dpkg -x skopeo_*.deb root
go install github.com/google/go-containerregistry/cmd/crane@v0.22.1 2> /dev/null
go install oras.land/oras/cmd/oras@v1.3.6 2> /dev/null
export HOME="$work" XDG_RUNTIME_DIR="$work"
timeout 100 python3 - <<'PYTHON'
import hashlib
import http.client
import json
import subprocess
import sys
import threading
from pathlib import Path

OCI = "application/vnd.oci.image"
NAME = "org.opencontainers.image.ref.name"
EMPTY = b"{}"


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def manifest(text: str) -> bytes:
    blob = {"mediaType": f"{OCI}.config.v1+json", "digest": digest_of(EMPTY), "size": len(EMPTY)}
    described = {"schemaVersion": 2, "mediaType": f"{OCI}.manifest.v1+json", "config": blob, "layers": []}
    return json.dumps({**described, "annotations": {"example.com/text": text}}).encode()


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def layout(name: str) -> list[tuple[str, str]]:
    """The image and the name of each entry of the layout."""
    entries = json.loads(Path(name, "index.json").read_text())["manifests"]
    return [(IMAGES[each["digest"]], each.get("annotations", {}).get(NAME, "")) for each in entries]


OLD, NEW = manifest("old"), manifest("new")
IMAGES = {digest_of(OLD): "old", digest_of(NEW): "new"}
server = subprocess.Popen(
    ["./crane", "registry", "serve", "--address=127.0.0.1:0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
)
assert server.stdout is not None
line = next((line for line in server.stdout if "serving on port" in line), "")
host = f"127.0.0.1:{line.split()[-1] if line else ''}"
threading.Thread(target=server.stdout.read, daemon=True).start()
image = f"{host}/app:1"


def put(path: str, body: bytes, kind: str) -> None:
    connection = http.client.HTTPConnection(host)
    connection.request("PUT", f"/v2/app/{path}", body, {"Content-Type": kind})
    answer = connection.getresponse()
    answer.read()
    assert answer.status == 201, answer.status


try:
    connection = http.client.HTTPConnection(host)
    connection.request("POST", "/v2/app/blobs/uploads/")
    answer = connection.getresponse()
    answer.read()
    put(f"{answer.headers['Location'].partition('/v2/app/')[2]}?digest={digest_of(EMPTY)}", EMPTY, "")
    for content in (OLD, NEW):
        put("manifests/1", content, f"{OCI}.manifest.v1+json")
        run("./crane", "pull", "--insecure", "--format=oci", image, "plain")
        run("./crane", "pull", "--insecure", "--format=oci", "--annotate-ref", image, "named")
        run("./oras", "cp", "--from-plain-http", "--to-oci-layout-path=by-oras", image, image)
    run("./crane", "pull", "--insecure", "--format=oci", image, "plain")
finally:
    server.terminate()
    server.wait(20)
by_skopeo = IMAGES[run("root/usr/bin/skopeo", "inspect", "--format={{.Digest}}", f"oci:named:{image}")]
by_oras = IMAGES[run("./oras", "resolve", "--oci-layout-path=named", image)]
print("crane pull, three times:", *layout("plain"))
print("crane pull --annotate-ref, twice:", *layout("named"))
print("oras cp, twice:", *layout("by-oras"))
print(f"of the second one skopeo takes the {by_skopeo} image, oras the {by_oras} one")
holds = layout("plain") == [("old", ""), ("new", ""), ("new", "")] and by_skopeo == "old" and by_oras == "new"
holds = holds and layout("named") == [("old", image), ("new", image)] and ("new", image) in layout("by-oras")
holds = holds and ("old", image) not in layout("by-oras")
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

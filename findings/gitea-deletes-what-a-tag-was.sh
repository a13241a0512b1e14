#!/usr/bin/env bash
# Expected: when a tag is pushed anew, the image that it stood for can be pulled by digest until something cleans up, and the tags `rc1` and
#   `RC1` are two.
# Actual: Gitea deletes the former image with the push: its manifest, configuration and layers are 404 by digest as soon as the new manifest is
#   stored, unless another tag names it, or it was pushed by its digest, as the manifests of an index are; those stay when the index
#   goes. Tags have no case: a push of `RC1` deletes what `rc1` was, and the list has `rc1`. A range of a blob is answered 200 with
#   all of it, and each page of tags that is not empty has a `Link` to a next one.
# Versions: code.gitea.io/gitea v1.27.3 (Go module), Go 1.26, with SQLite. It builds for some minutes.
# Why a registry cache must care: a client or a cache that has read the tag before a push does not get the layers after it, until it asks
#   for the tag again; a cache that believes tags for minutes must do so when something of the image is gone. What is pinned by digest
#   there is lost with the next push, but for what a cache keeps. A cut transfer begins again.
set -euo pipefail
work=$(mktemp -d)
export GOMODCACHE="$work/modules" GOFLAGS="-modcacherw -p=2" CGO_ENABLED=0
trap 'rm -rf "$work"' EXIT
cd "$work"
go mod download code.gitea.io/gitea@v1.27.3
mv modules/code.gitea.io/gitea@v1.27.3 source
(cd source && go build -o ../gitea . 2> /dev/null)
cat > finding.py <<'PYTHON'
import base64
import getpass
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

OCI = "application/vnd.oci.image"
with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
here = Path.cwd()
(here / "app.ini").write_text(
    f"""
RUN_USER = {getpass.getuser()}
WORK_PATH = {here}/data
[server]
HTTP_ADDR = 127.0.0.1
HTTP_PORT = {port}
ROOT_URL = http://127.0.0.1:{port}/
STATIC_ROOT_PATH = {here}/source
OFFLINE_MODE = true
DISABLE_SSH = true
[database]
DB_TYPE = sqlite3
[security]
INSTALL_LOCK = true
[log]
MODE = file
"""
)
LOGIN = "Basic " + base64.b64encode(b"owner:of-this-server").decode()


def digest_of(body: bytes) -> str:
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


def ask(method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    named = {name.replace("_", "-"): value for name, value in headers.items()} | {"Authorization": LOGIN}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, named, method=method)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def status(path: str) -> int:
    return ask("GET", f"/v2/owner/app/{path}")[0]


def blob(kind: str, body: bytes) -> dict[str, object]:
    _, headers, _ = ask("POST", "/v2/owner/app/blobs/uploads/", b"")
    digest = digest_of(body)
    assert ask("PUT", f"{headers['Location']}?digest={digest}", body, Content_Type="application/octet-stream")[0] == 201
    return {"mediaType": f"{OCI}.{kind}", "digest": digest, "size": len(body)}


def put(kind: str, reference: str, value: dict[str, object]) -> str:
    media_type = f"{OCI}.{kind}.v1+json"
    body = json.dumps({"schemaVersion": 2, "mediaType": media_type, **value}).encode()
    digest = digest_of(body)
    assert ask("PUT", f"/v2/owner/app/manifests/{reference or digest}", body, Content_Type=media_type)[0] == 201
    return digest


def image(reference: str, name: str) -> tuple[str, str]:
    """The digests of a manifest, and of its layer."""
    config = json.dumps({"architecture": "amd64", "os": "linux", "author": name, "rootfs": {"type": "layers", "diff_ids": []}})
    layer = blob("layer.v1.tar+gzip", f"the layer of {name}".encode())
    value = {"config": blob("config.v1+json", config.encode()), "layers": [layer]}
    return put("manifest", reference, value), str(layer["digest"])


def index(reference: str, name: str) -> tuple[str, str]:
    """The digests of an index, and of its manifest."""
    child, _ = image("", name)
    _, headers, body = ask("GET", f"/v2/owner/app/manifests/{child}")
    described = {"mediaType": headers["Content-Type"], "digest": child, "size": len(body)}
    platform = {"os": "linux", "architecture": "amd64"}
    return put("index", reference, {"manifests": [{**described, "platform": platform}]}), child


def run() -> dict[str, object]:
    seen: dict[str, object] = {}
    first, layer = image("latest", "first")
    seen["an image by digest, and its layer"] = status(f"manifests/{first}"), status(f"blobs/{layer}")
    image("latest", "second")
    seen["after its tag was pushed anew"] = status(f"manifests/{first}"), status(f"blobs/{layer}")
    kept, layer = image("one", "third")
    image("two", "third")
    image("one", "fourth")
    seen["the same, if another tag names it"] = status(f"manifests/{kept}"), status(f"blobs/{layer}")
    former, child = index("multi", "fifth")
    index("multi", "sixth")
    seen["an index, and the manifest in it"] = status(f"manifests/{former}"), status(f"manifests/{child}")
    candidate, _ = image("rc1", "seventh")
    image("RC1", "eighth")
    seen["what rc1 was, after a push of RC1"] = status(f"manifests/{candidate}")
    _, headers, tags = ask("GET", "/v2/owner/app/tags/list")
    seen["the list"] = json.loads(tags)["tags"]
    seen["the next page of the whole list"] = re.findall("last=([^>]*)>; rel=\"next\"", headers.get("Link", ""))
    _, blob_of = image("last", "ninth")
    code, _, content = ask("GET", f"/v2/owner/app/blobs/{blob_of}", Range="bytes=1-2")
    seen["bytes=1-2 of a blob"] = code, content.decode()
    return seen


environment = {"PATH": os.environ["PATH"], "HOME": str(here), "USER": getpass.getuser()}
gitea = ["./gitea", "--config", "app.ini"]
user = ["admin", "user", "create", "--username", "owner", "--email", "owner@localhost.example", "--password", "of-this-server"]
for arguments in (["migrate"], [*user, "--must-change-password=false"]):
    subprocess.run([*gitea, *arguments], env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
server = subprocess.Popen([*gitea, "web"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
try:
    for _ in range(300):
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    seen = run()
finally:
    server.terminate()
    server.wait(30)
print(*(f"{what}: {found}" for what, found in seen.items()), sep="\n")
tags = ["latest", "multi", "one", "rc1", "two"]
holds = list(seen.values()) == [
    (200, 200),
    (404, 404),
    (200, 200),
    (404, 200),
    404,
    tags,
    ["two"],
    (200, "the layer of ninth"),
]
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON
as=()
if [ "$(id -u)" = 0 ]; then # Gitea does not run as root
    chown -R nobody: "$work"
    as=(setpriv --reuid=nobody --regid=nogroup --clear-groups)
fi
timeout 120 "${as[@]}" /usr/bin/python3 finding.py

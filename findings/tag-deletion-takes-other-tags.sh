#!/usr/bin/env bash
# Expected: `skopeo delete docker://REGISTRY/app:v1`, and `del_alias("v1")` of python-dxf, whose documentation says
#   "delete an alias", remove this one tag, by the `DELETE …/manifests/v1` that the distribution-spec has for it.
# Actual: both read the tag's manifest, and delete that by its digest. Every other tag of the same digest goes with
#   it, `latest` for example, and neither says so.
# Versions: skopeo 1.9.3+ds1-1+b10, docker-registry 2.8.2+ds1-1 (Debian 12), python-dxf 12.1.1 (PyPI).
# Why a registry cache must care: it sees a deletion of content, not of a tag, and has to drop its tags too. A rule
#   that protects a tag must look at deletions by digest as well. Whoever means one tag must use a client that
#   sends its name.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get -qq -o APT::Sandbox::User=root download skopeo=1.9.3+ds1-1+b10 libgpgme11 libassuan0 \
  libdevmapper1.02.1 docker-registry=2.8.2+ds1-1
for package in *.deb; do dpkg -x "$package" root; done
python3 -m venv venv
venv/bin/pip -q install --disable-pip-version-check python-dxf==12.1.1
export HOME="$work" REGISTRY="$work/root/usr/bin/docker-registry" SKOPEO="$work/root/usr/bin/skopeo"
export LIBRARIES="$work/root/usr/lib/x86_64-linux-gnu:$work/root/lib/x86_64-linux-gnu"
LD_LIBRARY_PATH="$LIBRARIES" "$SKOPEO" --version
"$REGISTRY" --version
timeout 120 venv/bin/python - <<'PYTHON'
import hashlib
import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import dxf
import requests

OCI = "application/vnd.oci.image"
CONFIG = b'{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}'
TAGS = ("v1", "latest", "other")


def digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def manifest(note: str) -> bytes:
    config = {"mediaType": f"{OCI}.config.v1+json", "digest": digest(CONFIG), "size": len(CONFIG)}
    document = {"schemaVersion": 2, "mediaType": f"{OCI}.manifest.v1+json", "config": config, "layers": []}
    return json.dumps({**document, "annotations": {"note": note}}).encode()


print("python-dxf", importlib.metadata.version("python-dxf"))
with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
with open("config.yml", "w") as config:
    config.write(
        f"version: 0.1\nlog: {{level: info, formatter: json}}\nhttp: {{addr: '127.0.0.1:{port}'}}\n"
        f"storage: {{filesystem: {{rootdirectory: {os.getcwd()}/data}}, delete: {{enabled: true}}}}\n"
    )
with open("log", "wb") as log:
    registry = subprocess.Popen([os.environ["REGISTRY"], "serve", "config.yml"], stdout=log, stderr=log)
host, session = f"127.0.0.1:{port}", requests.Session()
session.trust_env = False


def push(repository: str) -> None:
    base = f"http://{host}/v2/{repository}"
    place = session.post(f"{base}/blobs/uploads/", timeout=20).headers["Location"]
    session.put(f"{place}&digest={digest(CONFIG)}", data=CONFIG, timeout=20).raise_for_status()
    for tag in TAGS:
        content = manifest("another" if tag == "other" else "the same")
        headers = {"Content-Type": f"{OCI}.manifest.v1+json"}
        session.put(f"{base}/manifests/{tag}", data=content, headers=headers, timeout=20).raise_for_status()


def left(repository: str) -> list[str]:
    headers = {"Accept": f"{OCI}.manifest.v1+json"}
    url = f"http://{host}/v2/{repository}/manifests"
    return [tag for tag in TAGS if session.head(f"{url}/{tag}", headers=headers, timeout=20).status_code == 200]


def by_skopeo(repository: str) -> None:
    command = [os.environ["SKOPEO"], "delete", "--tls-verify=false", f"docker://{host}/{repository}:v1"]
    environment = {**os.environ, "LD_LIBRARY_PATH": os.environ["LIBRARIES"]}
    subprocess.run(command, env=environment, capture_output=True, timeout=30, check=True)


def by_dxf(repository: str) -> None:
    dxf.DXF(host, repository, insecure=True).del_alias("v1")


def requested(repository: str) -> list[str]:
    """The deletions in the registry's log."""
    with open("log") as log:
        lines = [json.loads(line) for line in log if '"DELETE"' in line and "http.request.uri" in line]
    uris = [each["http.request.uri"] for each in lines if f"/{repository}/" in each["http.request.uri"]]
    return sorted(set(uris))


holds = True
try:
    for _ in range(100):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            time.sleep(0.1)
    deletions: dict[str, Callable[[str], None]] = {"skopeo": by_skopeo, "dxf": by_dxf}
    for name, delete in deletions.items():
        push(name)
        before = left(name)
        delete(name)
        after = left(name)
        print(f"{name}: deletes v1; tags before: {', '.join(before)}; after: {', '.join(after)}")
        for uri in requested(name):
            print(f"  DELETE {uri}")
        holds &= before == list(TAGS) and after == ["other"]
        holds &= requested(name) == [f"/v2/{name}/manifests/{digest(manifest('the same'))}"]
finally:
    registry.terminate()
    registry.wait(10)
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

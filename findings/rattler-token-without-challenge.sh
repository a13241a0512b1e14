#!/usr/bin/env bash
# Expected: a client of conda channels in a registry (`oci://host:port/channel`) asks the registry, and fetches a token
#   where a challenge of it says (WWW-Authenticate: realm, service, scope), or none if there is no challenge.
# Actual: rattler, which pixi is made of, first asks `https://host/token?scope=repository:…:pull`, without the port of
#   the channel, before it has asked the registry anything. Whatever is not 200 with a token in JSON ends it: a
#   registry that is open to everybody has no `/token`, and cannot be pulled from. Since py-rattler 0.26 it follows
#   challenges, but drops the port still; libmamba (mamba, micromamba) does as rattler did (03564bf, 2026-07-24).
# Versions: py-rattler 0.25.0, and 0.28.0 as a counterexample (PyPI).
# Why a registry cache must care: conda-forge has its mirror on ghcr.io, where `/token` is. For these clients a cache
#   of it must have one at port 443, also if it needs no login: a token that stands for nobody will do.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
for version in 0.25.0 0.28.0; do
    python3 -m venv "$version"
    "$version/bin/pip" -q install --disable-pip-version-check "py-rattler==$version"
done
new() { openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -batch "$@" 2> /dev/null; }
new -x509 -days 2 -subj /CN=authority -keyout authority.key -out authority.pem
new -subj /CN=localhost -keyout server.key -out server.csr
printf 'subjectAltName=DNS:localhost\nbasicConstraints=CA:FALSE\nextendedKeyUsage=serverAuth\n' > extensions
openssl x509 -req -days 2 -in server.csr -CA authority.pem -CAkey authority.key -CAcreateserial \
    -extfile extensions -out server.pem 2> /dev/null
cat > client.py <<'PYTHON'
import asyncio
import os

import rattler
from rattler.networking import Client, OciMiddleware
from rattler.repo_data.gateway import SourceConfig


async def main() -> str:
    plain = SourceConfig(zstd_enabled=False, bz2_enabled=False, sharded_enabled=False)
    gateway = rattler.Gateway(
        cache_dir="cache", default_config=plain, client=Client([OciMiddleware()])
    )
    try:
        await gateway.query([rattler.Channel("oci://localhost:5443/channel")], ["noarch"], ["package"])
    except Exception as error:
        return str(error).splitlines()[0]
    return "ok"


print(asyncio.run(main()), flush=True)
os._exit(0)
PYTHON
cat > server.py <<'PYTHON'
import hashlib
import http.server
import json
import os
import shutil
import ssl
import subprocess
import sys
import threading

REPODATA = b'{"info": {"subdir": "noarch"}, "packages": {}, "packages.conda": {}}'
DIGEST = f"sha256:{hashlib.sha256(REPODATA).hexdigest()}"
LAYER = {"mediaType": "application/vnd.conda.repodata.v1+json", "digest": DIGEST, "size": len(REPODATA)}
MANIFEST = json.dumps({"schemaVersion": 2, "config": {**LAYER, "mediaType": "config"}, "layers": [LAYER]}).encode()
CONTENT = {"/v2/": b"{}", "/manifests/latest": MANIFEST, f"/blobs/{DIGEST}": REPODATA}
asked: list[str] = []


class Registry(http.server.BaseHTTPRequestHandler):
    """A registry that is open to everybody."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        host = self.headers["Host"]
        asked.append(f"{self.command} {self.path.replace(DIGEST, 'sha256:…')}")
        found = next((each for end, each in CONTENT.items() if self.path.partition("?")[0].endswith(end)), None)
        assert host == "localhost", host
        self.send_response(404 if found is None else 200)
        self.send_header("Content-Length", str(len(found or b"")))
        self.end_headers()
        self.wfile.write(found or b"")

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 443), Registry)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("server.pem", "server.key")
server.socket = context.wrap_socket(server.socket, server_side=True)
threading.Thread(target=server.serve_forever, daemon=True).start()
environment = {**os.environ, "SSL_CERT_FILE": "authority.pem", "HOME": os.getcwd()}
TOKEN = "GET /token?scope=repository:channel/noarch/repodata.json:pull"
holds = True
for version, has_token, expected, first in (
    ("0.25.0", False, "404 Not Found", TOKEN),
    ("0.25.0", True, "ok", TOKEN),
    ("0.28.0", False, "ok", "GET /v2/"),
):
    CONTENT.pop("/token", None)
    if has_token:
        CONTENT["/token"] = b'{"token": "nobody"}'
    asked.clear()
    shutil.rmtree("cache", ignore_errors=True)
    done = subprocess.run(
        [f"{version}/bin/python", "client.py"], env=environment, capture_output=True, text=True, timeout=60
    )
    outcome = done.stdout.strip() or done.stderr
    kind = "with /token" if has_token else "without /token"
    print(f"py-rattler {version}, a registry {kind}: {outcome}", *asked, sep="\n  ")
    holds = holds and expected in outcome and asked[:1] == [first]
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON
# A network of its own, where port 443 is free.
unshare --user --map-root-user --net sh -c 'ip link set lo up && exec timeout 120 python3 server.py'

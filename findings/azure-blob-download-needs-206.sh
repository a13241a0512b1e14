#!/usr/bin/env bash
# Expected: the Azure SDK's `download_blob` is a GET of the blob, in pieces if it is large; where a server ignores
#   `Range` and answers 200 with the whole blob, as RFC 9110 (14.2) allows it, the client takes that.
# Actual: each download, of a blob of two bytes too, is `Range: bytes=0-4194303`, and 200 raises HttpResponseError:
#   "Operation returned an invalid status 'OK'". The colon of the digest is sent as %3A in the path.
# Versions: azure-containerregistry 1.2.0 (PyPI), azure-core 1.41.0.
# Why a registry cache must care: it may not answer 200 while a blob is still on its way from upstream, nor cut the
#   range by a rule "small blobs whole"; a proxy in front that drops `Range` breaks this client. A cache that
#   matches paths before it decodes them finds no blob.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install --disable-pip-version-check azure-containerregistry==1.2.0 azure-core==1.41.0
cd "$work"
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout key.pem -out cert.pem -days 2 \
  -subj /CN=localhost -addext subjectAltName=DNS:localhost 2> /dev/null
timeout 60 "$work/venv/bin/python" - <<'PYTHON'
import hashlib
import importlib.metadata
import ssl
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from azure.containerregistry import ContainerRegistryClient
from azure.core.exceptions import HttpResponseError

BLOB = b"{}"
DIGEST = f"sha256:{hashlib.sha256(BLOB).hexdigest()}"


class Registry(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers["Range"]))
        ranged = self.server.ranges and self.headers["Range"]
        self.send_response(206 if ranged else 200)
        if ranged:
            self.send_header("Content-Range", f"bytes 0-{len(BLOB) - 1}/{len(BLOB)}")
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Docker-Content-Digest", DIGEST)
        self.send_header("Content-Length", str(len(BLOB)))
        self.end_headers()
        self.wfile.write(BLOB)

    def log_message(self, *args: object) -> None:
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("cert.pem", "key.pem")
server.socket = context.wrap_socket(server.socket, server_side=True)
server.seen = []
threading.Thread(target=server.serve_forever, daemon=True).start()
print(*(f"{name} {importlib.metadata.version(name)}" for name in ("azure-containerregistry", "azure-core")))
client = ContainerRegistryClient(
    f"https://localhost:{server.server_port}",
    audience="https://management.azure.com",
    connection_verify="cert.pem",
    retry_total=0,
)
results = []
for server.ranges in (True, False):
    try:
        result = b"".join(client.download_blob("app", DIGEST)).decode()
    except HttpResponseError as error:
        result = f"{type(error).__name__}: {error}"
    path, asked = server.seen[-1]
    print(f"GET {path}\n  Range: {asked}, answered {206 if server.ranges else 200}: {result}")
    results.append(result)
holds = (
    results[0] == BLOB.decode()
    and results[1].startswith("HttpResponseError")
    and set(server.seen) == {(f"/v2/app/blobs/{DIGEST.replace(':', '%3A')}", "bytes=0-4194303")}
)
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

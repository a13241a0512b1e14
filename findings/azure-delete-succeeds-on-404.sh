#!/usr/bin/env bash
# Expected: ContainerRegistryClient of the Azure SDK deletes by the distribution API, as it pulls and pushes by it
#   (`/v2/…`), and raises an error if the registry knows neither the name nor the call.
# Actual: `delete_tag` and `delete_repository` are sent to Azure's own API, `DELETE /acr/v1/…`, and 404 counts as
#   success: with any other registry they return None, like a deletion, and nothing is deleted. Only
#   `delete_blob`, and `delete_manifest` given a digest, use `/v2/`; they take 404 for success as well. Reading
#   tags or repositories by the same API raises ResourceNotFoundError.
# Versions: azure-containerregistry 1.2.0, azure-core 1.41.0 (PyPI).
# Why a registry cache must care: a clean-up that uses this SDK reports success against a private registry that is
#   not Azure's while nothing becomes free. `DELETE /acr/v1/…` in the log of requests is the sign of it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install --disable-pip-version-check azure-containerregistry==1.2.0 azure-core==1.41.0
cd "$work"
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout key.pem -out cert.pem -days 2 \
  -subj /CN=localhost -addext subjectAltName=DNS:localhost 2> /dev/null
timeout 60 "$work/venv/bin/python" - <<'PYTHON'
import importlib.metadata
import ssl
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

from azure.containerregistry import ContainerRegistryClient
from azure.core.exceptions import HttpResponseError

DIGEST = f"sha256:{'0' * 64}"


class Registry(BaseHTTPRequestHandler):
    """A registry that holds nothing, so that every answer is 404."""

    def do_GET(self) -> None:
        self.server.seen.append(f"{self.command} {unquote(self.path.partition('?')[0])}")
        body = b'{"errors":[{"code":"NAME_UNKNOWN","message":"not known"}]}'
        self.send_response(404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_DELETE = do_GET

    def log_message(self, *args: object) -> None:
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("cert.pem", "key.pem")
server.socket = context.wrap_socket(server.socket, server_side=True)
threading.Thread(target=server.serve_forever, daemon=True).start()
print(*(f"{name} {importlib.metadata.version(name)}" for name in ("azure-containerregistry", "azure-core")))
client = ContainerRegistryClient(
    f"https://localhost:{server.server_port}",
    audience="https://management.azure.com",
    connection_verify="cert.pem",
    retry_total=0,
)


def call(what: str, method: Callable[..., object], *args: str) -> tuple[str, list[str]]:
    """The result, or the name of the error, and the requests."""
    server.seen = []
    try:
        result = repr(method(*args))
    except HttpResponseError as error:
        result = type(error).__name__
    print(f"{what}: {result}; {', '.join(server.seen)}")
    return result, server.seen


holds = (
    call("delete_tag", client.delete_tag, "app", "v1") == ("None", ["DELETE /acr/v1/app/_tags/v1"])
    and call("delete_repository", client.delete_repository, "app") == ("None", ["DELETE /acr/v1/app"])
    and call("delete_manifest", client.delete_manifest, "app", DIGEST)
    == ("None", [f"DELETE /v2/app/manifests/{DIGEST}"])
    and call("delete_blob", client.delete_blob, "app", DIGEST) == ("None", [f"DELETE /v2/app/blobs/{DIGEST}"])
    and call("list_tag_properties", lambda name: list(client.list_tag_properties(name)), "app")
    == ("ResourceNotFoundError", ["GET /acr/v1/app/_tags"])
)
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

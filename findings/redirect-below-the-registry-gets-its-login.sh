#!/usr/bin/env bash
# Expected: a client that a registry redirects to another server for a blob, by a URL that carries its own signature,
#   leaves out its login for the registry, which is for one host and port.
# Actual: it depends on the names. containers/image (podman, skopeo, buildah, CRI-O) leaves the header to Go's HTTP client,
#   which keeps it for hosts below the first: `s3.registry.example` gets the token for registry.example, or user and
#   password if that asked for these. Built with Go 1.26, it sends them to any other port of registry.example as well;
#   Debian's skopeo, built with Go 1.19, does not. At `storage.example` no login arrives. oras-go (oras, helm) and
#   go-containerregistry (crane, ko, cosign) never send it.
# Versions: skopeo 1.9.3+ds1-1+b10 (Debian 12); go.podman.io/image/v5 v5.42.1, oras.land/oras-go/v2 v2.7.0,
#   github.com/google/go-containerregistry v0.22.1 (Go modules), Go 1.26.
# Why a registry cache must care: one that redirects to a bucket must not have it at its own name, nor below that. The
#   bucket's server gets the passwords of users; and Amazon S3 refuses a signed URL that comes with another login, so
#   that blobs fail for some clients and not for others, and never for pulls without a login.
set -euo pipefail
work=$(mktemp -d)
export GOMODCACHE="$work/modules" GOFLAGS="-mod=mod -modcacherw -p=1" CGO_ENABLED=0
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get -qq -o APT::Sandbox::User=root download skopeo=1.9.3+ds1-1+b10 libgpgme11 libassuan0 libdevmapper1.02.1
for package in *.deb; do dpkg -x "$package" root; done
cat > go.mod <<'MODULE'
module finding

go 1.26.0

require (
	github.com/google/go-containerregistry v0.22.1
	go.podman.io/image/v5 v5.42.1
	oras.land/oras-go/v2 v2.7.0
)
MODULE
cat > main.go <<'GO'
package main

import (
	"context"
	"io"
	"os"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	ggcr "github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/go-digest"
	"go.podman.io/image/v5/docker"
	"go.podman.io/image/v5/pkg/blobinfocache/none"
	"go.podman.io/image/v5/types"
	"oras.land/oras-go/v2/registry/remote"
	"oras.land/oras-go/v2/registry/remote/auth"
)

func check(err error) {
	if err != nil {
		panic(err)
	}
}

func withORAS(registry, digest string) (io.ReadCloser, error) {
	repository, err := remote.NewRepository(registry + "/app")
	check(err)
	repository.PlainHTTP = true
	login := auth.Credential{Username: "alice", Password: "wonderland"}
	repository.Client = &auth.Client{Credential: auth.StaticCredential(registry, login)}
	_, blob, err := repository.Blobs().FetchReference(context.Background(), digest)
	return blob, err
}

func withCrane(registry, digest string) (io.ReadCloser, error) {
	reference, err := name.NewDigest(registry+"/app@"+digest, name.Insecure)
	check(err)
	layer, err := ggcr.Layer(reference, ggcr.WithAuth(&authn.Basic{Username: "alice", Password: "wonderland"}))
	check(err)
	return layer.Compressed()
}

func withPodman(registry, blob string) (io.ReadCloser, error) {
	reference, err := docker.ParseReference("//" + registry + "/app:v1")
	check(err)
	source, err := reference.NewImageSource(context.Background(), &types.SystemContext{
		DockerAuthConfig:            &types.DockerAuthConfig{Username: "alice", Password: "wonderland"},
		DockerInsecureSkipTLSVerify: types.OptionalBoolTrue,
	})
	check(err)
	content, _, err := source.GetBlob(context.Background(), types.BlobInfo{Digest: digest.Digest(blob)}, none.NoCache)
	return content, err
}

// Reads the blob `registry/app@digest` with alice's login.
func main() {
	read := map[string]func(string, string) (io.ReadCloser, error){
		"containers/image": withPodman, "go-containerregistry": withCrane, "oras-go": withORAS,
	}
	blob, err := read[os.Args[1]](os.Args[2], os.Args[3])
	check(err)
	_, err = io.Copy(io.Discard, blob)
	check(err)
}
GO
go build -tags containers_image_openpgp,exclude_graphdriver_btrfs -o finding . 2> build.log || { cat build.log; exit 1; }
go version
go list -m go.podman.io/image/v5 oras.land/oras-go/v2 github.com/google/go-containerregistry
export LD_LIBRARY_PATH="$work/root/usr/lib/x86_64-linux-gnu:$work/root/lib/x86_64-linux-gnu"
export HOME="$work" SKOPEO="$work/root/usr/bin/skopeo"
"$SKOPEO" --version
timeout 120 python3 - <<'PYTHON'
import base64
import gzip
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

OCI = "application/vnd.oci.image"
LOGIN = base64.b64encode(b"alice:wonderland").decode()


def digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


TAR = bytes(1024)  # an empty archive
LAYER = gzip.compress(TAR, mtime=0)
CONFIG = json.dumps(
    {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [digest(TAR)]}}
).encode()
MANIFEST = json.dumps(
    {
        "schemaVersion": 2,
        "mediaType": f"{OCI}.manifest.v1+json",
        "config": {"mediaType": f"{OCI}.config.v1+json", "digest": digest(CONFIG), "size": len(CONFIG)},
        "layers": [{"mediaType": f"{OCI}.layer.v1.tar+gzip", "digest": digest(LAYER), "size": len(LAYER)}],
    }
).encode()
BLOBS = {digest(LAYER): LAYER, digest(CONFIG): CONFIG}
ACCEPTED = {"token": "Bearer opens", "password": f"Basic {LOGIN}"}
REGISTRY = "registry.example:5000"
asked_for = storage = ""
logins: set[str] = set()  # that the storage was sent


class Hosts(BaseHTTPRequestHandler):
    """The HTTP proxy of the clients, which answers for the registry and for the storage, by their names."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        url = urlsplit(self.path)
        login = self.headers["Authorization"]
        last = url.path.rpartition("/")[2]
        if url.netloc == storage:
            logins.add(login.split()[0] if login else "none")
            return self.answer(200, BLOBS[last])
        assert url.netloc == REGISTRY
        if url.path == "/token":
            return self.answer(200, b'{"token": "opens", "access_token": "opens"}')
        if login != ACCEPTED[asked_for]:
            bearer = f'Bearer realm="http://{REGISTRY}/token",service="app",scope="repository:app:pull"'
            return self.answer(401, b"{}", WWW_Authenticate=bearer if asked_for == "token" else 'Basic realm="app"')
        if "/manifests/" in url.path:
            return self.answer(200, MANIFEST, Content_Type=f"{OCI}.manifest.v1+json")
        if "/blobs/" in url.path and self.command == "GET":
            return self.answer(307, b"", Location=f"http://{storage}/{last}?signature=0")
        return self.answer(200, BLOBS.get(last, b"{}"))

    do_HEAD = do_POST = do_GET

    def do_CONNECT(self) -> None:
        self.send_error(403)  # skopeo tries https first

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, *args: object) -> None:
        pass  # a client that left


server = Server(("127.0.0.1", 0), Hosts)
threading.Thread(target=server.serve_forever, daemon=True).start()
proxy = f"http://127.0.0.1:{server.server_port}"
environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
environment |= {"HTTP_PROXY": proxy, "HTTPS_PROXY": proxy}
with open("auth.json", "w") as file:
    json.dump({"auths": {REGISTRY: {"auth": LOGIN}}}, file)
skopeo = [os.environ["SKOPEO"], "--insecure-policy", "copy", "--authfile=auth.json", "--src-tls-verify=false"]
COMMANDS = {
    "skopeo": [*skopeo, f"docker://{REGISTRY}/app:v1", "dir:copy"],
    **{name: ["./finding", name, REGISTRY, digest(LAYER)] for name in ("containers/image", "oras-go", "go-containerregistry")},
}
KEPT = {("s3.registry.example:5000", "skopeo"), ("s3.registry.example:5000", "containers/image"),
        ("registry.example:9000", "containers/image")}
seen = {}
for asked_for in ACCEPTED:
    for storage in ("s3.registry.example:5000", "storage.example:5000", "registry.example:9000"):
        for client, command in COMMANDS.items():
            logins.clear()
            subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60)
            seen[asked_for, storage, client] = " ".join(sorted(logins))
            print(f"a {asked_for} for {REGISTRY}, blobs at {storage}: {client} sends {' '.join(sorted(logins))}")
kinds = {"token": "Bearer", "password": "Basic"}
holds = all(
    login == (kinds[kind] if (host, client) in KEPT else "none")
    for (kind, host, client), login in seen.items()
)
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

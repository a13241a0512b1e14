#!/usr/bin/env bash
# Expected: a layer whose descriptor has `urls` ("from which this object MAY be downloaded", image specification) is fetched from the
#   registry or its mirror, which has it, and by one of these URLs only where the registry answers that it has not.
# Actual: skopeo (podman, buildah, CRI-O by its library) asks the URL alone: never the registry, also where the URL is answered 404,
#   and the copy fails. containerd asks the URL first, and the registry after it has failed. go-containerregistry and
#   regclient ask the registry first, as expected, and oras-go asks nobody else. The type of the layer does not
#   matter: this is an ordinary one, which is in the registry.
# Versions: skopeo 1.9.3+ds1-1+b10 (Debian 12); github.com/containerd/containerd/v2 v2.4.2,
#   github.com/google/go-containerregistry v0.22.1, github.com/regclient/regclient v0.11.7, oras.land/oras-go/v2 v2.7.0
#   (Go modules), Go 1.26.
# Why a registry cache must care: such layers are pulled past it, whatever mirrors are set, and a node without the internet cannot
#   pull the image though the cache has all of it. Its bytes cannot be changed; tools that build images should not leave
#   `urls` in them. A missing request for one layer in its log is not a fault of the cache.
set -euo pipefail
work=$(mktemp -d)
export GOMODCACHE="$work/modules" GOFLAGS="-mod=mod -modcacherw -p=1" CGO_ENABLED=0
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get -qq -o APT::Sandbox::User=root download skopeo=1.9.3+ds1-1+b10 libgpgme11 libassuan0 libdevmapper1.02.1
for package in *.deb; do dpkg -x "$package" root; done
cat > go.mod <<'MODULE'
module finding

go 1.26.6

require (
	github.com/containerd/containerd/v2 v2.4.2
	github.com/google/go-containerregistry v0.22.1
	github.com/opencontainers/image-spec v1.1.1
	github.com/regclient/regclient v0.11.7
	oras.land/oras-go/v2 v2.7.0
)
MODULE
cat > main.go <<'GO'
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/google/go-containerregistry/pkg/name"
	ggcr "github.com/google/go-containerregistry/pkg/v1/remote"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/regclient/regclient"
	"github.com/regclient/regclient/config"
	"github.com/regclient/regclient/types/manifest"
	"github.com/regclient/regclient/types/ref"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/registry/remote"
)

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func read(from io.Reader) []byte {
	all, err := io.ReadAll(from)
	check(err)
	return all
}

func layer(written []byte) ocispec.Descriptor {
	var found ocispec.Manifest
	check(json.Unmarshal(written, &found))
	return found.Layers[0]
}

func withContainerd(ctx context.Context, registry string) {
	hosts := docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchAllHosts))
	resolver := docker.NewResolver(docker.ResolverOptions{Hosts: hosts})
	named, descriptor, err := resolver.Resolve(ctx, registry+"/app:v1")
	check(err)
	fetcher, err := resolver.Fetcher(ctx, named)
	check(err)
	from, err := fetcher.Fetch(ctx, descriptor)
	check(err)
	body, err := fetcher.Fetch(ctx, layer(read(from)))
	check(err)
	read(body)
}

func withCrane(_ context.Context, registry string) {
	reference, err := name.ParseReference(registry+"/app:v1", name.Insecure)
	check(err)
	image, err := ggcr.Image(reference)
	check(err)
	layers, err := image.Layers()
	check(err)
	body, err := layers[0].Compressed()
	check(err)
	read(body)
}

func withORAS(ctx context.Context, registry string) {
	repository, err := remote.NewRepository(registry + "/app")
	check(err)
	repository.PlainHTTP = true
	descriptor, err := repository.Resolve(ctx, "v1")
	check(err)
	written, err := content.FetchAll(ctx, repository, descriptor)
	check(err)
	_, err = content.FetchAll(ctx, repository, layer(written))
	check(err)
}

func withRegctl(ctx context.Context, registry string) {
	host := config.HostNewName(registry)
	host.TLS = config.TLSDisabled
	reference, err := ref.New(registry + "/app:v1")
	check(err)
	client := regclient.New(regclient.WithConfigHost(*host))
	found, err := client.ManifestGet(ctx, reference)
	check(err)
	layers, err := found.(manifest.Imager).GetLayers()
	check(err)
	body, err := client.BlobGet(ctx, reference, layers[0])
	check(err)
	read(body)
}

// Fetches the manifest `registry/app:v1` and its layer.
func main() {
	map[string]func(context.Context, string){
		"containerd": withContainerd, "go-containerregistry": withCrane, "oras-go": withORAS, "regclient": withRegctl,
	}[os.Args[1]](context.Background(), os.Args[2])
}
GO
go build -o finding . 2> build.log || { cat build.log; exit 1; }
go version
go list -m github.com/containerd/containerd/v2 github.com/google/go-containerregistry github.com/regclient/regclient \
    oras.land/oras-go/v2
export LD_LIBRARY_PATH="$work/root/usr/lib/x86_64-linux-gnu:$work/root/lib/x86_64-linux-gnu"
export HOME="$work" SKOPEO="$work/root/usr/bin/skopeo"
"$SKOPEO" --version
timeout 240 python3 - <<'PYTHON'
import gzip
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

OCI = "application/vnd.oci.image"
seen: list[str] = []  # who was asked for the layer
lacking: set[str] = set()  # who answers 404 for it


def digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


class Host(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        content, kind = contents.get(self.path.rpartition("/")[2], (b"{}", "application/json"))
        status = 200
        if content == LAYER:
            who = "URL" if self.server is elsewhere else "registry"
            seen.append(who)
            status = 404 if who in lacking else 200
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Docker-Content-Digest", digest(content))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        pass


registry, elsewhere = (ThreadingHTTPServer(("127.0.0.1", 0), Host) for _ in range(2))
TAR = bytes(1024)  # an empty archive
LAYER = gzip.compress(TAR, mtime=0)
CONFIG = json.dumps(
    {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [digest(TAR)]}}
).encode()
url = f"http://127.0.0.1:{elsewhere.server_port}/{digest(LAYER)}"
layer = {"mediaType": f"{OCI}.layer.v1.tar+gzip", "digest": digest(LAYER), "size": len(LAYER), "urls": [url]}
MANIFEST = json.dumps(
    {
        "schemaVersion": 2,
        "mediaType": f"{OCI}.manifest.v1+json",
        "config": {"mediaType": f"{OCI}.config.v1+json", "digest": digest(CONFIG), "size": len(CONFIG)},
        "layers": [layer],
    }
).encode()
contents = {digest(each): (each, "application/octet-stream") for each in (LAYER, CONFIG)}
contents |= dict.fromkeys(("v1", digest(MANIFEST)), (MANIFEST, f"{OCI}.manifest.v1+json"))
for each in (registry, elsewhere):
    threading.Thread(target=each.serve_forever, daemon=True).start()
address = f"127.0.0.1:{registry.server_port}"
COMMANDS = {name: ["./finding", name, address] for name in ("containerd", "go-containerregistry", "oras-go", "regclient")}
copy = [os.environ["SKOPEO"], "--insecure-policy", "copy", "-q", "--src-tls-verify=false", f"docker://{address}/app:v1"]
found = {}
for client, command in (COMMANDS | {"skopeo": [*copy, f"dir:{os.environ['HOME']}/copy"]}).items():
    for lacking in (set(), {"URL"}):
        seen.clear()
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        asked = [who for number, who in enumerate(seen) if who not in seen[:number]]
        found[client, bool(lacking)] = (asked, done.returncode == 0)
        which = "only the registry has the layer" if lacking else "both have the layer"
        print(f"{client}, {which}: asks {', then '.join(asked)}; {'goes well' if done.returncode == 0 else 'fails'}")
expected = {("skopeo", False): (["URL"], True), ("skopeo", True): (["URL"], False)}
expected |= {("containerd", False): (["URL"], True), ("containerd", True): (["URL", "registry"], True)}
expected |= {
    (client, lacks): (["registry"], True)
    for client in ("go-containerregistry", "oras-go", "regclient")
    for lacks in (False, True)
}
print("as stated" if found == expected else f"CHANGED: {found}")
sys.exit(found != expected)
PYTHON

#!/usr/bin/env bash
# Expected: a client that is answered 429 or 503 with `Retry-After: 8` (RFC 9110, 10.2.3) asks again after 8 seconds, or
#   at least later than without it.
# Actual: containers/image (skopeo, podman) and regclient (regctl, regsync) wait so after 429. oras-go (oras, helm) asks
#   every 3 seconds. containerd (Kubernetes, docker, BuildKit) asks five times at once, and go-containerregistry (crane,
#   ko, cosign) three times in 4 seconds, whatever the header says; then they fail. After 503 none of the five heeds it:
#   skopeo and regclient do not ask again at all, containerd asks once more at once, the others within 7 seconds.
# Versions: skopeo 1.9.3+ds1-1+b10 (Debian 12); github.com/containerd/containerd/v2 v2.4.2,
#   github.com/google/go-containerregistry v0.22.1, github.com/regclient/regclient v0.11.7, oras.land/oras-go/v2 v2.7.0
#   (Go modules), Go 1.26.
# Why a registry cache must care: the pause that its upstream asks for must be its own. A 429 that it passes on is five
#   requests at once from each node of a cluster, and a 503 during a restart of some seconds is a failed pull. Hold the
#   request while the wait is short, and serve what is stored.
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
	github.com/regclient/regclient v0.11.7
	oras.land/oras-go/v2 v2.7.0
)
MODULE
cat > main.go <<'GO'
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/google/go-containerregistry/pkg/name"
	ggcr "github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/regclient/regclient"
	"github.com/regclient/regclient/config"
	"github.com/regclient/regclient/types/ref"
	"oras.land/oras-go/v2/registry/remote"
)

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func withContainerd(registry string) {
	hosts := docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchAllHosts))
	resolver := docker.NewResolver(docker.ResolverOptions{Hosts: hosts})
	_, _, err := resolver.Resolve(context.Background(), registry+"/app:v1")
	check(err)
}

func withCrane(registry string) {
	reference, err := name.ParseReference(registry+"/app:v1", name.Insecure)
	check(err)
	_, err = ggcr.Get(reference)
	check(err)
}

func withORAS(registry string) {
	repository, err := remote.NewRepository(registry + "/app")
	check(err)
	repository.PlainHTTP = true
	_, err = repository.Resolve(context.Background(), "v1")
	check(err)
}

func withRegctl(registry string) {
	host := config.HostNewName(registry)
	host.TLS = config.TLSDisabled
	reference, err := ref.New(registry + "/app:v1")
	check(err)
	_, err = regclient.New(regclient.WithConfigHost(*host)).ManifestGet(context.Background(), reference)
	check(err)
}

// Asks for the manifest `registry/app:v1`.
func main() {
	map[string]func(string){
		"containerd": withContainerd, "go-containerregistry": withCrane, "oras-go": withORAS, "regclient": withRegctl,
	}[os.Args[1]](os.Args[2])
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
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

OCI = "application/vnd.oci"
EMPTY = {"mediaType": f"{OCI}.empty.v1+json", "digest": f"sha256:{hashlib.sha256(b'{}').hexdigest()}", "size": 2}
MANIFEST = json.dumps(
    {"schemaVersion": 2, "mediaType": f"{OCI}.image.manifest.v1+json", "config": EMPTY, "layers": [EMPTY]}
).encode()
PAUSE = 8
status = 429
asked: list[float] = []  # when the manifest was asked for


class Registry(BaseHTTPRequestHandler):
    """Answers for a manifest after a pause."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/v2/":
            return self.answer(200, b"{}")
        asked.append(time.monotonic())
        if asked[-1] - asked[0] < PAUSE - 0.1:
            error = {"errors": [{"code": "TOOMANYREQUESTS", "message": "later"}]}
            return self.answer(status, json.dumps(error).encode(), Retry_After=str(PAUSE))
        digest = f"sha256:{hashlib.sha256(MANIFEST).hexdigest()}"
        headers = {"Content_Type": f"{OCI}.image.manifest.v1+json", "Docker_Content_Digest": digest}
        return self.answer(200, MANIFEST, **headers)

    do_HEAD = do_GET

    def answer(self, code: int, body: bytes, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
threading.Thread(target=server.serve_forever, daemon=True).start()
registry = f"127.0.0.1:{server.server_port}"
names = ("containerd", "go-containerregistry", "oras-go", "regclient")
inspect = [os.environ["SKOPEO"], "--insecure-policy", "inspect", "--raw", "--tls-verify=false"]
COMMANDS = {name: ["./finding", name, registry] for name in names} | {"skopeo": [*inspect, f"docker://{registry}/app:v1"]}
seen = {}
for status in (429, 503):
    for client, command in COMMANDS.items():
        asked.clear()
        done = subprocess.run(command, capture_output=True, timeout=60)
        went = "goes well" if done.returncode == 0 else "fails"
        seen[status, client] = (went, len(asked))
        print(f"{status}, {client} {went}; it asks after {', '.join(f'{each - asked[0]:.1f}' for each in asked)} s")
holds = (
    seen[429, "containerd"] == ("fails", 5)
    and seen[429, "go-containerregistry"] == ("fails", 3)
    and seen[429, "oras-go"][0] == "goes well" and seen[429, "oras-go"][1] > 2
    and seen[429, "regclient"] == seen[429, "skopeo"] == ("goes well", 2)
    and all(seen[503, client][0] == "fails" for client in COMMANDS)
    and [seen[503, client][1] for client in ("containerd", "regclient", "skopeo")] == [2, 1, 1]
)
print("as stated" if holds else "CHANGED")
sys.exit(not holds)
PYTHON

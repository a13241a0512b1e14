#!/usr/bin/env bash
# Expected: with `[[registry.mirror]]` in registries.conf, containers/image finds the digest of a tag where it finds the
#   manifest: at the mirror, and at the registry itself only if the mirror fails.
# Actual: `docker.GetDigest` asks the registry alone. Apptainer (1.5.3) calls it in each pull of docker://, by tag or by
#   digest, though it has the manifest and the layers from the first mirror: each pull costs a request there, and with the
#   registry unreachable it ends, whatever the mirror has.
# Versions: go.podman.io/image/v5 v5.42.1 (a Go module), Go 1.25 or newer.
# Why a registry cache must care: a node that reaches only the cache cannot pull so by the name of the image, though the
#   file of mirrors is right and podman pulls with it. It has to name the cache: `docker://CACHE/REGISTRY/REPOSITORY`.
set -euo pipefail
work=$(mktemp -d)
export GOMODCACHE="$work/modules" GOFLAGS="-mod=mod -modcacherw -p=1" CGO_ENABLED=0 GOTOOLCHAIN=auto
trap 'rm -rf "$work"' EXIT
cd "$work"
cat > go.mod <<'MODULE'
module finding

go 1.25.0

require go.podman.io/image/v5 v5.42.1
MODULE
cat > main.go <<'GO'
package main

import (
	"context"
	"crypto/sha256"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"

	"go.podman.io/image/v5/docker"
	"go.podman.io/image/v5/types"
)

const kind = "application/vnd.oci.image.manifest.v1+json"
const manifest = `{"schemaVersion":2,"mediaType":"` + kind + `","config":{"mediaType":"application/vnd.oci.image.config.v1+json",` +
	`"digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2},"layers":[]}`

func check(err error) {
	if err != nil {
		panic(err)
	}
}

type registry struct {
	*httptest.Server
	lock  sync.Mutex
	asked []string
}

func start() *registry {
	r := &registry{}
	r.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, request *http.Request) {
		r.lock.Lock()
		r.asked = append(r.asked, request.Method+" "+request.URL.Path)
		r.lock.Unlock()
		if strings.Contains(request.URL.Path, "/manifests/") {
			w.Header().Set("Content-Type", kind)
			w.Header().Set("Docker-Content-Digest", fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(manifest))))
			fmt.Fprint(w, manifest)
		}
	}))
	return r
}

func (r *registry) name() string { return strings.TrimPrefix(r.URL, "http://") }

func main() {
	origin, mirror := start(), start()
	conf := "registries.conf"
	check(os.WriteFile(conf, fmt.Appendf(nil,
		"[[registry]]\nlocation = %q\ninsecure = true\n[[registry.mirror]]\nlocation = %q\ninsecure = true\n",
		origin.name(), mirror.name()), 0o600))
	ref, err := docker.ParseReference("//" + origin.name() + "/app:v1")
	check(err)
	ctx, system := context.Background(), &types.SystemContext{SystemRegistriesConfPath: conf, SystemRegistriesConfDirPath: "none"}

	// look says whether a call succeeded, and how often it asked each for the manifest.
	look := func(what string, call func() error) string {
		origin.asked, mirror.asked = nil, nil
		err := call()
		found := fmt.Sprintf("%v, registry %d, mirror %d", err == nil, manifests(origin), manifests(mirror))
		fmt.Printf("%s: success %s\n", what, found)
		return found
	}
	read := func() error {
		source, err := ref.NewImageSource(ctx, system)
		if err != nil {
			return err
		}
		defer source.Close()
		_, _, err = source.GetManifest(ctx, nil)
		return err
	}
	digest := func() error {
		_, err := docker.GetDigest(ctx, system, ref)
		return err
	}
	holds := look("manifest", read) == "true, registry 0, mirror 1"
	holds = look("digest", digest) == "true, registry 1, mirror 0" && holds
	origin.Close()
	fmt.Println("The registry is stopped, the mirror is not:")
	holds = look("manifest", read) == "true, registry 0, mirror 1" && holds
	holds = look("digest", digest) == "false, registry 0, mirror 0" && holds
	if !holds {
		fmt.Println("CHANGED")
		os.Exit(1)
	}
	fmt.Println("as stated")
}

func manifests(r *registry) (count int) {
	for _, each := range r.asked {
		if strings.Contains(each, "/manifests/") {
			count++
		}
	}
	return count
}
GO
go build -tags containers_image_openpgp -o finding . > build.log 2>&1 || { cat build.log; exit 2; }
timeout 60 ./finding

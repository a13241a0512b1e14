#!/usr/bin/env bash
# Expected: a client whose download of a layer is cut off asks for the rest by `Range`, or at least for the whole once
#   more, since the registry has said `Accept-Ranges: bytes` and answers again at once.
# Actual: containerd (Kubernetes, docker, BuildKit), containers/image (skopeo, podman) and regclient (regctl, regsync) ask
#   for the rest, and have the layer. go-containerregistry (crane, kaniko, cosign) and oras-go (oras, helm) end with
#   "unexpected EOF", after one request: what they retry are requests, and not bodies. regclient's range ends one byte
#   after the last.
# Versions: github.com/containerd/containerd/v2 v2.4.2, github.com/google/go-containerregistry v0.22.1,
#   github.com/regclient/regclient v0.11.7, go.podman.io/image/v5 v5.42.1, oras.land/oras-go/v2 v2.7.0 (Go modules),
#   Go 1.26.
# Why a registry cache must care: whatever cuts its connections, as a restart or an upstream that breaks off does, ends
#   half of all kinds of pulls. It must resume from the upstream itself within one response to the client, and let what
#   is being sent end before a process stops.
set -euo pipefail
work=$(mktemp -d)
export GOMODCACHE="$work/modules" GOFLAGS="-mod=mod -modcacherw -p=1" CGO_ENABLED=0 GOTOOLCHAIN=auto
trap 'rm -rf "$work"' EXIT
cd "$work"
cat > go.mod <<'MODULE'
module finding

go 1.26.6

require (
	github.com/containerd/containerd/v2 v2.4.2
	github.com/google/go-containerregistry v0.22.1
	github.com/regclient/regclient v0.11.7
	go.podman.io/image/v5 v5.42.1
	oras.land/oras-go/v2 v2.7.0
)
MODULE
cat > main.go <<'GO'
package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/google/go-containerregistry/pkg/name"
	ggcr "github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/regclient/regclient"
	"github.com/regclient/regclient/config"
	"github.com/regclient/regclient/types/descriptor"
	"github.com/regclient/regclient/types/ref"
	"github.com/sirupsen/logrus"
	image "go.podman.io/image/v5/docker"
	"go.podman.io/image/v5/pkg/blobinfocache/none"
	"go.podman.io/image/v5/types"
	"oras.land/oras-go/v2/registry/remote"
)

const layerType = "application/vnd.oci.image.layer.v1.tar+gzip"

var (
	layer    = make([]byte, 4<<20)
	content  digest.Digest
	manifest []byte
)

func of(data []byte) digest.Digest { return digest.FromBytes(data) }

// A registry that cuts off the first answer with the layer in its middle.
type registry struct {
	sync.Mutex
	asked []string
}

func (g *registry) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch {
	case strings.Contains(r.URL.Path, "/manifests/"):
		w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
		w.Header().Set("Docker-Content-Digest", of(manifest).String())
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(manifest))
	case strings.HasSuffix(r.URL.Path, content.String()) && r.Method == "GET":
		g.Lock()
		asked := r.Header.Get("Range")
		if asked == "" {
			asked = "all"
		}
		g.asked = append(g.asked, asked)
		first := len(g.asked) == 1
		g.Unlock()
		w.Header().Set("Content-Type", "application/octet-stream")
		w.Header().Set("Docker-Content-Digest", content.String())
		if !first {
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(layer))
			return
		}
		w.Header().Set("Accept-Ranges", "bytes")
		w.Header().Set("Content-Length", fmt.Sprint(len(layer)))
		w.Write(layer[:len(layer)/2])
		panic(http.ErrAbortHandler)
	case strings.HasSuffix(r.URL.Path, content.String()):
		w.Header().Set("Content-Type", "application/octet-stream")
		w.Header().Set("Docker-Content-Digest", content.String())
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(layer))
	case r.URL.Path == "/v2/":
	default:
		w.WriteHeader(404)
	}
}

func read(from io.ReadCloser, err error) ([]byte, error) {
	if err != nil {
		return nil, err
	}
	defer from.Close()
	return io.ReadAll(from)
}

func viaContainerd(host string) ([]byte, error) {
	hosts := docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchAllHosts))
	resolver := docker.NewResolver(docker.ResolverOptions{Hosts: hosts})
	fetcher, err := resolver.Fetcher(context.Background(), host+"/app:1")
	if err != nil {
		return nil, err
	}
	return read(fetcher.Fetch(context.Background(), ocispec.Descriptor{
		MediaType: layerType, Digest: content, Size: int64(len(layer)),
	}))
}

func viaGGCR(host string) ([]byte, error) {
	reference, err := name.NewDigest(host+"/app@"+content.String(), name.Insecure)
	if err != nil {
		return nil, err
	}
	found, err := ggcr.Layer(reference)
	if err != nil {
		return nil, err
	}
	return read(found.Compressed())
}

func viaImage(host string) ([]byte, error) {
	reference, err := image.ParseReference("//" + host + "/app:1")
	if err != nil {
		return nil, err
	}
	system := &types.SystemContext{
		DockerInsecureSkipTLSVerify: types.OptionalBoolTrue,
		SystemRegistriesConfPath:    os.DevNull,
		SystemRegistriesConfDirPath: "/nonexistent",
	}
	source, err := reference.NewImageSource(context.Background(), system)
	if err != nil {
		return nil, err
	}
	defer source.Close()
	info := types.BlobInfo{Digest: content, Size: int64(len(layer)), MediaType: layerType}
	blob, _, err := source.GetBlob(context.Background(), info, none.NoCache)
	return read(blob, err)
}

func viaRegclient(host string) ([]byte, error) {
	client := regclient.New(regclient.WithConfigHost(config.Host{Name: host, Hostname: host, TLS: config.TLSDisabled}))
	reference, err := ref.New(host + "/app:1")
	if err != nil {
		return nil, err
	}
	blob, err := client.BlobGet(context.Background(), reference, descriptor.Descriptor{
		MediaType: layerType, Digest: content, Size: int64(len(layer)),
	})
	if err != nil {
		return nil, err
	}
	defer blob.Close()
	return io.ReadAll(blob)
}

func viaORAS(host string) ([]byte, error) {
	repository, err := remote.NewRepository(host + "/app")
	if err != nil {
		return nil, err
	}
	repository.PlainHTTP = true
	return read(repository.Fetch(context.Background(), ocispec.Descriptor{
		MediaType: layerType, Digest: content, Size: int64(len(layer)),
	}))
}

func main() {
	logrus.SetOutput(io.Discard)
	rand.New(rand.NewSource(1)).Read(layer)
	content = of(layer)
	manifest = []byte(fmt.Sprintf(`{"schemaVersion":2,"mediaType":"%s","config":{"mediaType":"%s","digest":"%s","size":2},"layers":[{"mediaType":"%s","digest":"%s","size":%d}]}`,
		ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig, of([]byte("{}")), layerType, content, len(layer)))
	clients := []struct {
		name string
		pull func(string) ([]byte, error)
		want bool
	}{
		{"containerd", viaContainerd, true},
		{"containers/image", viaImage, true},
		{"regclient", viaRegclient, true},
		{"go-containerregistry", viaGGCR, false},
		{"oras-go", viaORAS, false},
	}
	holds := true
	for _, client := range clients {
		asked := &registry{}
		server := httptest.NewServer(asked)
		server.Config.ErrorLog = nil
		data, err := client.pull(strings.TrimPrefix(server.URL, "http://"))
		right := err == nil && sha256.Sum256(data) == sha256.Sum256(layer)
		word := "has the layer"
		if !right {
			word = fmt.Sprint("ends: ", err)
		}
		fmt.Printf("%-22s asks for %-32s and %s\n", client.name, strings.Join(asked.asked, ", then "), word)
		holds = holds && right == client.want
		server.CloseClientConnections()
		server.Close()
	}
	if !holds {
		fmt.Println("CHANGED")
		os.Exit(1)
	}
	fmt.Println("as stated")
}
GO
go build -tags "containers_image_openpgp containers_image_docker_daemon_stub" -o finding . 2> build.log || { cat build.log; exit 2; }
timeout 120 ./finding

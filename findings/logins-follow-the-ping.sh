#!/usr/bin/env bash
# Expected: a program that has a login sends it where a repository is answered 401 with a challenge (RFC 9110, 11.6.1).
# Actual: containers/image (skopeo, podman) and Distribution as a pull-through cache only do so if `GET /v2/`, which names
#   no repository, was challenged too. containers/image also takes a challenge that comes with the 200 of that ping, where
#   Distribution needs a 401: without, it sends no login, and answers 404 to its own clients. go-containerregistry (crane,
#   ko, cosign), regclient and oras-go log in after the 401 of the repository.
# Versions: github.com/distribution/distribution/v3 v3.1.1, github.com/google/go-containerregistry v0.22.1,
#   go.podman.io/image/v5 v5.42.1, github.com/regclient/regclient v0.11.7, oras.land/oras-go/v2 v2.7.0 (Go modules),
#   Go 1.26.
# Why a registry cache must care: if it has public and private repositories at one address, its answer to the ping
#   decides who can log in. With 200 and a challenge, the public can be pulled without a login, and most programs log
#   in; for caches behind it, the private ones need an address of their own.
set -euo pipefail
work=$(mktemp -d)
export GOMODCACHE="$work/modules" GOFLAGS="-mod=mod -modcacherw -p=1" CGO_ENABLED=0 GOTOOLCHAIN=auto
trap 'rm -rf "$work"' EXIT
cd "$work"
cat > go.mod <<'MODULE'
module finding

go 1.26.6

require (
	github.com/distribution/distribution/v3 v3.1.1
	github.com/google/go-containerregistry v0.22.1
	github.com/regclient/regclient v0.11.7
	go.podman.io/image/v5 v5.42.1
	oras.land/oras-go/v2 v2.7.0
)
MODULE
cat > main.go <<'GO'
package main

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync/atomic"

	"github.com/distribution/distribution/v3/configuration"
	"github.com/distribution/distribution/v3/registry/handlers"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/inmemory"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	ggcr "github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/regclient/regclient"
	"github.com/regclient/regclient/config"
	"github.com/regclient/regclient/types/ref"
	"github.com/sirupsen/logrus"
	"go.podman.io/image/v5/docker"
	"go.podman.io/image/v5/types"
	"oras.land/oras-go/v2/registry/remote"
	"oras.land/oras-go/v2/registry/remote/auth"
)

const (
	user, password = "robot", "secret"
	media          = "application/vnd.oci.image.manifest.v1+json"
)

var manifest = []byte(`{"schemaVersion":2,"mediaType":"` + media + `","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2},"layers":[]}`)

// A registry whose repositories need a login.  ping: the status of GET /v2/ without a login, and whether it has a challenge.
type ping struct {
	status    int
	challenge bool
}

func registry(answer ping, seen *atomic.Bool) *httptest.Server {
	return httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		u, p, ok := r.BasicAuth()
		known := ok && u == user && p == password
		base := r.URL.Path == "/v2/"
		if !known && (!base || answer.challenge) {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
		}
		switch {
		case base && !known:
			w.WriteHeader(answer.status)
		case base:
			w.WriteHeader(200)
		case !known:
			w.WriteHeader(401)
		case strings.Contains(r.URL.Path, "/manifests/"):
			seen.Store(true)
			w.Header().Set("Content-Type", media)
			w.Header().Set("Content-Length", fmt.Sprint(len(manifest)))
			w.Header().Set("Docker-Content-Digest", fmt.Sprintf("sha256:%x", sha256.Sum256(manifest)))
			if r.Method == "GET" {
				w.Write(manifest)
			}
		default:
			w.WriteHeader(404)
		}
	}))
}

func viaGGCR(host string) error {
	tag, err := name.NewTag(host+"/private/app:1", name.Insecure)
	if err == nil {
		_, err = ggcr.Get(tag, ggcr.WithAuth(&authn.Basic{Username: user, Password: password}))
	}
	return err
}

func viaImage(host string) error {
	reference, err := docker.ParseReference("//" + host + "/private/app:1")
	if err != nil {
		return err
	}
	system := &types.SystemContext{
		DockerInsecureSkipTLSVerify: types.OptionalBoolTrue,
		DockerAuthConfig:            &types.DockerAuthConfig{Username: user, Password: password},
		SystemRegistriesConfPath:    os.DevNull,
		SystemRegistriesConfDirPath: "/nonexistent",
	}
	source, err := reference.NewImageSource(context.Background(), system)
	if err != nil {
		return err
	}
	defer source.Close()
	_, _, err = source.GetManifest(context.Background(), nil)
	return err
}

func viaRegclient(host string) error {
	login := config.Host{Name: host, Hostname: host, TLS: config.TLSDisabled, User: user, Pass: password}
	client := regclient.New(regclient.WithConfigHost(login))
	reference, err := ref.New(host + "/private/app:1")
	if err == nil {
		_, err = client.ManifestGet(context.Background(), reference)
	}
	return err
}

func viaORAS(host string) error {
	repository, err := remote.NewRepository(host + "/private/app")
	if err != nil {
		return err
	}
	repository.PlainHTTP = true
	repository.Client = &auth.Client{
		Credential: auth.StaticCredential(host, auth.Credential{Username: user, Password: password}),
	}
	_, err = repository.Resolve(context.Background(), "1")
	return err
}

// Distribution as a cache of the registry, which is asked for the image.
func viaDistribution(host string) error {
	settings := &configuration.Configuration{
		Storage: configuration.Storage{"inmemory": configuration.Parameters{}},
		Proxy:   configuration.Proxy{RemoteURL: "http://" + host, Username: user, Password: password},
	}
	settings.HTTP.Secret = "of no worth"
	settings.Catalog.MaxEntries = 10
	cache := httptest.NewServer(handlers.NewApp(context.Background(), settings))
	defer cache.Close()
	request, _ := http.NewRequest("GET", cache.URL+"/v2/private/app/manifests/1", nil)
	request.Header.Set("Accept", media)
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	io.Copy(io.Discard, response.Body)
	if response.StatusCode != 200 {
		return fmt.Errorf("its client is answered %d", response.StatusCode)
	}
	return nil
}

func main() {
	logrus.SetOutput(io.Discard)
	pings := []ping{{200, false}, {200, true}, {401, true}}
	clients := []struct {
		name string
		pull func(string) error
		want string // whether it logs in, for each ping
	}{
		{"go-containerregistry", viaGGCR, "yes yes yes"},
		{"containers/image", viaImage, "no yes yes"},
		{"Distribution", viaDistribution, "no no yes"},
		{"regclient", viaRegclient, "yes yes yes"},
		{"oras-go", viaORAS, "yes yes yes"},
	}
	holds := true
	fmt.Println("pulls of a repository that needs a login, by the answer to GET /v2/:")
	fmt.Printf("%-22s %-8s %-18s %s\n", "", "200", "200, challenged", "401, challenged")
	for _, client := range clients {
		var found []string
		for _, each := range pings {
			var seen atomic.Bool
			server := registry(each, &seen)
			host := server.Listener.Addr().(*net.TCPAddr).String()
			err := client.pull(host)
			server.Close()
			word := "no"
			if err == nil && seen.Load() {
				word = "yes"
			} else if os.Getenv("VERBOSE") != "" {
				fmt.Println("  ", client.name, each, err)
			}
			found = append(found, word)
		}
		fmt.Printf("%-22s %-8s %-18s %s\n", client.name, found[0], found[1], found[2])
		holds = holds && strings.Join(found, " ") == client.want
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

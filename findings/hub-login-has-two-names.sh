#!/usr/bin/env bash
# Expected: one login for Docker Hub, in the file or the credential helper that Docker's config.json names, is found by
#   every tool that reads this file, and so is the one that podman writes into a file of the same form.
# Actual: the tools know it by different names. Docker has it as `https://index.docker.io/v1/`, and so
#   go-containerregistry (crane, cosign, ko) and oras-go (oras, helm) ask for that name alone: a login that podman has
#   written as `docker.io` is none to them, and they pull anonymously, without an error. containers/image (podman,
#   skopeo, buildah) understands each name in a file, but of a helper it asks only `docker.io`, only if `credHelpers`
#   has that very key, and it never reads `credsStore`.
# Versions: github.com/google/go-containerregistry v0.22.1, oras.land/oras-go/v2 v2.7.0, go.podman.io/image/v5 v5.42.1
#   (Go modules), Go 1.25 or newer.
# Why a registry cache must care: it pulls by the logins that these tools have left. It must look for both names, also
#   in a helper, or it asks Docker Hub anonymously, and all its clients share the low limit of one address.
set -euo pipefail
work=$(mktemp -d)
export GOMODCACHE="$work/modules" GOFLAGS="-mod=mod -modcacherw -p=1" CGO_ENABLED=0
trap 'rm -rf "$work"' EXIT
cd "$work"
cat > go.mod <<'MODULE'
module finding

go 1.25.0

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
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"go.podman.io/image/v5/pkg/docker/config"
	"go.podman.io/image/v5/types"
	"oras.land/oras-go/v2/registry/remote/credentials"
)

const helper = `#!/bin/sh
read -r server
echo "$server" >> "$ASKED"
echo "credentials not found in native keychain"
exit 1
`

var dir string

func check(err error) {
	if err != nil {
		panic(err)
	}
}

func crane() (string, error) {
	reference, err := name.ParseReference("docker.io/library/alpine:3")
	check(err)
	found, err := authn.DefaultKeychain.Resolve(reference.Context().Registry)
	check(err)
	login, err := found.Authorization()
	return login.Username, err
}

func oras() (string, error) {
	store, err := credentials.NewStoreFromDocker(credentials.StoreOptions{})
	check(err)
	login, err := credentials.Credential(store)(context.Background(), "registry-1.docker.io")
	return login.Username, err
}

func podman() (string, error) {
	files := &types.SystemContext{DockerCompatAuthFilePath: filepath.Join(dir, "config.json")}
	login, err := config.GetCredentials(files, "docker.io")
	return login.Username, err
}

// outcome is the user that a tool finds, or the names that it asks the helper for.
func outcome(tool func() (string, error)) string {
	check(os.WriteFile(os.Getenv("ASKED"), nil, 0o600))
	user, err := tool()
	asked, _ := os.ReadFile(os.Getenv("ASKED"))
	switch lines := strings.Fields(string(asked)); {
	case len(lines) > 0:
		return "asks " + lines[0]
	case err != nil:
		return err.Error()
	case user == "":
		return "anonymous"
	}
	return user
}

func main() {
	var err error
	dir, err = os.MkdirTemp(".", "home")
	check(err)
	dir, err = filepath.Abs(dir)
	check(err)
	check(os.WriteFile(filepath.Join(dir, "docker-credential-keychain"), []byte(helper), 0o700))
	for variable, value := range map[string]string{
		"HOME": dir, "DOCKER_CONFIG": dir, "XDG_RUNTIME_DIR": dir, "XDG_CONFIG_HOME": dir,
		"ASKED": filepath.Join(dir, "asked"), "PATH": dir + ":" + os.Getenv("PATH"),
	} {
		os.Setenv(variable, value)
	}
	const docker, hub = "https://index.docker.io/v1/", "docker.io"
	auths := func(key string) string { return fmt.Sprintf(`{"auths":{"%s":{"auth":"YWxpY2U6eA=="}}}`, key) }
	helpers := func(key string) string { return fmt.Sprintf(`{"credHelpers":{"%s":"keychain"}}`, key) }
	cases := []struct{ config, crane, oras, podman string }{
		{auths(docker), "alice", "alice", "alice"},
		{auths(hub), "anonymous", "anonymous", "alice"},
		{helpers(docker), "asks " + docker, "asks " + docker, "anonymous"},
		{helpers(hub), "anonymous", "anonymous", "asks " + hub},
		{`{"credsStore":"keychain"}`, "asks " + docker, "asks " + docker, "anonymous"},
	}
	holds := true
	for _, each := range cases {
		check(os.WriteFile(filepath.Join(dir, "config.json"), []byte(each.config), 0o600))
		found := [3]string{outcome(crane), outcome(oras), outcome(podman)}
		fmt.Printf("%s\n  crane: %s; oras: %s; podman: %s\n", each.config, found[0], found[1], found[2])
		holds = holds && found == [3]string{each.crane, each.oras, each.podman}
	}
	if !holds {
		fmt.Println("CHANGED")
		os.Exit(1)
	}
	fmt.Println("as stated")
}
GO
go build -tags containers_image_openpgp,exclude_graphdriver_btrfs -o finding . 2> build.log || { cat build.log; exit 1; }
go version
go list -m github.com/google/go-containerregistry oras.land/oras-go/v2 go.podman.io/image/v5
timeout 60 ./finding

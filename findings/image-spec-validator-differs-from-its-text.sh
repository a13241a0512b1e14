#!/usr/bin/env bash
# Expected: the validator that the OCI image specification brings along, Go package `schema`, accepts what its text allows,
#   and refuses what cannot be.
# Actual: it refuses a manifest with `"layers": []`, though the text says that layers SHOULD have at least one entry "for
#   portability", so that a manifest of annotations or of a subject alone is valid. It accepts a descriptor of -1 bytes,
#   and an index whose manifests are layers, as BuildKit has written caches of builds.
# Versions: github.com/opencontainers/image-spec v1.1.1 (Go module), Go 1.25 or newer.
# Why a registry cache must care: one that checks manifests by this schema answers an error for artifacts that other
#   registries serve, and still has to check sizes itself before it adds them up. Parse what is needed, and pass on the
#   bytes.
set -euo pipefail
work=$(mktemp -d)
export GOMODCACHE="$work/modules" GOFLAGS="-mod=mod -modcacherw -p=1" CGO_ENABLED=0
trap 'rm -rf "$work"' EXIT
cd "$work"
cat > go.mod <<'MODULE'
module finding

go 1.25.0

require github.com/opencontainers/image-spec v1.1.1
MODULE
cat > main.go <<'GO'
package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/opencontainers/image-spec/schema"
)

const (
	kind  = "application/vnd.oci.image."
	empty = `{"mediaType":"application/vnd.oci.empty.v1+json","size":2,` +
		`"digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}`
)

func manifest(layers string) string {
	return `{"schemaVersion":2,"mediaType":"` + kind + `manifest.v1+json","artifactType":"application/x-note",` +
		`"config":` + empty + `,"layers":[` + layers + `],"annotations":{"note":"text"}}`
}

func main() {
	layer := strings.Replace(empty, "application/vnd.oci.empty.v1+json", kind+"layer.v1.tar", 1)
	cases := []struct {
		name      string
		validator schema.Validator
		content   string
		accepted  bool
	}{
		{"a manifest with the empty layer", schema.ValidatorMediaTypeManifest, manifest(empty), true},
		{"a manifest without layers", schema.ValidatorMediaTypeManifest, manifest(""), false},
		{"a layer of -1 bytes", schema.ValidatorMediaTypeManifest, manifest(strings.Replace(empty, ":2,", ":-1,", 1)), true},
		{"an index of layers", schema.ValidatorMediaTypeImageIndex,
			`{"schemaVersion":2,"mediaType":"` + kind + `index.v1+json","manifests":[` + layer + `]}`, true},
	}
	holds := true
	for _, each := range cases {
		err := each.validator.Validate(strings.NewReader(each.content))
		said := "accepted"
		if err != nil {
			said = err.Error()
		}
		fmt.Printf("%s: %s\n", each.name, said)
		holds = holds && (err == nil) == each.accepted
	}
	if !holds {
		fmt.Println("CHANGED")
		os.Exit(1)
	}
	fmt.Println("as stated")
}
GO
go build -o finding . 2> build.log || { cat build.log; exit 1; }
go version
go list -m github.com/opencontainers/image-spec
grep -o "For portability.*" modules/github.com/opencontainers/image-spec@v1.1.1/manifest.md
timeout 60 ./finding

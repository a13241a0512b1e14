#!/usr/bin/env bash
# Expected: a client that uploads a blob in chunks ends with a PUT that has either the last bytes and their
#   Content-Range, `<first>-<last>` inclusive (distribution-spec, "Pushing a blob in chunks"), or neither.
# Actual: ociclient of CUE's ociregistry, given more than a chunk in one Write, sends it all by PATCH and then an
#   empty PUT with a range whose last byte is before its first: 25 bytes end with `Content-Range: 25-24` and
#   Content-Length 0. An empty blob is `0-0` with no byte, which is also how the first byte of a blob looks.
#   The same range says two things, so only the length of the body tells them apart.
# Versions: cuelabs.dev/go/oci/ociregistry v0.0.0-20251212221603-3adeb8663819 (Go module), Go 1.25 or newer.
# Why a registry cache must care: a registry that checks Content-Range against the length of the body, as it should
#   for a chunk, refuses these valid blobs at the very end. Where a PUT has no body, its Content-Range must not
#   be checked.
set -euo pipefail
work=$(mktemp -d)
export GOMODCACHE="$work/modules" GOFLAGS="-mod=mod -modcacherw -p=1"
trap 'rm -rf "$work"' EXIT
cd "$work"
cat > go.mod <<'MODULE'
module finding

go 1.25.0

require cuelabs.dev/go/oci/ociregistry v0.0.0-20251212221603-3adeb8663819
MODULE
cat > main.go <<'GO'
package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"

	"cuelabs.dev/go/oci/ociregistry"
	"cuelabs.dev/go/oci/ociregistry/ociclient"
	"github.com/opencontainers/go-digest"
)

const chunk = 10

var seen []string

// serve accepts every upload, and notes what came with it.
func serve(w http.ResponseWriter, r *http.Request) {
	count, _ := io.Copy(io.Discard, r.Body)
	if r.Method != http.MethodPost {
		seen = append(seen, fmt.Sprintf("%s %s, %d bytes", r.Method, r.Header.Get("Content-Range"), count))
	}
	w.Header().Set("Location", "/v2/app/blobs/uploads/1")
	if r.Method == http.MethodPut {
		w.WriteHeader(http.StatusCreated)
	} else {
		w.WriteHeader(http.StatusAccepted)
	}
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}

// write uploads a blob in as many pieces as there are sizes.
func write(client ociregistry.Interface, sizes ...int) {
	writer, err := client.PushBlobChunked(context.Background(), "app", chunk)
	check(err)
	var blob []byte
	for _, size := range sizes {
		_, err = writer.Write(make([]byte, size))
		check(err)
		blob = append(blob, make([]byte, size)...)
	}
	_, err = writer.Commit(digest.FromBytes(blob))
	check(err)
}

func push(client ociregistry.Interface, blob []byte) {
	descriptor := ociregistry.Descriptor{
		MediaType: "application/octet-stream", Digest: digest.FromBytes(blob), Size: int64(len(blob)),
	}
	_, err := client.PushBlob(context.Background(), "app", descriptor, bytes.NewReader(blob))
	check(err)
}

func main() {
	server := httptest.NewServer(http.HandlerFunc(serve))
	defer server.Close()
	host := strings.TrimPrefix(server.URL, "http://")
	client, err := ociclient.New(host, &ociclient.Options{Insecure: true})
	check(err)
	uploads := []struct {
		what     string
		upload   func()
		expected string
	}{
		{"one Write of 10 bytes", func() { write(client, 10) }, "PUT 0-9, 10 bytes"},
		{"Writes of 20 and 5 bytes", func() { write(client, 20, 5) }, "PATCH 0-19, 20 bytes; PUT 20-24, 5 bytes"},
		{"one Write of 25 bytes", func() { write(client, 25) }, "PATCH 0-24, 25 bytes; PUT 25-24, 0 bytes"},
		{"one Write of 11 bytes", func() { write(client, 11) }, "PATCH 0-10, 11 bytes; PUT 11-10, 0 bytes"},
		{"an empty blob, in chunks", func() { write(client, 0) }, "PUT 0-0, 0 bytes"},
		{"an empty blob, PushBlob", func() { push(client, nil) }, "PUT 0-0, 0 bytes"},
		{"a blob of 1 byte, PushBlob", func() { push(client, []byte{0}) }, "PUT 0-0, 1 bytes"},
	}
	holds := true
	fmt.Printf("chunks of %d bytes\n", chunk)
	for _, each := range uploads {
		seen = nil
		each.upload()
		result := strings.Join(seen, "; ")
		fmt.Printf("  %s: %s\n", each.what, result)
		holds = holds && result == each.expected
	}
	if !holds {
		fmt.Println("CHANGED")
		os.Exit(1)
	}
	fmt.Println("as stated")
}
GO
go build -o finding . 2> build.log || { cat build.log; exit 1; }
echo "$(go version); $(go list -m cuelabs.dev/go/oci/ociregistry)"
timeout 60 ./finding

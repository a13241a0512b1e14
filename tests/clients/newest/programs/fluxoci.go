// Command fluxoci pushes the directory `files`, or pulls to `pulled`, as flux does: `fluxoci push|pull IMAGE`.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/fluxcd/pkg/oci"
)

func main() {
	command, image := os.Args[1], os.Args[2]
	client := oci.NewClient(oci.DefaultOptions())
	var err error
	if command == "push" {
		_, err = client.Push(context.Background(), image, "files", oci.WithPushMetadata(oci.Metadata{Source: "none", Revision: "1"}))
	} else {
		_, err = client.Pull(context.Background(), image, "pulled")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

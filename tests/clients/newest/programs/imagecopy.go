// Command imagecopy copies an image, as skopeo and podman do: `imagecopy SOURCE TARGET`, by names with
// transports (docker://, oci:, containers-storage:). With FORMAT, layers are compressed so.
package main

import (
	"context"
	"fmt"
	"os"

	"go.podman.io/image/v5/copy"
	"go.podman.io/image/v5/pkg/compression"
	"go.podman.io/image/v5/signature"
	"go.podman.io/image/v5/transports/alltransports"
	"go.podman.io/image/v5/types"
	"go.podman.io/storage/pkg/reexec"
)

func main() {
	if reexec.Init() {
		return
	}
	if err := run(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

func run(from, to string) error {
	source, err := alltransports.ParseImageName(from)
	if err != nil {
		return err
	}
	target, err := alltransports.ParseImageName(to)
	if err != nil {
		return err
	}
	anything := signature.Policy{Default: signature.PolicyRequirements{signature.NewPRInsecureAcceptAnything()}}
	policy, err := signature.NewPolicyContext(&anything)
	if err != nil {
		return err
	}
	system := types.SystemContext{
		DockerInsecureSkipTLSVerify: types.OptionalBoolTrue,
		SystemRegistriesConfPath:    os.Getenv("HOME") + "/.config/containers/registries.conf",
	}
	options := copy.Options{SourceCtx: &system, DestinationCtx: &system}
	if name := os.Getenv("FORMAT"); name != "" {
		format, err := compression.AlgorithmByName(name)
		if err != nil {
			return err
		}
		system.CompressionFormat = &format
		options.ForceCompressionFormat = true
	}
	_, err = copy.Image(context.Background(), policy, target, source, &options)
	return err
}

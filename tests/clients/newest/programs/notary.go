// Command notary signs and verifies as notation does: `notary keys|sign|verify DIRECTORY [IMAGE]`, with a key
// pair in the directory, and the credentials in LOGIN and PASSWORD.
package main

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"os"
	"time"

	"github.com/notaryproject/notation-core-go/signature/jws"
	"github.com/notaryproject/notation-go"
	"github.com/notaryproject/notation-go/registry"
	"github.com/notaryproject/notation-go/signer"
	"github.com/notaryproject/notation-go/verifier"
	"github.com/notaryproject/notation-go/verifier/trustpolicy"
	"github.com/notaryproject/notation-go/verifier/truststore"
	"oras.land/oras-go/v2/registry/remote"
	"oras.land/oras-go/v2/registry/remote/auth"
)

func main() {
	command, directory := os.Args[1], os.Args[2]
	var err error
	if command == "keys" {
		err = keys(directory)
	} else {
		err = use(command, directory, os.Args[3])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

func keys(directory string) error {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	template := x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{Country: []string{"US"}, Province: []string{"WA"}, Organization: []string{"a"}, CommonName: "a"},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(24 * time.Hour),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning},
		BasicConstraintsValid: true,
	}
	certificate, err := x509.CreateCertificate(rand.Reader, &template, &template, &key.PublicKey, key)
	if err != nil {
		return err
	}
	if err := os.WriteFile(directory+"/key", x509.MarshalPKCS1PrivateKey(key), 0o600); err != nil {
		return err
	}
	return os.WriteFile(directory+"/certificate", certificate, 0o600)
}

func use(command, directory, image string) error {
	ctx := context.Background()
	remotes, err := remote.NewRepository(image)
	if err != nil {
		return err
	}
	remotes.PlainHTTP = true
	login := auth.Credential{Username: os.Getenv("LOGIN"), Password: os.Getenv("PASSWORD")}
	remotes.Client = &auth.Client{Credential: auth.StaticCredential(remotes.Reference.Registry, login)}
	described, err := remotes.Resolve(ctx, remotes.Reference.Reference)
	if err != nil {
		return err
	}
	exact := remotes.Reference.Registry + "/" + remotes.Reference.Repository + "@" + described.Digest.String()
	encoded, err := os.ReadFile(directory + "/certificate")
	if err != nil {
		return err
	}
	certificate, err := x509.ParseCertificate(encoded)
	if err != nil {
		return err
	}
	repository := registry.NewRepository(remotes)
	if command == "verify" {
		return verify(ctx, repository, exact, certificate)
	}
	encoded, err = os.ReadFile(directory + "/key")
	if err != nil {
		return err
	}
	key, err := x509.ParsePKCS1PrivateKey(encoded)
	if err != nil {
		return err
	}
	signing, err := signer.NewGenericSigner(key, []*x509.Certificate{certificate})
	if err != nil {
		return err
	}
	options := notation.SignOptions{ArtifactReference: exact}
	options.SignatureMediaType = jws.MediaTypeEnvelope
	_, err = notation.Sign(ctx, signing, repository, options)
	return err
}

// trusted is a trust store of one certificate.
type trusted struct{ certificate *x509.Certificate }

func (store trusted) GetCertificates(context.Context, truststore.Type, string) ([]*x509.Certificate, error) {
	return []*x509.Certificate{store.certificate}, nil
}

func verify(ctx context.Context, repository registry.Repository, image string, certificate *x509.Certificate) error {
	policy := trustpolicy.Document{
		Version: "1.0",
		TrustPolicies: []trustpolicy.TrustPolicy{{
			Name:                  "all",
			RegistryScopes:        []string{"*"},
			SignatureVerification: trustpolicy.SignatureVerification{VerificationLevel: "strict"},
			TrustStores:           []string{"ca:all"},
			TrustedIdentities:     []string{"*"},
		}},
	}
	verifying, err := verifier.New(&policy, trusted{certificate}, nil)
	if err != nil {
		return err
	}
	options := notation.VerifyOptions{ArtifactReference: image, MaxSignatureAttempts: 10}
	_, _, err = notation.Verify(ctx, verifying, repository, options)
	return err
}

"""The cases of tests/data/signatures at the fake upstream."""

from __future__ import annotations

from storage.oci import Digest
from tests.signing.cases import DATA, ROOTS, SignedCase, content
from tests.upstream import Upstream

SIGNERS = {
    **{
        name: {"key": str(DATA / f"{name}.pub")}
        for name in (
            "ecdsa",
            "rsa",
            "ed25519",
            "p384",
            "referring",
            "other",
            "former-ecdsa",
            "former-ed25519",
        )
    },
    **{
        name: {"certificates": str(DATA / f"{name}.pem")}
        for name in ("notary-rsa", "notary-ec", "notary-short")
    },
    **{
        name: {
            "trusted_root": str(DATA / root),
            "issuer": "https://tokens.test",
            "identity": "https://git.test/acme/*",
        }
        for name, root in ROOTS.items()
    },
}


def publish(upstream: Upstream, case: SignedCase, repository: str) -> Digest:
    """Put all that a case has into a repository; returns the digest of the image."""
    for digest in case.blobs:
        upstream.blob(repository, content(digest))
    for digest, media_type in case.manifests.items():
        upstream.manifest(repository, content(digest), media_type)
    upstream.repositories[repository].tags.update(case.tags)
    return case.image

"""Images that are signed by keys, attestations, and an index that is signed."""

from __future__ import annotations

import base64
import json
import shutil
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from tests.signing.maker import (
    INDEX,
    MANIFEST,
    SIMPLE,
    Maker,
    digest_of,
    encoded,
    move_tag,
    payload_edit,
    signature_tag,
)

CLASSIC = ("--use-signing-config=false", "--tlog-upload=false", "--new-bundle-format=false")
PREDICATE = {
    "buildDefinition": {"buildType": "https://build.test/v1", "externalParameters": {"ref": "refs/tags/v1"}},
    "runDetails": {"builder": {"id": "https://build.test/runner"}},
}


def make_keys(maker: Maker) -> None:
    """A pair of keys of each kind, of which only the public ones are kept."""
    pairs: dict[str, Any] = {
        "ecdsa": ec.generate_private_key(ec.SECP256R1()),
        "other": ec.generate_private_key(ec.SECP256R1()),
        "p384": ec.generate_private_key(ec.SECP384R1()),
        "rsa": rsa.generate_private_key(65537, 3072),
        "ed25519": ed25519.Ed25519PrivateKey.generate(),
    }
    for name, key in pairs.items():
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (maker.tools.home / f"{name}.pem").write_bytes(private)
        maker.tools.run(
            "cosign", "import-key-pair", "--key", f"{name}.pem", "--output-key-prefix", name, stdin="y\n"
        )
        shutil.copy(maker.tools.home / f"{name}.pub", maker.target / f"{name}.pub")
    maker.tools.run("cosign", "signing-config", "create", "--out", "none.json")


def sign(maker: Maker, key: str, reference: str, *arguments: str) -> None:
    maker.tools.run(
        "cosign", "sign", "--yes", "--allow-http-registry", "--key", f"{key}.key",
        *(arguments or ("--signing-config", "none.json")), reference,
    )  # fmt: skip


def resign(maker: Maker, parts: Any) -> None:
    """Sign by Ed25519 as RFC 8032 says: cosign 3 signs by Ed25519ph, but verifies by Ed25519."""
    key = load_pem_private_key((maker.tools.home / "ed25519.pem").read_bytes(), None)
    assert isinstance(key, ed25519.Ed25519PrivateKey)
    layer = parts["manifest"]["layers"][0]
    if layer["mediaType"] == SIMPLE:
        signature = base64.b64encode(key.sign(parts["layer"])).decode()
        layer["annotations"]["dev.cosignproject.cosign/signature"] = signature
        return
    bundle = json.loads(parts["layer"])
    envelope = bundle["dsseEnvelope"]
    kind, payload = envelope["payloadType"].encode(), base64.b64decode(envelope["payload"])
    message = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    envelope["signatures"][0]["sig"] = base64.b64encode(key.sign(message)).decode()
    parts["layer"] = encoded(bundle)


def make_classic(maker: Maker) -> None:
    for key in ("ecdsa", "rsa", "ed25519", "p384"):
        with maker.case(f"classic-{key}", key) as (reference, case):
            sign(maker, key, reference, *CLASSIC)
            if key == "ed25519":
                tag = signature_tag(case.image)
                maker.forge(reference, tag, lambda parts: resign(maker, parts), maker.plain)
    with maker.case("classic-other-key", "ecdsa", good=False) as (reference, _):
        sign(maker, "other", reference, *CLASSIC)
    with maker.case("classic-both-keys", "ecdsa") as (reference, _):
        sign(maker, "other", reference, *CLASSIC)
        sign(maker, "ecdsa", reference, *CLASSIC)
    with maker.case("classic-other-digest", "ecdsa", good=False) as (reference, case):
        sign(maker, "ecdsa", maker.other(reference), *CLASSIC)
        move_tag(maker, reference, ".sig")
    with maker.case("classic-tampered", "ecdsa", good=False) as (reference, case):
        sign(maker, "ecdsa", maker.other(reference), *CLASSIC)
        move_tag(maker, reference, ".sig")

        def claim(parts: Any) -> None:
            other = digest_of(maker.images[1][0])
            parts["layer"] = parts["layer"].replace(other.encode(), case.image.encode())

        maker.forge(reference, signature_tag(case.image), claim, maker.plain)


def make_referring(maker: Maker) -> None:
    """The classic form as a referrer, which cosign calls an experiment."""
    maker.tools.run("cosign", "generate-key-pair", "--output-key-prefix", "referring")
    shutil.copy(maker.tools.home / "referring.pub", maker.target / "referring.pub")
    with maker.case("classic-referrers", "referring", listing=True) as (reference, _):
        maker.tools.run(
            "cosign", "sign", "--yes", "--allow-http-registry", "--key", "referring.key",
            "--registry-referrers-mode", "oci-1-1", *CLASSIC, reference, COSIGN_EXPERIMENTAL="1",
        )  # fmt: skip


def make_former(maker: Maker) -> None:
    """What version 2 of cosign signs, with keys of its own; version 3 does not verify its Ed25519."""
    pairs = {
        "former-ecdsa": ec.generate_private_key(ec.SECP256R1()),
        "former-ed25519": ed25519.Ed25519PrivateKey.generate(),
    }
    for name, key in pairs.items():
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (maker.tools.home / f"{name}.pem").write_bytes(private)
        maker.tools.run(
            "cosign2", "import-key-pair", "--key", f"{name}.pem", "--output-key-prefix", name, stdin="y\n"
        )
        shutil.copy(maker.tools.home / f"{name}.pub", maker.target / f"{name}.pub")
        with maker.case(name, name, good=name == "former-ecdsa") as (reference, _):
            maker.tools.run(
                "cosign2", "sign", "--yes", "--allow-http-registry", "--tlog-upload=false",
                "--key", f"{name}.key", reference,
            )  # fmt: skip


def make_bundles(maker: Maker) -> None:
    for key in ("ecdsa", "rsa", "ed25519", "p384"):
        with maker.case(f"bundle-{key}", key) as (reference, case):
            sign(maker, key, reference)
            if key == "ed25519":
                tag = signature_tag(case.image, "")
                maker.forge(reference, tag, lambda parts: resign(maker, parts), maker.plain)
    with maker.case("bundle-referrers", "ecdsa", listing=True) as (reference, _):
        sign(maker, "ecdsa", reference)
    with maker.case("bundle-other-key", "ecdsa", good=False) as (reference, _):
        sign(maker, "other", reference)
    with maker.case("bundle-other-key-referrers", "ecdsa", good=False, listing=True) as (reference, _):
        sign(maker, "other", reference)
    with maker.case("bundle-other-digest", "ecdsa", good=False) as (reference, _):
        sign(maker, "ecdsa", maker.other(reference))
        move_tag(maker, reference, "")
    with maker.case("bundle-tampered", "ecdsa", good=False) as (reference, case):
        sign(maker, "ecdsa", maker.other(reference))
        move_tag(maker, reference, "")
        ours, other = (
            each.partition(":")[2].encode() for each in (case.image, digest_of(maker.images[1][0]))
        )
        change = payload_edit(lambda payload: payload.replace(other, ours))
        maker.forge(reference, signature_tag(case.image, ""), change, maker.plain)
    with maker.case("unsigned", "ecdsa", good=False):
        pass


def make_attestations(maker: Maker) -> None:
    """Attestations alone are no signatures."""
    (maker.tools.home / "provenance.json").write_text(json.dumps(PREDICATE))
    (maker.tools.home / "scan.json").write_text(json.dumps({"scanner": {"result": {"critical": 2}}}))
    for name, key, kind, file in (
        ("attested-provenance", "ecdsa", "slsaprovenance1", "provenance.json"),
        ("attested-other-key", "other", "slsaprovenance1", "provenance.json"),
        ("attested-scan", "ecdsa", "https://scan.test/v1", "scan.json"),
    ):
        with maker.case(name, "ecdsa", good=False) as (reference, _):
            attest(maker, key, kind, file, reference, "--signing-config", "none.json")
    with maker.case("attested-classic", "ecdsa", good=False) as (reference, _):
        attest(maker, "ecdsa", "slsaprovenance1", "provenance.json", reference, *CLASSIC)


def attest(maker: Maker, key: str, kind: str, file: str, reference: str, *arguments: str) -> None:
    maker.tools.run(
        "cosign", "attest", "--yes", "--allow-http-registry", "--key", f"{key}.key", "--type", kind,
        "--predicate", file, *arguments, reference,
    )  # fmt: skip


def make_index(maker: Maker) -> None:
    """An index that is signed, whose child is not."""
    with maker.case("index", "ecdsa") as (reference, case):
        content = maker.images[0][0]
        entry = {"mediaType": MANIFEST, "digest": case.image, "size": len(content)}
        entry["platform"] = {"os": "linux", "architecture": "amd64"}
        index = encoded({"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry]})
        maker.plain.push_manifest("local/index", "v1", INDEX, index)
        case.image = digest_of(index)
        sign(maker, "ecdsa", reference.partition("@")[0] + "@" + case.image)

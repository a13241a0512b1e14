"""Makes tests/data/signatures: `python -m tests.signing.make DIRECTORY`.

It needs `cosign` 3, `notation` and Distribution's `registry` in PATH, and takes some minutes, as signatures
and a certificate have to expire.  Each case is a repository with one image, and what signs it or pretends to;
tools write it, and what no tool would write is made of that.  The commands of each case are kept, and the
verdict of the tool that verifies such signatures.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.signing.authority import KeylessAuthority, usage
from tests.signing.cases import ROOTS
from tests.signing.timestamps import TimestampAuthority
from tests.signing.tools import HTTPRegistry, Tools, free_port, process, served, token

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
SIMPLE = "application/vnd.dev.cosign.simplesigning.v1+json"
BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
ISSUER, IDENTITY = "https://tokens.test", "https://git.test/acme/app/release@refs/tags/v1"
CLASSIC = ("--use-signing-config=false", "--tlog-upload=false", "--new-bundle-format=false")
PREDICATE = {
    "buildDefinition": {"buildType": "https://build.test/v1", "externalParameters": {"ref": "refs/tags/v1"}},
    "runDetails": {"builder": {"id": "https://build.test/runner"}},
}
Edit = Callable[[Any], None]


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def encoded(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


@dataclass
class Case:
    """A repository: its image, by whom it claims to be signed, and the verdict of a tool."""

    name: str
    signer: str
    good: bool
    image: str
    commands: list[str] = field(default_factory=list)
    accepted: bool = False
    said: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    manifests: dict[str, str] = field(default_factory=dict)
    blobs: list[str] = field(default_factory=list)


class Maker:
    """Makes the cases at a registry without the referrers API, and one with it."""

    def __init__(self, target: Path, tools: Tools, plain: HTTPRegistry, listing: HTTPRegistry) -> None:
        self.target, self.tools, self.plain, self.listing = target, tools, plain, listing
        self.cases: list[Case] = []
        self.content: dict[str, Any] = {}  # text, or a list of one text in base64
        self.images = [self._image(each) for each in (b"the image", b"another image")]

    @contextmanager
    def case(
        self, name: str, signer: str, good: bool = True, listing: bool = False
    ) -> Iterator[tuple[str, Case]]:
        """The reference of the image in a repository of its own; what signs it is kept after the block."""
        registry = self.listing if listing else self.plain
        repository = f"local/{name}"
        for content, blobs in self.images:
            for blob in blobs:
                registry.push_blob(repository, blob, digest_of(blob))
            registry.push_manifest(repository, digest_of(content), MANIFEST, content)
        image = digest_of(self.images[0][0])
        registry.push_manifest(repository, "v1", MANIFEST, self.images[0][0])
        self.tools.commands.clear()
        case = Case(name, signer, good, image)
        yield f"{registry.host}/{repository}@{image}", case
        case.commands = [each.replace(registry.host, "registry.test") for each in self.tools.commands]
        self.cases.append(case)
        self._verdict(case, registry)
        self._keep(case, registry)

    def other(self, reference: str) -> str:
        """The other image in the same repository."""
        return reference.partition("@")[0] + "@" + digest_of(self.images[1][0])

    def _image(self, layer: bytes) -> tuple[bytes, list[bytes]]:
        config = encoded(
            {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}}
        )
        named = [
            {"mediaType": kind, "digest": digest_of(content), "size": len(content)}
            for kind, content in (
                ("application/vnd.oci.image.config.v1+json", config),
                ("application/vnd.oci.image.layer.v1.tar", layer),
            )
        ]
        manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": named[0], "layers": named[1:]}
        return encoded(manifest), [config, layer]

    # Forgeries

    def forge(self, reference: str, tag: str, edit: Edit, registry: HTTPRegistry) -> None:
        """Replace what `tag` leads to by what `edit` makes of it: it gets the manifest and the only layer."""
        repository = reference.partition("@")[0].partition("/")[2]
        found = registry.manifest(repository, tag)
        assert found is not None, tag
        media_type, content = found
        if media_type == INDEX:
            index = json.loads(content)
            (entry,) = index["manifests"]
            found = registry.manifest(repository, entry["digest"])
            assert found is not None
            content = self._edited(repository, found[1], edit, registry)
            entry |= {"digest": digest_of(content), "size": len(content)}
            registry.push_manifest(repository, entry["digest"], MANIFEST, content)
            content = encoded(index)
        else:
            content = self._edited(repository, content, edit, registry)
        registry.push_manifest(repository, tag, media_type, content)

    def _edited(self, repository: str, manifest: bytes, edit: Edit, registry: HTTPRegistry) -> bytes:
        found = json.loads(manifest)
        layer = found["layers"][0]
        content = registry.blob(repository, layer["digest"])
        parts = {"manifest": found, "layer": content}
        edit(parts)
        layer |= {"digest": digest_of(parts["layer"]), "size": len(parts["layer"])}
        registry.push_blob(repository, parts["layer"], layer["digest"])
        return encoded(found)

    # What is kept

    def _verdict(self, case: Case, registry: HTTPRegistry) -> None:
        image = f"{registry.host}/local/{case.name}@{case.image}"
        if case.signer.startswith("notary"):
            ran = self.tools.verify_with_notation(image, self.target / f"{case.signer}.pem")
        elif case.signer in ROOTS:
            ran = self.tools.verify_with_cosign(
                image, "--trusted-root", str(self.target / ROOTS[case.signer]),
                "--certificate-identity", IDENTITY, "--certificate-oidc-issuer", ISSUER,
                *(["--use-signed-timestamps"] if case.signer == "timestamped" else []),
            )  # fmt: skip
        else:
            ran = self.tools.verify_with_cosign(
                image, "--key", str(self.target / f"{case.signer}.pub"), "--insecure-ignore-tlog"
            )
        case.accepted = ran.code == 0
        lines = [
            each for each in ran.said.replace(registry.host, "registry.test").splitlines() if each.strip()
        ]
        case.said = (lines[-1] if lines else "")[:300]
        print(f"{'ok ' if case.accepted == case.good else 'NO '} {case.name}: {case.said}")

    def _keep(self, case: Case, registry: HTTPRegistry) -> None:
        repository = f"local/{case.name}"
        for tag in registry.listed(repository, "tags/list").get("tags") or []:
            found = registry.manifest(repository, tag)
            assert found is not None
            case.tags[tag] = self._keep_manifest(case, registry, *found)
        self._keep_referrers(case, registry)

    def _keep_referrers(self, case: Case, registry: HTTPRegistry) -> None:
        for entry in registry.listed(f"local/{case.name}", f"referrers/{case.image}").get("manifests") or []:
            found = registry.manifest(f"local/{case.name}", entry["digest"])
            assert found is not None
            self._keep_manifest(case, registry, *found)

    def _keep_manifest(self, case: Case, registry: HTTPRegistry, media_type: str, content: bytes) -> str:
        digest = digest_of(content)
        if digest not in case.manifests:
            case.manifests[digest] = media_type
            self._keep_content(content)
            found = json.loads(content)
            for entry in found.get("manifests") or []:
                child = registry.manifest(f"local/{case.name}", entry["digest"])
                assert child is not None
                self._keep_manifest(case, registry, *child)
            for entry in [*filter(None, [found.get("config")]), *(found.get("layers") or [])]:
                blob = registry.blob(f"local/{case.name}", entry["digest"])
                case.blobs.append(self._keep_content(blob))
        return digest

    def _keep_content(self, content: bytes) -> str:
        digest = digest_of(content)
        try:
            self.content[digest] = content.decode()
        except UnicodeDecodeError:
            self.content[digest] = [base64.b64encode(content).decode()]
        return digest

    def finish(self) -> None:
        """Write what was made, beside what is there of other cases."""
        made = {each.name: vars(each) for each in self.cases}
        if (self.target / "cases.json").exists():
            former = json.loads((self.target / "cases.json").read_text())
            made = {each["name"]: each for each in former} | made
            self.content = json.loads((self.target / "content.json").read_text()) | self.content
        rows = [made[name] for name in sorted(made)]
        for name, value in (("cases", rows), ("content", self.content)):
            (self.target / f"{name}.json").write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


# Signatures by keys


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


def signature_tag(digest: str, suffix: str = ".sig") -> str:
    return digest.replace(":", "-") + suffix


def move_tag(maker: Maker, reference: str, suffix: str) -> None:
    """What signs the other image is shown as what signs this one."""
    repository, _, digest = reference.partition("/")[2].partition("@")
    other = digest_of(maker.images[1][0])
    found = maker.plain.manifest(repository, signature_tag(other, suffix))
    assert found is not None
    maker.plain.push_manifest(repository, signature_tag(digest, suffix), *found)


def payload_edit(change: Callable[[bytes], bytes]) -> Edit:
    """Change the payload in the envelope of a bundle, and nothing else."""

    def edit(parts: Any) -> None:
        bundle = json.loads(parts["layer"])
        envelope = bundle["dsseEnvelope"]
        envelope["payload"] = base64.b64encode(change(base64.b64decode(envelope["payload"]))).decode()
        parts["layer"] = encoded(bundle)

    return edit


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
    """Attestations alone are no signatures, although `cosign verify` takes those in bundles for some."""
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


# Keyless signatures


def make_keyless(maker: Maker) -> None:
    trusted, foreign = KeylessAuthority(), KeylessAuthority()
    late = trusted.later(timedelta(hours=1))
    trusted.write(maker.tools.home)
    began = f"{datetime.now(UTC) - timedelta(hours=1):%Y-%m-%dT%H:%M:%SZ}"
    maker.tools.run(
        "cosign", "trusted-root", "create", "--out", "trusted_root.json",
        "--fulcio", "url=http://fulcio.test,certificate-chain=fulcio.pem",
        "--rekor", f"url=http://log.test,public-key=log.pub,start-time={began}",
        "--ctfe", f"url=http://ct.test,public-key=ct.pub,start-time={began}",
    )  # fmt: skip
    shutil.copy(maker.tools.home / "trusted_root.json", maker.target / "trusted_root.json")
    with ExitStack() as stack:
        urls = {}
        for name, authority in (("trusted", trusted), ("late", late), ("foreign", foreign)):
            urls[name] = stack.enter_context(served(authority.app()))
            start = f"api-version=1,start-time={began},operator=test"
            maker.tools.run(
                "cosign", "signing-config", "create", "--out", f"{name}.json",
                "--fulcio", f"url={urls[name]},{start}", "--rekor", f"url={urls[name]},{start}",
                "--rekor-config", "ANY",
            )  # fmt: skip
        _make_keyless_cases(maker)


def sign_keyless(
    maker: Maker, reference: str, by: str = "trusted", issuer: str = ISSUER, identity: str = IDENTITY
) -> None:
    (maker.tools.home / "token").write_text(token(issuer, identity))
    maker.tools.run(
        "cosign", "sign", "--yes", "--allow-http-registry", "--signing-config", f"{by}.json",
        "--identity-token", "token", reference,
    )  # fmt: skip


def _make_keyless_cases(maker: Maker) -> None:
    with maker.case("keyless", "keyless") as (reference, _):
        sign_keyless(maker, reference)
    with maker.case("keyless-other-identity", "keyless", good=False) as (reference, _):
        sign_keyless(maker, reference, identity="mallory@mail.test")
    with maker.case("keyless-other-issuer", "keyless", good=False) as (reference, _):
        sign_keyless(maker, reference, issuer="https://elsewhere.test")
    with maker.case("keyless-foreign", "keyless", good=False) as (reference, _):
        sign_keyless(maker, reference, "foreign")
    with maker.case("keyless-late", "keyless", good=False) as (reference, _):
        sign_keyless(maker, reference, "late")
    with maker.case("keyless-other-digest", "keyless", good=False) as (reference, _):
        sign_keyless(maker, maker.other(reference))
        move_tag(maker, reference, "")
    with maker.case("keyless-tampered", "keyless", good=False) as (reference, case):
        sign_keyless(maker, maker.other(reference))
        move_tag(maker, reference, "")
        ours, other = (
            each.partition(":")[2].encode() for each in (case.image, digest_of(maker.images[1][0]))
        )
        change = payload_edit(lambda payload: payload.replace(other, ours))
        maker.forge(reference, signature_tag(case.image, ""), change, maker.plain)
    with maker.case("keyless-no-log", "keyless", good=False) as (reference, case):
        sign_keyless(maker, reference)

        def drop(parts: Any) -> None:
            bundle = json.loads(parts["layer"])
            del bundle["verificationMaterial"]["tlogEntries"]
            parts["layer"] = encoded(bundle)

        maker.forge(reference, signature_tag(case.image, ""), drop, maker.plain)


def make_timestamped(maker: Maker) -> None:
    """Signatures whose time is vouched for by an authority (RFC 3161), and one for which nobody vouches."""
    authority, timestamps = KeylessAuthority(), TimestampAuthority(maker.tools.home / "timestamps")
    authority.write(maker.tools.home)
    began = f"{datetime.now(UTC) - timedelta(hours=1):%Y-%m-%dT%H:%M:%SZ}"
    maker.tools.run(
        "cosign", "trusted-root", "create", "--out", "timestamped.json",
        "--fulcio", "url=http://fulcio.test,certificate-chain=fulcio.pem",
        "--rekor", f"url=http://log.test,public-key=log.pub,start-time={began}",
        "--ctfe", f"url=http://ct.test,public-key=ct.pub,start-time={began}",
        "--tsa", f"url=http://timestamps.test,certificate-chain={timestamps.chain}",
    )  # fmt: skip
    shutil.copy(maker.tools.home / "timestamped.json", maker.target / "timestamped_root.json")
    with served(authority.app()) as url, served(timestamps.app()) as stamping:
        start = f"api-version=1,start-time={began},operator=test"
        maker.tools.run(
            "cosign", "signing-config", "create", "--out", "timestamping.json",
            "--fulcio", f"url={url},{start}", "--rekor", f"url={url},{start}", "--rekor-config", "ANY",
            "--tsa", f"url={stamping}/timestamp,{start}", "--tsa-config", "ANY",
        )  # fmt: skip
        for name, good, edit in (
            ("timestamped", True, None),
            ("timestamped-only", True, _drop_promise),
            ("timestamped-not", False, _drop_both),
        ):
            with maker.case(name, "timestamped", good=good) as (reference, case):
                sign_keyless(maker, reference, "timestamping")
                if edit is not None:
                    maker.forge(reference, signature_tag(case.image, ""), edit, maker.plain)


def _drop_promise(parts: Any) -> None:
    """Only the timestamp says when it was signed; the log still proves that it has the entry."""
    bundle = json.loads(parts["layer"])
    del bundle["verificationMaterial"]["tlogEntries"][0]["inclusionPromise"]
    parts["layer"] = encoded(bundle)


def _drop_both(parts: Any) -> None:
    _drop_promise(parts)
    bundle = json.loads(parts["layer"])
    del bundle["verificationMaterial"]["timestampVerificationData"]
    parts["layer"] = encoded(bundle)


# Signatures of Notary Project


def certify(
    maker: Maker, name: str, key: Any, organization: str = "acme", valid: timedelta = timedelta(days=36500)
) -> None:
    """Write a chain of a root and a certificate for the signing of code; the root is kept as `name`."""
    now = datetime.now(UTC)
    ca = ec.generate_private_key(ec.SECP256R1())
    chain: list[x509.Certificate] = []
    for holder, issuer, signed, lasts in (
        (ca, f"{name} root", ca, timedelta(days=36500)),
        (key, f"{name} root", ca, valid),
    ):
        subject = f"{name} root" if holder is ca else f"{name} signer"
        names = [
            x509.Name(
                [
                    x509.NameAttribute(NameOID.COUNTRY_NAME, "FR"),
                    x509.NameAttribute(NameOID.STATE_OR_PROVINCE_NAME, "75"),
                    x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization),
                    x509.NameAttribute(NameOID.COMMON_NAME, each),
                ]
            )
            for each in (subject, issuer)
        ]
        builder = (
            x509.CertificateBuilder()
            .subject_name(names[0])
            .issuer_name(names[1])
            .public_key(holder.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=1))
            .not_valid_after(now + lasts)
            .add_extension(x509.BasicConstraints(ca=holder is ca, path_length=None), critical=True)
            .add_extension(
                usage(key_cert_sign=True) if holder is ca else usage(digital_signature=True), critical=True
            )
        )
        if holder is not ca:
            purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING])
            builder = builder.add_extension(purpose, critical=False)
        chain.insert(0, builder.sign(signed, SHA256()))
    root, home = chain[-1], maker.tools.home
    (maker.target / f"{name}.pem").write_bytes(root.public_bytes(Encoding.PEM))
    (home / f"{name}.crt").write_bytes(b"".join(each.public_bytes(Encoding.PEM) for each in chain))
    (home / f"{name}.pk8").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    config = home / "config" / "notation" / "signingkeys.json"
    config.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(config.read_text()) if config.exists() else {"keys": []}
    known["keys"].append(
        {"name": name, "keyPath": str(home / f"{name}.pk8"), "certPath": str(home / f"{name}.crt")}
    )
    config.write_text(json.dumps(known))


def notation(maker: Maker, reference: str, key: str, *arguments: str) -> None:
    maker.tools.run("notation", "sign", "--insecure-registry", "--key", key, *arguments, reference)


def make_notary(maker: Maker) -> None:
    keys = {
        "notary-rsa": rsa.generate_private_key(65537, 2048),
        "notary-ec": ec.generate_private_key(ec.SECP384R1()),
    }
    for name, key in keys.items():
        certify(maker, name, key)
        for form in ("jws", "cose"):
            with maker.case(f"{name}-{form}", name) as (reference, _):
                notation(maker, reference, name, "--signature-format", form)
    certify(maker, "notary-short", ec.generate_private_key(ec.SECP256R1()), valid=timedelta(seconds=15))
    with maker.case("notary-expired-certificate", "notary-short", good=False) as (reference, _):
        notation(maker, reference, "notary-short")
        time.sleep(16)
    for form in ("jws", "cose"):
        with maker.case(f"notary-expired-{form}", "notary-ec", good=False) as (reference, _):
            notation(maker, reference, "notary-ec", "--signature-format", form, "--expiry", "1m")
            time.sleep(61)
        with maker.case(f"notary-unexpired-{form}", "notary-ec") as (reference, _):
            notation(maker, reference, "notary-ec", "--signature-format", form, "--expiry", "438000h")
        with maker.case(f"notary-other-authority-{form}", "notary-ec", good=False) as (reference, _):
            notation(maker, reference, "notary-rsa", "--signature-format", form)
        with maker.case(f"notary-other-digest-{form}", "notary-ec", good=False) as (reference, case):
            notation(maker, maker.other(reference), "notary-ec", "--signature-format", form)
            move_tag(maker, reference, "")
            about(maker, reference, case)
        with maker.case(f"notary-tampered-{form}", "notary-ec", good=False) as (reference, case):
            notation(maker, maker.other(reference), "notary-ec", "--signature-format", form)
            move_tag(maker, reference, "")
            about(maker, reference, case, changed=True)


def about(maker: Maker, reference: str, case: Case, changed: bool = False) -> None:
    """Let a signature of the other image say that its subject is this one; `changed` also the payload."""
    other = digest_of(maker.images[1][0])

    def edit(parts: Any) -> None:
        subject = parts["manifest"]["subject"]
        subject |= {"digest": case.image, "size": len(maker.images[0][0])}
        if not changed:
            return
        if parts["layer"].startswith(b"{"):
            envelope = json.loads(parts["layer"])
            payload = base64.urlsafe_b64decode(envelope["payload"] + "==").replace(
                other.encode(), case.image.encode()
            )
            envelope["payload"] = base64.urlsafe_b64encode(payload).rstrip(b"=").decode()
            parts["layer"] = encoded(envelope)
        else:
            parts["layer"] = parts["layer"].replace(other.encode(), case.image.encode())

    maker.forge(reference, signature_tag(case.image, ""), edit, maker.plain)


ENTREPOT = """
listen: 127.0.0.1:{port}
disk: {{path: {path}}}
namespaces: {{local: {{store: {{}}}}}}
"""


def main(target: Path, *only: str) -> None:
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as home, ExitStack() as stack:
        ports = free_port(), free_port()
        directory = Path(home)
        (directory / "registry.yml").write_text(
            f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {home}/registry}}}}\n"
            f"http: {{addr: '127.0.0.1:{ports[0]}'}}\n"
        )
        stack.enter_context(process("registry", "serve", f"{home}/registry.yml", port=ports[0]))
        (directory / "entrepot.yml").write_text(ENTREPOT.format(port=ports[1], path=f"{home}/entrepot"))
        command = (sys.executable, "-m", "proxy", "serve", "--config", f"{home}/entrepot.yml")
        stack.enter_context(process(*command, port=ports[1]))
        registries = [HTTPRegistry(f"127.0.0.1:{each}") for each in ports]
        tools = Tools(directory / "tools")
        tools.home.mkdir()
        maker = Maker(target, tools, *registries)
        make_keys(maker)
        for make in (
            make_classic,
            make_bundles,
            make_attestations,
            make_index,
            make_keyless,
            make_timestamped,
            make_notary,
        ):
            if make.__name__ in only or not only:
                make(maker)
        maker.finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

"""Signatures that real tools made, and forgeries of them: what each signer believes, and why not.

tests/data/signatures has the artifacts, with the commands that made them; tests/signing/make.py makes them.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import cbor2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from proxy.signatures.certificates import check_chain, parse_chain, read_certificates
from proxy.signatures.errors import SignatureRefused, SignerInvalid
from proxy.signatures.forms import COSE, DSSE_ENVELOPE, FORMS, JWS, FoundSignature, Proof, Signer
from proxy.signatures.key_signer import KeySigner
from proxy.signatures.keyless_signer import IdentityPattern, KeylessSigner
from proxy.signatures.keys import VerificationKey
from proxy.signatures.notary_signer import NotarySigner
from proxy.signatures.simple_signing import SIGNATURE
from storage.oci import Descriptor, Digest, parse_manifest
from tests.signing.authority import usage
from tests.signing.cases import DATA, ROOTS, SignedCase, cases, content

NOW = datetime.now(UTC)
CASES = cases()
PATTERN = IdentityPattern("https://tokens.test", "https://git.test/acme/*")
# Where the tool that made a signature judges otherwise: docs/policy.md says why.
OTHERWISE = {"classic-p384", "bundle-p384"}


@cache
def signer_of(name: str) -> Signer:
    if name in ROOTS:
        return KeylessSigner(DATA / ROOTS[name], PATTERN)
    if name.startswith("notary"):
        return NotarySigner(read_certificates(DATA / f"{name}.pem"))
    return KeySigner(VerificationKey.read(DATA / f"{name}.pub"))


def hint(name: str) -> str:
    return VerificationKey.read(DATA / f"{name}.pub").hint


def signatures(case: SignedCase) -> list[FoundSignature]:
    """What claims to sign the image of a case."""
    wanted = [case.image.replace(":", "-") + suffix for suffix in ("", ".sig", ".att")]
    pending = [case.tags[tag] for tag in wanted if tag in case.tags] or list(case.manifests)
    found = []
    while pending:
        parsed = parse_manifest(case.manifest(digest := pending.pop()).content)
        pending += [each.digest for each in parsed.listed]
        for layer in parsed.layers:
            if layer.media_type in FORMS:
                annotations = layer.annotations or {}
                found.append(FoundSignature(digest, layer.media_type, content(layer.digest), annotations))
    return found


def signature(name: str) -> FoundSignature:
    (found,) = signatures(CASES[name])
    return found


def proofs(case: SignedCase, signer: Signer | None = None) -> tuple[list[Proof], list[str]]:
    """What is proven about the image, and why the rest is refused."""
    proven, refused = [], []
    for each in signatures(case):
        try:
            proven.append((signer or signer_of(case.signer)).verify(each, case.target, NOW))
        except SignatureRefused as error:
            refused.append(str(error))
    return proven, refused


def refusal(found: FoundSignature, target: Descriptor, signer: Signer, now: datetime = NOW) -> str:
    with pytest.raises(SignatureRefused) as caught:
        signer.verify(found, target, now)
    said = str(caught.value)
    assert "\n" not in said
    return said


@pytest.mark.parametrize("name", CASES)
def test_the_verdict_is_that_of_the_tool(name: str) -> None:
    case = CASES[name]
    proven, refused = proofs(case)
    good = any(each.predicate_type is None for each in proven)
    assert good == case.good
    if case.accepted is not None:
        assert (good == case.accepted) == (name not in OTHERWISE)
    assert case.good or refused or proven or name == "unsigned"


OTHER = "the signature is of another digest, sha256:bf4765d502ffaa0c"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("classic-other-key", "the signature is by another key, or the content was changed"),
        ("classic-other-digest", OTHER),
        ("former-ed25519", "the signature is by another key, or the content was changed"),
        ("classic-tampered", "the signature is by another key, or the content was changed"),
        ("bundle-other-key", f"the signature is by another key, {hint('other')}"),
        ("bundle-other-key-referrers", f"the signature is by another key, {hint('other')}"),
        ("bundle-other-digest", OTHER),
        ("bundle-tampered", "the signature is by another key, or the content was changed"),
        (
            "keyless-other-identity",
            "the identity that signed is mallory@mail.test, not https://git.test/acme/*",
        ),
        (
            "keyless-other-issuer",
            "the issuer of the identity is https://elsewhere.test, not https://tokens.test",
        ),
        ("keyless-foreign", "the bundle is refused: failed to build timestamp certificate chain: validation"),
        ("keyless-late", "the bundle is refused: failed to build timestamp certificate chain: validation"),
        ("keyless-other-digest", OTHER),
        ("keyless-tampered", "the bundle is refused: DSSE: invalid signature"),
        ("keyless-no-log", "the bundle has no entry of a transparency log"),
        (
            "formerly-email",
            "the identity that signed is mallory@mail.test, not https://git.test/acme/*",
        ),
        ("formerly-other-issuer", "the issuer of the identity is https://elsewhere.test, not https://tokens"),
        ("formerly-late", "its certificate was not valid at 20"),
        ("formerly-foreign", "its certificate is not issued by an authority of the trusted root"),
        ("formerly-elsewhere", "its entry is of the log "),
        ("formerly-unlogged", "its certificate is not in a log of certificates that is trusted"),
        ("formerly-other-digest", OTHER),
        ("formerly-no-entry", "it has no entry of a transparency log (annotation dev.sigstore.cosign/bu"),
        ("formerly-other-key", "the signature is by another key, or the content was changed"),
        ("formerly-other-time", "its entry was changed: the transparency log did not sign it"),
        ("formerly-tampered", "the signature is by another key, or the content was changed"),
        ("formerly-other-entry", "its log entry is about other content"),
        (
            "timestamped-not",
            "the bundle is refused: bundle must contain an inclusion promise or signed timestamp(s)",
        ),
        (
            "notary-expired-certificate",
            "the certificate of CN=notary-short signer,O=acme,ST=75,C=FR expired",
        ),
        ("notary-expired-jws", "the signature expired at 20"),
        ("notary-expired-cose", "the signature expired at 20"),
        (
            "notary-other-authority-jws",
            "no certificate of the chain is trusted; it ends at CN=notary-rsa root,O=acme,ST=75,C=FR",
        ),
        ("notary-other-authority-cose", "no certificate of the chain is trusted; it ends at CN=notary-rsa"),
        ("notary-other-digest-jws", OTHER),
        ("notary-other-digest-cose", OTHER),
        ("notary-tampered-jws", "the content was changed: CN=notary-ec signer,O=acme,ST=75,C=FR did not"),
        ("notary-tampered-cose", "the content was changed: CN=notary-ec signer,O=acme,ST=75,C=FR did not"),
    ],
)
def test_a_refusal_says_why(name: str, says: str) -> None:
    proven, (refused,) = proofs(CASES[name])
    assert not proven and refused.startswith(says)


def test_every_bad_case_is_refused_for_a_reason_of_its_own() -> None:
    told = test_a_refusal_says_why.pytestmark[0].args[1]  # type: ignore[attr-defined]
    bad = {name for name, case in CASES.items() if not case.good and name != "unsigned"}
    assert bad - {name for name, _ in told} == {
        "attested-classic", "attested-formerly", "attested-other-key", "attested-provenance", "attested-scan",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["attested-provenance", "attested-classic"])
def test_an_attestation_proves_its_statement_and_is_no_signature(name: str) -> None:
    (proof,), _ = proofs(CASES[name])
    assert proof.predicate_type == "https://slsa.dev/provenance/v1"
    assert proof.predicate["runDetails"]["builder"]["id"] == "https://build.test/runner"


def test_an_attestation_by_an_identity_in_the_classic_form() -> None:
    (proof,), _ = proofs(CASES["attested-formerly"])
    assert proof.predicate_type == "https://slsa.dev/provenance/v1"
    assert proof.predicate["builder"]["id"] == "https://build.test/runner"


@pytest.mark.parametrize(
    ("name", "signer", "says"),
    [
        ("notary-rsa-jws", "ecdsa", "it is signed by a certificate for Notary Project, not by a key"),
        ("keyless", "ecdsa", "it is signed by the certificate of an identity, not by a key"),
        ("bundle-ecdsa", "keyless", "it is signed by a key, not by the certificate of an identity"),
        ("classic-ecdsa", "keyless", "it is a signature of the form simple signing, not by the certificate"),
        ("formerly", "keyless", "its entry is of the log "),
        ("formerly", "ecdsa", "the signature is by another key, or the content was changed"),
        (
            "classic-ecdsa",
            "notary-rsa",
            "it is a signature of the form simple signing, not of Notary",
        ),
        ("bundle-ecdsa", "notary-rsa", "it is a signature of the form bundle, not of Notary Project"),
    ],
)
def test_a_signature_of_another_kind_is_named(name: str, signer: str, says: str) -> None:
    assert refusal(signature(name), CASES[name].target, signer_of(signer)).startswith(says)


# JSON that readers read differently


def edited(found: FoundSignature, change: Callable[[bytes], bytes]) -> FoundSignature:
    return replace(found, content=change(found.content))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (b'{"mediaType"', b'{"dsseEnvelope":{},"mediaType"', "a key occurs twice"),
        (b'{"mediaType"', b'{"DSSEEnvelope":{},"mediaType"', "keys that differ in case only"),
        (b'"payloadType"', b'"PayloadType":"","payloadType"', "keys that differ in case only"),
        (b'"sig":', b'"\\u017fig":"","sig":', "keys that differ in case only"),
        (b'{"mediaType"', b'\xef\xbb\xbf{"mediaType"', "is not JSON that all readers read alike"),
        (b'{"mediaType"', b'{"a":NaN,"mediaType"', "NaN is no JSON value"),
        (b'{"mediaType"', b'{"a":' + b"[" * 100_000 + b',"mediaType"', "is not JSON"),
        (b'{"mediaType":"', b'{"mediaType":"\xff', "is not JSON"),
        (b'{"mediaType"', b'[{"mediaType"', "is not JSON"),
    ],
)
@pytest.mark.parametrize("name", ["bundle-ecdsa", "keyless"])
def test_ambiguous_json_is_never_judged_good(name: str, old: bytes, new: bytes, says: str) -> None:
    case = CASES[name]
    forged = edited(signature(name), lambda bundle: bundle.replace(old, new, 1))
    assert says in refusal(forged, case.target, signer_of(case.signer))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda found: found.pop("dsseEnvelope"), "has no envelope"),
        (lambda found: found.update(dsseEnvelope=[]), "has no payloadType"),
        (lambda found: found["dsseEnvelope"].update(payload="%"), "the payload is not base64"),
        (lambda found: found["dsseEnvelope"].update(signatures=[]), "has no signature"),
        (
            lambda found: found["dsseEnvelope"].update(signatures=[{}] * 17),
            "or more than 16",
        ),
        (lambda found: found["dsseEnvelope"].update(signatures=[{"sig": "AA=="}]), "is by another key"),
        (lambda found: found["dsseEnvelope"].update(payloadType="text/plain"), "is by another key"),
        (lambda found: found.update(verificationMaterial=None), "by the certificate of an identity"),
    ],
)
def test_a_bundle_of_another_shape_is_refused(change: Callable[[Any], Any], says: str) -> None:
    def edit(bundle: bytes) -> bytes:
        found = json.loads(bundle)
        change(found)
        return json.dumps(found).encode()

    assert says in refusal(
        edited(signature("bundle-ecdsa"), edit), CASES["bundle-ecdsa"].target, signer_of("ecdsa")
    )


def test_one_of_several_signatures_of_an_envelope_suffices() -> None:
    bundle = json.loads(signature("bundle-ecdsa").content)
    envelope = bundle["dsseEnvelope"]
    envelope["signatures"].insert(0, {"sig": base64.b64encode(b"another's").decode(), "keyid": "x"})
    found = FoundSignature("test", DSSE_ENVELOPE, json.dumps(envelope).encode())
    assert signer_of("ecdsa").verify(found, CASES["bundle-ecdsa"].target, NOW) == Proof()


def test_a_classic_signature_needs_its_annotation() -> None:
    found = signature("classic-ecdsa")
    target, signer = CASES["classic-ecdsa"].target, signer_of("ecdsa")
    assert "no annotation" in refusal(replace(found, annotations={}), target, signer)
    assert "not base64" in refusal(replace(found, annotations={SIGNATURE: "?"}), target, signer)


# Keys


def pem(key: Any) -> bytes:
    return bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


def test_keys_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(SignerInvalid, match=r"weak.pub holds a key that cannot be used: give one of ECDSA"):
        VerificationKey(pem(rsa.generate_private_key(65537, 1024)), "weak.pub")
    with pytest.raises(SignerInvalid, match="give one of ECDSA"):
        VerificationKey(pem(ec.generate_private_key(ec.SECP256K1())), "coin.pub")
    with pytest.raises(SignerInvalid, match=r"text holds no public key in PEM"):
        VerificationKey(b"text", "text")
    with pytest.raises(SignerInvalid, match=r"none\.pub cannot be read: No such file"):
        VerificationKey.read(tmp_path / "none.pub")


# Keyless signatures


@pytest.mark.parametrize(
    ("issuer", "identity", "good"),
    [
        ("https://tokens.test", "https://git.test/acme/app/release@refs/tags/v1", True),
        ("https://*", "*@refs/tags/v*", True),
        ("https://tokens.test", "https://git.test/acme/app/release", False),
        ("tokens.test", "*", False),
        ("https://token?.test", "HTTPS://git.test/*", False),
    ],
)
def test_patterns_of_identities_match_as_a_whole(issuer: str, identity: str, good: bool) -> None:
    signer = KeylessSigner(DATA / "trusted_root.json", IdentityPattern(issuer, identity))
    assert bool(proofs(CASES["keyless"], signer)[0]) is good


def test_a_trusted_root_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    file = tmp_path / "root.json"
    with pytest.raises(SignerInvalid, match=r"root\.json cannot be read: No such file"):
        KeylessSigner(file, PATTERN)
    file.write_text("{}")
    with pytest.raises(SignerInvalid, match=r"root\.json is no "):
        KeylessSigner(file, PATTERN)
    root = json.loads((DATA / "trusted_root.json").read_text())
    file.write_text(json.dumps({**root, "tlogs": []}))
    with pytest.raises(SignerInvalid, match="no transparency log"):
        KeylessSigner(file, PATTERN)


@pytest.mark.parametrize(
    ("module", "make", "says"),
    [
        ("sigstore", lambda: KeylessSigner(DATA / "trusted_root.json", PATTERN), "the library sigstore"),
        (
            "cbor2",
            lambda: signer_of("notary-ec").verify(
                signature("notary-ec-cose"), CASES["notary-ec-cose"].target, NOW
            ),
            "the library cbor2",
        ),
    ],
)
def test_a_library_that_is_missing_is_named(
    module: str, make: Callable[[], Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [each for each in sys.modules if each.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SignerInvalid, match=rf"{says}: install entrepot\[policy\]"):
        make()


# Notary Project


@pytest.mark.parametrize(
    ("subject", "good"),
    [
        ("O=acme", True),
        ("C=FR,ST=75", True),
        ("CN=notary-rsa signer,O=acme", True),
        ("O=acme,L=Paris", False),
        ("O=Acme", False),
    ],
)
@pytest.mark.parametrize("form", ["jws", "cose"])
def test_the_subject_of_the_signer_is_compared(subject: str, good: bool, form: str) -> None:
    signer = NotarySigner(read_certificates(DATA / "notary-rsa.pem"), subject)
    proven, refused = proofs(CASES[f"notary-rsa-{form}"], signer)
    assert bool(proven) is good
    assert good or refused == [f"the signer is CN=notary-rsa signer,O=acme,ST=75,C=FR, not {subject}"]


def test_a_subject_that_is_none_is_named() -> None:
    with pytest.raises(SignerInvalid, match="'acme' is no subject: write it as O=acme,C=FR"):
        NotarySigner([], "acme")


@pytest.mark.parametrize("form", ["jws", "cose"])
def test_a_signature_is_known_until_it_expires(form: str) -> None:
    (proof,), _ = proofs(CASES[f"notary-unexpired-{form}"])
    (lasting,), _ = proofs(CASES[f"notary-ec-{form}"])
    assert proof.until and lasting.until and proof.until < lasting.until
    case = CASES[f"notary-unexpired-{form}"]
    found = signature(case.name)
    assert signer_of("notary-ec").verify(found, case.target, proof.until - timedelta(seconds=1)) == proof
    assert "the signature expired at" in refusal(found, case.target, signer_of("notary-ec"), proof.until)


def test_a_certificate_is_not_valid_before_its_time() -> None:
    case = CASES["notary-ec-jws"]
    early = NOW - timedelta(days=36500)
    assert "is not valid before" in refusal(signature(case.name), case.target, signer_of("notary-ec"), early)


def test_media_type_and_size_of_the_target_count() -> None:
    case = CASES["notary-ec-jws"]
    other = replace(case.target, size=case.target.size + 1)
    assert "another media type or size" in refusal(signature(case.name), other, signer_of("notary-ec"))


def jws(change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> FoundSignature:
    """A JWS whose envelope and protected header were changed."""
    envelope = json.loads(signature("notary-ec-jws").content)
    encoded = envelope["protected"]
    protected = json.loads(base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)))
    change(envelope, protected)
    if "protected" in envelope:
        rewritten = json.dumps(protected, separators=(",", ":")).encode()
        envelope["protected"] = base64.urlsafe_b64encode(rewritten).rstrip(b"=").decode()
    return FoundSignature("test", JWS, json.dumps(envelope).encode())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda envelope, _: envelope.pop("protected"), "has no protected"),
        (lambda envelope, _: envelope.pop("header"), "has no certificates"),
        (lambda envelope, _: envelope["header"].update(x5c=[]), "has no certificate, or more than 10"),
        (lambda envelope, _: envelope["header"].update(x5c=["AAAA"]), "cannot be read"),
        (lambda envelope, _: envelope.update(signature="a+b/"), "the signature is not base64url"),
        (lambda _, protected: protected.update(alg="none"), "the signature is by none, not ES384"),
        (lambda _, protected: protected.update(alg="HS256"), "the signature is by HS256, not ES384"),
        (lambda _, protected: protected.pop("crit"), "does not name its critical headers"),
        (lambda _, protected: protected.update({"io.cncf.notary.expiry": "x"}), "the content was changed"),
    ],
)
def test_a_jws_of_another_shape_is_refused(change: Callable[[Any, Any], Any], says: str) -> None:
    assert says in refusal(jws(change), CASES["notary-ec-jws"].target, signer_of("notary-ec"))


def cose(change: Callable[[list[Any]], Any]) -> FoundSignature:
    tagged = cbor2.loads(signature("notary-ec-cose").content)
    encoded, unprotected, *rest = tagged.value
    parts = [encoded, dict(unprotected), *rest]
    change(parts)
    return FoundSignature("test", COSE, cbor2.dumps(cbor2.CBORTag(18, parts)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda parts: parts.pop(), "is no COSE_Sign1"),
        (lambda parts: parts[1].pop(33), "has no certificates"),
        (lambda parts: parts.__setitem__(0, b""), "is not CBOR"),
        (lambda parts: parts.__setitem__(0, b"\x01"), "has no headers"),
        (
            lambda parts: parts.__setitem__(0, b"\xa2\x01\x26\x01\x26"),
            "is not CBOR that all readers",
        ),
        (lambda parts: parts.__setitem__(0, parts[0] + b"\0"), "bytes follow the envelope"),
        (
            lambda parts: parts.__setitem__(0, cbor2.dumps({1: [], 2: ["x"], 3: "y"})),
            "by an unknown algorithm",
        ),
        (lambda parts: parts.__setitem__(2, None), "has no payload"),
        (lambda parts: parts.__setitem__(3, b"short"), "the content was changed"),
    ],
)
def test_a_cose_of_another_shape_is_refused(change: Callable[[Any], Any], says: str) -> None:
    assert says in refusal(cose(change), CASES["notary-ec-cose"].target, signer_of("notary-ec"))


def test_bytes_after_an_envelope_are_refused() -> None:
    case = CASES["notary-ec-cose"]
    longer = edited(signature(case.name), lambda envelope: envelope + b"\0")
    assert "bytes follow" in refusal(longer, case.target, signer_of("notary-ec"))
    deep = FoundSignature("test", COSE, b"\x81" * 10_000)
    assert "is not CBOR" in refusal(deep, case.target, signer_of("notary-ec"))


def chain(name: str) -> list[x509.Certificate]:
    header = json.loads(signature(name).content)["header"]
    return parse_chain([base64.b64decode(each) for each in header["x5c"]])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda ec, rsa: [ec[0], rsa[1]], "is not issued by that of CN=notary-rsa root"),
        (lambda ec, rsa: [ec[1]], "is that of a CA: a signer has one of its own"),
        (lambda ec, rsa: [ec[0]], "is not issued by that of CN=notary-ec signer"),
        (lambda ec, rsa: [ec[1], ec[1]], "is that of a CA"),
        (lambda ec, rsa: [ec[0], ec[1], ec[0]], "is not issued by"),
    ],
)
def test_a_chain_is_checked_link_by_link(make: Callable[..., Any], says: str) -> None:
    links = make(chain("notary-ec-jws"), chain("notary-rsa-jws"))
    with pytest.raises(SignatureRefused, match=says):
        check_chain(links, links, NOW)


def issued(*extensions: x509.ExtensionType, critical: bool = True) -> list[x509.Certificate]:
    """A chain of a certificate with further extensions, and its authority."""
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, each)]) for each in ("signer", "root")]
    chain = []
    for number in range(2):
        purpose = usage(key_cert_sign=True) if number else usage(digital_signature=True)
        builder = (
            x509.CertificateBuilder()
            .subject_name(names[number])
            .issuer_name(names[1])
            .public_key(keys[number].public_key())
            .serial_number(number + 1)
            .not_valid_before(NOW - timedelta(days=1))
            .not_valid_after(NOW + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=bool(number), path_length=None), critical=True)
            .add_extension(purpose, critical=True)
        )
        for each in extensions if not number else ():
            builder = builder.add_extension(each, critical=critical)
        chain.append(builder.sign(keys[1], SHA256()))
    return chain


def test_a_critical_extension_that_is_not_understood_is_refused() -> None:
    unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")
    ignored = issued(unknown, critical=False)
    check_chain(ignored, ignored[1:], NOW)
    chain = issued(unknown)
    with pytest.raises(
        SignatureRefused, match=r"CN=signer has a critical extension, 1\.2\.3\.4, which is not"
    ):
        check_chain(chain, chain[1:], NOW)


@pytest.mark.parametrize(
    ("purpose", "good"),
    [
        (ExtendedKeyUsageOID.CODE_SIGNING, True),
        (ExtendedKeyUsageOID.SERVER_AUTH, False),
        (ExtendedKeyUsageOID.TIME_STAMPING, False),
    ],
)
def test_a_certificate_for_other_purposes_signs_no_code(purpose: x509.ObjectIdentifier, good: bool) -> None:
    chain = issued(x509.ExtendedKeyUsage([purpose]), critical=False)
    refused = pytest.raises(SignatureRefused, match="is made for other purposes than the signing of code")
    with nullcontext() if good else refused:
        check_chain(chain, chain[1:], NOW)


# Damage


def test_a_refusal_is_one_line_of_printable_text() -> None:
    hidden = "text\nWarning: x \x1b[2J\u202e" + "y" * 1000

    def edit(bundle: bytes) -> bytes:
        found = json.loads(bundle)
        found["verificationMaterial"]["publicKey"]["hint"] = hidden
        return json.dumps(found).encode()

    said = refusal(edited(signature("bundle-ecdsa"), edit), CASES["bundle-ecdsa"].target, signer_of("ecdsa"))
    assert said.startswith("the signature is by another key, text Warning: x ?[2J?yyy") and len(said) < 500


def damaged(content: bytes, chance: Random) -> bytes:
    """Some bytes of it are changed, lost or added; or, within JSON, a value, or the bytes that it encodes."""
    if content.startswith(b"{") and chance.random() < 0.6:
        tree = json.loads(content)
        holder, key = chance.choice(list(places(tree)))
        old = holder[key]
        if isinstance(old, str) and chance.random() < 0.7:
            with suppress(ValueError):
                inner = base64.b64decode(old + "=" * (-len(old) % 4))
                holder[key] = base64.b64encode(damaged(inner or b"x", chance)).decode()
                return json.dumps(tree).encode()
        holder[key] = chance.choice([None, 1, -1, 2**70, "", [], {}, True, 1.5, ["a"], {"a": 1}])
        return json.dumps(tree).encode()
    where, found = chance.randrange(len(content)), bytearray(content)
    junk = bytes(chance.choices(b'{}[]":,0aZ\x00\xff\xa1\x81', k=3))
    found[where : where + chance.choice((0, 1, 9))] = chance.choice((b"", junk))
    return bytes(found)


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from places(value)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.good])
def test_damage_is_refused_or_does_no_harm(name: str) -> None:
    """Whatever is changed, it is refused in words; or it was not signed, and proves what it did before."""
    case, chance = CASES[name], Random(name)
    refused = 0
    for original in signatures(case):
        for _ in range(25):
            forged = edited(original, lambda content: damaged(content, chance))
            try:
                assert signer_of(case.signer).verify(forged, case.target, NOW).predicate_type is None
            except SignatureRefused:
                refused += 1
    assert refused


def test_the_image_is_the_same_in_every_case() -> None:
    assert len({case.image for case in CASES.values() if case.name != "index"}) == 1
    assert all(Digest.of(content(digest)) == digest for case in CASES.values() for digest in case.manifests)

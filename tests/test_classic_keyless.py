"""Keyless signatures in cosign's classic form, made here: what no tool would write.

tests/test_signatures.py has those that cosign made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from proxy.signatures.errors import SignatureRefused, SignerInvalid
from proxy.signatures.forms import SIMPLE_SIGNING, FoundSignature, Proof
from proxy.signatures.keyless_signer import IdentityPattern, KeylessSigner
from storage.oci import OCI_MANIFEST, Descriptor, Digest
from tests.signing.authority import KeylessAuthority, b64, usage

AUTHORITY = KeylessAuthority()
CLAIMS = {"iss": "https://tokens.test", "sub": "https://git.test/acme/app"}
PATTERN = IdentityPattern("https://tokens.test", "https://git.test/acme/*")
DIGEST = Digest.of(b"the image")
TARGET = Descriptor(OCI_MANIFEST, DIGEST, 9)
NOW = datetime.now(UTC)
SIGNATURE, CERTIFICATE, LOG_ENTRY = (
    "dev.cosignproject.cosign/signature",
    "dev.sigstore.cosign/certificate",
    "dev.sigstore.cosign/bundle",
)
Edit = Callable[[Any], Any]


def nothing(value: Any) -> Any:
    return value


@dataclass
class Signed:
    """A signature.  `logged` changes the body that the log takes, `noted` what the annotation has of it."""

    by: KeylessAuthority = AUTHORITY
    key: Any = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    logged: Edit = nothing
    noted: Edit = nothing
    certificate: Edit = nothing

    def make(self) -> FoundSignature:
        simple = {
            "identity": {"docker-reference": "git.test/acme/app"},
            "image": {"docker-manifest-digest": DIGEST},
            "type": "cosign container image signature",
        }
        payload = json.dumps({"critical": simple, "optional": None}).encode()
        signature = b64(self.key.sign(payload, ec.ECDSA(SHA256())))
        pem = self.by.leaf(self.key.public_key(), CLAIMS).public_bytes(Encoding.PEM)
        spec = {
            "data": {"hash": {"algorithm": "sha256", "value": hashlib.sha256(payload).hexdigest()}},
            "signature": {"content": signature, "publicKey": {"content": b64(pem)}},
        }
        body = {"apiVersion": "0.0.1", "kind": "hashedrekord", "spec": spec}
        _, entry = self.by.entry(self.logged(body))
        promise = entry.pop("verification")["signedEntryTimestamp"]
        noted = self.noted({"SignedEntryTimestamp": promise, "Payload": entry})
        annotations = {
            SIGNATURE: signature,
            CERTIFICATE: self.certificate(pem).decode(),
            LOG_ENTRY: noted if isinstance(noted, str) else json.dumps(noted),
        }
        return FoundSignature("here", SIMPLE_SIGNING, payload, annotations)


def signer(directory: Path, root: Any = None) -> KeylessSigner:
    path = directory / "root.json"
    path.write_text(json.dumps(root or AUTHORITY.trusted_root()))
    return KeylessSigner(path, PATTERN)


@pytest.fixture(scope="module")
def trusting(tmp_path_factory: pytest.TempPathFactory) -> KeylessSigner:
    return signer(tmp_path_factory.mktemp("root"))


def refusal(believer: KeylessSigner, found: FoundSignature) -> str:
    with pytest.raises(SignatureRefused) as caught:
        believer.verify(found, TARGET, NOW)
    return str(caught.value)


def test_it_is_believed(trusting: KeylessSigner) -> None:
    assert trusting.verify(Signed().make(), TARGET, NOW) == Proof()


def put(*path: str, value: Any) -> Edit:
    """Change a member of an object."""

    def edit(found: Any) -> Any:
        inner = found
        for each in path[:-1]:
            inner = inner[each]
        inner[path[-1]] = value(inner[path[-1]]) if callable(value) else value
        return found

    return edit


OTHER = KeylessAuthority().root.public_bytes(Encoding.PEM)


@pytest.mark.parametrize(
    ("logged", "says"),
    [
        (put("kind", value="rekord"), "its log entry is of the kind rekord 0.0.1, not hashedrekord 0.0.1"),
        (put("kind", value="dsse"), "its log entry is of the kind dsse 0.0.1"),
        (put("apiVersion", value="0.0.2"), "its log entry is of the kind hashedrekord 0.0.2"),
        (put("kind", value=["x"] * 99), "its log entry is of the kind ['x'"),
        (put("spec", value=[]), "the log's entry has no data.hash.algorithm"),
        (put("spec", "data", "hash", "algorithm", value="sha1"), "its log entry is about other content"),
        (put("spec", "data", "hash", "value", value="0" * 64), "its log entry is about other content"),
        (put("spec", "data", "hash", "value", value=str.upper), "its log entry is about other content"),
        (
            put("spec", "signature", "publicKey", "content", value=b64(OTHER)),
            "its log entry is about another certificate",
        ),
        (
            put("spec", "signature", "publicKey", "content", value=b64(b"-----BEGIN PUBLIC KEY-----")),
            "it has no certificate that can be read, or several",
        ),
        (put("spec", "signature", "publicKey", value=[]), "its log entry is about another certificate"),
        (put("spec", "signature", "content", value="AAAA"), "its log entry is about another signature"),
        (put("spec", "signature", "content", value=7), "the log's entry has no signature.content"),
    ],
)
def test_an_entry_about_something_else(trusting: KeylessSigner, logged: Edit, says: str) -> None:
    assert refusal(trusting, Signed(logged=logged).make()).startswith(says)


def twice(found: Any) -> str:
    return json.dumps(found).replace('"Payload"', '"payload": {}, "Payload"', 1)


@pytest.mark.parametrize(
    ("noted", "says"),
    [
        (lambda found: "", "the log's entry is not JSON"),
        (lambda found: "[]", "the log's entry is no JSON object"),
        (lambda found: "{}", "the log's entry has no SignedEntryTimestamp"),
        (lambda found: "\udcff", "the log's entry is not JSON"),
        (twice, "the log's entry has keys that differ in case only"),
        (put("SignedEntryTimestamp", value="%"), "its signature is not base64"),
        (put("SignedEntryTimestamp", value=b64(b"x" * 70)), "its entry was changed"),
        (put("Payload", value=None), "the log's entry has no Payload.body"),
        (put("Payload", "body", value="%"), "the body of the entry is not base64"),
        (put("Payload", "body", value=b64(b"{}")), "its entry was changed"),
        (put("Payload", "body", value=b64(b'{"a":1,"a":2}')), "the log's entry is not JSON"),
        (
            put("Payload", "logID", value="0" * 64),
            "its entry is of the log 0000000000000000, which the trusted",
        ),
        (put("Payload", "logID", value=str.upper), "the log's entry names no log"),
        (put("Payload", "logID", value="x"), "the log's entry names no log"),
        (put("Payload", "logIndex", value=2), "its entry was changed"),
        (put("Payload", "logIndex", value=True), "the log's entry has no logIndex"),
        (put("Payload", "logIndex", value=-1), "the log's entry has no logIndex"),
        (put("Payload", "integratedTime", value=lambda at: at + 1), "its entry was changed"),
        (put("Payload", "integratedTime", value=10**15), "the log's entry has no integratedTime"),
        (put("Payload", "integratedTime", value=1.5), "the log's entry has no integratedTime"),
        (put("Payload", "integratedTime", value=0), "its entry is of the log "),
    ],
)
def test_an_entry_that_is_none(trusting: KeylessSigner, noted: Edit, says: str) -> None:
    assert refusal(trusting, Signed(noted=noted).make()).startswith(says)


def somebody_elses() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    return AUTHORITY.leaf(key.public_key(), CLAIMS).public_bytes(Encoding.PEM)


@pytest.mark.parametrize(
    ("certificate", "says"),
    [
        (lambda pem: b"", "it has no certificate that can be read, or several"),
        (lambda pem: pem + pem, "it has no certificate that can be read, or several"),
        (lambda pem: b"\xc3\xbc", "it has no certificate that can be read, or several"),
        (lambda pem: OTHER, "its certificate is not issued by an authority of the trusted root"),
        (
            lambda pem: AUTHORITY.root.public_bytes(Encoding.PEM),
            "its certificate is not",
        ),
        (
            lambda pem: AUTHORITY.leaf(
                ec.generate_private_key(ec.SECP256R1()).public_key(), CLAIMS
            ).public_bytes(Encoding.PEM),
            "the signature is by another key",
        ),
    ],
)
def test_another_certificate(trusting: KeylessSigner, certificate: Edit, says: str) -> None:
    assert refusal(trusting, Signed(certificate=certificate).make()).startswith(says)


# The trusted root


def test_when_logs_and_authorities_are_trusted(tmp_path: Path) -> None:
    found = Signed().make()
    past = {"start": "2020-01-01T00:00:00Z", "end": "2021-01-01T00:00:00Z"}
    for name, says in (
        ("tlogs", "its entry is of the log "),
        ("ctlogs", "its certificate is not in a log of certificates that is trusted"),
        ("authorities", "its certificate is not issued by an authority of the trusted root"),
    ):
        assert refusal(signer(tmp_path, AUTHORITY.trusted_root(**{name: past})), found).startswith(says)
    future = {"start": f"{NOW + timedelta(days=1):%Y-%m-%dT%H:%M:%SZ}"}
    assert refusal(signer(tmp_path, AUTHORITY.trusted_root(tlogs=future)), found).startswith(
        "its entry is of"
    )


def test_without_logs_of_certificates(tmp_path: Path) -> None:
    unlogged = AUTHORITY.with_other("certificate log")
    root = AUTHORITY.trusted_root() | {"ctlogs": []}
    assert signer(tmp_path, root).verify(Signed(unlogged).make(), TARGET, NOW) == Proof()


def test_a_log_with_a_key_of_another_kind_is_no_obstacle(tmp_path: Path) -> None:
    root = AUTHORITY.trusted_root()
    (log,) = root["tlogs"]
    root["tlogs"] = [{**log, "publicKey": {**log["publicKey"], "rawBytes": b64(b"what is it")}}, log]
    assert signer(tmp_path, root).verify(Signed().make(), TARGET, NOW) == Proof()


def test_certificates_between(tmp_path: Path) -> None:
    """As the public sigstore has: signers' certificates are issued by an intermediate authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "the root")])
    root = _authority(name, key.public_key(), name, key, 2)
    between = _authority(AUTHORITY.root.subject, AUTHORITY.root.public_key(), name, key, 0)
    trusted = AUTHORITY.trusted_root(chain=[between, root])
    assert signer(tmp_path, trusted).verify(Signed().make(), TARGET, NOW) == Proof()
    alone = AUTHORITY.trusted_root(chain=[root])
    assert "not issued by an authority" in refusal(signer(tmp_path, alone), Signed().make())


def _authority(
    subject: x509.Name, key: Any, issuer: x509.Name, by: ec.EllipticCurvePrivateKey, below: int
) -> x509.Certificate:
    identifier = x509.SubjectKeyIdentifier.from_public_key
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - timedelta(hours=1))
        .not_valid_after(NOW + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=below), critical=True)
        .add_extension(usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(identifier(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(by.public_key()), critical=False)
        .sign(by, SHA256())
    )


@pytest.mark.parametrize("content", ["", "{}", '{"mediaType": "x"}'])
def test_what_is_no_trusted_root(tmp_path: Path, content: str) -> None:
    path = tmp_path / "root.json"
    path.write_text(content)
    with pytest.raises(SignerInvalid, match="is no trusted root that can be used"):
        KeylessSigner(path, PATTERN)

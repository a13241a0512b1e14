"""A private authority for keyless signatures: what Fulcio, its log of certificates, and Rekor do.

cosign speaks to it over HTTP, so that the bundles are cosign's own.  It believes every token, and its log is
a tree of two entries, whose second is always the newest.  RFC 6962, sigstore's fulcio.proto and Rekor's
openapi.yaml say what the bytes are.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import time
from copy import copy
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

ISSUER_OID = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.8")
FORMER_ISSUER_OID = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.1")  # Fulcio writes both
SCT_OID = x509.ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")
ORIGIN = "log.test - 1"  # as Rekor 1 names a tree
FIRST = hashlib.sha256(b"\0first").digest()  # the hash of the first entry of the log
VALID = timedelta(minutes=10)


def b64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def spki(key: ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey) -> bytes:
    public = key.public_key() if isinstance(key, ec.EllipticCurvePrivateKey) else key
    return public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


class KeylessAuthority:
    """An authority with keys of its own."""

    def __init__(self) -> None:
        self._late = timedelta()
        self._ca, self._ct, self._log = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
        now = datetime.now(UTC)
        name = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "authority.test"),
                x509.NameAttribute(NameOID.COMMON_NAME, "authority.test"),
            ]
        )
        self._name = name
        self.root = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self._ca.public_key())
            .serial_number(1)
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=36500))
            .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
            .add_extension(usage(key_cert_sign=True, crl_sign=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._ca.public_key()), critical=False)
            .sign(self._ca, SHA256())
        )

    def with_other(self, part: Literal["authority", "log", "certificate log"]) -> KeylessAuthority:
        """The same authority, but for one part with a key of its own."""
        same, other = copy(self), KeylessAuthority()
        if part == "authority":
            same._ca, same.root, same._name = other._ca, other.root, other._name
        elif part == "log":
            same._log = other._log
        else:
            same._ct = other._ct
        return same

    def later(self, late: timedelta) -> KeylessAuthority:
        """The same authority, whose log takes entries so long after the signature."""
        same = copy(self)
        same._late = late
        return same

    def write(self, directory: Path) -> None:
        """Write what `cosign trusted-root create` reads."""
        (directory / "fulcio.pem").write_bytes(self.root.public_bytes(Encoding.PEM))
        (directory / "ct.pub").write_bytes(pem(self._ct))
        (directory / "log.pub").write_bytes(pem(self._log))

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/api/v2/signingCert", self._certify)
        app.router.add_post("/api/v1/signingCert", self._certify_formerly)
        app.router.add_post("/api/v1/log/entries", self._enter)
        return app

    async def _certify(self, request: web.Request) -> web.Response:
        asked = await request.json()
        key = load_pem_public_key(asked["publicKeyRequest"]["publicKey"]["content"].encode())
        chain = self._chain(key, request)
        return web.json_response({"signedCertificateEmbeddedSct": {"chain": {"certificates": chain}}})

    async def _certify_formerly(self, request: web.Request) -> web.Response:
        """As cosign 2 asks for it: fulcio, openapi of version 1."""
        asked = await request.json()
        key = load_pem_public_key(base64.b64decode(asked["publicKey"]["content"]))
        return web.Response(status=201, text="".join(self._chain(key, request)))

    def _chain(self, key: Any, request: web.Request) -> list[str]:
        token = request.headers["Authorization"].removeprefix("Bearer ").split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
        return [each.public_bytes(Encoding.PEM).decode() for each in (self.leaf(key, claims), self.root)]

    def leaf(self, key: Any, claims: dict[str, Any]) -> x509.Certificate:
        now = datetime.now(UTC)
        issuer = claims["iss"].encode()
        identity = claims.get("email") or claims["sub"]
        name: x509.GeneralName = (
            x509.RFC822Name(identity) if "@" in identity and ":" not in identity
            else x509.UniformResourceIdentifier(identity)
        )  # fmt: skip
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(seconds=5))
            .not_valid_after(now + VALID)
            .add_extension(usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._ca.public_key()), critical=False
            )
            .add_extension(x509.SubjectAlternativeName([name]), critical=True)
            .add_extension(
                x509.UnrecognizedExtension(ISSUER_OID, bytes([0x0C, len(issuer)]) + issuer), critical=False
            )
            .add_extension(x509.UnrecognizedExtension(FORMER_ISSUER_OID, issuer), critical=False)
        )
        tbs = builder.sign(self._ca, SHA256()).tbs_certificate_bytes
        listed = self._timestamp(tbs)
        return builder.add_extension(x509.UnrecognizedExtension(SCT_OID, listed), critical=False).sign(
            self._ca, SHA256()
        )

    def _timestamp(self, tbs: bytes) -> bytes:
        """The list of one signed certificate timestamp: RFC 6962, sections 3.2 and 3.3."""
        milliseconds = int(time.time() * 1000)
        ca = hashlib.sha256(spki(self._ca)).digest()
        signed = (
            struct.pack(">BBQH", 0, 0, milliseconds, 1) + ca + len(tbs).to_bytes(3, "big") + tbs + b"\0\0"
        )
        signature = self._ct.sign(signed, ec.ECDSA(SHA256()))
        log = hashlib.sha256(spki(self._ct)).digest()
        sct = b"\0" + log + struct.pack(">QH", milliseconds, 0) + b"\4\3" + struct.pack(">H", len(signature))
        sct += signature
        listed = struct.pack(">H", len(sct)) + sct
        listed = struct.pack(">H", len(listed)) + listed
        return b"\x04" + _length(len(listed)) + listed

    async def _enter(self, request: web.Request) -> web.Response:
        uuid, entry = self.entry(_logged(await request.json()))
        headers = {"ETag": uuid, "Location": f"/api/v1/log/entries/{uuid}"}
        return web.json_response({uuid: entry}, status=201, headers=headers)

    def entry(self, logged: Any) -> tuple[str, dict[str, Any]]:
        """The name of an entry with that body, and the entry, as Rekor answers it."""
        body = canonical(logged)
        at = int(time.time() + self._late.total_seconds())
        log_id = hashlib.sha256(spki(self._log)).digest()
        leaf = hashlib.sha256(b"\0" + body).digest()
        root = hashlib.sha256(b"\1" + FIRST + leaf).digest()
        note = f"{ORIGIN}\n2\n{b64(root)}\n"
        signed = self._log.sign(note.encode(), ec.ECDSA(SHA256()))
        checkpoint = f"{note}\n— log.test {b64(log_id[:4] + signed)}\n"
        entry = {"body": b64(body), "integratedTime": at, "logID": log_id.hex(), "logIndex": 1}
        promise = self._log.sign(canonical(entry), ec.ECDSA(SHA256()))
        proof = {
            "checkpoint": checkpoint, "hashes": [FIRST.hex()], "logIndex": 1, "rootHash": root.hex(),
            "treeSize": 2,
        }  # fmt: skip
        entry["verification"] = {"inclusionProof": proof, "signedEntryTimestamp": b64(promise)}
        return root.hex(), entry

    def trusted_root(self, chain: Any = None, **periods: dict[str, str]) -> dict[str, Any]:
        """What a trusted root file has.

        chain: the certificates of the authority, the root at the end
        periods: when tlogs, ctlogs and authorities are trusted; else always
        """
        always = {"start": "2020-01-01T00:00:00Z"}
        logs = {
            name: [
                {
                    "baseUrl": f"http://{name}.test",
                    "hashAlgorithm": "SHA2_256",
                    "publicKey": {
                        "rawBytes": b64(spki(key)),
                        "keyDetails": "PKIX_ECDSA_P256_SHA_256",
                        "validFor": periods.get(name, always),
                    },
                    "logId": {"keyId": b64(hashlib.sha256(spki(key)).digest())},
                }
            ]
            for name, key in (("tlogs", self._log), ("ctlogs", self._ct))
        }
        listed = [{"rawBytes": b64(each.public_bytes(Encoding.DER))} for each in chain or [self.root]]
        authority = {
            "subject": {"organization": "authority.test", "commonName": "authority.test"},
            "uri": "http://fulcio.test",
            "certChain": {"certificates": listed},
            "validFor": periods.get("authorities", always),
        }
        kind = "application/vnd.dev.sigstore.trustedroot+json;version=0.1"
        return {"mediaType": kind, "certificateAuthorities": [authority], **logs}


def _logged(proposed: dict[str, Any]) -> dict[str, Any]:
    """What the log keeps of a proposed entry."""
    if proposed["kind"] != "dsse":
        return proposed
    content = proposed["spec"]["proposedContent"]
    envelope = json.loads(content["envelope"])
    payload = base64.b64decode(envelope["payload"])
    spec = {
        "envelopeHash": _hash(content["envelope"].encode()),
        "payloadHash": _hash(payload),
        "signatures": [
            {"signature": each["sig"], "verifier": content["verifiers"][0]} for each in envelope["signatures"]
        ],
    }
    return {"apiVersion": proposed["apiVersion"], "kind": "dsse", "spec": spec}


def _hash(content: bytes) -> dict[str, str]:
    return {"algorithm": "sha256", "value": hashlib.sha256(content).hexdigest()}


def _length(size: int) -> bytes:
    if size < 0x80:
        return bytes([size])
    encoded = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([0x80 | len(encoded)]) + encoded


def usage(**on: bool) -> x509.KeyUsage:
    names = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**{each: on.get(each, False) for each in names})

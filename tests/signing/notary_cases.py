"""Images that are signed for Notary Project."""

from __future__ import annotations

import base64
import json
import time
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.signing.authority import usage
from tests.signing.maker import (
    Case,
    Maker,
    digest_of,
    encoded,
    move_tag,
    signature_tag,
)


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

"""A private timestamp authority (RFC 3161), whose answers `openssl ts` makes."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.signing.authority import usage

_CONFIGURATION = """
[tsa]
default_tsa = test
[test]
serial = serial
default_policy = 1.2.3.4.1
digests = sha256, sha384, sha512
signer_digest = sha256
ess_cert_id_alg = sha256
"""


class TimestampAuthority:
    """An authority with keys of its own, which it keeps in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir()
        (directory / "ts.cnf").write_text(_CONFIGURATION)
        (directory / "serial").write_text("01\n")
        keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
        names = [_name(each) for each in ("timestamps.test", "timestamps.test root")]
        now, chain = datetime.now(UTC), []
        for number, key in enumerate(keys):
            builder = (
                x509.CertificateBuilder()
                .subject_name(names[number])
                .issuer_name(names[1])
                .public_key(key.public_key())
                .serial_number(number + 1)
                .not_valid_before(now - timedelta(hours=1))
                .not_valid_after(now + timedelta(days=36500))
                .add_extension(x509.BasicConstraints(ca=bool(number), path_length=None), critical=True)
                .add_extension(
                    usage(key_cert_sign=True) if number else usage(digital_signature=True), critical=True
                )
            )
            if not number:
                purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.TIME_STAMPING])
                builder = builder.add_extension(purpose, critical=True)
            chain.append(builder.sign(keys[1], SHA256()).public_bytes(Encoding.PEM))
        (directory / "signer.pem").write_bytes(chain[0])
        (directory / "root.pem").write_bytes(chain[1])
        self.chain = directory / "chain.pem"
        self.chain.write_bytes(b"".join(chain))
        private = keys[0].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (directory / "key.pem").write_bytes(private)

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/{path:.*}", self._stamp)
        return app

    async def _stamp(self, request: web.Request) -> web.Response:
        (self._directory / "query").write_bytes(await request.read())
        command = [
            shutil.which("openssl") or "openssl", "ts", "-reply", "-config", "ts.cnf", "-queryfile", "query",
            "-signer", "signer.pem", "-inkey", "key.pem", "-chain", "root.pem", "-out", "reply",
        ]  # fmt: skip
        await asyncio.to_thread(subprocess.run, command, cwd=self._directory, check=True, capture_output=True)
        reply = (self._directory / "reply").read_bytes()
        return web.Response(body=reply, content_type="application/timestamp-reply", status=201)


def _name(text: str) -> x509.Name:
    attributes = ((NameOID.ORGANIZATION_NAME, "timestamps.test"), (NameOID.COMMON_NAME, text))
    return x509.Name([x509.NameAttribute(*each) for each in attributes])

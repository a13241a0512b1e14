"""Certificates made on the spot, as files: a server's, and those of its clients."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime
from pathlib import Path

import trustme


class Authority:
    """Issues certificates into `directory`, as NAME.crt and NAME.key; its own is `ca`."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self._directory = directory
        self._ca = trustme.CA(organization_name=name)
        self.ca = directory / f"{name}.pem"
        self._ca.cert_pem.write_to_path(str(self.ca))

    def issue(
        self, name: str, *identities: str, common_name: str | None = None, expires: float | None = None
    ) -> dict[str, str]:
        """`certificate` and `key` as a configuration has them; a file that is there is replaced at once."""
        after = None if expires is None else datetime.fromtimestamp(expires, UTC)
        issued = self._ca.issue_cert(
            *(identities or ("127.0.0.1", "localhost")), common_name=common_name, not_after=after
        )
        certificate, key = self._directory / f"{name}.crt", self._directory / f"{name}.key"
        replace(certificate, b"".join(each.bytes() for each in issued.cert_chain_pems))
        replace(key, issued.private_key_pem.bytes())
        return {"certificate": str(certificate), "key": str(key)}

    def write_key(self) -> None:
        """Its own key, beside `ca`, for a server that issues certificates in its name."""
        self._ca.private_key_pem.write_to_path(str(self.ca.with_suffix(".key")))

    def client(self, own: dict[str, str] | None = None) -> ssl.SSLContext:
        """Of a client that trusts it, and shows `own`."""
        context = ssl.create_default_context(cafile=self.ca)
        if own is not None:
            context.load_cert_chain(own["certificate"], own["key"])
        return context


def replace(path: Path, content: bytes) -> None:
    path.with_suffix(".new").write_bytes(content)
    path.with_suffix(".new").rename(path)

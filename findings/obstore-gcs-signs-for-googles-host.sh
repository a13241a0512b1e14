#!/usr/bin/env bash
# Expected: a signed URL of obstore's GCSStore is valid for the host in it, also where `base_url` names another one,
#   as those of S3Store with an `endpoint` are.
# Actual: the URL has the host of `base_url`, and its signature is one for `host: storage.googleapis.com`.
# Versions: obstore 0.12.1, cryptography 50.0.2 (PyPI).
# Why a registry cache must care: clients that are redirected to a bucket by another name than Google's are refused
#   there, unless what answers at that name forwards requests with Google's `Host`.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install --disable-pip-version-check obstore==0.12.1 cryptography==50.0.2
cd "$work"
timeout 60 "$work/venv/bin/python" - <<'PYTHON'
import hashlib
import json
import sys
from datetime import timedelta
from urllib.parse import parse_qsl, quote, urlsplit

import obstore
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from obstore.store import GCSStore

OWN, GOOGLE = "https://images.example", "storage.googleapis.com"
key = rsa.generate_private_key(65537, 2048)
form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
account = {"client_email": "a@b.example", "private_key_id": "1", "private_key": key.private_bytes(*form).decode()}
store = GCSStore("bucket", service_account_key=json.dumps(account), base_url=OWN)
url = urlsplit(obstore.sign(store, "GET", "an/object", timedelta(minutes=1)))
given = dict(parse_qsl(url.query))
signature = bytes.fromhex(given.pop("X-Goog-Signature"))
query = "&".join(f"{quote(name, '')}={quote(value, '')}" for name, value in sorted(given.items()))


def valid(host: str) -> bool:
    """Whether it is the signature of a request to that host, by Google's V4 signing process."""
    lines = ["GET", url.path, query, f"host:{host}", "", "host", "UNSIGNED-PAYLOAD"]
    hashed = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    scope = given["X-Goog-Credential"].partition("/")[2]
    text = "\n".join([given["X-Goog-Algorithm"], given["X-Goog-Date"], scope, hashed])
    try:
        key.public_key().verify(signature, text.encode(), padding.PKCS1v15(), hashes.SHA256())
    except InvalidSignature:
        return False
    return True


print(f"the URL leads to {url.netloc}")
for host in (url.netloc, GOOGLE):
    print(f"  its signature is valid for host {host}: {valid(host)}")
sys.exit(0 if not valid(url.netloc) and valid(GOOGLE) else 1)
PYTHON

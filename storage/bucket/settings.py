"""Which bucket it is, and how it is reached: the settings, and what obstore makes of them.

Credentials that are not set are those of each cloud's chain: environment, files, identity of the instance.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, S3Store

from storage.bucket.failures import explain

ObjectStore: TypeAlias = Any  # obstore's stores, which its functions take, have no common type

SCHEMES = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}
# A request takes as long as its client reads; what does not move for this long has broken.
_CLIENT = {"connect_timeout": "5s", "read_timeout": "60s", "timeout": "12h", "user_agent": "entrepot"}
_RETRY = {
    "max_retries": 3,
    "retry_timeout": timedelta(seconds=30),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=2)},
}
_GENERIC = re.compile(r"^Generic \w+ error: ")
# What to do, by what obstore says of settings.
_FAULTS = {
    "Account must be specified": "set access_key to the account",
    "Invalid Access Key": "set secret_key to a key of the account",
    "service account": "set secret_key to the key of a service account, as JSON",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketSettings:
    """A bucket, and how it is reached.  What is empty is up to the cloud.

    url: s3://<bucket>/<prefix>, gs://<bucket>/<prefix> or az://<container>/<prefix>
    endpoint: the URL of the service, for what is compatible with S3 or Azure
    access_key, secret_key, session_token: of S3; of Azure the first two are the account and its key, and of
        Google the second is the key of a service account, as JSON
    encryption, encryption_key: `AES256`, `aws:kms` or `aws:kms:dsse`, and the id of a KMS key
    ca: a file of certificates that are trusted besides those of the system
    """

    url: str
    endpoint: str = ""
    region: str = ""
    access_key: str = ""
    secret_key: str = ""
    session_token: str = ""
    storage_class: str = ""
    encryption: str = ""
    encryption_key: str = ""
    ca: Path | None = None
    proxy: str = ""

    def connect(self) -> ObjectStore:
        """The bucket, of which nothing is asked yet.  Raises ValueError; OSError if a file is unreadable."""
        parts = urlsplit(self.url)
        if self.endpoint and not self.endpoint.startswith(("http://", "https://")):
            raise ValueError(f"endpoint is {self.endpoint!r}, but must begin with https:// or http://")
        client: dict[str, Any] = {**_CLIENT, "allow_http": self.endpoint.startswith("http://")}
        if self.ca is not None:
            client["root_certificate"] = self.ca.read_bytes()
        if self.proxy:
            client["proxy_url"] = self.proxy
        options = {name: value for name, value in self._options(parts.scheme).items() if value}
        try:
            made: ObjectStore = SCHEMES[parts.scheme](
                parts.netloc,
                prefix=parts.path.strip("/") or None,
                client_options=client,
                retry_config=_RETRY,
                **options,
            )
        except (BaseError, ValueError) as error:
            raise ValueError(self._fault(explain(error).raw)) from None
        return made

    def _fault(self, said: str) -> str:
        """What is wrong with the settings, of which obstore has said something."""
        if "certificates" in said:
            return f"ca: {self.ca} has no certificates in PEM form"
        advice = next((advice for word, advice in _FAULTS.items() if word in said), "compare docs/fleet.md")
        return f"{_GENERIC.sub('', said)}; {advice}"

    def _options(self, scheme: str) -> dict[str, str | bool]:
        if scheme == "gs":
            return {"service_account_key": self.secret_key, "base_url": self.endpoint}
        if scheme == "az":
            return {
                "account_name": self.access_key,
                "account_key": self.secret_key,
                "endpoint": self.endpoint,
            }
        return {
            "access_key_id": self.access_key,
            "secret_access_key": self.secret_key,
            "session_token": self.session_token,
            "endpoint": self.endpoint,
            "region": self.region,
            "server_side_encryption": self.encryption,
            "sse_kms_key_id": self.encryption_key,
            # TLS protects the content on its way; without, a hash of each part does, at the cost of reading.
            "unsigned_payload": not self.endpoint.startswith("http://"),
        }

"""A credential provider: logins that a server of secrets with the API of Vault keeps (KV, version 2).

The secret <mount>/<path>/<host> has the keys `username` and `password`.
"""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp

from proxy.extensions.protocols import CredentialProvider, HostLogin


@dataclass
class VaultSettings:
    """The file holds the token for the server; it is read each time, since tokens are renewed."""

    address: str
    token_file: Path
    mount: str = "secret"
    path: str = "registries"
    valid_for: float = 300.0

    def __post_init__(self) -> None:
        url = urlsplit(self.address)
        if url.scheme != "https" and (url.scheme, url.hostname) != ("http", "127.0.0.1"):
            raise ValueError("address: must begin with https://, or http://127.0.0.1")


class Vault(CredentialProvider):
    """Is asked for each repository, once in `valid_for` seconds, and again when the login was refused."""

    protocol = 1
    Settings = VaultSettings

    def __init__(self, settings: VaultSettings) -> None:
        self._settings = settings

    async def get(self, host: str, repository: str) -> HostLogin | None:
        of = self._settings
        url = f"{of.address}/v1/{of.mount}/data/{of.path}/{host}"
        headers = {"X-Vault-Token": of.token_file.read_text().strip()}
        async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as response:
            if response.status == 404:
                return None
            response.raise_for_status()
            found = (await response.json())["data"]["data"]
        return HostLogin(found["username"], found["password"], of.valid_for)

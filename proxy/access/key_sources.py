"""The keys of the issuers of a configuration."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from proxy.access.issuer_keys import IssuerKeys, KeyFile, KeySource
from proxy.config.errors import StartError
from proxy.config.oidc import OIDCIssuer
from proxy.connections.failures import file_fault
from proxy.upstream.connect import Connect
from storage.shared import SharedState


def key_sources(
    issuers: Mapping[str, OIDCIssuer],
    clock: Callable[[], float] = time.time,
    shared: SharedState | None = None,
) -> dict[str, KeySource]:
    """Where the keys of each issuer come from.  Nothing is fetched yet.

    It is called inside a running event loop.  Raises StartError for a file that cannot be used.
    """
    return {name: _source(name, each, clock, shared) for name, each in issuers.items()}


def _source(
    name: str, issuer: OIDCIssuer, clock: Callable[[], float], shared: SharedState | None
) -> KeySource:
    path = f"access.oidc.{name}"
    if (file := issuer.jwks_file) is not None:
        try:
            return KeyFile(file)
        except OSError as error:
            raise StartError(f"{file} ({path}.jwks_file): {file_fault(error)}") from None
        except ValueError as error:
            raise StartError(f"{file} ({path}.jwks_file): {error}") from None
    try:
        if issuer.token_file is not None:
            issuer.token_file.open("rb").close()
    except OSError as error:
        raise StartError(f"{issuer.token_file} ({path}.token_file): {file_fault(error)}") from None
    try:
        return IssuerKeys(
            name,
            issuer.issuer,
            issuer.jwks_url,
            Connect(ca_file=issuer.ca_file, proxy=issuer.proxy),
            token_file=issuer.token_file,
            keep=issuer.keep_keys,
            clock=clock,
            shared=shared,
        )
    except OSError as error:
        raise StartError(f"{issuer.ca_file} ({path}.ca_file): {file_fault(error)}") from None

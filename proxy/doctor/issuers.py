"""The checks of the issuers of tokens (access.oidc): whether their keys can be had, and their clocks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from proxy.access.issuer_keys import IssuerKeys, KeySource
from proxy.access.key_sources import key_sources
from proxy.config.errors import StartError
from proxy.config.oidc import OIDCIssuer
from proxy.doctor.checks import Check, check_skew, failed, ok
from storage.errors import Unavailable

MAX_SKEW = (
    30.0  # seconds between two clocks; tokens are accepted up to twice that before and after their time
)


async def check(issuers: Mapping[str, OIDCIssuer], clock: Callable[[], float] = time.time) -> list[Check]:
    """The checks of all issuers; each that is not known by a file is asked for its keys."""
    checks: list[Check] = []
    for each in await asyncio.gather(*(_check(name, issuer, clock) for name, issuer in issuers.items())):
        checks += each
    return checks


async def _check(name: str, issuer: OIDCIssuer, clock: Callable[[], float]) -> list[Check]:
    try:
        source = key_sources({name: issuer}, clock)[name]
    except StartError as error:
        return [failed("issuer", name, str(error), f"check the files of access.oidc.{name}")]
    try:
        return await _ask(name, issuer, source)
    finally:
        await source.close()


async def _ask(name: str, issuer: OIDCIssuer, source: KeySource) -> list[Check]:
    try:
        keys = await source.keys(None)
    except Unavailable as error:
        reason = source.failure if isinstance(source, IssuerKeys) else str(error)
        advice = (
            f"check issuer, jwks_url, ca_file, token_file and proxy of access.oidc.{name}, or set jwks_file"
        )
        return [failed("issuer", name, f"{issuer.asked}: {reason}", advice)]
    named = ", ".join(keys.names()[:3]) + (", …" if len(keys.keys) > 3 else "")
    found = ok("issuer", name, f"its keys can be had: {named}")
    return [found, *(check_skew(name, source.ahead, MAX_SKEW) if isinstance(source, IssuerKeys) else [])]

"""The section `peers`: the replicas of a fleet, which ask each other before they ask an upstream."""

from __future__ import annotations

import re
from typing import Annotated

import msgspec

from proxy.config.fields import File, Section
from proxy.config.hosts import parse_url, parse_urls
from proxy.config.values import Secret, parse_secret, parse_text

SHORTEST = 16  # characters of a secret
_SERVICE = re.compile(r"([A-Za-z0-9._-]+):([0-9]{1,5})", re.ASCII)


def parse_service(value: object) -> tuple[str, int]:
    """The name that resolves to the addresses of all replicas, and their port."""
    found = _SERVICE.fullmatch(parse_text(value))
    if found is None or not 0 < int(found[2]) < 65536:
        raise ValueError("expected NAME:PORT, such as entrepot-peers.registry.svc:5000")
    return found[1], int(found[2])


def parse_fleet_secret(value: object) -> Secret:
    secret = parse_secret(value)
    if len(secret) < SHORTEST or not secret.isascii() or " " in secret:
        raise ValueError(f"needs {SHORTEST} characters or more, of ASCII and without spaces")
    return secret


class PeersConfig(Section, frozen=True):
    """The replicas of a fleet, all with the same configuration.

    dns: a name that resolves to the addresses of all replicas, and their port
    urls: in place of `dns`, the URLs of all replicas, as they reach each other
    own: which of them this server is; by default the one at an address of this machine and the port of
        `listen`
    secret: what requests between replicas carry
    ca_file: certificates that are trusted besides those of the system
    """

    secret: Annotated[Secret, parse_fleet_secret]
    dns: Annotated[tuple[str, int] | None, parse_service] = None
    urls: Annotated[tuple[str, ...], parse_urls] = ()
    own: Annotated[str | None, parse_url] = msgspec.field(default=None, name="self")
    ca_file: File | None = None

    def __post_init__(self) -> None:
        if (self.dns is None) == (not self.urls):
            raise ValueError("needs either dns, such as entrepot-peers:5000, or urls, a list of all replicas")
        if self.urls and self.own is not None and self.own not in self.urls:
            raise ValueError(f"self is {self.own}, which is none of urls: write it as it is there")

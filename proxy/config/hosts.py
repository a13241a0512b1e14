"""What a value of the configuration may be that says where something is: hosts, addresses, URLs.

The parsers are like those of proxy.values.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from proxy.config.values import Secret, parse_secret, parse_text

if TYPE_CHECKING:
    from yarl import URL

_NAME = re.compile(r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*(?::[0-9]{1,5})?")
_HOST = re.compile(rf"{_NAME.pattern}|\[[0-9a-f:.]+\](?::[0-9]{{1,5}})?")
_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.%\w-]+)\]|([A-Za-z0-9._-]*)):([0-9]{1,5})", re.ASCII)
_AUTHORITY = r"(?:[a-zA-Z0-9._-]+|\[([0-9a-fA-F:.]+)\])(?::([0-9]{1,5}))?"
_URL = re.compile(rf"https?://{_AUTHORITY}(?:/[a-zA-Z0-9._~-]+)*/?")
_PROXY = re.compile(rf"http://(?:[^@/\s]+@)?{_AUTHORITY}/?")
_REALM = re.compile(rf"https?://{_AUTHORITY}(?:/[^\s\"\\#]*)?", re.ASCII)
_TARGET = re.compile(rf"https?://{_AUTHORITY}(?:[/?][!-~]*)?")
# Every address of the machine, and where this machine reaches a listener on it.
_EVERYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen.  `host` "" is every address of the machine, `port` 0 any free one."""

    host: str
    port: int

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def everywhere(self) -> bool:
        """Whether it stands for every address of the machine."""
        return self.host in _EVERYWHERE

    @property
    def local_host(self) -> str:
        """The host at which this machine reaches who listens there."""
        return _EVERYWHERE.get(self.host, self.host)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(value: object) -> Address:
    """`host:port`, `[::1]:port`, or `:port` for every address."""
    found = _ADDRESS.fullmatch(value) if isinstance(value, str) else None
    if not found or int(found[3]) > 65535:
        raise ValueError("expected host:port in quotes, such as '127.0.0.1:5000', '[::1]:5000' or ':5000'")
    if found[1]:
        ipaddress.IPv6Address(found[1])
    return Address(found[1] or found[2], int(found[3]))


def parse_admin(value: object) -> Address | None:
    """As parse_address, or None for `off`, which YAML reads as false."""
    return None if value is False or value == "off" else parse_address(value)


def parse_network(value: object) -> Network:
    """An address, or a range of them in CIDR notation."""
    text = parse_text(value)
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        hint = ": its last bits must be 0" if "host bits" in str(error) else ""
        raise ValueError(f"expected an address or a range such as 10.0.0.0/8 or fd00::/8{hint}") from None


def parse_realm(value: object) -> str:
    """Where a token server is; a URL that stands in a header between quotes."""
    text = parse_text(value)
    if not _REALM.fullmatch(text):
        raise ValueError("expected the URL of a token server, such as https://auth.example/token")
    return text


def parse_name(value: object) -> str:
    """A namespace's name: a host, with a port where it has one, or a plain word."""
    text = parse_text(value)
    if not _NAME.fullmatch(text):
        raise ValueError("expected a host, with or without :port, or a plain word, in lower case")
    return text


def parse_host(value: object) -> str:
    text = parse_text(value)
    if not _HOST.fullmatch(text):
        raise ValueError("expected a host, with or without :port, in lower case")
    return text


def parse_url(value: object) -> str:
    """Where a registry is; without a slash at its end."""
    text = parse_text(value)
    if not text.startswith(("https://", "http://")):
        raise ValueError("must begin with https:// or http://")
    if "@" in text:
        raise ValueError("must hold no user name: use the keys username and password")
    if "?" in text or "#" in text:
        raise ValueError("must hold no query and no fragment")
    if not _has_authority(_URL.fullmatch(text)):
        raise ValueError("expected https://host, https://host:port or https://host/path")
    text = text.removesuffix("/")
    if text.endswith("/v2"):
        raise ValueError("leave /v2 out: it is added to every request")
    return text


def parse_urls(value: object) -> tuple[str, ...]:
    """Where a registry is, and where else: a URL, or a list of them in the order to try."""
    if not isinstance(value, list):
        return (parse_url(value),)
    if not value:
        raise ValueError("names none")
    urls: list[str] = []
    for number, each in enumerate(value):
        try:
            urls.append(parse_url(each))
        except ValueError as error:
            raise ValueError(f"[{number}]: {error}") from None
    if len(set(urls)) < len(urls):
        raise ValueError("names one twice")
    return tuple(urls)


def parse_target(value: object) -> Secret:
    """Where to POST to; a Secret because many a receiver knows its callers by path or query."""
    text = parse_secret(value)
    if not text.startswith(("https://", "http://")):
        raise ValueError("must begin with https:// or http://")
    if "@" in text.partition("//")[2].partition("/")[0]:
        raise ValueError("must hold no user name: send an Authorization header (headers)")
    if "#" in text or not _has_authority(_TARGET.fullmatch(text)):
        raise ValueError("expected https://host, https://host:port/path or https://host/path?query")
    return text


def parse_proxy(value: object) -> Secret:
    """A Secret because `http://user:password@host:port` is allowed."""
    text = parse_secret(value)
    if not _has_authority(_PROXY.fullmatch(text)):
        raise ValueError("expected http://host:port or http://user:password@host:port")
    return text


def _has_authority(found: re.Match[str] | None) -> bool:
    """Whether a URL's host and port, groups 1 (IPv6) and 2, are possible ones.  Raises ValueError."""
    if not found:
        return False
    if found[1]:
        ipaddress.IPv6Address(found[1])
    return not found[2] or 0 < int(found[2]) < 65536


def without_port(name: str) -> str:
    """A host's name as it is compared: without the ports that are the schemes' own."""
    host, _, port = name.rpartition(":")
    return host if port in ("443", "80") else name


def is_host(name: str) -> bool:
    """Whether clients take the first component of an image name for a registry's host."""
    return "." in name or ":" in name or name == "localhost"


def parse_server(text: str) -> URL:
    """The address of an admin listener, as given by --server; http:// may be left out."""
    from yarl import URL

    try:
        url = URL(text if "//" in text else f"http://{text}")
        if url.host and url.scheme in ("http", "https"):
            return url
    except ValueError:
        pass
    raise ValueError(f"--server {text}: expected an address such as http://127.0.0.1:5001")


def local_url(scheme: str, address: Address) -> URL:
    """Where this machine reaches who listens at `address`."""
    from yarl import URL

    return URL.build(scheme=scheme, host=address.local_host, port=address.port)

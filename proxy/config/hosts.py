"""Hosts, addresses and URLs, as an operator writes them.

A `parse_` function takes a value as YAML gives it, and raises ValueError with half a sentence that follows
the name of the key.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias
from urllib.parse import urlsplit

from proxy.config.values import LABEL, Secret, parse_secret, parse_text

if TYPE_CHECKING:
    from yarl import URL

NAME = re.compile(rf"{LABEL.pattern}(?::[0-9]{{1,5}})?")  # a host that is a name, with or without a port
IPV6 = re.compile(r"\[[0-9a-f:.]+\](?::[0-9]{1,5})?")  # a host that is an address, which is not checked
_IN_PATH = re.compile(r"(.+)_([0-9]{1,5})")
_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.%\w-]+)\]|([A-Za-z0-9._-]*)):([0-9]{1,5})", re.ASCII)
_AUTHORITY = r"(?:[a-zA-Z0-9._-]+|\[([0-9a-fA-F:.]+)\])(?::([0-9]{1,5}))?"
_URL = re.compile(rf"https?://{_AUTHORITY}(?:/[a-zA-Z0-9._~-]+)*/?")
_PROXY = re.compile(rf"http://(?:[^@/\s]+@)?{_AUTHORITY}/?")
_REALM = re.compile(rf"https?://{_AUTHORITY}(?:/[^\s\"\\#]*)?", re.ASCII)
_TARGET = re.compile(rf"https?://{_AUTHORITY}(?:[/?][!-~]*)?")
# Hosts that stand for every address of the machine, and where to connect from this machine.
_EVERYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
_WILDCARDS = {"0.0.0.0", "::"}
_HOSTS = {"": ("0.0.0.0", "::"), "localhost": ("127.0.0.1", "::1")}  # that stand for several addresses

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

# Translated to the IPv4 address in its last 32 bits: RFC 6052, section 2.1.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# Not global either, though not every version of Python knows: addresses of protocols and of one site, those
# that hold an IPv4 address in another way, and that of Azure's metadata.
_NOT_GLOBAL: list[Network] = [
    *map(ipaddress.IPv4Network, ("192.0.0.0/24", "168.63.129.16")),
    *map(ipaddress.IPv6Network, ("::/96", "::ffff:0:0:0/96", "64:ff9b:1::/48", "2002::/16", "fec0::/10")),
]


@dataclass(frozen=True, slots=True)
class Address:
    """The address of a listener.  An empty `host` is every address of the machine, `port` 0 any free port."""

    host: str
    port: int

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        return is_loopback(self.host)

    @property
    def public(self) -> bool:
        """Whether it is an address outside of private networks."""
        try:
            return ipaddress.ip_address(self.host).is_global
        except ValueError:
            return False

    @property
    def everywhere(self) -> bool:
        """Whether the host stands for every address of the machine."""
        return self.host in _EVERYWHERE

    @property
    def local_host(self) -> str:
        """The host to connect to from this machine."""
        return _EVERYWHERE.get(self.host, self.host)

    def overlaps(self, other: Address) -> bool:
        """Whether one socket cannot listen on this address while another listens on the other one."""
        if not self.port or self.port != other.port:
            return False
        return any(
            mine == theirs or ((":" in mine) == (":" in theirs) and {mine, theirs} & _WILDCARDS)
            for mine in _HOSTS.get(self.host, (self.host,))
            for theirs in _HOSTS.get(other.host, (other.host,))
        )

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


# Listeners


def parse_address(value: object) -> Address:
    """`host:port`, `[::1]:port`, or `:port` for every address."""
    found = _ADDRESS.fullmatch(value) if isinstance(value, str) else None
    if not found or int(found[3]) > 65535:
        raise ValueError("expected host:port in quotes, such as '127.0.0.1:5000', '[::1]:5000' or ':5000'")
    if found[1]:
        ipaddress.IPv6Address(found[1])
    return Address(found[1] or found[2], int(found[3]))


def parse_admin(value: object) -> Address | None:
    """An address, or None for `off`, which YAML reads as false."""
    return None if value is False or value == "off" else parse_address(value)


def parse_server(text: str) -> URL:
    """The URL of an admin listener, from the option --server; without a scheme, http.  Raises ValueError."""
    from yarl import URL

    try:
        url = URL(text if "//" in text else f"http://{text}")
        if url.host and url.scheme in ("http", "https"):
            return url
    except ValueError:
        pass
    raise ValueError(f"--server {text}: expected an address such as http://127.0.0.1:5001")


def local_url(scheme: str, address: Address) -> URL:
    """The URL of a listener, as seen from this machine."""
    from yarl import URL

    return URL.build(scheme=scheme, host=address.local_host, port=address.port)


# Hosts and networks


def parse_name(value: object) -> str:
    """The name of a namespace: a host with an optional port, or a plain word; IPv6 addresses in brackets."""
    return _host(value, "expected a host, with or without :port, or a plain word, all in lower case")


def parse_host(value: object) -> str:
    return _host(value, "expected a host, with or without :port, in lower case")


def _host(value: object, expected: str) -> str:
    text = parse_text(value)
    if NAME.fullmatch(text):
        return text
    if not IPV6.fullmatch(text) or (host := canonical_host(text)) is None:
        raise ValueError(expected)
    return host


def canonical_host(text: str) -> str | None:
    """The host with an IPv6 address compressed, as in RFC 5952; None if the address is malformed."""
    if not text.startswith("["):
        return text
    if not IPV6.fullmatch(text):
        return None
    host, _, port = text[1:].partition("]")
    try:
        address = ipaddress.IPv6Address(host)
    except ValueError:
        return None
    # Versions of Python write mapped addresses differently, and a namespace's name is in the keys of records.
    written = f"::ffff:{address.ipv4_mapped}" if address.ipv4_mapped else address.compressed
    return f"[{written}]{port}"


def parse_network(value: object) -> Network:
    """An address, or a range of them in CIDR notation."""
    text = parse_text(value)
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        hint = ", in which the bits after the prefix are 0" if "host bits" in str(error) else ""
        raise ValueError(f"expected an address or a range such as 10.0.0.0/8 or fd00::/8{hint}") from None


def path_of(host: str) -> str:
    """A host as an element of a repository's name, where clients accept no colon: `registry.example_8443`.

    "" for an IPv6 address, of which no such element can be made.
    """
    return "" if host.startswith("[") else host.replace(":", "_")


def host_in_path(text: str) -> str:
    """The host with a port of which path_of() makes `text`; "" if there is none."""
    return ":".join(found.groups()) if (found := _IN_PATH.fullmatch(text)) else ""


def is_host(name: str) -> bool:
    """Whether clients read this first component of an image name as a registry's host."""
    return "." in name or ":" in name or name == "localhost"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the host, given without a port and without brackets."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_of(url: str) -> str:
    """The host of a URL, without a port and without brackets."""
    return urlsplit(url).hostname or ""


def is_private(host: str) -> bool:
    """Whether it is an address that is not globally reachable: private, loopback, link-local and the like.

    So is one that a translator turns into such an address.  A name is not an address.
    """
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            address = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        else:
            address = address.ipv4_mapped or address
    return not address.is_global or address.is_multicast or any(address in each for each in _NOT_GLOBAL)


def normal_host(text: str) -> str:
    """A host as a client may write it, for comparisons: in lower case, without the default port."""
    text = text.lower()
    return without_port(canonical_host(text) or text)


def without_port(name: str) -> str:
    """The host without a port that is the default of http or https, for comparisons."""
    host, _, port = name.rpartition(":")
    return host if port in ("443", "80") else name


# URLs


def parse_url(value: object) -> str:
    """The URL of a registry, without a slash at its end."""
    text = parse_text(value)
    if not text.startswith(("https://", "http://")):
        raise ValueError("must begin with https:// or http://")
    if "@" in text:
        raise ValueError("must not hold a user name: use the keys username and password")
    if "?" in text or "#" in text:
        raise ValueError("must not hold a query or a fragment")
    if not _has_authority(_URL.fullmatch(text)):
        raise ValueError("expected https://host, https://host:port or https://host/path")
    text = text.removesuffix("/")
    if text.endswith("/v2"):
        raise ValueError("must not end with /v2, which is added to every request")
    return text


def parse_urls(value: object) -> tuple[str, ...]:
    """The URLs of a registry in the order to try them, from one URL or a list."""
    if not isinstance(value, list):
        return (parse_url(value),)
    if not value:
        raise ValueError("is empty: give at least one URL")
    urls: list[str] = []
    for number, each in enumerate(value):
        try:
            urls.append(parse_url(each))
        except ValueError as error:
            raise ValueError(f"[{number}]: {error}") from None
    if len(set(urls)) < len(urls):
        raise ValueError("holds the same URL twice")
    return tuple(urls)


def parse_realm(value: object) -> str:
    """The URL of a token server, which can be a quoted string in a header."""
    text = parse_text(value)
    if not _has_authority(_REALM.fullmatch(text)):
        raise ValueError("expected the URL of a token server, such as https://auth.example/token")
    return text


def parse_target(value: object) -> Secret:
    """The URL of a webhook; a Secret, since a path or query may authenticate the caller."""
    text = parse_secret(value)
    if not text.startswith(("https://", "http://")):
        raise ValueError("must begin with https:// or http://")
    if "@" in text.partition("//")[2].partition("/")[0]:
        raise ValueError("must not hold a user name: set an Authorization header in headers")
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
    """Whether the IPv6 address (group 1) and the port (group 2) of a URL are valid.  Raises ValueError."""
    if not found:
        return False
    if found[1]:
        ipaddress.IPv6Address(found[1])
    return not found[2] or 0 < int(found[2]) < 65536

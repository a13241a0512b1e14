"""The hosts of registries that become namespaces when a client first asks for them: `upstream.hosts`.

    ghcr.io                  this host, at the default port
    *.example.com:5000       every host below example.com, at port 5000
    *-docker.pkg.dev         a `*` stands for at least one character, dots included
    http://registry.lan:80   by http

What a `*` stands for is never a private address.  A host that is listed by its full name may have one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache

from proxy.config.hosts import is_host, is_private, normal_host, without_port
from proxy.config.values import MAX_LABEL, parse_text
from proxy.config.wellknown import DOCKER_HUB, DOCKER_HUB_ALIASES

EVERY = "*"  # the name of the namespace whose settings these hosts have
_PORT = r"(?::([1-9][0-9]{0,4}))?"
_NAME = re.compile(rf"([a-z0-9](?:[a-z0-9._-]*[a-z0-9])?){_PORT}")
_IPV6 = re.compile(rf"\[[0-9a-f:.]+\]{_PORT}")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_IPV4 = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}")
MAX_HOST = 253  # characters: RFC 1035, section 2.3.4


@dataclass(frozen=True)
class HostPattern:
    """A host, or the hosts that a pattern with `*` stands for.  `plain_http` is whether they speak http."""

    text: str
    plain_http: bool = False

    @property
    def literal(self) -> bool:
        """Whether it is one host, by its full name."""
        return "*" not in self.text

    @cached_property
    def _glob(self) -> re.Pattern[str]:
        return re.compile("[a-z0-9._-]+".join(map(re.escape, self.text.split("*"))))

    def matches(self, host: str) -> bool:
        """Whether a host, as registry_host() returns it, is one of these."""
        if self.literal:
            return host == self.text
        name = host.partition(":")[0]
        # All names in localhost are loopback addresses: RFC 6761, section 6.3.
        private = is_private(name) or f".{name}".endswith(".localhost")
        return not private and self._glob.fullmatch(host) is not None

    def url(self, host: str) -> str:
        return f"{'http' if self.plain_http else 'https'}://{host}"


@lru_cache(maxsize=4096)
def registry_host(text: str) -> str | None:
    """The host of a registry as namespaces are named by it; None if it is none.

    In lower case, without a dot at its end, without the default port, and for Docker Hub by one name.
    """
    host, colon, port = text.partition(":")
    host = normal_host(host.removesuffix(".") + colon + port)
    found = _NAME.fullmatch(host) or _IPV6.fullmatch(host)
    if found is None or not is_host(host) or int(found[found.re.groups] or 1) > 65535:
        return None
    if found.re is _NAME and not _is_name(found[1]):
        return None
    return DOCKER_HUB if host in DOCKER_HUB_ALIASES else host


def _is_name(name: str) -> bool:
    """Whether it is the name of a host or an address; 127.1 is another way to write one."""
    labels = name.split(".")
    return (
        len(name) <= MAX_HOST
        and all(0 < len(each) <= MAX_LABEL for each in labels)
        and not (any(each.startswith("xn--") for each in labels) and not _is_international(name))
        and (_NUMBER.fullmatch(labels[-1]) is None or _is_address(name))
    )


def _is_international(name: str) -> bool:
    """Whether the labels that begin with xn-- can be decoded, as whoever sends requests to it does."""
    from yarl import URL  # here: commands start faster without it

    try:
        return URL(f"https://{name}").host is not None
    except ValueError:
        return False


def _is_address(text: str) -> bool:
    return _IPV4.fullmatch(text) is not None and all(
        int(each) < 256 and str(int(each)) == each for each in text.split(".")
    )


@lru_cache(maxsize=4096)
def find_pattern(patterns: tuple[HostPattern, ...], host: str) -> HostPattern | None:
    """The pattern for a host, as registry_host() returns it: its full name, else the first that matches."""
    if registry_host(host) != host:
        return None
    found = [each for each in patterns if each.matches(host)]
    return next((each for each in found if each.literal), found[0] if found else None)


def parse_pattern_of_hosts(value: object) -> HostPattern:
    text = parse_text(value)
    plain = text.startswith("http://")
    pattern = text.removeprefix("http://" if plain else "https://")
    if pattern == EVERY:
        return HostPattern(pattern, plain)
    # Any character may be in place of a `*`.
    host = registry_host(pattern.replace("*", "x"))
    if host is None or pattern != pattern.lower():
        raise ValueError(
            "expected the host of a registry in lower case, such as ghcr.io or localhost:5000, or a"
            " pattern, such as *.example.com"
        )
    return HostPattern(without_port(pattern) if "*" in pattern else host, plain)

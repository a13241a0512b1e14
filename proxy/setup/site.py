"""The server as its clients see it, and the configuration of a client.

A Setup is the configuration of one kind of client: Pieces, each a file or a part of one, and notes.  A
renderer makes a Setup from a Site; it neither reads nor writes files.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from yarl import URL

from proxy.config.hosts import Address, is_host, is_loopback, parse_name, parse_url, path_of
from proxy.config.schema import Config
from proxy.config.wellknown import DOCKER_HUB

CA = "ca.crt"  # the file name by which dockerd, podman and containerd recognize an authority
SYSTEM = "copy FILE to /usr/local/share/ca-certificates/entrepot.crt, and run update-ca-certificates"
OURS = "/etc/entrepot/clients"  # for files that have no place of their own


@dataclass(frozen=True, slots=True)
class Site:
    """A server as its clients see it.

    `namespaces` are the registries that it caches, by host.  With `every`, clients that are able to use it
    for all registries do so; otherwise they use it for `namespaces` only.  `hub` is whether a name without a
    namespace is on Docker Hub.  `ca` holds the certificates of a private authority, in PEM.  Without
    `bypass`, clients must not contact the registries themselves.  `stores` are the hosts of the listeners
    that each serve one private registry, by its namespace.  `aliases` are names without a dot, by namespace;
    "" if it has none, and another namespace has what path_of() makes of it.  `patterns` are of further hosts
    that it caches.
    """

    url: URL
    namespaces: tuple[str, ...] = (DOCKER_HUB,)
    every: bool = True
    hub: bool = True
    ca: str | None = None
    bypass: bool = True
    stores: Mapping[str, str] = field(default_factory=dict)
    named: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    patterns: tuple[str, ...] = ()

    @property
    def hosts(self) -> tuple[str, ...]:
        """The hosts of all listeners, those of private registries first."""
        return (*self.stores.values(), self.host)

    @property
    def base(self) -> str:
        """`http://cache.example:5000`"""
        return str(self.url.origin())

    @property
    def host(self) -> str:
        """`cache.example:5000`; without the port if it is the default of the scheme."""
        return self.url.host_port_subcomponent or ""

    @property
    def hub_url(self) -> str:
        """The URL of a mirror of Docker Hub, for clients that name no registry."""
        return self.base if self.hub else f"{self.base}/{DOCKER_HUB}"

    @property
    def plain(self) -> bool:
        """Whether the server has no TLS."""
        return self.url.scheme == "http"

    @property
    def loopback(self) -> bool:
        return is_loopback(self.url.host or "")

    @property
    def insecure(self) -> list[str]:
        """The hosts that clients must be told to use plain http for: all without TLS on other machines."""
        return [each for each in self.hosts if self.plain and not is_loopback(URL(f"//{each}").host or "")]

    def url_of(self, host: str) -> str:
        """The URL of one of `hosts`."""
        return f"{self.url.scheme}://{host}"


Kind = Literal["file", "keys", "part", "flags", "example"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A file of a client's configuration, or a part of one.

    `content` is by `kind` the whole file at `path`; `keys` to merge into the JSON there; a `part` of a file
    that others write; `flags` of a command line, without a path; or an `example`, whose `path` is its title.
    `about` says for which versions of the client it is, if not for all.  A `path` that begins with ~/ is in
    the home directory of the user.
    """

    path: str
    content: str
    kind: Kind = "file"
    about: str = ""


@dataclass(frozen=True, slots=True)
class Setup:
    """The configuration of one kind of client.

    `after` is the step that follows once the files are in place, and `undo` the one once they are gone, if it
    is another.  `notes` name limits and surprises of the client.  `trust` is how it gets a private authority,
    if no file of `pieces` does that.
    """

    client: str
    pieces: Sequence[Piece]
    after: str
    notes: Sequence[str] = field(default_factory=list)
    undo: str = ""
    trust: str = ""


def loopback_notes(site: Site, name: str = "") -> list[str]:
    """What to say of a loopback address where the client is not on this machine.

    `name` is that of this machine there.
    """
    if not site.loopback:
        return []
    such = f", such as {site.url.with_host(name).origin()} for this machine" if name else ""
    return [f"{site.host} is the client's own machine: give --url with an address that it can reach{such}"]


def client_url(scheme: str, address: Address) -> URL:
    """The URL of a listener for clients; one on every address has the name of this machine."""
    host = socket.gethostname() if address.everywhere else address.host
    return URL.build(scheme=scheme, host=host, port=address.port)


def scheme_of(config: Config) -> str:
    """The scheme of the listener for clients."""
    return "https" if config.tls else "http"


def site_of(
    config: Config,
    *,
    url: str | None = None,
    namespaces: Sequence[str] = (),
    ca_file: Path | None = None,
    bypass: bool = True,
) -> Site:
    """The server of a configuration, with options that override it.  Raises ValueError."""
    server_url = _url(url) if url else client_url(scheme_of(config), config.listen)
    if not server_url.port:
        raise ValueError("listen has port 0, which stands for any free port: give --url")
    if ca_file is not None and server_url.scheme == "http":
        raise ValueError(f"--ca-file needs an https URL, and {server_url} has no TLS")
    # No client mirrors a private registry: its images are pulled by full name.
    if stores := sorted(config.hosted().keys() & set(namespaces)):
        raise ValueError(f"--namespace {stores[0]}: is a private registry, which is used by full name")
    listed = config.others.hosts if config.others else ()
    caches = [*config.cached(), *(each.text for each in listed if each.literal)]
    return Site(
        url=server_url,
        namespaces=tuple(dict.fromkeys(map(_name, namespaces or filter(is_host, caches)))),
        patterns=() if namespaces else tuple(each.text for each in listed if not each.literal),
        every=not namespaces,
        hub=config.default_namespace == DOCKER_HUB,
        ca=_authority(ca_file) if ca_file else None,
        bypass=bypass,
        stores={
            name: _host(server_url, each) for name, each in config.store_listeners().items() if each.port
        },
        named=_hosts_of_caches(config, server_url),
        aliases=_aliases(config),
    )


def _hosts_of_caches(config: Config, url: URL) -> dict[str, str]:
    return {
        name: _named(url, each.hosts[0])
        for name, each in config.namespaces.items()
        if each.upstream is not None and each.hosts
    }


def _aliases(config: Config) -> dict[str, str]:
    """The first alias of each namespace that is no host; "" if it needs one, and has none."""
    owners = {given: name for name, each in config.namespaces.items() for given in (name, *each.aliases)}
    found = {}
    for name, each in config.namespaces.items():
        alias = next((alias for alias in each.aliases if not is_host(alias)), "")
        if alias or owners.get(path_of(name), name) != name:
            found[name] = alias
    return found


def _host(url: URL, address: Address) -> str:
    """The host and port of a listener, on the machine that is at `url`."""
    host = url.host if address.everywhere else address.host
    return URL.build(scheme=url.scheme, host=host or "", port=address.port).host_port_subcomponent or ""


def _named(url: URL, host: str) -> str:
    """The host of a namespace, with the port of `url` if it names none."""
    given = URL.build(scheme=url.scheme, authority=host)
    return host if given.explicit_port else url.with_host(given.host or "").host_port_subcomponent or ""


def _url(text: str) -> URL:
    try:
        url = URL(parse_url(text if "//" in text else f"http://{text}"))
    except ValueError as error:
        raise ValueError(f"--url {text}: {error}") from None
    if url.path != "/":
        raise ValueError(f"--url {text}: must not have a path, which not every client supports")
    return url


def _name(text: str) -> str:
    try:
        name = parse_name(text)
    except ValueError as error:
        raise ValueError(f"--namespace {text}: {error}") from None
    if not is_host(name):
        raise ValueError(
            f"--namespace {text}: is not a host, so no client mirrors it: its images are pulled by full name"
        )
    return name


def _authority(path: Path) -> str:
    try:
        text = path.read_text(encoding="ascii")
        ssl.create_default_context(cadata=text)
    except OSError as error:  # SSLError is one too, and its strerror says little
        cause = "holds no PEM certificate" if isinstance(error, ssl.SSLError) else error.strerror
        raise ValueError(f"--ca-file {path}: {cause}") from None
    except ValueError:
        raise ValueError(f"--ca-file {path}: holds no PEM certificate") from None
    if "PRIVATE KEY" in text:
        raise ValueError(f"--ca-file {path}: holds a private key, which clients must not get")
    return text if text.endswith("\n") else f"{text}\n"

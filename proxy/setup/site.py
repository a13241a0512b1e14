"""What a client is told: of which server, and by which files.

A client's configuration is a Setup: Pieces, each a file or a part of one, with what is to be known besides.
Renderers make it of a Site and do nothing else: they read no file, and write none.
"""

from __future__ import annotations

import ipaddress
import json
import socket
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from yarl import URL

from proxy.config.hosts import Address, is_host, parse_name, parse_url
from proxy.config.schema import Config
from proxy.config.wellknown import DOCKER_HUB

CA = "ca.crt"  # what dockerd, podman and containerd all take for an authority, by its name


@dataclass(frozen=True, slots=True)
class Site:
    """A server as its clients see it.

    `namespaces` are those it stands before, all of them names of hosts.  With `every`, clients that can are
    to ask it for any registry, else for those alone.  `hub` is whether a name without a namespace is Docker
    Hub's.  `ca` holds the certificates, in PEM, that its own is checked by, where not everybody has them.
    Without `bypass`, clients must not ask the registries themselves.
    """

    url: URL
    namespaces: tuple[str, ...] = (DOCKER_HUB,)
    every: bool = True
    hub: bool = True
    ca: str | None = None
    bypass: bool = True

    @property
    def base(self) -> str:
        """`http://cache.example:5000`"""
        return str(self.url.origin())

    @property
    def host(self) -> str:
        """`cache.example:5000`; the port is left out where it is the scheme's own."""
        return self.url.host_port_subcomponent or ""

    @property
    def plain(self) -> bool:
        """It has no TLS."""
        return self.url.scheme == "http"

    @property
    def loopback(self) -> bool:
        host = self.url.host or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"


Kind = Literal["file", "keys", "part", "flags"]


@dataclass(frozen=True, slots=True)
class Piece:
    """`content` is all of the file at `path`, which is ours; or `keys` that the JSON there is to have; or a
    `part` of a file that is somebody else's; or `flags` of a command line, where there is no file.
    `about` tells for whom it is, where not for all.
    """

    path: str
    content: str
    kind: Kind = "file"
    about: str = ""


@dataclass(frozen=True, slots=True)
class Setup:
    """`notes` are what the client does or cannot do that a reader would not expect; `after` what is to be
    done once the files are there.
    """

    client: str
    pieces: Sequence[Piece]
    after: str
    notes: Sequence[str] = field(default_factory=list)


def in_json(keys: Mapping[str, Any]) -> str:
    """An object with a line for each key."""
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in keys.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def quoted(*texts: str) -> str:
    """A list of strings, in TOML."""
    return f"[{', '.join(json.dumps(each) for each in texts)}]"


def client_url(scheme: str, address: Address) -> URL:
    """Where clients reach a listener: on every address, by this machine's name."""
    host = socket.gethostname() if address.everywhere else address.host
    return URL.build(scheme=scheme, host=host, port=address.port)


def scheme_of(config: Config) -> str:
    """How its clients are spoken to."""
    return "https" if config.tls else "http"


def site_of(
    config: Config,
    *,
    url: str | None = None,
    namespaces: Sequence[str] = (),
    ca_file: Path | None = None,
    bypass: bool = True,
) -> Site:
    """The server of that configuration, but for what is given.  Raises ValueError, in a sentence."""
    where = _url(url) if url else client_url(scheme_of(config), config.listen)
    if not where.port:
        raise ValueError("listen has port 0, which is any: give --url")
    if ca_file is not None and where.scheme == "http":
        raise ValueError(f"--ca-file is of no use: {where} has no TLS")
    # What a store holds nobody mirrors: it is pulled by full name.
    if stores := sorted(config.hosted().keys() & set(namespaces)):
        raise ValueError(f"--namespace {stores[0]}: is a store of our own: it is pulled by full name")
    caches = [name for name, each in config.namespaces.items() if each.upstream is not None]
    return Site(
        url=where,
        namespaces=tuple(dict.fromkeys(map(_name, namespaces))) or tuple(filter(is_host, caches)),
        every=not namespaces,
        hub=config.default_namespace == DOCKER_HUB,
        ca=_authority(ca_file) if ca_file else None,
        bypass=bypass,
    )


def _url(text: str) -> URL:
    try:
        url = URL(parse_url(text if "//" in text else f"http://{text}"))
    except ValueError as error:
        raise ValueError(f"--url {text}: {error}") from None
    if url.path != "/":
        raise ValueError(f"--url {text}: leave the path out: not every client takes one")
    return url


def _name(text: str) -> str:
    try:
        name = parse_name(text)
    except ValueError as error:
        raise ValueError(f"--namespace {text}: {error}") from None
    if not is_host(name):
        raise ValueError(
            f"--namespace {text}: is no host, so no client asks for it: it is pulled by full name"
        )
    return name


def _authority(path: Path) -> str:
    try:
        text = path.read_text(encoding="ascii")
        ssl.create_default_context(cadata=text)
    except OSError as error:  # ssl's is one too, and has no strerror that says much
        cause = "holds no certificate in PEM" if isinstance(error, ssl.SSLError) else error.strerror
        raise ValueError(f"--ca-file {path}: {cause}") from None
    except ValueError:
        raise ValueError(f"--ca-file {path}: holds no certificate in PEM") from None
    if "PRIVATE KEY" in text:
        raise ValueError(f"--ca-file {path}: holds a private key, which is not for clients")
    return text if text.endswith("\n") else f"{text}\n"

"""Configuration of lazy pullers: the snapshotters of stargz, nydus and SOCI.

Each fetches layers by itself, beside containerd, which needs its own configuration.  Released stargz and
nydus send neither ?ns= nor the path of a mirror: they reach only the default namespace, and namespaces that
have a host of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from proxy.config.wellknown import DOCKER_HUB
from proxy.setup.site import CA, SYSTEM, Piece, Setup, Site

NYDUS = "/etc/nydus"
_NYDUS = {DOCKER_HUB: "index.docker.io"}  # the name of Docker Hub in nydus-snapshotter
ALSO = "containerd itself pulls manifests: see entrepot setup containerd"


def stargz(site: Site) -> Setup:
    tables = [_mirror(name, host, site) for name, host in _hosts(site).items()]
    tables += [_mirror(each, each, site) for each in site.hosts if site.plain]  # for images by full name
    notes = [
        ALSO,
        *_left_out(site),
        "this is for containerd-stargz-grpc; stargz as a plugin of containerd or k3s has a config_path, whose"
        f" hosts.toml files need override_path = true and the path of a namespace: {site.base}/v2/ghcr.io",
    ]
    if not site.bypass:
        notes.append(NEVER)
    path, after = "/etc/containerd-stargz-grpc/config.toml", "systemctl restart stargz-snapshotter"
    return Setup("stargz", _part(path, tables), after, notes, trust=SYSTEM)


def soci(site: Site) -> Setup:
    tables = [_mirror(each, f"{site.base}/v2/{each}", site) for each in site.namespaces]
    tables += [_mirror(each, site.url_of(each), site) for each in site.hosts if site.plain]
    notes = [
        ALSO,
        "the parallel mode (parallel_pull_unpack) asks no mirrors, and no mirror is asked for a SOCI index:"
        f" pull by full name there, {site.host}/ghcr.io/owner/image",
    ]
    if not site.bypass:
        notes.append(NEVER)
    path, after = "/etc/soci-snapshotter-grpc/config.toml", "systemctl restart soci-snapshotter"
    return Setup("soci", _part(path, tables), after, notes, trust=SYSTEM)


def nydus(site: Site) -> Setup:
    certs = f"{NYDUS}/certs.d"
    pieces = [Piece(f"{NYDUS}/config.toml", f"[remote.mirrors_config]\ndir = {json.dumps(certs)}\n", "part")]
    for name, host in _hosts(site).items():
        directory = f"{certs}/{_NYDUS.get(name, name)}"
        lines = [f"[host.{json.dumps(site.url_of(host))}]"]
        if site.ca:
            lines.append(f'ca = "{directory}/{CA}"')
            pieces.append(Piece(f"{directory}/{CA}", site.ca))
        elif site.bypass:  # without an answer there, nydus uses the registry itself
            lines.append(f'ping_url = "{site.url_of(host)}/v2/"')
        pieces.append(Piece(f"{directory}/hosts.toml", "\n".join([*lines, ""])))
    notes = [
        ALSO,
        *_left_out(site),
        "the mirror is chosen when an image is mounted, for as long as it is mounted",
        "nydusd ends a request after 5 s, and takes every answer from 200 to 399 for the range that it wants",
    ]
    if site.ca and site.bypass:
        notes.append("ping_url knows no private authority, so nydus does not ask the registry itself here")
    return Setup("nydus", pieces, "systemctl restart nydus-snapshotter", notes)


NEVER = "the registry itself is asked if the server fails, and no setting prevents that"


def _hosts(site: Site) -> Mapping[str, str]:
    """The host that stands for each registry, where one does."""
    default = {DOCKER_HUB: site.host} if site.hub and DOCKER_HUB in site.namespaces else {}
    return {**default, **{name: host for name, host in site.named.items() if name in site.namespaces}}


def _left_out(site: Site) -> list[str]:
    if not (names := [each for each in site.namespaces if each not in _hosts(site)]):
        return []
    return [
        f"no mirror is possible for {', '.join(names)}, since it gets no path and no ?ns=: give the namespace"
        f" a name of its own (hosts), or pull by full name, {site.host}/{names[0]}/owner/image"
    ]


def _mirror(registry: str, host: str, site: Site) -> str:
    insecure = "insecure = true\n" if site.plain else ""
    return f"[[resolver.host.{json.dumps(registry)}.mirrors]]\nhost = {json.dumps(host)}\n{insecure}"


def _part(path: str, tables: list[str]) -> list[Piece]:
    return [Piece(path, "\n".join(tables), "part")] if tables else []

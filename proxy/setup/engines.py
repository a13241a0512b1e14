"""What runs containers: dockerd, containerd, and podman with its kin.

Traps that are avoided here:

- dockerd has mirrors for Docker Hub only, and refused a path in their URLs before version 24.
- containerd without `capabilities` sends pushes to a mirror, without "resolve" in them no tag.
- Older containerd, all of 1.6 among it, takes a hosts.toml without any [host] table for broken, and goes
  past it.
- Without `server`, containerd asks the registry itself last; there is no other way to keep it from that.
- podman tries plain http only where `insecure` says so; a mirror's path comes after /v2 there, so that
  /v2/ has to answer as well, which it does.
"""

from __future__ import annotations

from proxy.config.wellknown import DOCKER_HUB
from proxy.setup.site import CA, Piece, Setup, Site, in_json, quoted

DOCKER = "/etc/docker"
CONTAINERD = "/etc/containerd"
CONTAINERS = "/etc/containers"
PULL = ("pull", "resolve")
# Where the CRI plugin of containerd has its registries, by the version of containerd.
CRI = {"1": "io.containerd.grpc.v1.cri", "2": "io.containerd.cri.v1.images"}


def docker(site: Site) -> Setup:
    keys: dict[str, list[str]] = {}
    notes = []
    if DOCKER_HUB in site.namespaces:
        keys["registry-mirrors"] = [site.base if site.hub else f"{site.base}/{DOCKER_HUB}"]
        if not site.hub:
            notes.append(
                "default_namespace is not docker.io there, so the mirror has a path: that needs Docker 24"
            )
    else:
        notes.append("docker.io is not among the namespaces, and Docker before 29 has mirrors for no other")
    if site.plain and not site.loopback:  # loopback addresses are insecure ones by default
        keys["insecure-registries"] = [site.host]
    others = [each for each in site.namespaces if each != DOCKER_HUB] or ["ghcr.io"]
    notes += [
        f"registry-mirrors are for Docker Hub only: what lies elsewhere ({', '.join(others[:3])}, …)"
        f" is pulled by full name, {site.host}/{others[0]}/owner/image",
        "the hosts.toml files are for Docker 29 and later with the containerd image store, and there they are"
        " for every registry; others do not look at them",
    ]
    if not site.bypass:
        notes.append(
            "without the containerd image store dockerd asks Docker Hub itself when a mirror fails, and"
            " nothing keeps it from that: block registry-1.docker.io in the network"
        )
    pieces = [Piece(f"{DOCKER}/daemon.json", in_json(keys), "keys")] if keys else []
    pieces += _hosts(site, f"{DOCKER}/certs.d")
    pieces += _authority(site, f"{DOCKER}/certs.d/{site.host}")
    return Setup("docker", pieces, "systemctl reload docker", notes)


def containerd(site: Site) -> Setup:
    notes = []
    if not site.every:
        notes.append("other registries than these are asked directly")
    elif not site.bypass:
        notes.append("what is no namespace of the server cannot be pulled at all then")
    pieces = hosts(site, f"{CONTAINERD}/certs.d")
    pieces += [
        Piece(f"{CONTAINERD}/config.toml", config_path(plugin), "part", f"containerd {version}.x")
        for version, plugin in CRI.items()
    ]
    notes.append(
        "config_path is for Kubernetes (CRI), and excludes registry.mirrors and registry.configs there;"
        f" nerdctl looks there anyway, ctr with --hosts-dir {CONTAINERD}/certs.d"
    )
    after = "systemctl restart containerd if config.toml was changed; the rest is read at each pull"
    return Setup("containerd", pieces, after, notes)


def config_path(plugin: str) -> str:
    return f'[plugins."{plugin}".registry]\n  config_path = "{CONTAINERD}/certs.d"\n'


def hosts(site: Site, directory: str) -> list[Piece]:
    """What lies below config_path: for all registries, or each, and for the server's own name."""
    own = f"{directory}/{site.host}"  # by it, it is pulled from in full, and pushed to
    return [*_hosts(site, directory), Piece(f"{own}/hosts.toml", _server(site)), *_authority(site, own)]


def _hosts(site: Site, directory: str) -> list[Piece]:
    content = _mirror(site) if site.bypass else _server(site, *PULL)
    pieces = []
    for each in ["_default"] if site.every else site.namespaces:
        pieces.append(Piece(f"{directory}/{each}/hosts.toml", content))
        # Beside it, so that the directory can be mounted elsewhere.
        pieces += _authority(site, f"{directory}/{each}")
    return pieces


def _authority(site: Site, directory: str) -> list[Piece]:
    return [Piece(f"{directory}/{CA}", site.ca)] if site.ca else []


def _mirror(site: Site) -> str:
    ca = f'  ca = "{CA}"\n' if site.ca else ""
    return f'[host."{site.base}"]\n  capabilities = {quoted(*PULL)}\n{ca}'


def _server(site: Site, *capabilities: str) -> str:
    """Nobody but the server itself."""
    lines = [f'server = "{site.base}"']
    lines += [f"capabilities = {quoted(*capabilities)}"] if capabilities else []
    lines += [f'ca = "{CA}"'] if site.ca else []
    return "\n".join([*lines, "[host]", ""])


def podman(site: Site) -> Setup:
    notes = [
        "each registry needs a table of its own: what is not named here is asked directly",
        "a name without a registry is looked for in unqualified-search-registries of registries.conf",
    ]
    after = "nothing: podman, buildah and skopeo read it at each pull"
    return Setup("podman", registries(site), after, notes)


def crio(site: Site) -> Setup:
    notes = ["each registry needs a table of its own: what is not named here is asked directly"]
    return Setup("crio", registries(site), "systemctl reload crio", notes)


def registries(site: Site) -> list[Piece]:
    """For all that reads registries.conf: podman, buildah, skopeo, CRI-O."""
    insecure = "insecure = true\n" if site.plain else ""
    tables = []
    for each in site.namespaces:
        mirror = f'location = "{site.host}/{each}"\n{insecure}'
        if site.bypass:
            tables.append(f'[[registry]]\nlocation = "{each}"\n[[registry.mirror]]\n{mirror}')
        else:  # the registry is then where the server is, and there is nothing to go on to
            tables.append(f'[[registry]]\nprefix = "{each}"\n{mirror}')
    if site.plain:  # for full names
        tables.append(f'[[registry]]\nlocation = "{site.host}"\n{insecure}')
    path = f"{CONTAINERS}/registries.conf.d/entrepot.conf"
    return [Piece(path, "\n".join(tables)), *_authority(site, f"{CONTAINERS}/certs.d/{site.host}")]

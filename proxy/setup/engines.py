"""Configuration of container engines: dockerd, containerd, podman and other users of registries.conf.

Traps that are avoided here:

- dockerd has mirrors for Docker Hub only, and before version 24 refused a path in their URLs.
- Without `capabilities`, containerd also pushes to a mirror; without "resolve" in them, it resolves no tags
  there.
- Older versions of containerd, such as 1.6, consider a hosts.toml without a [host] table broken, and ignore
  it.
- Without `server`, containerd contacts the registry itself last; no other setting prevents that.
- podman uses plain http only with `insecure`.  It puts a mirror's path after /v2, so that /v2/ itself must
  answer as well, which it does.
"""

from __future__ import annotations

from proxy.config.hosts import path_of
from proxy.config.wellknown import DOCKER_HUB
from proxy.setup.formats import in_json, quoted
from proxy.setup.site import CA, Piece, Setup, Site

DOCKER = "/etc/docker"
CONTAINERD = "/etc/containerd"
CONTAINERS = "/etc/containers"
PULL = ("pull", "resolve")
# The plugin that holds the registries of CRI, by the major version of containerd.
CRI = {"1": "io.containerd.grpc.v1.cri", "2": "io.containerd.cri.v1.images"}


def docker(site: Site) -> Setup:
    keys = daemon_keys(site)
    notes = daemon_notes(site)
    notes += [
        "only Docker 29 and later with the containerd image store reads the hosts.toml files, which work for"
        " every registry",
    ]
    pieces = [Piece(f"{DOCKER}/daemon.json", in_json(keys), "keys")] if keys else []
    pieces += mirrors(site, f"{DOCKER}/certs.d")
    pieces += authorities(site, f"{DOCKER}/certs.d")
    return Setup("docker", pieces, "systemctl reload docker", notes)


def daemon_keys(site: Site) -> dict[str, list[str]]:
    """The keys of daemon.json."""
    keys: dict[str, list[str]] = {}
    if DOCKER_HUB in site.namespaces:
        keys["registry-mirrors"] = [site.hub_url]
    if site.insecure:
        keys["insecure-registries"] = site.insecure
    return keys


def daemon_notes(site: Site) -> list[str]:
    """The limits of every dockerd."""
    notes = []
    if DOCKER_HUB not in site.namespaces:
        notes.append("docker.io is not among the namespaces, and Docker before 29 mirrors no other registry")
    elif not site.hub:
        notes.append("default_namespace is not docker.io, so the mirror has a path, which needs Docker 24")
    others = {each: path for each, path in mirror_paths(site).items() if each != DOCKER_HUB}
    others = others or {"ghcr.io": "ghcr.io"}
    notes += [
        "registry-mirrors work for Docker Hub only: pull images of other registries"
        f" ({', '.join([*others][:3])}, …) by full name,"
        f" {site.host}/{next(iter(others.values()))}/owner/image"
    ]
    if not site.bypass:
        notes.append(
            "without the containerd image store, dockerd contacts Docker Hub itself when a mirror fails, and"
            " no setting prevents that: block registry-1.docker.io in the network"
        )
    return notes


def containerd(site: Site) -> Setup:
    notes = []
    if not site.every:
        notes.append("all other registries are contacted directly")
    elif not site.bypass:
        notes.append("images of registries that are not namespaces of the server cannot be pulled")
    pieces = hosts(site, f"{CONTAINERD}/certs.d")
    pieces += [
        Piece(f"{CONTAINERD}/config.toml", config_path(plugin), "part", f"containerd {version}.x")
        for version, plugin in CRI.items()
    ]
    notes.append(
        "config_path is for Kubernetes (CRI), and must not be combined with registry.mirrors or"
        f" registry.configs; nerdctl reads the directory anyway, ctr with --hosts-dir {CONTAINERD}/certs.d"
    )
    after = "systemctl restart containerd if config.toml has changed; the other files are read at each pull"
    return Setup("containerd", pieces, after, notes)


def config_path(plugin: str, directory: str = f"{CONTAINERD}/certs.d") -> str:
    return f'[plugins."{plugin}".registry]\n  config_path = "{directory}"\n'


def hosts(site: Site, directory: str) -> list[Piece]:
    """The files below config_path: for all registries or for each one, and for the server's own names."""
    pieces = mirrors(site, directory)
    for each in site.hosts:  # for pulls by full name, and for pushes
        own = f"{directory}/{each}"
        pieces += [Piece(f"{own}/hosts.toml", _server(site.url_of(each), site)), *_authority(site, own)]
    return pieces


def mirrors(site: Site, directory: str) -> list[Piece]:
    """The files below config_path for all registries, or for each one."""
    content = _mirror(site) if site.bypass else _server(site.base, site, *PULL)
    pieces = []
    for each in ["_default"] if site.every else site.namespaces:
        pieces.append(Piece(f"{directory}/{each}/hosts.toml", content))
        # In the same directory, so that it can be mounted elsewhere.
        pieces += _authority(site, f"{directory}/{each}")
    return pieces


def _authority(site: Site, directory: str) -> list[Piece]:
    return [Piece(f"{directory}/{CA}", site.ca)] if site.ca else []


def authorities(site: Site, directory: str) -> list[Piece]:
    return [piece for each in site.hosts for piece in _authority(site, f"{directory}/{each}")]


def _mirror(site: Site) -> str:
    ca = f'  ca = "{CA}"\n' if site.ca else ""
    return f'[host."{site.base}"]\n  capabilities = {quoted(*PULL)}\n{ca}'


def _server(url: str, site: Site, *capabilities: str) -> str:
    """A hosts.toml with the server alone, without a fallback to the registry."""
    lines = [f'server = "{url}"']
    lines += [f"capabilities = {quoted(*capabilities)}"] if capabilities else []
    lines += [f'ca = "{CA}"'] if site.ca else []
    return "\n".join([*lines, "[host]", ""])


def podman(site: Site) -> Setup:
    notes = [
        "registries without a table of their own are contacted directly",
        "a name without a registry is searched in unqualified-search-registries of registries.conf",
    ]
    notes += left_out(site)
    after = "nothing else: podman, buildah and skopeo read the files at each pull"
    return Setup("podman", registries(site), after, notes)


def crio(site: Site) -> Setup:
    notes = ["registries without a table of their own are contacted directly", *left_out(site)]
    return Setup("crio", registries(site), "systemctl reload crio", notes)


def left_out(site: Site) -> list[str]:
    notes = [
        f"{', '.join(site.patterns)}: no table can stand for several registries: give each that you use by"
        " --namespace, with those above, or pull by full name"
    ]
    notes = notes if site.patterns else []
    if not (names := [each for each in site.namespaces if each not in mirror_paths(site)]):
        return notes
    return [
        *notes,
        f"{', '.join(names)}: no mirror is possible, since its path would have a colon, or is another"
        f" namespace: give it an alias, with which it has a mirror, or at an IPv6 address is pulled by name,"
        f" {site.host}/<alias>/…",
    ]


def mirror_paths(site: Site) -> dict[str, str]:
    """The paths of mirrors for clients that take them for the names of repositories, which have no colon.

    A registry with a port has the path of its alias, or one with `_` in place of the colon.  One at an IPv6
    address has none: to such clients, that is no name of a registry either.
    """
    paths = {each: site.aliases.get(each, path_of(each)) if ":" in each else each for each in site.namespaces}
    return {each: path for each, path in paths.items() if path and not each.startswith("[")}


def registries(site: Site, directory: str = CONTAINERS) -> list[Piece]:
    """The files for all that read registries.conf: podman, buildah, skopeo, CRI-O."""
    insecure = "insecure = true\n" if site.plain else ""
    tables = []
    for each, path in mirror_paths(site).items():
        mirror = f'location = "{site.host}/{path}"\n{insecure}'
        if site.bypass:
            tables.append(f'[[registry]]\nlocation = "{each}"\n[[registry.mirror]]\n{mirror}')
        else:  # the server takes the place of the registry, so there is no fallback
            tables.append(f'[[registry]]\nprefix = "{each}"\n{mirror}')
    if site.plain:  # for pulls by full name
        tables += [f'[[registry]]\nlocation = "{each}"\n{insecure}' for each in site.hosts]
    path = f"{directory}/registries.conf.d/entrepot.conf"
    pieces = [Piece(path, "\n".join(tables))] if tables else []
    return [*pieces, *authorities(site, f"{directory}/certs.d")]

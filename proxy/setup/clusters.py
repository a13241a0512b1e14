"""Configuration of Kubernetes distributions that configure their own containerd.

k3s, RKE2 and k3d read a registries.yaml.  kind, minikube, k0s and MicroK8s have a directory of hosts.toml
files, in a place of their own.
"""

from __future__ import annotations

from typing import Any

from proxy.config.wellknown import DOCKER_HUB
from proxy.setup.engines import (
    CONTAINERD,
    CONTAINERS,
    CRI,
    DOCKER,
    authorities,
    config_path,
    hosts,
    left_out,
    registries,
)
from proxy.setup.formats import in_yaml
from proxy.setup.site import CA, OURS, Piece, Setup, Site, loopback_notes

K3S = "/etc/rancher/k3s"
RKE2 = "/etc/rancher/rke2"
EVERY = "*"
NEVER = "disable-default-registry-endpoint"
MINIKUBE = "~/.minikube/files"  # minikube copies what is below it into the node
K0S = "/etc/k0s/containerd.d"
MICROK8S = "/var/snap/microk8s/current/args/certs.d"


def k3s(site: Site) -> Setup:
    return _rancher("k3s", K3S, "systemctl restart k3s (on agents: k3s-agent)", site)


def rke2(site: Site) -> Setup:
    return _rancher("rke2", RKE2, "systemctl restart rke2-server (on agents: rke2-agent)", site)


def _rancher(client: str, directory: str, after: str, site: Site) -> Setup:
    authority = f"{directory}/entrepot.crt"
    pieces = [Piece(f"{directory}/registries.yaml", registries_yaml(site, authority))]
    notes = ["each node needs these files"]
    if site.ca:
        pieces.append(Piece(authority, site.ca))
    if not site.bypass:
        pieces.append(Piece(f"{directory}/config.yaml.d/entrepot.yaml", in_yaml({NEVER: True})))
        notes.append(f"{NEVER} needs a release of January 2024 or later (1.29.1, 1.26.13)")
    return Setup(client, pieces, after, [*notes, *loopback_notes(site)])


def k3d(site: Site) -> Setup:
    config, mounted = f"{OURS}/k3d/registries.yaml", f"{K3S}/entrepot.crt"
    flags, nodes = [f"--registry-config={config}"], "@server:*;agent:*"
    pieces = [Piece(config, registries_yaml(site, mounted))]
    if site.ca:
        pieces.append(Piece(f"{OURS}/k3d/entrepot.crt", site.ca))
        flags.append(f"--volume='{OURS}/k3d/entrepot.crt:{mounted}{nodes}'")
    if not site.bypass:
        flags.append(f"--k3s-arg='--{NEVER}{nodes}'")
    pieces.append(Piece("", "".join(f"{each}\n" for each in flags), "flags"))
    notes = ["a cluster keeps the registries with which it was created"]
    after = "k3d cluster create with these flags"
    return Setup("k3d", pieces, after, [*notes, *loopback_notes(site, "host.k3d.internal")], undo=RECREATE)


def kind(site: Site) -> Setup:
    directory = f"{OURS}/kind/certs.d"
    tree = {
        "kind": "Cluster",
        "apiVersion": "kind.x-k8s.io/v1alpha4",
        "containerdConfigPatches": [config_path(CRI["1"])],
        "nodes": [
            {
                "role": "control-plane",
                "extraMounts": [
                    {"hostPath": directory, "containerPath": f"{CONTAINERD}/certs.d", "readOnly": True}
                ],
            }
        ],
    }
    config = f"{OURS}/kind/cluster.yaml"
    notes = [
        "only nodes before kind 0.27 need the patch; later ones use the directory anyway",
        "every additional node needs the same extraMounts",
    ]
    pieces = [Piece(config, in_yaml(tree)), *hosts(site, directory)]
    after = f"kind create cluster --config {config}"
    return Setup("kind", pieces, after, [*notes, *loopback_notes(site)], undo=RECREATE)


def minikube(site: Site) -> Setup:
    flags = [f"--registry-mirror={site.hub_url}"] if DOCKER_HUB in site.namespaces else []
    flags += [f"--insecure-registry={each}" for each in site.insecure]
    pieces = [
        *hosts(site, f"{MINIKUBE}{CONTAINERD}/certs.d"),
        *registries(site, f"{MINIKUBE}{CONTAINERS}"),
        *authorities(site, f"{MINIKUBE}{DOCKER}/certs.d"),
    ]
    if flags:
        pieces.append(Piece("", "".join(f"{each}\n" for each in flags), "flags", "for dockerd"))
    notes = [
        "the hosts.toml files are for --container-runtime=containerd, entrepot.conf for cri-o, the flags for"
        " docker, which mirrors Docker Hub only",
        "minikube copies the files at each start, but takes the flags only when it creates a cluster",
        *left_out(site),
        *loopback_notes(site, "host.minikube.internal"),
    ]
    return Setup("minikube", pieces, "minikube start, with the flags for a new cluster", notes, undo=RECREATE)


def k0s(site: Site) -> Setup:
    directory = f"{K0S}/certs.d"
    drop_in = f"version = 3\n\n{config_path(CRI['2'], directory)}"
    pieces = [Piece(f"{K0S}/entrepot.toml", drop_in), *hosts(site, directory)]
    notes = [
        "each worker needs these files",
        f"before k0s 1.36 (containerd 1.7), entrepot.toml must have version = 2 and {CRI['1']} instead",
        "k0s reads the directory only while /etc/k0s/containerd.toml begins with # k0s_managed=true",
    ]
    after = "nothing else: k0s reloads containerd when a file in containerd.d changes"
    return Setup("k0s", pieces, after, [*notes, *loopback_notes(site)])


def microk8s(site: Site) -> Setup:
    pieces = hosts(site, MICROK8S)
    notes = ["each node needs these files", *loopback_notes(site)]
    if site.every and DOCKER_HUB in site.namespaces:
        default = f"{MICROK8S}/_default/"
        pieces += [
            Piece(f"{MICROK8S}/{DOCKER_HUB}/{name}", each.content)
            for each in pieces
            for name in ("hosts.toml", CA)
            if each.path == default + name
        ]
    if DOCKER_HUB in site.namespaces:
        notes.append(
            f"MicroK8s has a {DOCKER_HUB}/hosts.toml of its own, which goes before _default: give --force"
            " once to replace it"
        )
    after = "nothing else: containerd reads the files at each pull"
    return Setup("microk8s", pieces, after, notes)


def registries_yaml(site: Site, authority: str) -> str:
    """The registries.yaml of k3s, with the server's authority at the path `authority`."""
    tree: dict[str, Any] = {"mirrors": {name: {"endpoint": [url]} for name, url in endpoints(site).items()}}
    if site.ca:
        tree["configs"] = {each: {"tls": {"ca_file": authority}} for each in site.hosts}
    return in_yaml(tree)


def endpoints(site: Site) -> dict[str, str]:
    """The URL to use for each registry: the server's, and for its private registries their own.

    The server is one of them where no entry is for every registry, or else clients use https for its name.
    """
    own = (site.host,) if site.plain else ()
    names = (EVERY,) if site.every else (*site.namespaces, *own)
    return {host: site.url_of(host) for host in site.stores.values()} | dict.fromkeys(names, site.base)


RECREATE = "create the cluster again, without them"

"""Configuration of Kubernetes distributions that configure containerd themselves: k3s, kind, Talos.

On a node that is a container or another machine, a loopback address (127.0.0.1) is the node itself.
"""

from __future__ import annotations

import base64
from typing import Any

import yaml

from proxy.setup.engines import CONTAINERD, CRI, config_path, hosts
from proxy.setup.site import Piece, Setup, Site

K3S = "/etc/rancher/k3s"
OURS = "/etc/entrepot/clients"  # for files that have no place of their own
EVERY = "*"


def k3s(site: Site) -> Setup:
    authority = f"{K3S}/entrepot.crt"
    tree: dict[str, Any] = {"mirrors": {name: {"endpoint": [url]} for name, url in _endpoints(site).items()}}
    pieces = []
    if site.ca:
        tree["configs"] = {each: {"tls": {"ca_file": authority}} for each in site.hosts}
        pieces.append(Piece(authority, site.ca))
    pieces.insert(0, Piece(f"{K3S}/registries.yaml", _dump(tree)))
    if not site.bypass:
        pieces.append(
            Piece(f"{K3S}/config.yaml.d/entrepot.yaml", _dump({"disable-default-registry-endpoint": True}))
        )
    notes = ["each node needs these files; RKE2 has them in /etc/rancher/rke2"]
    if not site.bypass:
        notes.append(
            "disable-default-registry-endpoint needs a release of January 2024 or later (1.29.1, 1.26.13)"
        )
    return Setup("k3s", pieces, "systemctl restart k3s (on agents: k3s-agent)", [*notes, *_away(site)])


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
    pieces = [Piece(config, _dump(tree)), *hosts(site, directory)]
    return Setup("kind", pieces, f"kind create cluster --config {config}", [*notes, *_away(site)])


def talos(site: Site) -> Setup:
    more = {} if site.bypass else {"skipFallback": True}
    mirrors = {name: {"endpoints": [url], **more} for name, url in _endpoints(site).items()}
    registries: dict[str, Any] = {"mirrors": mirrors}
    if site.ca:
        ca = base64.b64encode(site.ca.encode()).decode()
        registries["config"] = {each: {"tls": {"ca": ca}} for each in site.hosts}
    path = f"{OURS}/talos/registries.yaml"
    pieces = [Piece(path, _dump({"machine": {"registries": registries}}))]
    notes = ["Talos 1.12 and later prefer RegistryMirrorConfig documents, but still accept this form"]
    after = f"talosctl patch machineconfig --nodes NODE --patch @{path}"
    return Setup("talos", pieces, after, [*notes, *_away(site)])


def _endpoints(site: Site) -> dict[str, str]:
    """The URL to use for each registry: the server's, and for its private registries their own."""
    names = (EVERY,) if site.every else site.namespaces
    return {host: site.url_of(host) for host in site.stores.values()} | dict.fromkeys(names, site.base)


def _away(site: Site) -> list[str]:
    if not site.loopback:
        return []
    return [f"{site.host} is the node itself: give --url with an address that the nodes can reach"]


class _Dumper(yaml.SafeDumper):
    """A dumper that writes multi-line text as a block, and no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _dump(tree: dict[str, Any]) -> str:
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, width=1000)
    return text

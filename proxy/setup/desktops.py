"""Configuration of engines that run in a virtual machine on a desktop.

To them, 127.0.0.1 is the virtual machine.  Docker Desktop and Rancher Desktop show ~/.docker/certs.d to the
engine as /etc/docker/certs.d, which dockerd and nerdctl read.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping

from proxy.setup.clusters import K3S, registries_yaml
from proxy.setup.engines import DOCKER, authorities, daemon_keys, daemon_notes, hosts
from proxy.setup.formats import in_json, in_yaml
from proxy.setup.site import CA, Piece, Setup, Site, loopback_notes

HOME = "~/.docker"
LIMA = "rancher-desktop/lima/_config/override.yaml"
RANCHER = f"~/.local/share/{LIMA}"


def docker_desktop(site: Site) -> Setup:
    keys = daemon_keys(site)
    pieces = [Piece(f"{HOME}/daemon.json", in_json(keys), "keys")] if keys else []
    pieces += authorities(site, f"{HOME}/certs.d")
    notes = [
        *daemon_notes(site),
        "Settings, Docker Engine shows the same file; on Windows it is %USERPROFILE%\\.docker\\daemon.json,"
        " and authorities belong to the trusted roots of Windows",
        *loopback_notes(site, "host.docker.internal"),
    ]
    return Setup("docker-desktop", pieces, "restart Docker Desktop", notes)


def rancher_desktop(site: Site) -> Setup:
    files = {f"{K3S}/registries.yaml": registries_yaml(site, f"{DOCKER}/certs.d/{site.host}/{CA}")}
    if keys := daemon_keys(site):
        files[f"{DOCKER}/daemon.json"] = in_json(keys)
    pieces = [
        Piece(RANCHER, in_yaml({"provision": [{"mode": "system", "script": script(files)}]})),
        *hosts(site, f"{HOME}/certs.d"),
    ]
    notes = [
        *daemon_notes(site),
        "nerdctl, and dockerd with the containerd image store, read the hosts.toml files; Kubernetes reads"
        " registries.yaml",
        f"on macOS the first file is ~/Library/Application Support/{LIMA}; on Windows its script is"
        " %AppData%\\rancher-desktop\\provisioning\\entrepot.start",
        *loopback_notes(site, "host.rancher-desktop.internal"),
    ]
    undo = f"rdctl shell sudo rm {' '.join(files)}; restart Rancher Desktop"
    return Setup("rancher-desktop", pieces, "restart Rancher Desktop", notes, undo=undo)


def colima(site: Site) -> Setup:
    files = {each.path: each.content for each in hosts(site, f"{DOCKER}/certs.d")}
    tree: dict[str, object] = {"docker": daemon_keys(site)} if daemon_keys(site) else {}
    tree["provision"] = [{"mode": "system", "script": script(files)}]
    pieces = [Piece("~/.colima/default/colima.yaml", in_yaml(tree), "part")]
    notes = [
        *daemon_notes(site),
        "nerdctl, and dockerd with the containerd image store, read the hosts.toml files that the script"
        " writes; Kubernetes with the containerd runtime does not",
        "if the file has docker: {} and provision: [] already, replace them; another profile has a directory"
        " of its own, and with XDG_CONFIG_HOME that is in $XDG_CONFIG_HOME/colima",
        *loopback_notes(site, "host.lima.internal"),
    ]
    undo = f"colima ssh -- sudo rm -r {DOCKER}/certs.d; colima stop; colima start"
    return Setup("colima", pieces, "colima stop; colima start", notes, undo=undo)


def script(files: Mapping[str, str]) -> str:
    """A shell script that writes the files."""
    lines = ["#!/bin/sh", "set -eu"]
    for path, content in files.items():
        lines += [f"mkdir -p '{posixpath.dirname(path)}'", f"cat >'{path}' <<'END'", f"{content}END"]
    return "\n".join([*lines, ""])

"""The renderers of all clients by name, and the text of a Setup for people."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from proxy.setup import (
    builders,
    clusters,
    desktops,
    engines,
    models,
    platforms,
    runners,
    snapshotters,
    tools,
)
from proxy.setup.site import Piece, Setup, Site

Renderer = Callable[[Site], Setup]
GROUPS: Mapping[str, Mapping[str, Renderer]] = {
    "engines": {
        "docker": engines.docker,
        "containerd": engines.containerd,
        "podman": engines.podman,
        "crio": engines.crio,
    },
    "desktops": {
        "docker-desktop": desktops.docker_desktop,
        "rancher-desktop": desktops.rancher_desktop,
        "colima": desktops.colima,
    },
    "builders": {
        "buildkit": builders.buildkit,
        "dagger": builders.dagger,
        "kaniko": builders.kaniko,
        "jib": builders.jib,
        "pack": builders.pack,
    },
    "clusters": {
        "k3s": clusters.k3s,
        "rke2": clusters.rke2,
        "k3d": clusters.k3d,
        "kind": clusters.kind,
        "minikube": clusters.minikube,
        "k0s": clusters.k0s,
        "microk8s": clusters.microk8s,
        "openshift": platforms.openshift,
        "talos": platforms.talos,
        "bottlerocket": platforms.bottlerocket,
    },
    "jobs": {
        "gitlab-runner": runners.gitlab_runner,
        "arc": runners.arc,
        "nomad": runners.nomad,
    },
    "lazy pullers": {
        "stargz": snapshotters.stargz,
        "nydus": snapshotters.nydus,
        "soci": snapshotters.soci,
    },
    "models": {
        "ollama": models.ollama,
        "model-runner": models.model_runner,
    },
    "tools": {
        "renovate": tools.renovate,
        "trivy": tools.trivy,
        "flux": tools.flux,
        "argocd-image-updater": tools.argocd_image_updater,
    },
}
RENDERERS: Mapping[str, Renderer] = {
    name: renderer for group in GROUPS.values() for name, renderer in group.items()
}
WHAT = {
    "keys": ", merge these keys",
    "part": ", add this part",
    "file": "",
    "flags": "",
    "example": ", for example",
}
MARK = "# Written by entrepot setup"  # the start of every file that setup writes


def with_mark(piece: Piece) -> str:
    """The whole file, with a first line that says who has written it."""
    return f"{MARK}, which replaces it when it runs again.\n{piece.content}"


def store_lines(site: Site) -> Iterator[str]:
    """A line for each private registry that has a listener of its own."""
    for name, host in site.stores.items():
        yield f"private registry {name}: docker login {host}; docker push {host}/team/app:1"


def lines_of(setup: Setup, warnings: Sequence[str] = ()) -> Iterator[str]:
    """The lines of each piece below its path, then the next step, warnings and notes as comments."""
    for piece in setup.pieces:
        about = f" ({piece.about})" if piece.about else ""
        yield f"# {piece.path or 'flags'}{WHAT[piece.kind]}{about}"
        yield piece.content.rstrip("\n")
        yield ""
    yield f"# then: {setup.after}"
    yield from (f"# warning: {each}" for each in warnings)
    yield from (f"# note: {each}" for each in setup.notes)

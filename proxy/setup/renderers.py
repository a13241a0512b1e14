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

RENDERERS: Mapping[str, Callable[[Site], Setup]] = {
    "docker": engines.docker,
    "containerd": engines.containerd,
    "podman": engines.podman,
    "crio": engines.crio,
    "docker-desktop": desktops.docker_desktop,
    "rancher-desktop": desktops.rancher_desktop,
    "colima": desktops.colima,
    "buildkit": builders.buildkit,
    "kaniko": builders.kaniko,
    "jib": builders.jib,
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
    "gitlab-runner": runners.gitlab_runner,
    "arc": runners.arc,
    "nomad": runners.nomad,
    "stargz": snapshotters.stargz,
    "nydus": snapshotters.nydus,
    "soci": snapshotters.soci,
    "ollama": models.ollama,
    "model-runner": models.model_runner,
    "renovate": tools.renovate,
    "trivy": tools.trivy,
    "flux": tools.flux,
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

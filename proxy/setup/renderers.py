"""Every client by its name, and what the text of its files looks like to people."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from proxy.setup import builders, clusters, engines
from proxy.setup.site import Piece, Setup, Site

RENDERERS: Mapping[str, Callable[[Site], Setup]] = {
    "docker": engines.docker,
    "containerd": engines.containerd,
    "podman": engines.podman,
    "crio": engines.crio,
    "buildkit": builders.buildkit,
    "k3s": clusters.k3s,
    "kind": clusters.kind,
    "kaniko": builders.kaniko,
    "talos": clusters.talos,
}
WHAT = {"keys": ", these keys beside what is there", "part": ", a part of it", "file": "", "flags": ""}
MARK = "# Written by entrepot setup"  # how a file of ours begins


def marked(piece: Piece) -> str:
    """The whole file, told to be ours."""
    return f"{MARK}, which replaces it when it runs again.\n{piece.content}"


def text(setup: Setup) -> Iterator[str]:
    """Line by line: each piece below its path, then what else is to be known, as comments."""
    for piece in setup.pieces:
        about = f" ({piece.about})" if piece.about else ""
        yield f"# {piece.path or 'flags'}{WHAT[piece.kind]}{about}"
        yield piece.content.rstrip("\n")
        yield ""
    yield f"# then: {setup.after}"
    yield from (f"# note: {each}" for each in setup.notes)

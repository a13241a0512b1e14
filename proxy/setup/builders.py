"""Configuration of image builders: BuildKit and kaniko.

Neither has a setting for all registries at once.  Both put a mirror's path after /v2.
"""

from __future__ import annotations

from proxy.config.wellknown import DOCKER_HUB
from proxy.setup.formats import quoted
from proxy.setup.site import Piece, Setup, Site

BUILDKIT = "/etc/buildkit"
KANIKO = "/kaniko"
INDEX = "index.docker.io"  # the name of Docker Hub in kaniko


def buildkit(site: Site) -> Setup:
    tables = [
        f'[registry."{each}"]\n  mirrors = {quoted(f"{site.host}/{each}")}\n' for each in site.namespaces
    ]
    authority = f"{BUILDKIT}/entrepot.crt"
    pieces = []
    if site.plain:
        tables += [f'[registry."{each}"]\n  http = true\n' for each in site.hosts]
    elif site.ca:
        tables += [f'[registry."{each}"]\n  ca = {quoted(authority)}\n' for each in site.hosts]
        pieces.append(Piece(authority, site.ca))
    notes = ["the docker driver of buildx does not read this file: use entrepot setup docker for it"]
    if not site.bypass:
        notes.append("BuildKit contacts the registry itself if a mirror fails, and no setting prevents that")
    after = (
        f"restart buildkitd, or docker buildx create --use --buildkitd-config {BUILDKIT}/buildkitd.toml"
        " for a separate builder"
    )
    return Setup("buildkit", [Piece(f"{BUILDKIT}/buildkitd.toml", "\n".join(tables)), *pieces], after, notes)


def kaniko(site: Site) -> Setup:
    flags = [f"--registry-map={_called(each)}={site.host}/{each}" for each in site.namespaces]
    notes = [
        "paths in --registry-map need kaniko 1.23; KANIKO_REGISTRY_MAP takes the same maps, separated by ;"
    ]
    if site.plain:
        flags += [f"--insecure-registry={each}" for each in site.hosts]
    elif site.ca:
        flags += [f"--registry-certificate={each}={KANIKO}/entrepot.crt" for each in site.hosts]
        notes.append(f"put the server's authority into the container as {KANIKO}/entrepot.crt")
    if not site.bypass:
        flags.append("--skip-default-registry-fallback")
    content = "".join(f"{each}\n" for each in flags)
    return Setup("kaniko", [Piece("", content, "flags")], "pass them to the executor", notes)


def _called(namespace: str) -> str:
    return INDEX if namespace == DOCKER_HUB else namespace

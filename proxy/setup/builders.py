"""What builds images: BuildKit and kaniko.

Neither can be told of all registries at once.  A mirror's path comes after /v2 for both.
"""

from __future__ import annotations

from proxy.config.wellknown import DOCKER_HUB
from proxy.setup.site import Piece, Setup, Site, quoted

BUILDKIT = "/etc/buildkit"
KANIKO = "/kaniko"
INDEX = "index.docker.io"  # what kaniko calls Docker Hub


def buildkit(site: Site) -> Setup:
    tables = [
        f'[registry."{each}"]\n  mirrors = {quoted(f"{site.host}/{each}")}\n' for each in site.namespaces
    ]
    authority = f"{BUILDKIT}/entrepot.crt"
    pieces = []
    if site.plain:
        tables.append(f'[registry."{site.host}"]\n  http = true\n')
    elif site.ca:
        tables.append(f'[registry."{site.host}"]\n  ca = {quoted(authority)}\n')
        pieces.append(Piece(authority, site.ca))
    notes = ["the docker driver of buildx has no such file: there it is what setup docker says that counts"]
    if not site.bypass:
        notes.append("BuildKit asks the registry itself when a mirror fails, and nothing keeps it from that")
    after = (
        f"restart buildkitd, or docker buildx create --use --buildkitd-config {BUILDKIT}/buildkitd.toml"
        " for a builder of its own"
    )
    return Setup("buildkit", [Piece(f"{BUILDKIT}/buildkitd.toml", "\n".join(tables)), *pieces], after, notes)


def kaniko(site: Site) -> Setup:
    flags = [f"--registry-map={_called(each)}={site.host}/{each}" for each in site.namespaces]
    notes = [
        "paths in --registry-map need kaniko 1.23; KANIKO_REGISTRY_MAP takes the maps too, with ; between"
    ]
    if site.plain:
        flags.append(f"--insecure-registry={site.host}")
    elif site.ca:
        flags.append(f"--registry-certificate={site.host}={KANIKO}/entrepot.crt")
        notes.append(f"the server's authority has to be in the container, as {KANIKO}/entrepot.crt")
    if not site.bypass:
        flags.append("--skip-default-registry-fallback")
    content = "".join(f"{each}\n" for each in flags)
    return Setup("kaniko", [Piece("", content, "flags")], "give them to the executor", notes)


def _called(namespace: str) -> str:
    return INDEX if namespace == DOCKER_HUB else namespace

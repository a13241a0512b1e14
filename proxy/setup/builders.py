"""Configuration of image builders: BuildKit, Dagger, kaniko, Jib and pack.

None has a setting for all registries at once.  BuildKit and kaniko put a mirror's path after /v2, Jib before
it.  Kaniko takes a path that begins with a host for the registry itself, and asks that: so it begins with v2.
"""

from __future__ import annotations

import json

from proxy.config.hosts import is_host
from proxy.config.wellknown import DOCKER_HUB
from proxy.setup.engines import left_out, mirror_paths
from proxy.setup.formats import in_json, quoted
from proxy.setup.site import SYSTEM, Piece, Setup, Site, loopback_notes

BUILDKIT = "/etc/buildkit"
KANIKO = "/kaniko"
INDEX = "index.docker.io"  # the name of Docker Hub in kaniko
JIB = "google-cloud-tools-java/jib/config.json"
_JIB = {DOCKER_HUB: "registry-1.docker.io"}  # the name of Docker Hub in Jib


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


def dagger(site: Site) -> Setup:
    registries: dict[str, object] = {each: {"mirrors": [f"{site.host}/{each}"]} for each in site.namespaces}
    if site.plain:
        registries |= {each: {"http": True} for each in site.hosts}
    notes = [
        "the file is for the engine that dagger starts itself; one of your own reads /etc/dagger/engine.json",
        *loopback_notes(site),
    ]
    if not site.bypass:
        notes.append("Dagger contacts the registry itself if a mirror fails, and no setting prevents that")
    after = "remove the container of the engine: the next dagger command starts another"
    trust = "mount FILE into the engine, as /usr/local/share/ca-certificates/entrepot.crt"
    pieces = [Piece("~/.config/dagger/engine.json", in_json({"registries": registries}), "keys")]
    return Setup("dagger", pieces, after, notes, trust=trust)


def kaniko(site: Site) -> Setup:
    paths = mirror_paths(site)
    paths |= {each: site.aliases.get(each) or path for each, path in paths.items()}
    flags = [
        f"--registry-map={called(each)}={site.host}/{f'v2/{path}' if is_host(path) else path}"
        for each, path in paths.items()
    ]
    notes = [
        "paths in --registry-map need kaniko 1.23; KANIKO_REGISTRY_MAP takes the same maps, separated by ;"
    ]
    notes += left_out(site)
    if site.plain:
        flags += [f"--insecure-registry={each}" for each in site.hosts]
    elif site.ca:
        flags += [f"--registry-certificate={each}={KANIKO}/entrepot.crt" for each in site.hosts]
        notes.append(f"put the server's authority into the container as {KANIKO}/entrepot.crt")
    if not site.bypass:
        flags.append("--skip-default-registry-fallback")
    content = "".join(f"{each}\n" for each in flags)
    return Setup("kaniko", [Piece("", content, "flags")], "pass them to the executor", notes)


def jib(site: Site) -> Setup:
    mirrors = [
        {"registry": _JIB.get(each, each), "mirrors": [f"{site.host}/{each}"]} for each in site.namespaces
    ]
    pieces = [Piece(f"~/.config/{JIB}", in_json({"registryMirrors": mirrors}), "keys")]
    notes = [
        "Jib has mirrors for base images; it sends them no credentials, and contacts the registry itself if"
        " all fail",
        "on macOS the file is ~/Library/Preferences/Google/Jib/config.json, on Windows"
        " %LOCALAPPDATA%\\Google\\Jib\\Config\\config.json",
    ]
    if site.plain:
        notes.append("without TLS on the server, Jib needs -Djib.allowInsecureRegistries=true")
    trust = "as root, keytool -importcert -noprompt -cacerts -alias entrepot -file FILE"
    return Setup("jib", pieces, "nothing else: Jib reads the file at each build", notes, trust=trust)


def pack(site: Site) -> Setup:
    lines = [
        f"{json.dumps(called(each))} = {json.dumps(f'{site.host}/{path}')}\n"
        for each, path in mirror_paths(site).items()
    ]
    pieces = [Piece("~/.pack/config.toml", "".join(["[registry-mirrors]\n", *lines]), "part")]
    notes = [
        "pack and dockerd, which pull by these names, contact no other registry if the server fails",
        *left_out(site),
    ]
    if site.plain and not site.loopback:
        notes.append("pack uses http only for loopback and private addresses, so the server needs TLS")
    after = "nothing else: pack reads the file at each command"
    return Setup("pack", pieces if lines else [], after, notes, trust=SYSTEM)


def called(namespace: str) -> str:
    """What tools made with go-containerregistry call it."""
    return INDEX if namespace == DOCKER_HUB else namespace

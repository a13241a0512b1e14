"""Configuration of tools that read registries: Renovate, trivy, Flux, Argo CD Image Updater."""

from __future__ import annotations

from typing import Any

from proxy.config.wellknown import DOCKER_HUB
from proxy.setup.builders import called
from proxy.setup.engines import left_out, mirror_paths
from proxy.setup.formats import in_json, in_yaml
from proxy.setup.site import CA, OURS, SYSTEM, Piece, Setup, Site, loopback_notes

GHCR = "ghcr.io"
TRIVY = "mirror.gcr.io"  # where trivy looks for its databases first


def renovate(site: Site) -> Setup:
    tree: dict[str, Any] = {}
    if DOCKER_HUB in site.namespaces:
        tree["packageRules"] = [{"matchDatasources": ["docker"], "registryUrls": [site.hub_url]}]
    tree["registryAliases"] = {each: f"{site.host}/{path}" for each, path in mirror_paths(site).items()}
    if site.plain:
        rule = {"hostType": "docker", "insecureRegistry": True}
        # Renovate compares it with the URL that it has before it looks for insecureRegistry.
        tree["hostRules"] = [{**rule, "matchHost": f"https://{each}"} for each in site.hosts]
    path = f"{OURS}/renovate/config.json"
    notes = [
        "registryUrls are for names without a registry, registryAliases for the others",
        "a 5xx of a registry ends Renovate's run for the repository: the server answers from its cache while"
        " an upstream is down, but it has no list of tags that was never asked for",
        *left_out(site),
        *loopback_notes(site),
    ]
    after = f"RENOVATE_ADDITIONAL_CONFIG_FILE={path} renovate, or add the keys to your configuration"
    trust = "NODE_EXTRA_CA_CERTS=FILE in the environment of Renovate"
    return Setup("renovate", [Piece(path, in_json(tree), "keys")], after, notes, trust=trust)


def trivy(site: Site) -> Setup:
    paths = mirror_paths(site)
    mirrors = {called(each): [f"{site.host}/{path}"] for each, path in paths.items()}
    tree: dict[str, Any] = {"registry": {"mirrors": mirrors}}
    notes = ["trivy asks the registry itself if the server fails, and no setting prevents that"]
    if GHCR in paths and TRIVY not in paths:
        tree["db"] = {
            "repository": [f"{GHCR}/aquasecurity/trivy-db:2"],
            "java-repository": [f"{GHCR}/aquasecurity/trivy-java-db:1"],
        }
        notes.append(f"the databases come from {GHCR}, since {TRIVY} is no namespace of the server")
    if site.plain and not site.loopback:
        tree["insecure"] = True
        notes.append("without TLS on the server, insecure is needed, and then trivy verifies no certificate")
    notes.append(
        "do not name the server in --db-repository: trivy goes on to the next repository after some answers,"
        " but not if the server is down"
    )
    notes += left_out(site)
    path = f"{OURS}/trivy/trivy.yaml"
    after = f"trivy --config {path} image IMAGE, or TRIVY_CONFIG={path} in the environment"
    return Setup("trivy", [Piece(path, in_yaml(tree))], after, notes, undo="drop --config", trust=SYSTEM)


def flux(site: Site) -> Setup:
    paths = mirror_paths(site)
    name = GHCR if GHCR in paths else next(iter(paths.values()), DOCKER_HUB)
    more: dict[str, Any] = {"insecure": True} if site.plain else {}
    if site.ca:
        more["certSecretRef"] = {"name": "entrepot"}
    url = f"oci://{site.host}/{name}/owner"
    trees = [
        _source("OCIRepository", {"url": f"{url}/app", "ref": {"tag": "1.0.0"}, **more}),
        _source("HelmRepository", {"type": "oci", "url": f"{url}/charts", **more}),
    ]
    after = "nothing else: each URL says which server is asked"
    pieces = [Piece("sources", in_yaml(*trees), "example")]
    if site.ca:
        pieces.append(Piece(f"{OURS}/flux/{CA}", site.ca))
        file = f"--from-file={OURS}/flux/{CA}"
        after = f"kubectl create secret generic entrepot --namespace flux-system {file}"
    notes = [
        "Flux has no setting for a mirror: URLs name the server, and so does image of an ImageRepository",
        "semver lists all tags at each interval; a tag alone is one HEAD request",
        "the images of pods are pulled by the nodes",
    ]
    return Setup("flux", pieces, after, [*notes, *loopback_notes(site)], undo="name the registry in each URL")


def argocd_image_updater(site: Site) -> Setup:
    hub = {"defaultns": "library", "default": True}  # a name without a registry is one of Docker Hub
    registries = [
        {
            "name": each,
            "prefix": each,
            "api_url": f"{site.base}/{each}",
            **(hub if each == DOCKER_HUB else {}),
        }
        for each in site.namespaces
    ]
    registries += [{"name": each, "prefix": each, "api_url": site.url_of(each)} for each in site.hosts]
    if site.ca:
        registries = [{**each, "ca_data": site.ca} for each in registries]
    data = {"registries.conf": in_yaml({"registries": registries})}
    metadata = {"name": "argocd-image-updater-config"}
    tree = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}
    path = f"{OURS}/argocd-image-updater/config.yaml"
    after = (
        f"kubectl patch -n NAMESPACE configmap {metadata['name']} --type merge --patch-file {path}; kubectl"
        " rollout restart -n NAMESPACE deployment argocd-image-updater-controller"
    )
    notes = [
        "only how images are looked up changes: their names stay as they are, and nodes pull them",
        "registries.conf replaces the one that the ConfigMap has",
        *loopback_notes(site),
    ]
    undo = "remove registries.conf from the ConfigMap, and restart the deployment"
    return Setup("argocd-image-updater", [Piece(path, in_yaml(tree))], after, notes, undo=undo)


def _source(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    metadata = {"name": "app", "namespace": "flux-system"}
    version = "source.toolkit.fluxcd.io/v1"
    return {"apiVersion": version, "kind": kind, "metadata": metadata, "spec": {"interval": "10m", **spec}}

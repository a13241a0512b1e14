"""Configuration of operating systems and platforms that take it as a document, by their API."""

from __future__ import annotations

import base64
import json
from typing import Any

from proxy.config.wellknown import DOCKER_HUB
from proxy.setup.clusters import EVERY, endpoints
from proxy.setup.engines import left_out, mirror_paths
from proxy.setup.formats import in_yaml, quoted
from proxy.setup.site import OURS, Piece, Setup, Site, loopback_notes

CONFIG = "config.openshift.io/v1"


def talos(site: Site) -> Setup:
    more = {} if site.bypass else {"skipFallback": True}
    mirrors = {name: {"endpoints": [url], **more} for name, url in endpoints(site).items()}
    registries: dict[str, Any] = {"mirrors": mirrors}
    if site.ca:
        registries["config"] = {each: {"tls": {"ca": _base64(site.ca)}} for each in site.hosts}
    path = f"{OURS}/talos/registries.yaml"
    pieces = [Piece(path, in_yaml({"machine": {"registries": registries}}))]
    notes = ["Talos 1.12 and later prefer RegistryMirrorConfig documents, but still accept this form"]
    after = f"talosctl patch machineconfig --nodes NODE --patch @{path}"
    undo = "talosctl edit machineconfig --nodes NODE, and delete machine.registries"
    return Setup("talos", pieces, after, [*notes, *loopback_notes(site)], undo=undo)


def bottlerocket(site: Site) -> Setup:
    # Variants for ECS read docker.io alone, those for Kubernetes prefer it to "*".  To a path, dockerd adds
    # /v2, but neither containerd nor host-ctr does.
    hub = site.base if site.hub else f"{site.base}/v2/{DOCKER_HUB}"
    urls = endpoints(site) | ({DOCKER_HUB: hub} if DOCKER_HUB in site.namespaces else {})
    tables = [
        f"[[settings.container-registry.mirrors]]\nregistry = {json.dumps(name)}\nendpoint = {quoted(url)}\n"
        for name, url in urls.items()
    ]
    if site.ca:
        tables.append(f'[settings.pki.entrepot]\ndata = "{_base64(site.ca)}"\ntrusted = true\n')
    notes = [
        f'variants for ECS use the mirror of docker.io only; those for Kubernetes also that of "{EVERY}"',
        *loopback_notes(site),
    ]
    if not site.bypass:
        notes.append("Bottlerocket contacts the registry itself if a mirror fails; no setting prevents that")
    after = "add it to the user data of new nodes; on a node: apiclient apply < FILE"
    undo = "remove it from the user data, and replace the nodes"
    path = f"{OURS}/bottlerocket/user-data.toml"
    return Setup("bottlerocket", [Piece(path, "\n".join(tables))], after, notes, undo=undo)


def openshift(site: Site) -> Setup:
    policy = {} if site.bypass else {"mirrorSourcePolicy": "NeverContactSource"}
    mirrors = [
        {"source": each, "mirrors": [f"{site.host}/{path}"], **policy}
        for each, path in mirror_paths(site).items()
    ]
    trees = [
        _document("ImageDigestMirrorSet", spec={"imageDigestMirrors": mirrors}),
        _document("ImageTagMirrorSet", spec={"imageTagMirrors": mirrors}),
    ]
    spec: dict[str, Any] = {}
    if site.plain:
        spec["registrySources"] = {"insecureRegistries": list(site.hosts)}
    elif site.ca:
        # A key of a ConfigMap has no colon: two dots stand before the port.
        ca = {each.replace(":", ".."): site.ca for each in site.hosts}
        trees.append(_document("ConfigMap", "v1", {"namespace": "openshift-config"}, data=ca))
        spec["additionalTrustedCA"] = {"name": "entrepot"}
    path = f"{OURS}/openshift/mirrors.yaml"
    after, notes = f"oc apply -f {path}", ["tags have mirrors since OpenShift 4.13 (ImageTagMirrorSet)"]
    if spec:
        patch = json.dumps({"spec": spec})
        after += f"; oc patch image.config.openshift.io/cluster --type=merge -p '{patch}'"
        notes.append(
            "the patch replaces registrySources.insecureRegistries and additionalTrustedCA: add what the"
            " cluster has there already (oc get image.config.openshift.io/cluster -o yaml)"
        )
    notes.append("the Machine Config Operator changes one node after the other, and may drain it")
    undo = "oc delete imagedigestmirrorset,imagetagmirrorset entrepot"
    notes += [*left_out(site), *loopback_notes(site)]
    return Setup("openshift", [Piece(path, in_yaml(*trees))], after, notes, undo=undo)


def _document(
    kind: str, version: str = CONFIG, metadata: dict[str, str] | None = None, **content: object
) -> dict[str, object]:
    metadata = {"name": "entrepot", **(metadata or {})}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **content}


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()

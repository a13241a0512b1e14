"""Kubernetes distributions and platforms: each file is compared as its reader parses it."""

from __future__ import annotations

import base64
import json
import re
import shlex
from dataclasses import replace
from typing import Any

import pytest
import yaml
from yarl import URL

from proxy.setup.renderers import RENDERERS
from tests.test_setup import CERTS, PEM, PLAIN, PULL, SECURE, content, made, notes

OURS = "/etc/entrepot/clients"
STRICT = replace(SECURE, bypass=False)


def flags(setup: Any) -> list[str]:
    """The arguments that a shell makes of the flags."""
    (piece,) = (each for each in setup.pieces if each.kind == "flags")
    return shlex.split(piece.content)


def test_rke2_has_the_files_of_k3s() -> None:
    for site in (PLAIN, STRICT):
        k3s, rke2 = RENDERERS["k3s"](site), RENDERERS["rke2"](site)
        moved = [
            (each.path.replace("k3s", "rke2"), each.content.replace("k3s", "rke2")) for each in k3s.pieces
        ]
        assert [(each.path, each.content) for each in rke2.pieces] == moved
    assert "rke2-server" in rke2.after


def test_k3d_is_given_the_files_by_flags() -> None:
    setup = made("k3d", PLAIN)
    assert content(setup, f"{OURS}/k3d/registries.yaml") == {
        "mirrors": {"*": {"endpoint": ["http://cache.example:5000"]}}
    }
    assert flags(setup) == [f"--registry-config={OURS}/k3d/registries.yaml"]
    setup = made("k3d", STRICT)
    config = content(setup, f"{OURS}/k3d/registries.yaml")["configs"]
    # What it names is where the volume is mounted.
    (authority,) = {each["tls"]["ca_file"] for each in config.values()}
    assert flags(setup)[1:] == [
        f"--volume={OURS}/k3d/entrepot.crt:{authority}@server:*;agent:*",
        "--k3s-arg=--disable-default-registry-endpoint@server:*;agent:*",
    ]
    assert content(setup, f"{OURS}/k3d/entrepot.crt") == PEM
    assert "host.k3d.internal:5000" in notes(made("k3d", PLAIN, url=URL("http://127.0.0.1:5000")))


def test_minikube_copies_the_files_of_its_runtimes() -> None:
    setup = made("minikube", SECURE)
    for client in ("containerd", "podman"):
        for each in RENDERERS[client](SECURE).pieces:
            if each.kind == "file":
                assert content(setup, f"~/.minikube/files{each.path}") == content(
                    made(client, SECURE), each.path
                )
    assert content(setup, "~/.minikube/files/etc/docker/certs.d/cache.example/ca.crt") == PEM
    assert flags(setup) == ["--registry-mirror=https://cache.example"]
    assert flags(made("minikube", PLAIN, hub=False)) == [
        "--registry-mirror=http://cache.example:5000/docker.io",
        "--insecure-registry=cache.example:5000",
    ]
    nothing = made("minikube", SECURE, namespaces=("ghcr.io",))
    assert not [each for each in nothing.pieces if each.kind == "flags"]


def test_k0s_imports_a_file_that_names_the_directory() -> None:
    setup = made("k0s", STRICT)
    drop_in = content(setup, "/etc/k0s/containerd.d/entrepot.toml")
    assert drop_in["version"] == 3
    (plugin,) = drop_in["plugins"].values()
    directory = plugin["registry"]["config_path"]
    for each in RENDERERS["containerd"](STRICT).pieces:
        if each.kind == "file":
            moved = each.path.replace(CERTS, directory)
            assert content(setup, moved) == content(made("containerd", STRICT), each.path)


def test_microk8s_has_a_file_for_docker_hub_before_the_default() -> None:
    certs = "/var/snap/microk8s/current/args/certs.d"
    setup = made("microk8s", SECURE)
    for name in ("hosts.toml", "ca.crt"):
        assert content(setup, f"{certs}/docker.io/{name}") == content(setup, f"{certs}/_default/{name}")
    assert content(setup, f"{certs}/_default/hosts.toml")["host"]["https://cache.example"]["ca"] == "ca.crt"
    assert "--force" in notes(setup)
    few = made("microk8s", PLAIN, every=False, namespaces=("docker.io",))
    paths = [each.path for each in few.pieces]
    assert paths.count(f"{certs}/docker.io/hosts.toml") == 1
    assert not any(
        "docker.io" in each.path for each in made("microk8s", PLAIN, namespaces=("ghcr.io",)).pieces
    )


def documents(setup: Any) -> dict[str, Any]:
    """The documents of the one file, by kind."""
    (piece,) = setup.pieces
    return {each["kind"]: each for each in yaml.safe_load_all(piece.content)}


def test_openshift() -> None:
    setup = made("openshift", PLAIN)
    found = documents(setup)
    mirrors = [
        {"source": each, "mirrors": [f"cache.example:5000/{each.replace(':', '_')}"]}
        for each in PLAIN.namespaces
    ]
    assert found["ImageDigestMirrorSet"]["spec"] == {"imageDigestMirrors": mirrors}
    assert found["ImageTagMirrorSet"]["spec"] == {"imageTagMirrors": mirrors}
    assert patch(setup) == {"spec": {"registrySources": {"insecureRegistries": ["cache.example:5000"]}}}
    assert "openshift" in setup.after and "delete" in setup.undo


def patch(setup: Any) -> Any:
    """What oc patch is given."""
    return json.loads(shlex.split(setup.after)[-1])


def test_openshift_by_https() -> None:
    site = replace(STRICT, stores={"local": "cache.example:5001"}, namespaces=("docker.io", "[::1]:5000"))
    found = documents(RENDERERS["openshift"](site))
    # A key of a ConfigMap must not have a colon.
    assert found["ConfigMap"]["data"] == {"cache.example..5001": PEM, "cache.example": PEM}
    assert found["ConfigMap"]["metadata"]["namespace"] == "openshift-config"
    name = found["ConfigMap"]["metadata"]["name"]
    assert patch(RENDERERS["openshift"](site)) == {"spec": {"additionalTrustedCA": {"name": name}}}
    (mirror,) = found["ImageTagMirrorSet"]["spec"]["imageTagMirrors"]
    assert mirror["mirrorSourcePolicy"] == "NeverContactSource"
    assert "oc patch" not in made("openshift", SECURE, ca=None).after


def test_bottlerocket() -> None:
    path = f"{OURS}/bottlerocket/user-data.toml"
    settings = content(made("bottlerocket", PLAIN, hub=False, stores={"local": "cache.example:5001"}), path)[
        "settings"
    ]
    mirrors = {each["registry"]: each["endpoint"] for each in settings["container-registry"]["mirrors"]}
    assert mirrors == {
        "cache.example:5001": ["http://cache.example:5001"],
        "*": ["http://cache.example:5000"],
        "docker.io": ["http://cache.example:5000/v2/docker.io"],
    }
    setup = made("bottlerocket", STRICT, every=False, namespaces=("ghcr.io",))
    settings = content(setup, path)["settings"]
    assert settings["container-registry"]["mirrors"] == [
        {"registry": "ghcr.io", "endpoint": ["https://cache.example"]}
    ]
    (bundle,) = settings["pki"].values()
    assert base64.b64decode(bundle["data"]).decode() == PEM and bundle["trusted"] is True
    assert "no setting prevents that" in notes(setup)


@pytest.mark.parametrize("client", ["k3s", "rke2", "k3d", "rancher-desktop", "talos", "bottlerocket"])
def test_a_server_without_tls_has_an_entry_where_no_entry_is_for_all(client: str) -> None:
    """Without one, containerd asks for its images by https."""
    few = "".join(each.content for each in made(client, PLAIN, every=False).pieces)
    assert re.search(r"['\"]?cache\.example:5000['\"]?:\n|registry = \"cache\.example:5000\"", few)


@pytest.mark.parametrize(
    "client", ["rke2", "k3d", "minikube", "k0s", "microk8s", "openshift", "bottlerocket"]
)
def test_another_machine_has_a_loopback_of_its_own(client: str) -> None:
    assert "give --url" in notes(made(client, PLAIN, url=URL("http://127.0.0.1:5000")))
    assert "give --url" not in notes(made(client, PLAIN))


@pytest.mark.parametrize("client", ["k0s", "microk8s", "minikube"])
def test_the_directory_is_that_of_containerd(client: str) -> None:
    """By registry where only some are asked for, without the registry where it must not be asked."""
    setup = made(client, PLAIN, every=False, bypass=False)
    hosts = {each.path for each in setup.pieces if each.path.endswith("hosts.toml")}
    assert {re.split("certs.d/", each)[1] for each in hosts} == {
        f"{each}/hosts.toml" for each in (*PLAIN.namespaces, PLAIN.host)
    }
    (path,) = (each for each in hosts if "ghcr.io" in each)
    assert content(setup, path) == {"server": "http://cache.example:5000", "capabilities": PULL, "host": {}}

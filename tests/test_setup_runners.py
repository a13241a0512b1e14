"""Desktops, runners of jobs, and Jib: each file is compared as its reader parses it, and scripts are run."""

from __future__ import annotations

import json
import subprocess
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from yarl import URL

from proxy.setup.desktops import script
from proxy.setup.renderers import RENDERERS
from proxy.setup.site import Setup
from tests.test_setup import PEM, PLAIN, SECURE, content, made, notes

DAEMON = {"registry-mirrors": ["http://cache.example:5000"], "insecure-registries": ["cache.example:5000"]}
LOCAL = URL("http://127.0.0.1:5000")
RANCHER = "~/.local/share/rancher-desktop/lima/_config/override.yaml"


def written(tree: Any, root: Path) -> dict[str, str]:
    """What the script of a virtual machine writes there, `root` being /."""
    (step,) = tree["provision"]
    assert step["mode"] == "system"
    text = step["script"].replace("'/etc/", f"'{root}/etc/")
    subprocess.run(["/bin/sh", "-c", text], check=True)
    return {f"/{each.relative_to(root)}": each.read_text() for each in root.rglob("*") if each.is_file()}


def test_a_script_writes_each_file_as_it_is(tmp_path: Path) -> None:
    files = {"/etc/a b/x": "$HOME `id` \\\n'quoted' \"too\"\n", "/etc/y": "1\n2\n"}
    assert written({"provision": [{"mode": "system", "script": script(files)}]}, tmp_path) == files


def test_docker_desktop_has_its_file_in_the_home_directory() -> None:
    assert content(made("docker-desktop", PLAIN), "~/.docker/daemon.json") == DAEMON
    secure = made("docker-desktop", SECURE)
    assert content(secure, "~/.docker/daemon.json") == {"registry-mirrors": ["https://cache.example"]}
    assert content(secure, "~/.docker/certs.d/cache.example/ca.crt") == PEM
    assert "http://host.docker.internal:5000" in notes(made("docker-desktop", PLAIN, url=LOCAL))


@pytest.mark.parametrize("site", [PLAIN, replace(SECURE, bypass=False)])
def test_rancher_desktop_writes_for_each_of_its_readers(site: Any, tmp_path: Path) -> None:
    setup = RENDERERS["rancher-desktop"](site)
    found = written(content(setup, RANCHER), tmp_path)
    assert json.loads(found["/etc/docker/daemon.json"]) == content(
        RENDERERS["docker"](site), "/etc/docker/daemon.json"
    )
    k3s = yaml.safe_load(found["/etc/rancher/k3s/registries.yaml"])
    assert k3s["mirrors"] == {"*": {"endpoint": [site.base]}}
    for each in (each for each in RENDERERS["containerd"](site).pieces if each.kind == "file"):
        moved = each.path.replace("/etc/containerd", "~/.docker")
        assert content(setup, moved) == content(RENDERERS["containerd"](site), each.path)
    if site.ca:
        (authority,) = {each["tls"]["ca_file"] for each in k3s["configs"].values()}
        # As the virtual machine sees it.
        assert content(setup, authority.replace("/etc/docker", "~/.docker")) == PEM
    assert all(each in setup.undo for each in found)


@pytest.mark.parametrize("site", [PLAIN, SECURE])
def test_colima_has_all_in_one_part(site: Any, tmp_path: Path) -> None:
    setup = RENDERERS["colima"](site)
    (piece,) = setup.pieces
    assert piece.kind == "part"
    tree = yaml.safe_load(piece.content)
    assert tree["docker"] == content(RENDERERS["docker"](site), "/etc/docker/daemon.json")
    found = written(tree, tmp_path)
    expected = {each.path: each.content for each in RENDERERS["docker"](site).pieces if each.kind == "file"}
    assert expected.items() <= found.items()
    assert tomllib.loads(found[f"/etc/docker/certs.d/{site.host}/hosts.toml"])["server"] == site.base


def test_jib() -> None:
    path = "~/.config/google-cloud-tools-java/jib/config.json"
    assert content(made("jib", PLAIN), path)["registryMirrors"][:2] == [
        {"registry": "registry-1.docker.io", "mirrors": ["cache.example:5000/docker.io"]},
        {"registry": "ghcr.io", "mirrors": ["cache.example:5000/ghcr.io"]},
    ]
    assert "allowInsecureRegistries" in notes(made("jib", PLAIN))
    assert "allowInsecureRegistries" not in notes(made("jib", SECURE))
    assert "keytool" in made("jib", SECURE).trust


def volumes(setup: Setup) -> dict[str, str]:
    """What is mounted where, by the configuration of the runner."""
    (runner,) = content(setup, "/etc/gitlab-runner/config.toml")["runners"]
    parts = [each.split(":") for each in runner["docker"]["volumes"]]
    assert all(rest == ["ro"] for _, _, *rest in parts)
    return {inside: outside for outside, inside, _ in parts}


def test_gitlab_runner_mounts_the_files_of_docker() -> None:
    setup = made("gitlab-runner", SECURE)
    mounted = volumes(setup)
    for each in RENDERERS["docker"](SECURE).pieces:
        (inside,) = (path for path in mounted if each.path.startswith(path))
        moved = each.path.replace(inside, mounted[inside])
        assert content(setup, moved) == content(RENDERERS["docker"](SECURE), each.path)
    few = volumes(made("gitlab-runner", SECURE, namespaces=("ghcr.io",)))
    assert "/etc/docker/daemon.json" not in few  # there is nothing in it
    assert "give --url" in notes(made("gitlab-runner", PLAIN, url=LOCAL))


def test_arc_starts_dockerd_with_the_server() -> None:
    spec = content(made("arc", PLAIN), "/etc/entrepot/clients/arc/values.yaml")["template"]["spec"]
    dind = spec["initContainers"][1]
    assert dind["args"][-2:] == [
        "--registry-mirror=http://cache.example:5000",
        "--insecure-registry=cache.example:5000",
    ]
    containers = [*spec["initContainers"], *spec["containers"]]
    names = {each["name"] for each in spec["volumes"]}
    assert {mount["name"] for each in containers for mount in each["volumeMounts"]} == names


def test_arc_mounts_the_authority() -> None:
    setup = made("arc", SECURE, stores={"local": "cache.example:5001"})
    spec = content(setup, "/etc/entrepot/clients/arc/values.yaml")["template"]["spec"]
    name = next(each["name"] for each in spec["volumes"] if "configMap" in each)
    mounts = [each["mountPath"] for each in spec["initContainers"][1]["volumeMounts"] if each["name"] == name]
    assert mounts == [f"/etc/docker/certs.d/{each}" for each in ("cache.example:5001", "cache.example")]
    # The name of the file becomes the key, and so the name that dockerd looks for.
    assert content(setup, "/etc/entrepot/clients/arc/ca.crt") == PEM
    assert "--from-file=/etc/entrepot/clients/arc/ca.crt" in setup.after


def test_nomad_has_the_files_of_docker() -> None:
    setup = made("nomad", PLAIN, namespaces=("docker.io", "registry.k8s.io"))
    assert setup.pieces == made("docker", PLAIN, namespaces=("docker.io", "registry.k8s.io")).pieces
    assert "cache.example:5000/registry.k8s.io/pause" in notes(setup)
    assert "infra_image" not in notes(made("nomad", PLAIN))


def test_json_lists_of_objects_and_parts_are_merged(tmp_path: Path) -> None:
    """As of Jib, and of colima, whose file is YAML."""
    from proxy.setup.install import plan_install

    jib = RENDERERS["jib"](PLAIN)
    mine = {"disableUpdateCheck": True, "registryMirrors": [{"registry": "x.example", "mirrors": ["y"]}]}
    file = tmp_path / str(Path(jib.pieces[0].path).expanduser()).lstrip("/")
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(mine))
    (change,) = plan_install(jib, tmp_path).changes
    merged = json.loads(change.after or "")
    ours = content(jib, jib.pieces[0].path)["registryMirrors"]
    assert merged == {"disableUpdateCheck": True, "registryMirrors": [*ours, *mine["registryMirrors"]]}  # type: ignore[misc]

    colima = RENDERERS["colima"](PLAIN)
    assert plan_install(colima, tmp_path).parts == colima.pieces
    file = tmp_path / str(Path(colima.pieces[0].path).expanduser()).lstrip("/")
    file.parent.mkdir(parents=True)
    tree = yaml.safe_load(colima.pieces[0].content)
    tree["docker"]["features"] = {"buildkit": True}
    tree["provision"].insert(0, {"mode": "user", "script": "true"})
    file.write_text(yaml.safe_dump({"cpu": 2, **tree}))
    assert plan_install(colima, tmp_path).parts == []
    file.write_text("cpu: [")
    assert "it is not YAML" in plan_install(colima, tmp_path).refused[0][2]

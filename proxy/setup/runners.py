"""Configuration of what runs jobs: GitLab Runner, the runners of GitHub (ARC), Nomad.

The images of jobs are pulled by an engine that setup configures by itself.  What is here is the dockerd that
runs inside a job.
"""

from __future__ import annotations

from typing import Any

from proxy.setup.engines import DOCKER, authorities, daemon_keys, docker, mirrors
from proxy.setup.formats import in_json, in_yaml, quoted
from proxy.setup.site import CA, OURS, Piece, Setup, Site, loopback_notes

GITLAB = f"{OURS}/gitlab-runner"
PAUSE = "registry.k8s.io"
IMAGE = "ghcr.io/actions/actions-runner:latest"


def gitlab_runner(site: Site) -> Setup:
    volumes = [f"{GITLAB}/certs.d:{DOCKER}/certs.d:ro"]
    pieces = [*mirrors(site, f"{GITLAB}/certs.d"), *authorities(site, f"{GITLAB}/certs.d")]
    if keys := daemon_keys(site):
        pieces.insert(0, Piece(f"{GITLAB}/daemon.json", in_json(keys), "keys"))
        volumes.insert(0, f"{GITLAB}/daemon.json:{DOCKER}/daemon.json:ro")
    config = f"[[runners]]\n  [runners.docker]\n    volumes = {quoted(*volumes)}\n"
    pieces.append(Piece("/etc/gitlab-runner/config.toml", config, "part"))
    notes = [
        "this is for docker:dind in jobs; the images of the jobs are pulled by the engine of the machine:"
        " entrepot setup docker, or podman; with the Kubernetes executor by that of the nodes",
        "add the volumes to those that the runner has, such as /cache",
        *loopback_notes(site),
    ]
    after = "nothing else: the runner reads config.toml again when it changes"
    return Setup("gitlab-runner", pieces, after, notes)


def arc(site: Site) -> Setup:
    keys = daemon_keys(site)
    flags = [f"--registry-mirror={each}" for each in keys.get("registry-mirrors", [])]
    flags += [f"--insecure-registry={each}" for each in keys.get("insecure-registries", [])]
    path = f"{OURS}/arc/values.yaml"
    pieces = [Piece(path, in_yaml({"template": {"spec": _pod(site, flags)}}))]
    after = f"helm upgrade --install NAME --values {path}, after the values that you have"
    if site.ca:
        file = f"{OURS}/arc/{CA}"
        pieces.append(Piece(file, site.ca))
        after = f"kubectl create configmap entrepot --from-file={file} --namespace NAMESPACE; {after}"
    notes = [
        "this is for containerMode dind of gha-runner-scale-set: leave out containerMode, since it replaces"
        " the template; the pods need Kubernetes 1.29",
        "the images of pods and of job containers in Kubernetes mode are pulled by the nodes",
        *loopback_notes(site),
    ]
    undo = "set containerMode.type to dind, and helm upgrade"
    return Setup("arc", pieces, after, notes, undo=undo)


_WORK = {"name": "work", "mountPath": "/home/runner/_work"}
_SOCKET = {"name": "dind-sock", "mountPath": "/var/run"}
_RUNNER = {
    "name": "runner",
    "image": IMAGE,
    "command": ["/home/runner/run.sh"],
    "env": [
        {"name": "DOCKER_HOST", "value": "unix:///var/run/docker.sock"},
        {"name": "RUNNER_WAIT_FOR_DOCKER_IN_SECONDS", "value": "120"},
    ],
    "volumeMounts": [_WORK, _SOCKET],
}
_EXTERNALS = {
    "name": "init-dind-externals",
    "image": IMAGE,
    "command": ["cp", "-r", "/home/runner/externals/.", "/home/runner/tmpDir/"],
    "volumeMounts": [{"name": "dind-externals", "mountPath": "/home/runner/tmpDir"}],
}


def _pod(site: Site, flags: list[str]) -> dict[str, Any]:
    """The pod that the chart makes for dind, with flags for dockerd."""
    volumes: list[dict[str, Any]] = [
        {"name": name, "emptyDir": {}} for name in ("work", "dind-sock", "dind-externals")
    ]
    if site.ca:
        volumes.append({"name": "entrepot", "configMap": {"name": "entrepot"}})
    return {"initContainers": [_EXTERNALS, _dind(site, flags)], "containers": [_RUNNER], "volumes": volumes}


def _dind(site: Site, flags: list[str]) -> dict[str, Any]:
    trusted = [
        {"name": "entrepot", "mountPath": f"{DOCKER}/certs.d/{each}"} for each in site.hosts if site.ca
    ]
    externals = {"name": "dind-externals", "mountPath": "/home/runner/externals"}
    return {
        "name": "dind",
        "image": "docker:dind",
        "args": ["dockerd", "--host=unix:///var/run/docker.sock", "--group=$(DOCKER_GROUP_GID)", *flags],
        "env": [{"name": "DOCKER_GROUP_GID", "value": "123"}],
        "securityContext": {"privileged": True},
        "restartPolicy": "Always",
        "startupProbe": {
            "exec": {"command": ["docker", "info"]},
            "failureThreshold": 24,
            "periodSeconds": 5,
        },
        "volumeMounts": [_WORK, _SOCKET, externals, *trusted],
    }


def nomad(site: Site) -> Setup:
    made = docker(site)
    notes = [
        "the docker driver pulls by dockerd of the machine, whose files these are; for the podman driver use"
        " entrepot setup podman",
        *made.notes,
    ]
    if PAUSE in site.namespaces:
        notes.append(
            f"for jobs in bridge mode, Nomad pulls the image of pause from {PAUSE}, which dockerd does not"
            f' mirror: set infra_image = "{site.host}/{PAUSE}/pause:3.10" in the config of plugin "docker"'
        )
    return Setup("nomad", made.pieces, made.after, notes)

"""Drives dockerd by its API: `pull NAME`, `login REGISTRY`, `push SOURCE TARGET`; credentials as in LOGIN."""

import os
import sys

import docker
from docker.errors import DockerException

engine = docker.DockerClient(base_url=f"unix://{os.environ['HOME']}/docker.sock")
credentials = {"username": os.environ["LOGIN"], "password": os.environ["PASSWORD"]}


def push(source: str, target: str) -> None:
    repository, _, tag = target.rpartition(":")
    engine.images.pull(source).tag(repository, tag)
    for line in engine.images.push(repository, tag, auth_config=credentials, stream=True, decode=True):
        if "error" in line:
            raise DockerException(line["error"])


match sys.argv[1:]:
    case ["pull", name]:
        engine.images.pull(name)
    case ["login", registry]:
        engine.login(**credentials, registry=registry)
    case ["push", source, target]:
        push(source, target)

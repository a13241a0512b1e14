"""What the README prints for a push, done as it is printed."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.conftest import Filled
from tests.clients.processes import PATIENCE, Process, environment, free_port, require
from tests.clients.site import SERVER, DockerRegistry
from tests.clients.test_login import Docker

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def address(filled: Filled, tmp_path: Path) -> Iterator[str]:
    """Of a server that is started with --store local, whose Docker Hub is the filled one."""
    hub = DockerRegistry(filled.roots["docker.io"], tmp_path)
    port = free_port()
    config = tmp_path / "entrepot.yml"
    tree = {
        "listen": f"127.0.0.1:{port}",
        "admin": "off",
        "disk": {"path": str(tmp_path / "disk")},
        "namespaces": {"docker.io": {"upstream": hub.url}},
    }
    config.write_text(json.dumps(tree))
    server = Process([*SERVER, config, "--store", "local"], ready="listening")
    assert server.wait_for(f"private registry local: docker push 127.0.0.1:{port}/local/team/app:1")
    yield f"localhost:{port}"
    server.stop()
    hub.stop()


def commands() -> list[str]:
    section = re.search(r"^## Push to it$(.*?)^## ", README.read_text(), re.DOTALL | re.MULTILINE)
    assert section
    block = re.search(r"```console\n(.*?)```", section[1], re.DOTALL)
    assert block
    first, *rest = [line.removeprefix("$ ") for line in block[1].splitlines()]
    assert first == "entrepot serve --store local"
    return rest


def test_the_push_works_as_printed(address: str, home: Path) -> None:
    require("docker", "dockerd", "podman", "skopeo")
    auth = home / "auth.json"
    auth.write_text("{}")
    storage = home / "storage.conf"
    storage.write_text(f'[storage]\ndriver = "vfs"\ngraphroot = "{home}/root"\nrunroot = "{home}/run"\n')
    settings = {"REGISTRY_AUTH_FILE": str(auth), "CONTAINERS_STORAGE_CONF": str(storage)}
    docker = Docker(home)
    try:
        for command in commands():
            said = command.replace("localhost:5000", address).replace("alpine:3", "layers:1")
            done = subprocess.run(
                said.replace("skopeo copy", "skopeo --insecure-policy copy"),
                shell=True,
                env=environment(home, DOCKER_HOST=docker.host, **settings),
                capture_output=True,
                text=True,
                timeout=PATIENCE,
            )
            assert done.returncode == 0, (said, done.stdout, done.stderr)
    finally:
        docker.stop()

"""What the README prints for a start, a push, and a look at what is stored, done as it is printed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.conftest import Filled
from tests.clients.processes import PATIENCE, Process, environment, free_port, require
from tests.clients.site import SERVER, DockerRegistry
from tests.clients.test_login import Docker
from tests.sandbox import shows
from tests.test_console import blocks

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"


@pytest.fixture
def address(filled: Filled, tmp_path: Path) -> Iterator[str]:
    """Of a server that is started with --store local, whose Docker Hub is the filled one."""
    hub = DockerRegistry(filled.roots["docker.io"], tmp_path)
    port = free_port()
    config = tmp_path / "entrepot.yml"
    tree = {
        "listen": f"127.0.0.1:{port}",
        "admin": f"127.0.0.1:{free_port()}",
        "disk": {"path": str(tmp_path / "disk")},
        "namespaces": {"docker.io": {"upstream": hub.url}},
    }
    config.write_text(json.dumps(tree))
    server = Process([*SERVER, config, "--store", "local"], ready="listening")
    assert server.wait_for(f"private registry local: docker push 127.0.0.1:{port}/local/team/app:1")
    yield f"localhost:{port}"
    server.stop()
    hub.stop()


def started(home: Path, *options: str) -> list[str]:
    """What a server prints at its start, with its addresses by the environment."""
    at = {f"ENTREPOT_{name}": f"127.0.0.1:{free_port()}" for name in ("LISTEN", "ADMIN")}
    command = [sys.executable, "-m", "proxy", "serve", *options]
    server = Process(command, environment(home, **at), ready="complete instructions")
    server.stop()
    end = [line.startswith("complete instructions") for line in server.lines].index(True) + 1
    return [line.replace(", with ENTREPOT_ADMIN, ENTREPOT_LISTEN", "") for line in server.lines[:end]]


def test_a_server_prints_at_its_start_what_is_shown(home: Path) -> None:
    (shown,) = [
        lines[1:] for lines in blocks(README.read_text()) if lines[0].endswith(".venv/bin/entrepot serve")
    ]
    assert len(shown) > 5
    printed = [line.replace(str(home), "/home/you") for line in started(home)]
    assert shows(shown, [line for line in printed if line])


def test_a_server_starts_by_its_options_alone(home: Path) -> None:
    """As docs/commands.md has them; it listens elsewhere."""
    page = (ROOT / "docs" / "commands.md").read_text()
    (line,) = re.findall(r"^\$ entrepot serve (--listen .+)$", page, re.MULTILINE)
    options = line.replace("0.0.0.0:5000", f"127.0.0.1:{free_port()}").replace("/data", f"{home}/data")
    printed = started(home, *options.split())
    assert f"storing in {home}/data" in printed
    assert any(line.startswith("private registry local: docker push ") for line in printed)


def commands(first: str) -> list[str]:
    """The commands of the block that begins with this one, which is the first."""
    blocks = re.findall(r"```console\n(.*?)```", README.read_text(), re.DOTALL)
    (block,) = [each for each in blocks if each.startswith(f"$ {first}\n")]
    return [line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")]


def test_the_push_works_as_printed(address: str, home: Path) -> None:
    require("docker", "dockerd", "podman", "skopeo")
    auth = home / "auth.json"
    auth.write_text("{}")
    storage = home / "storage.conf"
    storage.write_text(f'[storage]\ndriver = "vfs"\ngraphroot = "{home}/root"\nrunroot = "{home}/run"\n')
    settings = {"REGISTRY_AUTH_FILE": str(auth), "CONTAINERS_STORAGE_CONF": str(storage)}
    docker = Docker(home)
    try:
        for command in commands("entrepot serve --store local")[1:]:
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


# What needs more than this server: other files, a clone, or time. The rest of a block is run.
ELSEWHERE = ("purge", "warm", "ready", "drill", "export", "import")


def test_what_is_stored_is_shown_as_printed(address: str, home: Path, tmp_path: Path) -> None:
    require("skopeo")
    pull = (
        f"skopeo --insecure-policy copy --src-tls-verify=false docker://{address}/docker.io/library/layers:1"
    )
    settings = environment(home, ENTREPOT_CONFIG=str(tmp_path / "entrepot.yml"), COLUMNS="200")
    settings["PATH"] = f"{Path(sys.executable).parent}:{settings['PATH']}"

    def run(command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, shell=True, env=settings, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE
        )

    push = (
        f"skopeo --insecure-policy copy --dest-tls-verify=false oci:image docker://{address}/local/team/app:1"
    )
    for command in (f"{pull} oci:image", push):
        assert run(command).returncode == 0, command
    said = []
    for command in commands("entrepot ls --tags"):
        if command.split()[1] not in ELSEWHERE:
            done = run(command.replace("alpine:3", "layers:1"))
            assert done.returncode == 0, (command, done.stdout, done.stderr)
            said.append(done.stdout)
    images, saved, why, pinned = said
    assert "docker.io/library/layers:1" in images
    assert "nothing was pulled" not in saved
    assert "hit: the tag is fresh" in why
    assert "docker.io/library/layers:1" in pinned
    tagged, deleted = map(run, commands("entrepot tag local/team/app:1 local/team/app:stable"))
    assert tagged.stdout.startswith("local/team/app:stable: sha256:"), tagged.stderr
    assert "matches local/*:ci-*" in deleted.stderr  # there are none

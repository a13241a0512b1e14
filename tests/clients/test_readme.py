"""What the README prints for a start, a push, and a look at what is stored, done as it is printed."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from proxy.cli.main import main
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


PASSWORD = "correct horse battery"


@pytest.fixture
def addresses(filled: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """Of a server with the user alice: that of its caches, and that of its private registry."""
    hub = DockerRegistry(filled.roots["docker.io"], tmp_path)
    caches, store = (f"127.0.0.1:{free_port()}" for _ in range(2))
    users, config = tmp_path / "htpasswd", tmp_path / "entrepot.yml"
    monkeypatch.setattr("proxy.cli.users.is_interactive", lambda: True)
    typed = f"{PASSWORD}\n{PASSWORD}\n"
    added = CliRunner().invoke(main, ["user", "add", "alice", "--file", str(users)], input=typed)
    assert added.exit_code == 0, added.output
    tree = {
        "listen": caches,
        "admin": "off",
        "disk": {"path": str(tmp_path / "disk")},
        "access": {"htpasswd": str(users)},
        "namespaces": {"docker.io": {"upstream": hub.url}, "local": {"store": {}, "listen": store}},
    }
    config.write_text(json.dumps(tree))
    server = Process([*SERVER, config], ready="listening")
    yield caches, store
    server.stop()
    hub.stop()


def on_a_terminal(command: str, settings: dict[str, str], *answers: tuple[str, str]) -> tuple[int, str]:
    """The exit status of a command that asks, and all that is on its terminal."""
    here, there = pty.openpty()
    running = subprocess.Popen(
        command, shell=True, env=settings, stdin=there, stdout=there, stderr=there, start_new_session=True
    )
    os.close(there)
    said = b""
    try:
        for question, answer in answers:
            while question.encode() not in said:
                said += os.read(here, 4096)
            os.write(here, f"{answer}\n".encode())
        status = running.wait(PATIENCE)
        return status, (said + os.read(here, 4096)).decode()
    finally:
        running.kill()
        running.wait()
        os.close(here)


def test_a_user_logs_in_and_pushes_as_printed(addresses: tuple[str, str], home: Path) -> None:
    require("docker", "dockerd")
    caches, store = addresses
    docker = Docker(home)
    settings = environment(home, DOCKER_HOST=docker.host)

    def run(command: str) -> tuple[int, str]:
        done = subprocess.run(
            command, shell=True, env=settings, capture_output=True, text=True, timeout=PATIENCE
        )
        return done.returncode, done.stdout + done.stderr

    image = f"{caches}/docker.io/library/layers:1"
    try:
        for page in ("README.md", "docs/access.md"):
            block = r"^\$ (docker login (\S+))\n\$ (docker push \2(/\S+))$"
            ((login, host, push, name),) = re.findall(block, (ROOT / page).read_text(), re.MULTILINE)
            login, push = (each.replace(host, store) for each in (login, push))
            for command in (f"docker pull {image}", f"docker tag {image} {store}{name}"):
                status, said = run(command)
                assert status == 0, said
            assert run(push)[0] == 1
            for password, expected in (("wrong", 1), (PASSWORD, 0)):
                status, said = on_a_terminal(login, settings, ("Username", "alice"), ("Password", password))
                assert (status, "Login Succeeded" in said) == (expected, expected == 0), said
            for command in (push, f"docker logout {store}"):
                status, said = run(command)
                assert status == 0, said
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

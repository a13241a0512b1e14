"""Completion in a shell: what is offered, and the scripts in the shells themselves."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import get_completion_class
from click.testing import CliRunner

from proxy.cli import completion
from proxy.cli.completion import PROGRAM, SHELLS, VARIABLE, namespaces, place, references
from proxy.cli.main import main
from tests.test_cli_operations import Shop, served, shop
from tests.upstream import Upstream

__all__ = ["served", "shop"]  # fixtures


def offered(line: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What bash is offered for a line."""
    monkeypatch.setenv("COMP_LINE", line)
    kind = get_completion_class("bash")
    assert kind is not None
    lines = kind(main, {}, PROGRAM, VARIABLE).complete().splitlines()
    return [each.partition(",")[2] for each in lines]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("entrepot to", ["top"]),
        ("entrepot top --on", ["--once"]),
        ("entrepot completion ", list(SHELLS)),
        ("entrepot completion f", ["fish"]),
        ("entrepot setup pod", ["podman"]),
        ("entrepot user ad", ["add"]),
    ],
)
def test_commands_and_options(line: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert offered(line, monkeypatch) == expected


def test_all_commands_are_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(offered("entrepot ", monkeypatch)) == set(main.commands)


# References


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a machine is quick decides no test."""
    monkeypatch.setattr(completion, "QUICK", 60.0)


def asking(shop: Shop, server: str | None = None) -> click.Context:
    context = click.Context(main.commands["show"])
    context.params = {"path": shop.config, "server": server or str(shop.site.app.admin_url)}
    return context


ARGUMENT = click.Argument(["reference"])


async def found(shop: Shop, text: str, server: str | None = None) -> list[str]:
    # The program has a loop of its own.
    return await asyncio.to_thread(references, asking(shop, server), ARGUMENT, text)


async def test_references_that_the_server_stores(served: Shop, upstream: Upstream) -> None:
    for name, tag in (("library/alpine", "3.20"), ("library/busybox", "1"), ("team/app", "v1")):
        upstream.image(name, tag)
        assert (await served.site.get(f"/v2/{name}/manifests/{tag}"))[0] == 200
    full = "docker.io/library"
    assert await found(served, f"{full}/alpine:3") == [f"{full}/alpine:3", f"{full}/alpine:3.20"]
    assert await found(served, f"{full}/alpine:4") == []
    # One that fits alone is offered with its tags.
    assert await found(served, f"{full}/b") == [f"{full}/busybox:1"]
    assert await found(served, "docker.io/") == [
        f"{full}/alpine",
        f"{full}/busybox",
        "docker.io/team/app",
    ]
    assert served.asked()[-1] == "GET manifest team/app:v1"  # no upstream is asked for a completion
    for text in ("alpine*", "x@sha256:", "[", "\n"):
        assert await found(served, text) == []


async def test_no_reference_without_a_server(shop: Shop, unused_tcp_port: int) -> None:
    assert await found(shop, "docker.io/", f"http://127.0.0.1:{unused_tcp_port}") == []
    assert await found(shop, "docker.io/", "not an address") == []


async def test_no_reference_of_a_server_that_is_slow(served: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completion, "QUICK", 0.0)
    assert await found(served, "docker.io/") == []


async def test_a_configuration_that_is_wrong_offers_nothing(served: Shop) -> None:
    served.config.write_text("listen: [")
    assert await found(served, "docker.io/") == []
    assert namespaces(asking(served), ARGUMENT, "") == []


async def test_namespaces_of_the_configuration(served: Shop) -> None:
    assert namespaces(asking(served), ARGUMENT, "") == ["docker.io"]
    assert namespaces(asking(served), ARGUMENT, "d") == ["docker.io"]
    assert namespaces(asking(served), ARGUMENT, "q") == []


async def test_short_names_of_the_default_namespace(served: Shop) -> None:
    tree = served.config.read_text().rstrip().removesuffix("}")
    served.config.write_text(f'{tree}, "default_namespace": "docker.io"}}')
    assert await found(served, "alp") == ["alpine:3"]
    assert await found(served, "alpine:") == ["alpine:3"]


# The command


def test_installing_for_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")  # which the specification has ignored
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = {
        "bash": tmp_path / "data/bash-completion/completions/entrepot",
        "zsh": tmp_path / "data/zsh/site-functions/_entrepot",
        "fish": tmp_path / ".config/fish/completions/entrepot.fish",
    }
    for shell, path in expected.items():
        assert place(shell) == path
        printed = CliRunner().invoke(main, ["completion", shell])
        done = CliRunner().invoke(main, ["completion", shell, "--install"])
        assert (printed.exit_code, done.exit_code) == (0, 0)
        assert path.read_text() == printed.stdout
        assert done.stdout.startswith(f"{path}\nthen: ")
        assert VARIABLE in printed.stdout


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bash-completion").write_text("a file")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    done = CliRunner().invoke(main, ["completion", "bash", "--install"])
    assert done.exit_code == 1 and done.stdout == ""
    assert done.stderr == (
        f"entrepot: cannot write {tmp_path}/bash-completion/completions: Not a directory."
        " Print the completion instead: entrepot completion bash > FILE\n"
    )


# The shells


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PATH on which `entrepot` is this one."""
    program = tmp_path / "bin" / "entrepot"
    program.parent.mkdir()
    patient = "from proxy.cli import completion; completion.QUICK = 60"
    start = f"{patient}; from proxy.cli.main import main; main(prog_name='entrepot')"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{start}" "$@"\n')
    program.chmod(0o755)
    return f"{program.parent}:{os.environ['PATH']}"


def shell(name: str, text: str, path: str, *words: str) -> list[str]:
    if shutil.which(name) is None:
        if "ENTREPOT_REQUIRE_CLIENTS" in os.environ:
            pytest.fail(f"{name} is not installed")
        pytest.skip(f"{name} is not installed")
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [name, *words, "-c", text], capture_output=True, text=True, check=False, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout.split()


BASH = """
source <(entrepot completion bash)
COMP_LINE='{line}' COMP_POINT=${{#COMP_LINE}}
_entrepot_completion entrepot
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.clients
async def test_bash(served: Shop, path: str) -> None:
    options = f"--config {served.config} --server {served.site.app.admin_url}"

    async def replies(line: str) -> list[str]:
        return await asyncio.to_thread(shell, "bash", BASH.format(line=line), path, "--norc")

    assert await replies("entrepot completion z") == ["zsh"]
    # Readline replaces only what follows the last colon.
    assert await replies(f"entrepot show {options} docker.io/library/alpine:") == ["3"]
    assert await replies(f"entrepot show {options} docker.io/library/alp") == ["docker.io/library/alpine:3"]


@pytest.mark.clients
def test_zsh(path: str) -> None:
    text = 'autoload -U compinit; compinit -D; eval "$(entrepot completion zsh)"; print $_comps[entrepot]'
    assert shell("zsh", text, path, "-f") == ["_entrepot_completion"]


@pytest.mark.clients
def test_fish(path: str) -> None:
    text = "entrepot completion fish | source; complete -C 'entrepot completion z'"
    assert shell("fish", text, path, "--no-config") == ["zsh"]

"""docs/air-gap.md is walked, command by command.

All files and commands are those of the page.  Changed are only: the addresses of the registries, the
port, the directories below /var/lib, and where `setup --write` puts what is the machine's.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients import images
from tests.clients.processes import Process, environment, free_port, require
from tests.clients.site import DockerRegistry

PAGE = Path(__file__).parents[2] / "docs" / "air-gap.md"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# ([\w.-]+)\n")


class Walk:
    """The files and commands of the page, section by section."""

    def __init__(self, home: Path, changes: dict[str, str]) -> None:
        self._home = home
        self._changes = changes
        programs = home / "bin"
        programs.mkdir()
        program = programs / "entrepot"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m proxy "$@"\n')
        program.chmod(0o755)
        self._environment = environment(home)
        self._environment["PATH"] = f"{programs}:{os.environ['PATH']}"
        # A server in the background, and whose output is looked at.
        self.servers: list[Process] = []
        self.ran: list[str] = []
        sections = PAGE.read_text().split("\n## ")
        self._sections = {each.partition("\n")[0]: each for each in sections}

    def section(self, title: str) -> None:
        for kind, text in _BLOCK.findall(self._sections[title]):
            for old, new in self._changes.items():
                text = text.replace(old, new)
            if kind == "console":
                for line in text.splitlines():
                    assert line.startswith("$ "), f"{line!r} is no command"
                    self._run(line.removeprefix("$ "))
            else:
                found = _FILE.match(text)
                assert found, f"the file has no name: {text!r}"
                (self._home / found[1]).write_text(text)

    def _run(self, command: str) -> None:
        self.ran.append(command)
        if command.endswith(" &"):
            there = f"cd {self._home} && exec {command.removesuffix(' &')}"
            self.servers.append(Process(["sh", "-c", there], self._environment, ready="listening"))
            return
        if " setup " in command:
            command += f" --root {self._home}"
        done = subprocess.run(
            ["sh", "-c", command],
            cwd=self._home,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        if " setup " in command:  # of drop-ins skopeo 1.9 knows only the system's
            own = self._home / ".config" / "containers"
            own.mkdir(parents=True)
            made = self._home / "etc" / "containers" / "registries.conf.d" / "entrepot.conf"
            (own / "registries.conf").write_text(made.read_text())

    def index(self, directory: str) -> str:
        return (self._home / directory / "index.json").read_text()


@pytest.fixture
def registries(tmp_path: Path) -> Iterator[dict[str, DockerRegistry]]:
    require("docker-registry", "skopeo", root=False)
    found: dict[str, DockerRegistry] = {}
    try:
        for name in ("docker.io", "ghcr.io"):
            found[name] = DockerRegistry(tmp_path / name, tmp_path)
        yield found
    finally:
        for each in found.values():
            each.stop()


@pytest.fixture
def walk(home: Path, registries: dict[str, DockerRegistry]) -> Iterator[Walk]:
    walk = Walk(
        home,
        {
            "https://registry-1.docker.io": registries["docker.io"].url,
            "https://ghcr.io": registries["ghcr.io"].url,
            "127.0.0.1:5000": f"127.0.0.1:{free_port()}",
            "127.0.0.1:5001": f"127.0.0.1:{free_port()}",
            "/var/lib": str(home / "lib"),
        },
    )
    yield walk
    for each in walk.servers:
        each.stop()


def test_the_page_is_walked(walk: Walk, registries: dict[str, DockerRegistry]) -> None:
    first, second = images.index("first", "amd64", "arm64"), images.index("second", "amd64", "arm64")
    images.push(registries["docker.io"].url, "library/alpine", "3.20", first)
    images.push(registries["ghcr.io"].url, "shop/app", "2.0", images.image("app"))
    walk.section("List the images")
    walk.section("Outside")
    asked = {name: each.requests() for name, each in registries.items()}
    walk.section("Inside")
    assert {name: each.requests() for name, each in registries.items()} == asked
    assert first.amd64.digest in walk.index("alpine")
    images.push(registries["docker.io"].url, "library/alpine", "3.20", second)
    walk.section("Update the site")
    assert second.amd64.digest in walk.index("alpine-week-2")
    # What the page is about was done, and not passed by for its form.
    done = {words[1] for words in map(str.split, walk.ran) if words[0] == "entrepot"}
    assert done == {"warm", "ready", "export", "import", "serve", "setup"}
    assert len(walk.ran) == PAGE.read_text().count("\n$ ")

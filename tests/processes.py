"""The server as people run it: `entrepot serve`, a parent and its workers, and what they say."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests import ONE_AUTHORITY
from tests.upstream import Upstream

PATIENCE = 30.0  # seconds; only what never happens takes them

Event = dict[str, Any]


class Worker:
    """One of the processes that serve, with a connection that is kept: all requests over it go there."""

    def __init__(self, pid: int, url: str) -> None:
        self.pid = pid
        self.prefix = ""  # of the ids of its requests
        self._url = url
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=1, keepalive_timeout=3600, ssl=False),
            auto_decompress=False,
        )

    @asynccontextmanager
    async def ask(
        self, path: str, method: str = "GET", body: bytes = b"", **headers: str
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Fails where another worker answers.  Names in `headers` have _ for -."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self._session.request(
            method, self._url + path, data=body or None, headers=given
        ) as response:
            prefix = response.headers["X-Request-Id"].partition("-")[0]
            self.prefix = self.prefix or prefix
            assert prefix == self.prefix, "another worker has answered"
            yield response

    async def get(self, path: str, status: int = 200, **headers: str) -> bytes:
        async with self.ask(path, **headers) as response:
            assert response.status == status, await response.text()
            return await response.read()

    async def close(self) -> None:
        await self._session.close()


class Server:
    """`events` are all that it has logged so far, `noise` the lines of standard error that are no events."""

    def __init__(self, process: asyncio.subprocess.Process, directory: Path) -> None:
        self.directory = directory
        self.url = self.admin_url = ""
        self.events: list[Event] = []
        self.noise: list[str] = []
        self._process = process
        self._news = asyncio.Event()
        self._listening = asyncio.create_task(self._listen())
        self._workers: list[Worker] = []

    async def _listen(self) -> None:
        assert self._process.stderr is not None
        async for line in self._process.stderr:
            try:
                self.events.append(json.loads(line))
            except ValueError:
                self.noise.append(line.decode())
            self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def serving(self) -> None:
        """Wait for the banner."""
        assert self._process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            line = (await self._process.stdout.readline()).decode()
        found = re.search(r"listening on (\S+), admin on (\S+)", line)
        assert found, f"it says {line!r}, and: {self.noise}"
        self.url, self.admin_url = found.groups()

    async def heard(self, name: str, nth: int = 1, **keys: Any) -> Event:
        """The `nth` of all events of that name and with those keys, once it has come."""
        await self.until(lambda: len(self.said(name, **keys)) >= nth)
        return self.said(name, **keys)[nth - 1]

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until it holds, which an event may change."""
        async with asyncio.timeout(PATIENCE):
            while not condition():
                assert not self._listening.done(), f"it has ended: {self.noise}"
                await self._news.wait()

    def said(self, name: str, **keys: Any) -> list[Event]:
        return [each for each in self.events if each["event"] == name and keys.items() <= each.items()]

    def forget(self, name: str) -> None:
        """Those events so far."""
        self.events[:] = [each for each in self.events if each["event"] != name]

    # Its processes

    @property
    def pid(self) -> int:
        return self._process.pid

    def pids(self) -> list[int]:
        """Of the workers."""
        return self._children("worker")

    def keeper(self) -> int:
        """The pid of who keeps house."""
        (pid,) = self._children("keeper")
        return pid

    def _children(self, role: str) -> list[int]:
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [int(pid) for pid in children if not ended(pid) and _role(pid) == role]

    async def gone(self, *pids: int) -> None:
        """Wait for the end of these."""
        for pid in pids:
            try:
                file = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            ended = asyncio.Event()
            asyncio.get_running_loop().add_reader(file, ended.set)
            try:
                async with asyncio.timeout(PATIENCE):
                    await ended.wait()
            finally:
                asyncio.get_running_loop().remove_reader(file)
                os.close(file)

    async def worker(self, pid: int) -> Worker:
        """A connection to that very one."""
        worker = Worker(pid, self.url)
        self._workers.append(worker)
        with self.alone(pid):
            async with asyncio.timeout(PATIENCE):
                await worker.get("/v2/")
        return worker

    @contextmanager
    def alone(self, pid: int) -> Iterator[None]:
        """Inside, that worker accepts all connections: the others are stopped."""
        others = [each for each in self.pids() if each != pid]
        for other in others:
            with suppress(ProcessLookupError):  # it drained, and has ended meanwhile
                os.kill(other, signal.SIGSTOP)
        try:
            yield
        finally:
            for other in others:
                with suppress(ProcessLookupError):
                    os.kill(other, signal.SIGCONT)

    async def workers(self) -> list[Worker]:
        """A connection to each."""
        found = [await self.worker(pid) for pid in self.pids()]
        assert len({each.prefix for each in found}) == len(found)
        return found

    def send(self, number: signal.Signals) -> None:
        """To the parent alone."""
        self._process.send_signal(number)

    async def ended(self) -> int:
        """The parent's exit status, once the workers have ended too."""
        async with asyncio.timeout(PATIENCE):
            await self._listening  # they all hold the other end
            return await self._process.wait()

    async def hear_no_more(self) -> None:
        """Close the end of its standard error that is read."""
        self._process._transport.get_pipe_transport(2).close()  # type: ignore[attr-defined]
        await self._listening

    async def kill(self) -> None:
        """All processes at once."""
        with suppress(ProcessLookupError):  # it has ended meanwhile
            os.killpg(self.pid, signal.SIGKILL)
        await self.ended()

    async def stop(self) -> None:
        self.send(signal.SIGTERM)
        assert await self.ended() == 0

    async def clear(self) -> None:
        for worker in self._workers:
            await worker.close()
        if self._process.returncode is None:
            await self.kill()
        await self._process.communicate()
        await asyncio.sleep(0)  # its pipes are closed in the next turn of the loop

    # What it shows

    async def metric(self, name: str, **labels: str) -> float:
        """The sum of all its samples that have those labels."""
        async with aiohttp.ClientSession() as session, session.get(f"{self.admin_url}/metrics") as response:
            text = await response.text()
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def partial(self) -> list[Path]:
        return list((self.directory / "cache" / "partial").iterdir())

    def locks(self) -> list[Path]:
        return list((self.directory / "cache" / "locks").iterdir())


class Place:
    """A directory and a configuration; servers are started on it one after the other.

    `temporary` is where they keep their sockets: a short path, for a socket's holds 107 bytes.
    """

    def __init__(self, home: Path, temporary: Path, upstream: Upstream) -> None:
        self.home = home
        self.directory = home / "disk"
        self.temporary = temporary
        self.servers: list[Server] = []
        self.environment: dict[str, str] = {}  # besides the usual
        self.namespace: dict[str, Any] = {"upstream": {"url": upstream.url, "progress_timeout": "60s"}}
        self.tree: dict[str, Any] = {
            "listen": "127.0.0.1:0",
            "admin": "127.0.0.1:0",
            "workers": 2,
            "disk": {"path": str(self.directory)},
            "namespaces": {"docker.io": self.namespace},
        }

    def configure(self) -> Path:
        """Write `tree` to the file."""
        path = self.home / "entrepot.yml"
        path.write_text(yaml.safe_dump(self.tree))
        return path

    async def start(self, command: Sequence[str] = (), files: Sequence[int] = ()) -> Server:
        """Start a server, by a `command` that has its words appended and the descriptors `files`."""
        process = await asyncio.create_subprocess_exec(
            *(*command, sys.executable, "-m", "proxy", "serve", "--config", str(self.configure())),
            pass_fds=files,
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(self.home),
                "TMPDIR": str(self.temporary),
                **ONE_AUTHORITY,
                **self.environment,
            },
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=1 << 20,
            start_new_session=True,  # a process group of its own, so that all can be killed at once
        )
        server = Server(process, self.directory)
        self.servers.append(server)
        await server.serving()
        return server


@pytest.fixture
async def place(request: pytest.FixtureRequest, tmp_path: Path, upstream: Upstream) -> AsyncIterator[Place]:
    """Its servers may say no error but those that the test is marked with."""
    with tempfile.TemporaryDirectory(prefix="entrepot-") as temporary:
        place = Place(tmp_path, Path(temporary), upstream)
        yield place
        for server in place.servers:
            await server.clear()
    marker = request.node.get_closest_marker("errors")
    for server in place.servers:
        assert not server.noise, "".join(server.noise)
        errors = [each for each in server.events if each["level"] in ("error", "critical")]
        unexpected = [each for each in errors if each["event"] not in (marker.args if marker else ())]
        assert not unexpected, f"error events that the test did not ask for: {unexpected}"


def _role(pid: str) -> str:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/comm").read_text().strip().removeprefix("entrepot-")
    return ""


def ended(pid: str) -> bool:
    """A process that has ended is a child until its parent has asked for its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def memory(pid: int) -> int:
    """Bytes that a process uses."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors(pid: int) -> Counter[str]:
    """What a process holds open, but for what libraries keep open once it is used: databases, counters."""
    found: Counter[str] = Counter()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(entry.readlink())
        except FileNotFoundError:
            continue
        if not ("/records/" in target or "entrepot-run" in target):
            found[target.partition(":[")[0]] += 1
    return found


async def digest(response: aiohttp.ClientResponse, begun: bytes = b"") -> str:
    """Of the body, without having it in memory."""
    found = hashlib.sha256(begun)
    async for chunk in response.content.iter_chunked(1 << 20):
        found.update(chunk)
    return f"sha256:{found.hexdigest()}"

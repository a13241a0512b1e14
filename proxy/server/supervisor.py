"""The parent of the server's processes: workers, which serve clients, and one for the housekeeping.

The supervisor binds the listening sockets, and starts, watches and stops the processes.  It serves no
requests, so that only a bug of its own can end it.  The processes are forked from it: they start at once,
and share the memory of what it has imported, the sockets, the disk, the directory of the metrics, and a
SharedState, for the limits of the server.  Rules:

- A process that ends by itself is replaced: at once if it had run for `LIVED`, otherwise after a delay that
  doubles each time.
- While the server starts, the same is true of a process that a signal killed.  One that says why it cannot
  start, or ends with a status, ends the start; so does one that is killed again and again while none serves.
- On SIGHUP the configuration is read again.  If it is valid, new processes start with it, and the old ones
  drain as soon as the new ones serve.  If it is not, everything stays as it was.
- systemd hears when the server serves, reloads and stops.  Sockets that it has opened need not be bound.
- A process whose supervisor has ended drains and ends: their connection is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import structlog
from prometheus_client import multiprocess

from proxy.config.errors import ConfigError, StartError
from proxy.config.hosts import Address
from proxy.config.schema import Config
from proxy.server import notify
from proxy.server.fork import ForkedProcess, Parent, fork
from proxy.telemetry import tracers
from proxy.web.activation import PassedSockets
from proxy.web.sockets import Sockets, sockets_of
from proxy.web.tls import Certificates
from storage.concurrency import shielded
from storage.limits import RateLimit
from storage.shared import SharedState

log = structlog.get_logger()

LIVED = 60.0  # seconds that a process must have run to be replaced without a delay
WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds: the first and the longest delay of a replacement
TRIES = 3  # how often a process is started before the server starts without it, or not at all
GRACE = 10.0  # seconds beyond `drain` after which a process is killed
SOCKET_PATH = 107  # bytes, the longest path of a unix socket: unix(7)
_RUN = "entrepot-run-"


@dataclass(frozen=True)
class Assignment:
    """What a process is to do.

    sockets: the sockets that it serves
    run: the directory in which the processes of this server find each other
    shared: what all processes of this server know
    parent: the process reports "ready" or an error message to it
    """

    role: str
    config: Config
    sockets: Sockets
    run: Path
    shared: SharedState
    parent: Parent


class BoundAddresses(NamedTuple):
    """The addresses for clients, for administrators, and for clients of a single store, by its namespace."""

    listen: tuple[str, int]
    admin: tuple[str, int] | None
    stores: dict[str, tuple[str, int]]


class _Killed(StartError):
    """A signal ended a process before it served."""


@dataclass
class Generation:
    """The processes of one configuration, each with the task that runs and replaces it.

    `serving` is whether any of them has served.
    """

    config: Config
    serving: bool = False
    retired: asyncio.Event = field(default_factory=asyncio.Event)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)


class Supervisor:
    """Starts, watches, replaces and stops processes.

    reload: reads the configuration again
    work: what a process does; its result is the exit status
    passed: sockets that systemd has opened, which it need not bind
    """

    def __init__(
        self,
        config: Config,
        reload: Callable[[], Config],
        work: Callable[[Assignment], int],
        passed: PassedSockets | None = None,
    ) -> None:
        self._config = config
        self._reload = reload
        self._work = work
        self._passed = passed or PassedSockets()
        self._sockets: dict[tuple[str, Address], list[socket.socket]] = {}
        self._run, self._run_lock = _run_directory()
        self._shared = SharedState(forks=True)
        self._changes: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()
        self._reloading = asyncio.Lock()
        self._generation: Generation | None = None
        self._draining: Generation | None = None  # the one before it
        self._starting: dict[ForkedProcess, Config] = {}  # do not serve yet

    def addresses(self) -> BoundAddresses:
        """Where the server listens."""
        bound = self._bound(self._config)
        return BoundAddresses(
            _address(bound.listen),
            _address(bound.admin) if bound.admin else None,
            {name: _address(each) for name, each in bound.stores.items()},
        )

    async def start(self) -> None:
        """Start all processes, or none of them.  Raises StartError."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._on_hangup)
        try:
            async with self._reloading:  # a change waits until there is something to change
                self._prepare(self._config)
                self._generation = await self._launch(self._config)
        except BaseException:
            await self.stop()
            raise
        notify.ready()

    async def run(self) -> None:
        """Return at SIGTERM or SIGINT."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        await self._stopping.wait()

    async def stop(self) -> None:
        notify.stopping()
        for task in self._changes:
            task.cancel()
        await asyncio.gather(*self._changes, return_exceptions=True)
        generations = [each for each in (self._draining, self._generation) if each is not None]
        for generation in generations:
            generation.retired.set()  # first: no process may be started without sockets
        self._unbind()  # before draining: no client may connect that no process will serve
        self._passed.close()  # those that connect to these wait for the next server
        await asyncio.gather(*map(self._retire, generations))
        shutil.rmtree(self._run, ignore_errors=True)
        if self._run_lock >= 0:
            os.close(self._run_lock)
            self._run_lock = -1
        self._shared.close()

    # Configuration

    def _on_hangup(self) -> None:
        log.info("config.reloading")
        notify.reloading()
        task = asyncio.get_running_loop().create_task(self._change())
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)

    async def _change(self) -> None:
        async with self._reloading:
            try:
                config = self._reload()
                self._prepare(config)
                generation = await self._launch(config)
            except (ConfigError, StartError) as error:
                log.error("config.refused", error=str(error))
                self._unbind(self._config)
                notify.ready()  # with what it had
                return
            self._draining, self._generation, self._config = self._generation, generation, config
            self._unbind(config)
            self._change_bandwidths(self._draining.config if self._draining else config, config)
            log.info("config.reloaded", workers=config.processes())
            notify.ready()
            if self._draining is not None:
                # shielded: stop() may cancel this task, and then waits for the same processes.
                await shielded(self._retire(self._draining))
                self._draining = None

    def _change_bandwidths(self, old: Config, new: Config) -> None:
        """Those of transfers that go on.  A namespace that is new may have existed before, with another."""
        known = old.cached()
        for name, (_, upstream) in new.cached().items():
            rate = upstream.bandwidth
            before = known[name][1].bandwidth if name in known else rate
            if before != rate or name not in known:
                RateLimit(before, self._shared.upstreams, name).change(rate)

    def _prepare(self, config: Config) -> None:
        """Check and bind what can be checked and bound before a process starts.  Raises StartError."""
        if config.tls is not None:
            Certificates(config.tls).warn()
        self._bind(config)

    def _bind(self, config: Config) -> None:
        self._passed.check(config)
        for key, address in config.listeners().items():
            if (key, address) not in self._sockets:
                self._sockets[key, address] = self._passed.bind(address, key)

    def _bound(self, config: Config) -> Sockets:
        found = config.listeners().items()
        return sockets_of(config, {key: self._sockets[key, address] for key, address in found})

    def _unbind(self, config: Config | None = None) -> None:
        """Close all sockets except those of `config`."""
        for address in self._sockets.keys() - (config.listeners().items() if config else set()):
            for each in self._sockets.pop(address):
                each.close()

    # Processes

    async def _launch(self, config: Config) -> Generation:
        """Start all processes of `config`, and wait until they serve.  Raises StartError."""
        _share(config)
        generation = Generation(config)
        first: list[asyncio.Future[None]] = []
        for role in ["worker"] * config.processes() + ["keeper"]:
            serving = asyncio.get_running_loop().create_future()
            first.append(serving)
            generation.tasks.append(asyncio.create_task(self._supervise(generation, role, serving)))
        try:
            await asyncio.gather(*first)
        except BaseException:
            await self._retire(generation)
            raise
        return generation

    async def _supervise(self, generation: Generation, role: str, serving: asyncio.Future[None]) -> None:
        """Run one process of `role`, and replace it when it ends, until the generation is retired."""
        wait, pid, tries = 0.0, None, 0
        while not generation.retired.is_set():
            begun = time.monotonic()
            status: int | str
            try:
                process = await self._spawn(generation.config, role)
            except StartError as error:
                if generation.retired.is_set():
                    return
                status, pid, tries = str(error), None, tries + 1
                if not serving.done() and (not isinstance(error, _Killed) or tries == TRIES):
                    if not (isinstance(error, _Killed) and generation.serving):
                        serving.set_exception(error)
                        return
                    serving.set_result(None)  # the others serve without it
            else:
                if tries or pid is not None:
                    log.info(f"{role}.replaced", pid=process.pid)
                if not serving.done():
                    serving.set_result(None)
                pid, tries, generation.serving = process.pid, 0, True
                status = await self._watch(process, generation)
                if generation.retired.is_set():
                    return
            wait = 0.0 if time.monotonic() - begun > LIVED else min(LONGEST_WAIT, wait * 2 or WAIT)
            log.error(f"{role}.died", pid=pid, status=status, again_in=wait)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(generation.retired.wait(), wait)

    async def _spawn(self, config: Config, role: str) -> ForkedProcess:
        """Start a process, and wait until it serves.  Raises StartError."""
        bound = self._bound(config)
        sockets = Sockets(admin=bound.admin) if role == "keeper" else replace(bound, admin=[])

        def work(parent: Parent) -> int:
            return self._work(Assignment(role, config, sockets, self._run, self._shared, parent))

        keep = [each.fileno() for each in sockets] + [self._run_lock, *self._shared.descriptors()]
        try:
            process = fork(work, keep)
        except OSError as error:
            raise StartError(f"cannot start a {role}: {error.strerror}") from error
        self._starting[process] = config
        try:
            await asyncio.sleep(0)  # the others fork first: they share what this process then writes to
            message = await process.message()
        finally:
            del self._starting[process]
        if message == "ready":
            return process
        status = await self._end(process)
        if status < 0 and not message:
            raise _Killed(f"a {role} was killed by signal {-status} before it served")
        raise StartError(message or f"a {role} ended with status {status} before it served")

    async def _watch(self, process: ForkedProcess, generation: Generation) -> int:
        """Wait until it ends; stop it when its generation is retired.  Returns its exit status."""
        ended = asyncio.ensure_future(self._end(process))
        retired = asyncio.ensure_future(generation.retired.wait())
        await asyncio.wait((ended, retired), return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            process.send_signal(signal.SIGTERM)
            await asyncio.wait((ended,), timeout=generation.config.drain + GRACE)
            if not ended.done():
                log.error("worker.killed", pid=process.pid)
                process.send_signal(signal.SIGKILL)
        retired.cancel()
        status = await ended
        multiprocess.mark_process_dead(process.pid, str(self._run))  # type: ignore[no-untyped-call]
        return status

    async def _end(self, process: ForkedProcess) -> int:
        """Wait until it ends, and free what it held.  Returns its exit status."""
        status = await process.wait()
        self._shared.forget(process.pid)
        return status

    async def _retire(self, generation: Generation) -> None:
        generation.retired.set()
        for process, config in self._starting.items():
            if config is generation.config:
                process.send_signal(signal.SIGTERM)  # it may never serve; _watch() ends those that do
        await asyncio.gather(*generation.tasks, return_exceptions=True)


def _share(config: Config) -> None:
    """Import what all processes of `config` would import: they share its memory."""
    traced = [tracers.LIBRARY] if tracers.configured() else []
    for name in [*config.policy.libraries, *traced]:
        with contextlib.suppress(ImportError):  # the processes say that it is missing
            importlib.import_module(name)


def _address(sockets: list[socket.socket]) -> tuple[str, int]:
    host, port = sockets[0].getsockname()[:2]
    return host, port


def _run_directory() -> tuple[Path, int]:
    """Make a new directory, and lock it.  Also remove those that killed supervisors left behind.

    Raises StartError.

    The processes inherit the lock, so that it is free when the last of them has ended.
    """
    temporary = _temporary()
    for path in temporary.glob(f"{_RUN}*"):
        with contextlib.suppress(OSError):  # another user's, or in use
            os.close(_locked(path))
            shutil.rmtree(path, ignore_errors=True)
    try:
        path = Path(tempfile.mkdtemp(prefix=f".{_RUN}", dir=temporary))
        lock = _locked(path)
        # Only now: a supervisor that starts at the same time removes what has this name and no lock.
        return path.rename(path.with_name(path.name[1:])), lock
    except OSError as error:
        raise StartError(
            f"cannot create a directory for sockets in {temporary}: {error.strerror}: set TMPDIR to another"
        ) from error


def _temporary() -> Path:
    """The directory for temporary files; another one if its path is too long for unix sockets."""
    try:
        found = Path(tempfile.gettempdir())
    except OSError as error:
        raise StartError(f"{error.strerror}; set TMPDIR to a directory that can be written") from error
    for each in (found, Path("/tmp")):
        if len(os.fsencode(each)) <= SOCKET_PATH - len(f"/{_RUN}12345678/4194304.sock"):
            return each
    raise StartError(f"{found} is too long a path for unix sockets: set TMPDIR to a shorter one")


def _locked(directory: Path) -> int:
    file = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise
    return file

"""The processes of one server, each of which answers requests on a unix socket of its user.

    GET /state      ProcessReport
    POST /forget    {"repository": "<namespace>/<repository>"}
    POST /record
    GET /drill      DrillState
    POST /drill     DrillOrder
    DELETE /drill

ServerProcesses asks all of them.  A process that does not answer in time is left out.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import aiohttp
import msgspec
import structlog
from aiohttp import web

from proxy.cache.drill import DrillOrder, DrillState
from proxy.connections.failures import reason
from proxy.processes.rows import EndedFillRow
from proxy.processes.state import FillState, ForgetRequest, ProcessReport, ProcessState
from proxy.web.sockets import bind_unix
from proxy.web.tls_listener import PlainSite
from storage.errors import Unsupported

T = TypeVar("T")
log = structlog.get_logger()

TIMEOUT = 2.0  # seconds for the answer of another process
CLOSING = 1.0  # seconds for answers in progress when the socket is closed


async def serve_state(own: ProcessState, path: Path) -> Callable[[], Awaitable[None]]:
    """Serve the state of this process at a socket; the function that it returns ends that.

    Raises OSError, also if the path is too long for a socket, at about 100 bytes.
    """

    # No application: each worker would have its routes in memory.
    async def handle(request: web.BaseRequest) -> web.Response:
        match request.method, request.path:
            case "GET", "/state":
                return _in_json(own.state())
            case "GET", "/drill":
                return _in_json(own.drill.state())
            case "POST", "/forget":
                await own.forget((await decoded_body(request, ForgetRequest)).repository)
            case "POST", "/record":
                await own.record()
            case "POST", "/drill":
                own.drill.begin(await decoded_body(request, DrillOrder))
            case "DELETE", "/drill":
                own.drill.end()
            case _:
                return web.Response(status=404)
        return web.Response(status=204)

    return await serve_at(
        path, web.ServerRunner(web.Server(handle, access_log=None), shutdown_timeout=CLOSING)
    )


async def serve_at(path: Path, runner: web.BaseRunner) -> Callable[[], Awaitable[None]]:
    """Serve at a socket; the function that it returns ends that.

    Raises OSError, also if the path is too long for a socket, at about 100 bytes.
    """
    listening = bind_unix(path)
    inode = path.stat().st_ino
    await runner.setup()
    await PlainSite(runner, listening).start()

    async def close() -> None:
        await runner.cleanup()
        with suppress(FileNotFoundError):
            if path.stat().st_ino == inode:  # else another process has replaced it
                path.unlink()

    return close


def _in_json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")


async def decoded_body(request: web.BaseRequest, form: type[T]) -> T:
    try:
        return msgspec.json.decode(await request.read(), type=form)
    except msgspec.DecodeError as error:
        raise web.HTTPBadRequest(text=str(error)) from error


class ServerProcesses:
    """All processes of a server: this one, if it has a state, and those with a socket in `directory`."""

    def __init__(self, own: ProcessState | None, directory: Path | None) -> None:
        self._own = own
        self._directory = directory

    async def states(self) -> list[ProcessReport]:
        found = [self._own.state()] if self._own else []
        pids = {each.pid for each in found}
        for answer in await self._ask("GET", "/state"):
            with suppress(msgspec.DecodeError):  # of a process of another version
                state = msgspec.json.decode(answer, type=ProcessReport)
                if state.pid not in pids:  # our own socket may be in the directory
                    found.append(state)
        return found

    async def fills(self) -> list[FillState]:
        """One fill for each digest, the oldest first: that of the process that transfers it, with all
        followers.
        """
        return fills_of(await self.states())

    async def forget(self, repository: str) -> None:
        """See ProcessState.forget()."""
        if self._own:
            await self._own.forget(repository)
        await self._ask("POST", "/forget", msgspec.json.encode(ForgetRequest(repository)))

    async def record(self) -> None:
        """See ProcessState.record()."""
        if self._own:
            await self._own.record()
        await self._ask("POST", "/record")

    def reload(self) -> int:
        """Have their supervisor read the configuration again; returns its pid.  Raises Unsupported."""
        if self._directory is None:
            raise Unsupported("no server is running that can be reloaded")
        supervisor = os.getppid()
        os.kill(supervisor, signal.SIGHUP)
        return supervisor

    async def begin_drill(self, order: DrillOrder) -> None:
        if self._own:
            self._own.drill.begin(order)
        await self._ask("POST", "/drill", msgspec.json.encode(order))

    async def end_drill(self) -> None:
        if self._own:
            self._own.drill.end()
        await self._ask("DELETE", "/drill")

    async def drills(self) -> list[DrillState]:
        """What each process knows of the last drill, with no process twice."""
        found = {self._own.pid: self._own.drill.state()} if self._own else {}
        for path, answer in await self._ask_each("GET", "/drill"):
            with suppress(msgspec.DecodeError, ValueError):
                found.setdefault(int(path.stem), msgspec.json.decode(answer, type=DrillState))
        return list(found.values())

    async def _ask(self, method: str, path: str, body: bytes | None = None) -> list[bytes]:
        return [answer for _, answer in await self._ask_each(method, path, body)]

    async def _ask_each(self, method: str, path: str, body: bytes | None = None) -> list[tuple[Path, bytes]]:
        """The sockets of the processes that answered, and their answers."""
        sockets = sorted(self._directory.glob("*.sock")) if self._directory else []
        answers = await asyncio.gather(*(_answer(each, method, path, body) for each in sockets))
        return [(path, each) for path, each in zip(sockets, answers, strict=True) if each is not None]


async def _answer(path: Path, method: str, target: str, body: bytes | None) -> bytes | None:
    try:
        async with (
            aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(str(path)),
                timeout=aiohttp.ClientTimeout(total=TIMEOUT),
                raise_for_status=True,
            ) as session,
            session.request(method, f"http://live{target}", data=body) as response,
        ):
            return await response.read()
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        log.debug("live.unanswered", path=str(path), error=reason(error))
        return None


def fills_of(states: Iterable[ProcessReport]) -> list[FillState]:
    """See ServerProcesses.fills()."""
    found: dict[str, list[FillState]] = {}
    for state in states:
        for fill in state.fills:
            found.setdefault(fill.digest, []).append(fill)
    return sorted(map(_merged, found.values()), key=lambda each: (each.started, each.digest))


def ended_of(states: Iterable[ProcessReport]) -> list[EndedFillRow]:
    """The fills that ended last in any process, the latest first.

    What one process has fetched and others followed is one.
    """
    rows = sorted((row for state in states for row in reversed(state.ended)), key=lambda row: -row.ended)
    fetched = {(row.digest, row.repository) for row in rows if row.result == "committed"}
    return [row for row in rows if row.result != "followed" or (row.digest, row.repository) not in fetched]


def _merged(fills: list[FillState]) -> FillState:
    # A process that waits for a slot may have `own` too; the one with bytes transfers it.
    best = max(fills, key=lambda each: (each.own, each.bytes))
    return msgspec.structs.replace(
        best, followers=sum(each.followers for each in fills), size=max(each.size for each in fills)
    )

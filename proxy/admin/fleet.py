"""One view of a fleet: whichever replica an operator asks, it asks the others, and makes one answer of all.

- An operation is done here first, so that its own mistakes reach nobody else; then by all others at once.
- A replica that does not answer in time, or not as this version does, is named in a warning.  It changes
  nothing else about the answer.
- What another replica asks for is done here alone.
- Replicas compare the acts that they know (acts.py) when they start, and every EVERY seconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
import structlog

from proxy.admin.activity_reports import FillsNow
from proxy.admin.acts import ActControl, FleetAct, digest_of
from proxy.admin.answers import Answers, of_replica
from proxy.admin.combination import COMBINE, watched
from proxy.admin.fill_feed import FillFeed
from proxy.admin.notices import warn
from proxy.admin.operations import OPERATIONS, Operation, Operations, perform
from proxy.admin.sent import SentOperations
from proxy.namespaces.references import FieldInvalid
from proxy.processes.rows import ReplicaModel
from proxy.upstream.peers import Peers
from proxy.upstream.replicas import (
    EXCHANGE,
    STATE,
    UNKNOWN,
    FleetRequest,
    NotThere,
    RefusedRequest,
    ReplicaClient,
    Unanswered,
)
from storage.errors import ManifestUnknown, RegistryError, StorageFailed, Unavailable, Unsupported

log = structlog.get_logger()

EVERY = 30.0  # seconds between two comparisons of acts
READ, ACT = (
    5.0,
    60.0,
)  # seconds for the answer of another replica that looks, and of one that changes something
_ACTS = msgspec.json.Decoder(list[FleetAct])

WATCH = OPERATIONS["watch"]

State = Callable[[], Awaitable[object]]
Look = Callable[[], Awaitable[FillsNow]]
Administered = Callable[[str, str, Mapping[str, Any], int], None]


class Fleet(SentOperations):
    """The Operations of all replicas of a fleet.  `run` compares acts until it is cancelled.

    own: what this replica can do by itself
    acts: does the acts of which others tell
    sharing: whether replicas share the records of private registries
    state: gives a ReplicaState
    look: gives the fills of this replica
    administered: is called with each change that another replica asks for: its URL, the name of the
        operation, its arguments, and the status of the answer
    patience: seconds for the answers of others, if not the usual ones
    """

    def __init__(
        self,
        own: Operations,
        peers: Peers,
        client: ReplicaClient,
        acts: ActControl,
        *,
        sharing: bool,
        state: State,
        look: Look,
        administered: Administered = lambda sender, operation, arguments, status: None,
        patience: float | None = None,
    ) -> None:
        self._own = own
        self._peers = peers
        self._client = client
        self._acts = acts
        self._sharing = sharing
        self._state = state
        self._administered = administered
        self._patience = patience
        self._look = look
        self._feed = FillFeed(self._watched)

    async def send(self, operation: Operation, parameters: msgspec.Struct) -> Any:
        """The answer of all replicas.  Raises RegistryError, FieldInvalid."""
        arguments = msgspec.structs.asdict(parameters)
        if not operation.everywhere:
            return await self._named(await perform(self._own, operation, arguments))
        if operation.private and self._sharing:
            return await perform(self._own, operation, arguments)
        found: dict[str, Any] = {}
        here, act = await self._here(operation, arguments)
        if operation.anywhere and not isinstance(here, RegistryError):
            return here
        others = await self._others()
        own = self._peers.own or ""
        if not isinstance(here, RegistryError):
            found[own] = here
        request = FleetRequest(operation.name, dict(arguments), own)
        if act is not None:
            request = msgspec.structs.replace(request, subject=act.subject, at=act.at)
        answers = await self._ask(others, request, operation)
        found |= {url: each for url, each in answers.items() if not isinstance(each, Exception)}
        for each in answers.values():
            if isinstance(each, Unanswered):
                warn(str(each))
        if self._peers.own is None:
            warn("this replica does not know which of the peers it is: set peers.self")
        if not found:
            raise here
        without = [url for url, each in {own: here, **answers}.items() if _is_without(each)]
        return COMBINE[operation.name](Answers(found, arguments, without))

    async def _named(self, found: Any) -> Any:
        """What this replica has found, with its name if there are others, which may have another answer."""
        if isinstance(found, ReplicaModel) and self._peers.own is not None and await self._others():
            return of_replica(self._peers.own, found)
        return found

    def follow(self, operation: Operation, parameters: msgspec.Struct) -> AsyncIterator[Any]:
        """The fills of all replicas, once or at each change."""
        return self._feed.follow(**msgspec.structs.asdict(parameters))

    async def _watched(self) -> FillsNow:
        request, found = (
            FleetRequest(WATCH.name, {}, self._peers.own or ""),
            {self._peers.own or "": await self._look()},
        )
        answers = await self._ask(await self._others(), request, WATCH)
        found |= {url: each for url, each in answers.items() if isinstance(each, FillsNow)}
        return watched(Answers(found))

    async def _here(self, operation: Operation, arguments: Mapping[str, Any]) -> tuple[Any, FleetAct | None]:
        """The answer of this replica, a RegistryError if it has not what is asked for; and the act if any."""
        if operation.kept is not None and not arguments.get("dry_run"):
            act, result = await self._acts.begin(operation, arguments)
            return result, act
        try:
            return await perform(self._own, operation, arguments), None
        except RegistryError as error:
            if error.code not in UNKNOWN:
                raise
            return error, None

    async def _others(self) -> list[str]:
        """The URLs of the other replicas; none while it is unknown which of them is this one."""
        urls = await self._peers.known()
        return [] if self._peers.own is None else [url for url in urls if url != self._peers.own]

    async def _ask(self, urls: Sequence[str], request: FleetRequest, operation: Operation) -> dict[str, Any]:
        """The answers of the replicas by their URLs: results, NotThere or Unanswered."""
        read = partial(msgspec.json.decode, type=operation.result)
        patience = self._patience or (READ if operation.method == "GET" else ACT)
        asking = (self._client.ask(url, request, read, patience) for url in urls)
        answers = await asyncio.gather(*asking, return_exceptions=True)
        for each in answers:
            if isinstance(each, BaseException) and not isinstance(each, NotThere | Unanswered):
                raise each
        return dict(zip(urls, answers, strict=True))

    # Requests of other replicas

    async def answer(self, content: bytes) -> tuple[int, bytes]:
        """The status and the body of the answer to a FleetRequest."""
        request, status = FleetRequest(""), 200
        try:
            request = msgspec.json.decode(content, type=FleetRequest)
            body = msgspec.json.encode(await self._answer(request))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, FieldInvalid) as error:
            status, body = 400, _refusal(str(error), "FIELD_INVALID")
        except RegistryError as error:
            status, body = error.status, _refusal(str(error), error.code)
        except Exception as error:
            log.exception("fleet.failed", operation=request.operation, error=str(error))
            status, body = 500, _refusal("internal error: see its log", "UNKNOWN")
        operation = OPERATIONS.get(request.operation)
        if operation is not None and operation.method != "GET":
            self._administered(request.sender, operation.name, request.arguments, status)
        return status, body

    async def _answer(self, request: FleetRequest) -> object:
        if request.operation == EXCHANGE:
            known = await self._acts.known()
            return [] if digest_of(known) == request.arguments.get("digest") else known
        if request.operation == STATE:
            return await self._state()
        if request.operation == WATCH.name:
            return await self._look()
        operation = OPERATIONS.get(request.operation)
        if operation is None or not operation.everywhere:
            raise Unsupported(f"{request.operation[:50]} is no operation of a fleet in this version")
        if request.subject and operation.kept is not None:
            return await self._acts.follow(
                FleetAct(request.subject, request.at, operation.name, request.arguments)
            )
        arguments = msgspec.structs.asdict(msgspec.convert(request.arguments, operation.parameters))
        if operation.stored and (await self._own.why(arguments["reference"])).digest is None:
            raise ManifestUnknown(f"{arguments['reference']} is not stored here")
        return await perform(self._own, operation, arguments)

    # Acts

    async def run(self) -> None:
        while True:
            try:
                await self.exchange()
            except (StorageFailed, Unavailable):
                pass  # which is logged; the acts are done next time
            except Exception as error:
                log.exception("fleet.failed", operation=EXCHANGE, error=str(error))
            await asyncio.sleep(EVERY)

    async def exchange(self) -> None:
        """Do the acts that any other replica knows, and that are not known here.  Raises RegistryError."""
        if not (others := await self._others()):
            return
        known = await self._acts.known()
        request = FleetRequest(EXCHANGE, {"digest": digest_of(known)}, self._peers.own or "")
        asking = (self._client.ask(url, request, _ACTS.decode, self._patience or READ) for url in others)
        answers = await asyncio.gather(*asking, return_exceptions=True)
        acts: list[FleetAct] = []
        for each in answers:
            if isinstance(each, list):
                acts += each
            elif not isinstance(each, NotThere | Unanswered):
                raise each
        await self._acts.learn(acts)

    async def end_streams(self) -> None:
        """End what is watched, since the server stops."""
        await self._feed.close()

    async def close(self) -> None:
        await self._feed.close()
        await self._client.close()


def _is_without(answer: object) -> bool:
    return isinstance(answer, NotThere | RegistryError)


def _refusal(error: str, code: str) -> bytes:
    return msgspec.json.encode(RefusedRequest(error, code))
